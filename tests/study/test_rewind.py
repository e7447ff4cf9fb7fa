"""States of earlier times as sources: rewound epochs, runs of other studies; and every new phase stopped at every step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from robustlayers.core.errors import UserError
from robustlayers.core.files import read_json, read_tensors
from robustlayers.study import work
from robustlayers.study.definition import load_study
from robustlayers.study.plan import Plan, make_plan
from robustlayers.study.run import Outcome, run_plan
from robustlayers.study.semantics import build_model, data_of
from robustlayers.study.store import Store

STUDY = """\
question: Where does a state come from?
data: {name: "npz:DATA", validation: 0.2}
model: {name: small-cnn, width: 4, stem_stride: 2}
threat: {norm: linf, eps: 8/255}
attack: fgsm
training: {batch_size: 16, optimizer: {lr: 0.05}}
phases:
PHASES
seeds: [3]
evaluate: {attacks: [fgsm], monitor: {attack: fgsm, images: 16}}
"""
SEED = 3
FIRST = "name: first, epochs: 3, train: {all: natural}"
HEAD = "train: {head: natural, rest: frozen}"


@pytest.fixture
def plan(images: Path, tmp_path: Path) -> Callable[..., Plan]:
    """Plan the study with these phases, each one line."""

    def make(*phases: str, extra: str = "", overrides: tuple[str, ...] = ()) -> Plan:
        lines = "\n".join(f"  - {{{phase}}}" for phase in phases)
        file = tmp_path / "study.yaml"
        file.write_text(STUDY.replace("DATA", str(images)).replace("PHASES", lines) + extra)
        return make_plan(load_study(file, overrides))

    return make


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Outcome]:
    def go(made: Plan, folder: str = "out") -> Outcome:
        outcome = run_plan(made, tmp_path / folder, workers=1, threads=1)
        assert outcome.complete and not outcome.diverged, (outcome.failed, outcome.diverged)
        return outcome

    return go


def folders(made: Plan, root: Path, arm: int = 0) -> list[Path]:
    return [Store(root).phase(node, SEED) for node in made.arms[arm].nodes]


def state(folder: Path, name: str = "last") -> dict[str, Tensor]:
    return read_tensors(folder / f"{name}.safetensors")


def equal(one: dict[str, Tensor], two: dict[str, Tensor], part: str = "") -> bool:
    return all(torch.equal(one[name], two[name]) for name in one if part in name)


@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
def test_a_group_goes_back_to_an_epoch(
    plan: Callable[..., Plan], run: Callable[..., Outcome], tmp_path: Path, epoch: int
) -> None:
    """The frozen part of the second phase is that of a first phase which ended there; the state in between is kept."""
    made = plan(FIRST, f"name: second, epochs: 1, {HEAD}, start: {{rest: {{rewind: {epoch}}}}}")
    run(made)
    first, second = folders(made, tmp_path / "out")
    kept = [path.name for path in first.glob("epoch-*")]
    assert kept == ([f"epoch-{epoch}.safetensors"] if epoch in (1, 2) else [])
    if epoch:
        short = plan(f"name: first, epochs: {epoch}, train: {{all: natural}}")
        run(short, "short")
        source = state(folders(short, tmp_path / "short")[0])
    else:
        recipe = made.arms[0].recipe
        source = build_model(recipe.model, data_of(recipe.data)[0], SEED).state_dict()
    assert equal(state(second), source, "conv") and equal(state(second), source, "bn")
    assert equal(state(second), state(first), "conv") == (epoch == 3)
    assert not equal(state(second), source, "linear")


def test_epochs_are_counted_over_all_phases_and_a_change_is_one(
    plan: Callable[..., Plan], run: Callable[..., Outcome], tmp_path: Path
) -> None:
    phases = (
        FIRST,
        "name: skipped, epochs: 0, train: {all: natural}",
        "name: again, recalibrate: {}",
        "name: cut, steps: 6, train: {all: natural}",  # epochs 5 and 6, the second with 2 steps of 4
    )
    for epoch, phase in ((3, 0), (4, 1), (5, 2), (6, 2)):
        made = plan(*phases, f"name: back, set: {{all: {{rewind: {epoch}}}}}")
        run(made)
        found = folders(made, tmp_path / "out")
        kept = found[phase] / f"epoch-{epoch}.safetensors"
        assert kept.exists() == (epoch == 5)
        expected = read_tensors(kept) if epoch == 5 else state(found[phase])
        assert equal(state(found[3]), expected)
    with pytest.raises(UserError, match="rewind: 7 is after the 6 epoch"):
        plan(*phases, "name: back, set: {all: {rewind: 7}}")


def test_an_epoch_that_was_not_kept_is_trained_again_to_the_same_bits(
    plan: Callable[..., Plan], run: Callable[..., Outcome], tmp_path: Path
) -> None:
    before = plan(FIRST)
    run(before)
    (first,) = folders(before, tmp_path / "out")
    ended = state(first)
    after = plan(FIRST, "name: back, set: {all: {rewind: 2}}")
    assert after.arms[0].nodes[0] == before.arms[0].nodes[0]  # what is kept is no part of what was trained
    assert run(after).trained == 2
    assert equal(state(first), ended) and equal(
        read_tensors(first / "epoch-2.safetensors"), state(folders(after, tmp_path / "out")[1])
    )
    assert run(after).trained == 0 and run(before).trained == 0


def test_arms_that_share_a_phase_keep_the_epochs_of_all(
    plan: Callable[..., Plan], run: Callable[..., Outcome], tmp_path: Path
) -> None:
    two, zero = (f"{{phases.back.set: {{all: {{rewind: {epoch}}}}}}}" for epoch in (2, 0))
    factors = f"factors: {{to: {{one: {{}}, two: {two}, zero: {zero}}}}}\n"
    made = plan(FIRST, "name: back, set: {all: {rewind: 1}}", extra=factors)
    assert len(made.nodes) == 4 and made.nodes[made.arms[0].nodes[0]].kept == (1, 2)
    assert run(made).trained == 4
    ends = [state(folders(made, tmp_path / "out", arm)[1]) for arm in range(3)]
    assert not equal(ends[0], ends[1]) and not equal(ends[0], ends[2])


def test_after_an_early_stop_a_later_epoch_is_the_last_one(
    plan: Callable[..., Plan], run: Callable[..., Outcome], tmp_path: Path
) -> None:
    stop = "stop: {patience: 1, metric: clean, least: 1}"
    made = plan(
        f"name: first, epochs: 5, train: {{all: natural}}, {stop}",
        "name: one, set: {all: {rewind: 1}}",
        "name: late, set: {all: {rewind: 4}}",
    )
    run(made)
    first, one, late = folders(made, tmp_path / "out")
    assert len(read_json(first / "curve.json")["points"]) == 2
    assert equal(state(late), state(first)) and not equal(state(one), state(first))


# -- runs of other studies ---------------------------------------------------------------------------------------------

ARMS = "factors: {epochs: {few: {phases.tune.epochs: 1}, more: {}}}\n"


@pytest.fixture
def other(plan: Callable[..., Plan], run: Callable[..., Outcome], tmp_path: Path) -> Plan:
    """A finished study in `other`, with two arms of two phases."""
    made = plan(FIRST, f"name: tune, epochs: 2, {HEAD}", extra=ARMS)
    run(made, "other")
    return made


def test_a_run_of_another_study_is_a_source(
    plan: Callable[..., Plan], run: Callable[..., Outcome], other: Plan, tmp_path: Path
) -> None:
    for options, arm, phase, name in (
        ("arm: few", 0, 1, "last"),
        ("arm: more", 1, 1, "last"),
        ("arm: more, from: first, checkpoint: best", 1, 0, "best"),
    ):
        made = plan(f"name: start, set: {{all: {{run: {tmp_path}/other, {options}}}}}")
        run(made)
        expected = state(folders(other, tmp_path / "other", arm)[phase], name)
        assert equal(state(folders(made, tmp_path / "out")[0]), expected)
    mixed = plan(f"name: start, set: {{head: {{run: {tmp_path}/other, arm: few, mix: 0.5}}}}")
    run(mixed)
    recipe = mixed.arms[0].recipe
    initial = build_model(recipe.model, data_of(recipe.data)[0], SEED).state_dict()
    end, few = state(folders(mixed, tmp_path / "out")[0]), state(folders(other, tmp_path / "other", 0)[1])
    assert torch.allclose(end["linear.bias"], (initial["linear.bias"] + few["linear.bias"]) / 2)
    assert equal(end, initial, "conv")


def test_a_run_counts_by_what_it_is_not_by_its_folder(
    plan: Callable[..., Plan], run: Callable[..., Outcome], other: Plan, tmp_path: Path
) -> None:
    line = "name: start, set: {{all: {{run: {0}, arm: few}}}}"
    nodes = plan(line.format(tmp_path / "other")).arms[0].nodes
    (tmp_path / "other").rename(tmp_path / "moved")
    assert plan(line.format(tmp_path / "moved")).arms[0].nodes == nodes
    longer = plan("name: first, epochs: 1, train: {all: natural}", f"name: tune, epochs: 2, {HEAD}", extra=ARMS)
    run(longer, "other")
    assert plan(line.format(tmp_path / "other")).arms[0].nodes != nodes


def test_a_run_that_is_not_there_is_one_line(plan: Callable[..., Plan], other: Plan, tmp_path: Path) -> None:
    root = tmp_path / "other"

    def line(options: str, *overrides: str) -> str:
        with pytest.raises(UserError) as error:
            plan(f"name: start, set: {{all: {{{options}}}}}", overrides=overrides)
        (fault,) = error.value.faults
        found = str(fault)
        assert found.startswith(f"{tmp_path}/study.yaml:8: phases.0.set.all: "), found
        return found.split("set.all: ", 1)[1]

    assert line(f"run: {tmp_path}/nowhere") == f"{tmp_path}/nowhere: no study here: it has no plan.json"
    assert line(f"run: {root}") == f"{root}: has 2 arms; name one: few, more"
    assert line(f"run: {root}, arm: fev") == f"unknown arm of {root} 'fev'; nearest: few; allowed: few, more"
    assert "unknown phase of" in line(f"run: {root}, arm: few, from: frist") and "nearest: first" in line(
        f"run: {root}, arm: few, from: frist"
    )
    assert (
        line(f"run: {root}, arm: few", "seeds=[3, 4]")
        == f"{root}: has no whole result for seed 4; run that study first"
    )
    wider = line(f"run: {root}, arm: few", "model.width=5")
    assert wider.endswith("the model has [5, 1, 3, 3]") and "conv1.weight is [4, 1, 3, 3]" in wider
    last = folders(other, root)[1] / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-8])
    assert line(f"run: {root}, arm: few") == f"{root}: has no whole result for seed 3; run that study first"


# -- killed at every step ----------------------------------------------------------------------------------------------


class Stop(BaseException):
    """Stands for a kill."""


_save = work._save
_KILLED = {
    "averages, ascents, windows, slow groups": (
        "name: first, epochs: 2, train: {norm: adversarial, rest: natural}, windows: {norm: [0, 0.75]}, perturbation: ramp, "
        "ascent: {name: sam, warmup: 0.25}, average: {name: ema, decay: 0.5}, "
        "optimizer: {clip: 1, rates: rgn, rates_batches: 1, groups: {rest: {every: 3, drift: true}, norm: {scale: 0.5}}}",
        f"name: second, steps: 3, {HEAD}, start: {{rest: {{rewind: 1}}}}, optimizer: {{name: adam, lr: 1e-3}}",
    ),
    "changes": (
        "name: first, epochs: 1, train: {all: natural}",
        "name: again, recalibrate: {on: adversarial}",
        "name: noisy, recalibrate: {on: noise, momentum: 0.3}",
        "name: mixed, set: {norm: {from: first, mix: 0.5}, head: shuffle}",
    ),
    "an early stop and an average of epochs": (
        "name: first, epochs: 4, train: {all: natural}, average: {name: swa, start: 0.2}, "
        "stop: {patience: 1, metric: clean, least: 1}",
        f"name: second, epochs: 1, {HEAD}",
    ),
}


@pytest.mark.parametrize("case", _KILLED)
def test_a_phase_stopped_after_every_step_ends_with_the_same_bits(
    plan: Callable[..., Plan],
    run: Callable[..., Outcome],
    tmp_path: Path,
    contents: Callable[[Path], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    made = plan(*_KILLED[case])
    run(made, "whole")
    places: list[tuple[str, int]] = []

    def save_and_stop(item: Any, folder: Path, record: dict[str, Any]) -> None:
        _save(item, folder, record)
        places.append((folder.parent.name, item.place))
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(work, "_STRIDE", 1)
        patch.setattr(work, "_SAVE_SECONDS", -1.0)
        patch.setattr(work, "_save", save_and_stop)
        for _ in range(60):
            try:
                run_plan(made, tmp_path / "killed", workers=1, threads=1)
                break
            except Stop:
                continue
    assert len(places) == len(set(places)) >= 8  # after every step, and never twice at the same one
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    for one, two in zip(folders(made, tmp_path / "killed"), folders(made, tmp_path / "whole"), strict=True):
        assert read_json(one / "ledger.json") == read_json(two / "ledger.json")
        assert read_json(one / "curve.json") == read_json(two / "curve.json")


def test_a_state_of_the_middle_of_an_epoch_differs_from_its_end(
    plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the test before would show nothing: the saved weights differ from step to step."""
    made = plan(FIRST)
    seen: list[Tensor] = []

    def save_and_look(item: Any, folder: Path, record: dict[str, Any]) -> None:
        _save(item, folder, record)
        seen.append(read_tensors(folder / record["state"])["model/linear.weight"])

    monkeypatch.setattr(work, "_STRIDE", 1)
    monkeypatch.setattr(work, "_SAVE_SECONDS", -1.0)
    monkeypatch.setattr(work, "_save", save_and_look)
    assert run_plan(made, tmp_path / "out", workers=1, threads=1).complete
    assert len(seen) == 12 and all(not torch.equal(a, b) for a, b in pairwise(seen))


def test_epochs_are_kept_to_be_looked_at_and_change_no_identity(
    plan: Callable[..., Plan], run: Callable[..., Outcome], tmp_path: Path
) -> None:
    phase = "name: first, epochs: 5, train: {all: natural}"
    before = plan(phase)
    run(before)
    (first,) = folders(before, tmp_path / "out")
    ended = state(first)
    after = plan(f"{phase}, keep: 2")
    assert after.arms[0].nodes == before.arms[0].nodes and after.arms[0].run == before.arms[0].run
    assert after.nodes[after.arms[0].nodes[0]].kept == (2, 4)  # its last epoch is kept anyway
    assert run(after).trained == 1 and equal(state(first), ended)
    names = {path.stem for path in first.glob("epoch-*.safetensors")}
    assert names == {"epoch-2", "epoch-4"} and run(after).trained == 0


def test_a_phase_that_stopped_before_the_epochs_to_keep_is_not_trained_again(
    plan: Callable[..., Plan], run: Callable[..., Outcome]
) -> None:
    made = plan("name: first, epochs: 5, train: {all: natural}, keep: 1, stop: {patience: 1, metric: clean, least: 1}")
    assert run(made).trained == 1
    assert run(made).trained == 0


def test_only_training_keeps_epochs(plan: Callable[..., Plan]) -> None:
    with pytest.raises(UserError, match=r"phases\.1\.keep: does nothing in a phase with set"):
        plan("name: first, epochs: 1, train: {all: natural}", "name: back, set: {all: {rewind: 0}}, keep: 1")
