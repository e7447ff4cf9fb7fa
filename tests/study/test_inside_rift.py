"""RiFT on the nets of a study: what chooses and what measures are apart, and both ends of the line are known nets."""

from __future__ import annotations

import csv
import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robustlayers.analysis import WorstCase
from robustlayers.attacks import PGD, Gaussian, Linf
from robustlayers.cli.subject import Asked as Question
from robustlayers.cli.subject import subject_of
from robustlayers.core.errors import UserError
from robustlayers.core.files import file_digest, read_json, read_tensors, write_json
from robustlayers.data import Images, to_float
from robustlayers.evaluation import accuracy, interval
from robustlayers.selection import Inventory, resolve
from robustlayers.study import _inside_rift
from robustlayers.study._inside_rift import rift, rift_cost, rift_load
from robustlayers.study._looks import Look, encoded
from robustlayers.study._nets import Trained, images_of
from robustlayers.study.analyze import Asked, Job, plan_analyses, run_analyses
from robustlayers.study.analyzed import kept_analyses, rows_of_analysis
from robustlayers.study.collect import collect_rows
from robustlayers.study.definition import load_study
from robustlayers.study.plan import make_plan
from robustlayers.study.run import run_plan
from robustlayers.study.store import Store
from robustlayers.training import Diverged, snapshot

ASKED = Asked(what=["rift"], arms=["all"])


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Store:
    """A copy of the finished study."""
    shutil.copytree(finished, tmp_path / "out")
    return Store(tmp_path / "out")


@pytest.fixture(scope="module")
def seen(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Trained]:
    """The finished study with the fine-tuning of one arm."""
    place = tmp_path_factory.mktemp("rift") / "out"
    shutil.copytree(finished, place)
    (job,) = _do(Store(place))
    return Store(place), job.subject


def _do(store: Store, asked: Asked = ASKED, watch: Any = None) -> list[Job]:
    planned = plan_analyses(store, asked)
    run_analyses(store, planned.left, watch or (lambda job, share, what: None), device="cpu")
    return [*planned.left, *planned.done]


def _rows(store: Store, part: str) -> list[dict[str, str]]:
    return [row for row in csv.DictReader(io.StringIO(rows_of_analysis(store, "rift"))) if row["part"] == part]


def test_the_line_begins_at_the_net_and_is_measured_on_images_that_chose_nothing(seen: Any) -> None:
    store, net = seen
    model, held_out = net.build(), images_of(net.recipe)[2]
    order = torch.argsort(held_out.labels, stable=True)
    halves = {"selection": order[0::2].sort().values, "measurement": order[1::2].sort().values}
    rows = _rows(store, "line")
    assert len(rows) == 22 and {row["total"] for row in rows} == {"8"}
    for kind, places in halves.items():
        some = held_out.take(places)
        assert some.labels.bincount().tolist() == [2, 2, 2, 2]
        first = next(row for row in rows if row["on"] == kind and float(row["alpha"]) == 0)
        right = accuracy(model, some.images, some.labels)
        assert float(first["clean_accuracy"]) == right
        low, high = interval(round(8 * right), 8)
        assert (float(first["clean_low"]), float(first["clean_high"])) == (low, high)


def test_the_chosen_alpha_keeps_the_rule_on_the_images_that_chose_it(seen: Any) -> None:
    line = [row for row in _rows(seen[0], "line") if row["on"] == "selection"]
    base = float(line[0]["robust_accuracy"])
    allowed = [row for row in line if float(row["robust_accuracy"]) >= base - 0.001 - 1e-12]
    assert [row for row in line if row["allowed"] == "True"] == allowed
    (chosen,) = (row for row in line if row["chosen"] == "True")
    assert chosen in allowed
    assert float(chosen["clean_accuracy"]) == max(float(row["clean_accuracy"]) for row in allowed)


def test_the_least_critical_of_modules_parts_and_norm_layers_is_fine_tuned(seen: Any) -> None:
    store, net = seen
    modules, parts = (_rows(store, f"criticality, {kind}") for kind in ("modules", "groups"))
    kinds = {type(net.build().get_submodule(row["group"])) for row in modules}
    assert kinds == {nn.Conv2d, nn.BatchNorm2d, nn.Linear}
    assert parts[-1]["group"] == "all norm layers"
    least = min((row for row in [*modules, *parts] if float(row["rise"]) > 0), key=lambda row: float(row["rise"]))
    assert {row["group"] for row in _rows(store, "line")} == {least["group"]}


def test_scores_feed_a_selector(seen: Any) -> None:
    store, net = seen
    ((folder, _),) = kept_analyses(store, read_json(store.plan))
    model = net.build()
    picked = resolve(Inventory(model), f'bottom("{folder / "scores-modules.csv"}", count=1)')
    modules = _rows(store, "criticality, modules")
    least = min(modules, key=lambda row: float(row["rise"]))["group"]
    assert {name.rpartition(".")[0] for name in picked.parts} == {least}


def _weights(store: Store) -> Path:
    """Return the file of the fine-tuned net, as the result lists it."""
    ((folder, record),) = kept_analyses(store, read_json(store.plan))
    ((name, sha256),) = record["weights"].items()
    assert file_digest(folder / name) == sha256 == read_json(folder / "manifest.json")["files"][name]["sha256"]
    return folder / name


def test_the_weights_that_are_kept_are_the_net_that_was_measured(seen: Any) -> None:
    store, net = seen
    model = net.build()
    before = snapshot(model)
    model.load_state_dict(read_tensors(_weights(store)))  # strict: the whole net
    held_out = images_of(net.recipe)[2]
    some = held_out.take(torch.argsort(held_out.labels, stable=True)[1::2].sort().values)
    rows = [row for row in _rows(store, "line") if row["on"] == "measurement"]
    (chosen,) = (row for row in rows if row["chosen"] == "True")
    assert accuracy(model, some.images, some.labels) == float(chosen["clean_accuracy"])
    (group,) = {row["group"] for row in rows}
    moved = {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}
    assert bool(moved) == (float(chosen["alpha"]) > 0)
    assert moved < set(dict(model.named_parameters()))  # running statistics stay, and all but one group
    if group in dict(model.named_modules()):
        assert {name.rpartition(".")[0] for name in moved} <= {group}


def test_a_phase_starts_from_the_weights_and_evaluate_takes_them(
    seen: Any, write: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    file = _weights(seen[0])
    head = write().read_text().partition("  - {name: pretrain")[0]
    study = tmp_path / "after.yaml"
    study.write_text(
        f'{head}  - {{name: tuned, set: {{all: {{load: "{file}"}}}}}}\n'
        "seeds: 1\nevaluate: {attacks: [pgd-2], monitor: {attack: pgd-1, images: 16}}\n"
    )
    run_plan(make_plan(load_study(study)), tmp_path / "after", workers=1, threads=1)
    (last,) = (tmp_path / "after").glob("phases/*/seed-0/last.safetensors")
    kept, there = read_tensors(file), read_tensors(last)
    assert kept.keys() == there.keys() and all(torch.equal(kept[name], there[name]) for name in kept)
    options = {"width": 4, "stem_stride": 2}
    subject = subject_of(Question("small-cnn", weights=file, data=f"npz:{images}", options=options))
    (row,) = (r for r in collect_rows(Store(tmp_path / "after")) if (r.metric, r.checkpoint) == ("clean", "last"))
    assert accuracy(subject.model, subject.test.images, subject.test.labels) == row.value


def test_what_an_earlier_version_found_is_left_out(store: Store) -> None:
    (job,) = _do(store)
    rows = rows_of_analysis(store, "rift")
    older = job.folder.with_name("0" * 16)
    shutil.copytree(job.folder, older)
    record = read_json(older / "result.json")
    write_json(
        older / "result.json", {key: value for key, value in record.items() if key not in ("version", "weights")}
    )
    store.finish(older, kind="analysis", id=older.name)
    assert [folder for folder, _ in kept_analyses(store, read_json(store.plan))] == [job.folder]
    assert rows_of_analysis(store, "rift") == rows


def test_a_repeated_command_does_nothing_and_it_is_done_only_when_named(seen: Any) -> None:
    assert not plan_analyses(seen[0], ASKED).left
    planned = plan_analyses(seen[0], Asked(arms=["all"]))
    assert "rift" not in {job.analysis.name for job in [*planned.left, *planned.done]}


def test_a_kill_in_the_middle_changes_nothing_in_the_end(seen: Any, store: Store) -> None:
    class Killed(Exception):
        pass

    for place in ("fine-tuning", "alpha 0.5"):

        def kill(job: Job, share: float, what: str, place: str = place) -> None:
            if what == place:
                raise Killed

        with pytest.raises(Killed):
            _do(store, watch=kill)
        assert len(plan_analyses(store, ASKED).left) == 1
    shares: list[float] = []
    _do(store, watch=lambda job, share, what: shares.append(share))
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) > 10
    assert rows_of_analysis(store, "rift") == rows_of_analysis(seen[0], "rift")


def test_a_selector_says_what_is_ranked(store: Store) -> None:
    _do(store, Asked(what=["rift"], arms=["all"], select="conv"))
    assert {row["group"] for row in _rows(store, "line")} <= {
        row["group"] for row in _rows(store, "criticality, modules")
    }
    assert not _rows(store, "criticality, groups")
    with pytest.raises(UserError, match="--what: rift: the net of arm all has no weights to fine-tune"):
        plan_analyses(store, Asked(what=["rift"], arms=["all"], select="norm.statistics"))


class _Branched(nn.Module):
    """A net with a layer that its forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.head = nn.Conv2d(1, 3, 3), nn.Conv2d(1, 3, 3), nn.Linear(3 * 36, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.used(x)).flatten(1))


@pytest.fixture
def branched() -> Callable[[], Look]:
    def make() -> Look:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = _Branched()
        draw = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (60, 1, 8, 8), generator=draw, dtype=torch.uint8)
        labels = torch.arange(60) % 3
        eps = Linf("4/255")
        train, held_out = Images(pixels[:40], labels[:40]), Images(pixels[40:], labels[40:])
        return Look("a", net, held_out, train, PGD(eps, steps=1), Gaussian(eps), 0)

    return make


def test_weights_that_the_forward_does_not_use_are_no_choice(branched: Callable[[], Look]) -> None:
    one = branched()
    before, modes = snapshot(one.model), [module.training for module in one.model.modules()]
    assert set(rift_cost(one)) == {"modules", "fine-tuning", "line"}
    found = rift(one)
    ranked = rift_load(encoded(found.payload), {})
    assert isinstance(ranked["modules"], WorstCase) and ranked["modules"].least.group == "unused"
    assert ranked["line"].group != "unused"
    assert ranked["line"].rows() == [
        {key: row[key] for key in ranked["line"].rows()[0]} for row in found.rows if row["part"] == "line"
    ]
    after = snapshot(one.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [module.training for module in one.model.modules()] == modes


def test_the_weights_that_are_found_are_those_at_the_chosen_alpha(
    branched: Callable[[], Look], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["robustlayers.analysis.rift"]
    monkeypatch.setattr(module, "choose", lambda points: points[-1])
    look = branched()
    found = rift(look)
    before, after = found.payload["measured"][0], found.payload["measured"][-1]
    look.model.load_state_dict(found.weights["tuned"])
    some = look.held_out.take(torch.argsort(look.y, stable=True)[1::2].sort().values)
    logits = look.model.eval()(to_float(some.images)).double()
    loss = nn.functional.cross_entropy(logits, some.labels).item()
    assert loss == pytest.approx(after["clean_loss"], rel=1e-9)
    assert before["clean_loss"] != pytest.approx(after["clean_loss"], rel=1e-7)


def test_a_fine_tuning_that_diverges_is_one_line(branched: Callable[[], Look], monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*arguments: Any, **options: Any) -> None:
        raise Diverged("loss is nan")

    monkeypatch.setattr(_inside_rift.analysis, "rift", diverge)
    with pytest.raises(UserError, match=r"the fine-tuning of \w+ diverged: loss is nan"):
        rift(branched())
