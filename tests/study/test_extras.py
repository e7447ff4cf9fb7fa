"""What a study measures beside plain attacks: corruptions, AutoAttack in shards, flags, accuracy against eps and steps."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from robustlayers.attacks import Linf
from robustlayers.core.errors import UserError
from robustlayers.core.files import read_json, read_tensors
from robustlayers.evaluation import CORRUPTIONS, autoattack, corruption_accuracy, sanity
from robustlayers.evaluation.autoattack import standard
from robustlayers.report import write
from robustlayers.study import measure
from robustlayers.study.collect import _flags, collect, collect_rows
from robustlayers.study.definition import load_study
from robustlayers.study.extras import families_of
from robustlayers.study.plan import make_plan
from robustlayers.study.run import plan_size, run_plan
from robustlayers.study.schema import CorruptionsConfig
from robustlayers.study.semantics import build_model, build_threat, data_of, measured_attacks
from robustlayers.study.store import Store
from robustlayers.study.summary import Row

STUDY = """\
question: Measured how?
data: {name: fashion-mnist-mini, validation: 0.1, train_images: 300, test_images: 40}
model: {name: small-cnn, width: 4}
threat: {norm: linf, eps: 4/255}
attack: pgd-1
phases:
  - {name: train, epochs: 1, train: {all: natural}, batch_size: 32}
seeds: 1
evaluate: {attacks: [ATTACKS], checkpoints: [last], monitor: {attack: fgsm, images: 30}MORE}
"""
SHORT = "{name: autoattack, steps: 5, targets: 2, queries: 20}"

Runs = Callable[..., dict[str, Row]]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    def run(attacks: str = "pgd-2", more: str = "", name: str = "one", eps: str = "4/255") -> dict[str, Row]:
        text = STUDY.replace("ATTACKS", attacks).replace("MORE", more).replace("4/255", eps)
        (tmp_path / f"{name}.yaml").write_text(text)
        outcome = run_plan(make_plan(load_study(tmp_path / f"{name}.yaml")), tmp_path / name, workers=1, threads=1)
        assert outcome.complete, outcome.failed
        return {row.metric: row for row in collect_rows(Store(tmp_path / name))}

    return run


def _trained(folder: Path) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The net that a study has trained, and its test images."""
    recipe = load_study(folder.with_suffix(".yaml")).arms[0].recipe
    dataset, _, _, test = data_of(recipe.data)
    model = build_model(recipe.model, dataset, 0)
    model.load_state_dict(read_tensors(next(folder.glob("phases/*/seed-0/last.safetensors"))))
    return model, test.images, test.labels


def test_corruptions_are_those_of_the_evaluation_and_stand_in_the_report(runs: Runs, tmp_path: Path) -> None:
    rows = runs(more=", corruptions: {families: [noise, spatter], severities: [5, 2], images: 30}")
    model, x, y = _trained(tmp_path / "one")
    families = ["gaussian-noise", "shot-noise", "impulse-noise", "spatter"]
    table = corruption_accuracy(model, x[:30], y[:30], families, (2, 5))
    found = {metric: row for metric, row in rows.items() if metric.startswith("corrupted")}
    assert set(found) == {
        "corrupted",
        *(f"corrupted:{family}" for family in families),
        *(f"corrupted:{family}:{severity}" for family in families for severity in (2, 5)),
    }
    for family in families:
        for severity in (2, 5):
            row = found[f"corrupted:{family}:{severity}"]
            assert (row.value, row.total, row.split) == (table.accuracy(family, severity), 30, "test")
            assert row.count == row.value * 30
        assert found[f"corrupted:{family}"].value == pytest.approx(table.means[family])
    assert found["corrupted"].value == pytest.approx(sum(table.means[family] for family in families[:3]) / 3)
    page = write(collect(Store(tmp_path / "one")), tmp_path / "report")
    for text in (page.read_text(), page.with_suffix(".md").read_text()):
        assert "Beside attacks" in text and "spatter" in text and "calibration error" in text
        assert f"{100 * found['corrupted:spatter'].value:.1f}" in text


def test_autoattack_has_its_name_only_on_the_whole_set_and_the_verdicts_are_its_own(runs: Runs, tmp_path: Path) -> None:
    rows = runs(f"pgd-2, {SHORT}")
    (name,) = (metric for metric in rows if re.fullmatch(r"apgd-ce-5-apgd-t-5-2-targets[a-z0-9-]*-square-20", metric))
    assert "autoattack" not in {metric.lower() for metric in rows}
    model, x, y = _trained(tmp_path / "one")
    recipe = load_study(tmp_path / "one.yaml").arms[0].recipe
    outcome = autoattack(model, x, y, threat=build_threat(recipe.threat), steps=5, targets=2, queries=20)
    assert rows[name].count == int(outcome.robust.sum())
    assert rows[name].attack.startswith(outcome.label) and "n=40" in rows[name].attack
    for turn in outcome.table:
        assert rows[f"{name}:{turn.attack}"].count == turn.robust
    assert (rows["robust"].count or 0) <= min(rows[name].count or 0, rows["pgd-2"].count or 0)
    result = next((tmp_path / "one" / "results").glob("*/seed-0"))
    assert not (result / ".shards").exists()  # what a kill would have lost is of no use any more
    summary = collect(Store(tmp_path / "one"))
    assert name in summary.attacks and name in write(summary, tmp_path / "report").read_text()


def test_only_autoattack_is_enough_for_a_study_and_its_pictures(runs: Runs, tmp_path: Path) -> None:
    rows = runs(SHORT)
    assert any("square-20" in metric for metric in rows)
    pictures = read_tensors(next((tmp_path / "one" / "results").glob("*/seed-0/pictures.safetensors")))
    change = (pictures["adversarial"] - pictures["natural"]).abs()
    assert float(change.max()) <= 4 / 255 + 1e-6


def test_a_study_killed_within_autoattack_goes_on_from_its_shards_to_the_same_rows(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = runs(f"pgd-2, {SHORT}", name="whole")
    cascade = measure.cascade

    def stopped(*arguments, progress, **options):
        def tell(moment):
            progress(moment)
            if moment.attack.startswith("apgd-t") and moment.done:
                raise KeyboardInterrupt

        return cascade(*arguments, progress=tell, **options)

    monkeypatch.setattr(measure, "cascade", stopped)
    with pytest.raises(KeyboardInterrupt):
        runs(f"pgd-2, {SHORT}", name="one")
    monkeypatch.undo()
    kept = sorted((tmp_path / "one" / "results").glob("*/seed-0/.shards/*/*/0*/*.safetensors"))
    assert [path.parent.name[:2] for path in kept] == ["00", "01"]
    said = []

    def heard(*arguments, progress, **options):
        return cascade(*arguments, progress=lambda moment: said.append((moment.attack, moment.done)), **options)

    monkeypatch.setattr(measure, "cascade", heard)
    rows = runs(f"pgd-2, {SHORT}", name="one")
    assert {m: (r.value, r.attack) for m, r in rows.items()} == {m: (r.value, r.attack) for m, r in undisturbed.items()}
    first = dict(reversed(said))  # how much was done when each attack began
    assert first["apgd-ce-5"] > 0 and first["square-20"] == 0


def test_sanity_draws_accuracy_against_eps_and_steps(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*arguments, **options):
        return sanity(*arguments, steps=10, queries=20, **options)

    monkeypatch.setattr(measure, "sanity", short)
    rows = runs(more=", sanity: true")
    model, x, y = _trained(tmp_path / "one")
    recipe = load_study(tmp_path / "one.yaml").arms[0].recipe
    found = sanity(model, x, y, build_threat(recipe.threat), steps=10, queries=20)
    assert found.by_eps is not None and found.by_steps is not None
    by_eps = [row.count for metric, row in rows.items() if metric.startswith("sanity:eps=")]
    by_steps = [row.count for metric, row in rows.items() if metric.startswith("sanity:steps=")]
    assert (by_eps, by_steps) == (list(found.by_eps.counts), list(found.by_steps.counts))
    assert rows["sanity:eps=4/255"].count == rows["sanity:pgd-10"].count
    assert rows["sanity:clean"].attack == "" and rows["sanity:fgsm"].attack == "fgsm, linf 4/255"


def test_an_attack_that_goes_beyond_autoattack_and_a_black_box_that_beats_gradients_are_told(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """PGD breaks everything by decree, the gradient attacks of AutoAttack nothing."""
    crafted = measure.worst_case

    def decree(forward, x, y, attacks, *arguments, **options):
        verdicts = crafted(forward, x, y, attacks, *arguments, **options)
        return {**verdicts, "pgd-2": verdicts["clean"], "square-20": torch.zeros_like(verdicts["clean"])}

    monkeypatch.setattr(measure, "worst_case", decree)
    rows = runs(f"pgd-2, square-20, {SHORT}", eps="0.1/255")
    raised = [flag.partition(":")[0] for flag in rows["clean"].flags.split("; ")]
    assert "beyond the final attack" in raised and "black box" in raised
    notes = collect(Store(tmp_path / "one")).notes
    assert any("breaks more images than the one whose number is reported" in note for note in notes)
    assert any("so the gradient is masked" in note for note in notes)


def test_a_run_that_collapsed_is_told_where_it_trained_for_robustness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = STUDY.replace("ATTACKS", "fgsm").replace("MORE", "").replace("epochs: 1", "epochs: 2")
    points = iter([(0.6, 0.4), (0.7, 0.0)] * 2)

    def monitor(self, model):
        clean, robust = next(points)
        return {
            f"{part}_{kind}": v
            for part in ("train", "validation")
            for kind, v in (("clean", clean), ("robust", robust))
        }

    monkeypatch.setattr("robustlayers.study.work._Monitor.__call__", monitor)
    for name, signal, expected in (("robust", "adversarial", True), ("plain", "natural", False)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("all: natural", f"all: {signal}"))
        outcome = run_plan(make_plan(load_study(tmp_path / f"{name}.yaml")), tmp_path / name, workers=1, threads=1)
        assert outcome.complete
        flags = next(row.flags for row in collect_rows(Store(tmp_path / name)) if row.metric == "clean")
        assert ("collapse: robust accuracy fell from 40.0 % after epoch 1 to 0.0 % after epoch 2" in flags) == expected


def test_a_flag_that_many_nets_raise_is_one_note(summary_row: Callable[..., Row]) -> None:
    rows = [
        summary_row(run=run, seed=seed, flags=f"single step: {seed} of 100 images; black box: same for all")
        for run in ("a", "b")
        for seed in (3, 4)
    ]
    black, single = _flags([*rows, summary_row(run="c", seed=0, flags="odd: of an earlier version")])[0::2]
    assert black.startswith("Flag raised: black box: same for all. A search without gradients")
    assert single.startswith(
        "Flag raised: single step: 3 of 100 images (one of 4 nets that raise it). Accuracy under one"
    )


@pytest.fixture
def summary_row() -> Callable[..., Row]:
    return partial(Row, study="s", arm="a", levels={}, checkpoint="best", metric="clean", value=0.5)


def _run(tmp_path: Path, more: str = "", attacks: str = "pgd-2", images: str = "40") -> tuple[str, str, float]:
    text = STUDY.replace("ATTACKS", attacks).replace("MORE", more).replace("test_images: 40", f"test_images: {images}")
    (tmp_path / "s.yaml").write_text(text)
    plan = make_plan(load_study(tmp_path / "s.yaml"))
    return next(iter(plan.nodes)), plan.arms[0].run, plan_size(plan)


def test_an_option_counts_in_a_run_only_where_it_is_used_and_never_in_a_phase(tmp_path: Path) -> None:
    node, run, size = _run(tmp_path)
    for idle in ("", ", corruptions: none", ", corruptions: []", ", sanity: false", ", corruptions: {families: none}"):
        assert _run(tmp_path, idle) == (node, run, size)
    used = [
        _run(tmp_path, more)
        for more in (
            ", corruptions: all",
            ", corruptions: noise",
            ", corruptions: fog",
            ", corruptions: {families: fog, severities: [1]}",
            ", corruptions: {families: fog, images: 20}",
            ", sanity: true",
        )
    ]
    used += [_run(tmp_path, attacks=attacks) for attacks in ("autoattack", SHORT, SHORT.replace("20", "30"))]
    assert {one[0] for one in used} == {node}
    assert len({run, *(one[1] for one in used)}) == len(used) + 1
    assert all(one[2] > size for one in used)
    # The same families by their names and by their group; order is no content.
    named = _run(tmp_path, ", corruptions: [impulse-noise, shot-noise, gaussian-noise]")
    assert named[1] == _run(tmp_path, ", corruptions: {families: noise, severities: [5, 4, 3, 2, 1]}")[1]


def test_the_name_autoattack_is_for_the_standard_on_every_test_image(tmp_path: Path) -> None:
    def name(attack: str, images: str) -> str:
        _run(tmp_path, attacks=attack, images=images)
        return next(iter(measured_attacks(load_study(tmp_path / "s.yaml").arms[0].recipe)))

    complete = len(standard(Linf("4/255"))[0]) == 4  # all four attacks are installed
    assert (name("autoattack", "2000") == name("autoattack", "null") == "autoattack") == complete
    partial = name("autoattack", "500")
    assert partial != "autoattack" and partial.startswith("apgd-ce-t-") and partial.endswith("-square")
    assert name("{name: autoattack, steps: 99}", "null").startswith("apgd-ce-99-apgd-t-99-")
    claim = 'claims: [{say: a, that: "autoattack > 0.1"}]\n'
    (tmp_path / "s.yaml").write_text((tmp_path / "s.yaml").read_text() + claim)
    with pytest.raises(
        UserError, match="'autoattack' is not measured; the name is for the standard on all test images"
    ):
        load_study(tmp_path / "s.yaml")


def test_names_of_families_and_groups(tmp_path: Path) -> None:
    def found(*names: str, channels: int = 3) -> tuple[str, ...]:
        return families_of(CorruptionsConfig(families=list(names)), channels)

    assert found() == ()
    assert found("all") == tuple(CORRUPTIONS) == found("extra", "digital", "noise", "blur", "weather")
    assert set(CORRUPTIONS) - set(found("all", channels=1)) == {"saturate"}
    assert found("extra", channels=1) == ("speckle-noise", "gaussian-blur", "spatter")
    assert found("fog", "noise")[-1] == "fog" and len(found("fog", "noise", "shot-noise")) == 4
    for names, words in ((("fogg",), "nearest: fog"), (("noize",), "nearest: noise")):
        with pytest.raises(UserError, match=words):
            found(*names)


@pytest.mark.parametrize(
    ("more", "attacks", "line"),
    [
        (", corruptions: fogg", "pgd-2", "evaluate.corruptions: unknown corruption 'fogg'; nearest: fog; "),
        (", corruptions: [fog, fog]", "pgd-2", "evaluate.corruptions: one of the families stands there twice"),
        (
            ", corruptions: saturate",
            "pgd-2",
            "evaluate.corruptions: saturate: not for images with 1 channel(s); allowed: 3",
        ),
        (", corruptions: {severities: [1]}", "pgd-2", "key 'families' is missing"),
        (
            ", corruptions: {families: all, severities: [6]}",
            "pgd-2",
            "evaluate.corruptions.severities.0: 6 is not allowed",
        ),
        (", corruptions: {families: all, imges: 9}", "pgd-2", "unknown key 'imges'; nearest: images"),
        (", corruptions: true", "pgd-2", "evaluate.corruptions: true is not allowed; allowed: a mapping"),
        (", sanity: 1", "pgd-2", "evaluate.sanity: 1 is not allowed; allowed: true or false"),
        ("", "autoatack", "evaluate.attacks.0: unknown attack 'autoatack'"),
        ("", "autoatack", "nearest: autoattack"),
        ("", "autoattack, autoattack", "evaluate.attacks.1: autoattack stands there twice"),
        ("", "{name: autoattack, step: 5}", "unknown option of autoattack 'step'; nearest: steps"),
        ("", "{name: autoattack, steps: 0}", "evaluate.attacks.0.steps: 0 is not allowed"),
        (", branches: true", "autoattack", "evaluate.branches: autoattack does not craft on single branches"),
    ],
)
def test_mistakes_are_one_line_at_their_place(tmp_path: Path, more: str, attacks: str, line: str) -> None:
    (tmp_path / "s.yaml").write_text(STUDY.replace("ATTACKS", attacks).replace("MORE", more))
    with pytest.raises(UserError) as caught:
        load_study(tmp_path / "s.yaml")
    assert line in str(caught.value), str(caught.value)
    assert f"{tmp_path / 's.yaml'}:" in str(caught.value)


def test_all_arms_are_measured_alike(tmp_path: Path) -> None:
    text = STUDY.replace("ATTACKS", "pgd-2").replace("MORE", "")
    (tmp_path / "s.yaml").write_text(text + "factors: {f: {a: {}, b: {evaluate.sanity: true}}}\n")
    with pytest.raises(UserError, match=r"no factor can change evaluate\.sanity"):
        load_study(tmp_path / "s.yaml")


def test_the_plan_is_plain_data(runs: Runs, tmp_path: Path) -> None:
    runs(f"pgd-2, {SHORT}", ", corruptions: {families: fog, severities: [1]}")
    plan = read_json(tmp_path / "one" / "plan.json")
    assert plan["attacks"][0] == "pgd-2" and "; then " in plan["attack_texts"][plan["attacks"][1]]
