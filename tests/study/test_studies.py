"""The studies that come with the package: each loads, is as short as promised, and shares the phases that it says it shares."""

from __future__ import annotations

import itertools
from functools import lru_cache
from pathlib import Path

import pytest

from robustlayers.study.definition import load_study
from robustlayers.study.plan import PhaseNode, Plan, make_plan
from robustlayers.study.run import run_plan

FOLDER = Path(__file__).parents[2] / "studies"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
SUBSETS = ["".join(map(str, chosen)) for count in range(1, 5) for chosen in itertools.combinations(range(1, 5), count)]
PROMISED = 40  # lines
SHORT = ("awp-blocks.yaml", "block-subsets.yaml", "cut-sweep.yaml", "overfitting.yaml", "partial-norm.yaml")


@lru_cache
def plan(name: str, *overrides: str) -> Plan:
    return make_plan(load_study(FOLDER / name, overrides))


def chains(made: Plan) -> dict[str, list[PhaseNode]]:
    """Return each arm's phases."""
    return {arm.name: [made.nodes[node] for node in arm.nodes] for arm in made.arms}


@pytest.mark.parametrize("name", FILES)
def test_each_loads_and_has_arms_claims_and_seeds(name: str) -> None:
    made = plan(name)
    assert len(made.arms) > 1 and made.study.claims and len(made.study.seeds) >= 3
    assert made.study.config.data.name == "fashion-mnist-mini"  # which comes with the package
    assert made.trainings < made.trainings_unshared or all(len(arm.nodes) == 1 for arm in made.arms)


def test_the_list_is_whole() -> None:
    assert set(SHORT) < set(FILES)


@pytest.mark.parametrize("name", SHORT)
def test_what_was_scripts_is_forty_lines(name: str) -> None:
    lines = (FOLDER / name).read_text().splitlines()
    assert len(lines) <= PROMISED and max(map(len, lines)) <= 130


def test_the_sweep_of_cuts_trains_its_first_phase_once() -> None:
    """Four cuts and two codes that begin adversarially, two naturally: two first phases, and a second one for each arm."""
    made = plan("cut-sweep.yaml")
    found = chains(made)
    assert len(found) == 16 and len(made.nodes) == 2 + 16
    for code, signal in {"A1N2": "adversarial", "N2A1": "adversarial", "N1A2": "natural", "A2N1": "natural"}.items():
        first = {chain[0].id for arm, chain in found.items() if arm.startswith(code)}
        (node,) = (made.nodes[name] for name in first)
        assert node.phase.train == {"all": signal}
    one = plan("cut-sweep.yaml", "factors.code={A1N2: {}}", "claims=[]")
    assert [node.phase.name for node in one.nodes.values()].count("whole") == 1 and len(one.nodes) == 1 + 4
    assert (one.trainings, one.trainings_unshared) == (3 * 5, 3 * 8)


def test_the_block_subsets_share_their_first_phase() -> None:
    made = plan("block-subsets.yaml")
    found = chains(made)
    assert list(found) == [f"{how}, s{subset}" for how in ("train", "freeze", "lr/10") for subset in SUBSETS]
    assert len({chain[0].id for chain in found.values()}) == 1 and len(made.nodes) == 1 + 45
    assert (made.trainings, made.trainings_unshared) == (3 * 46, 3 * 90)
    for name, chain in found.items():
        how, subset = name.split(", s")
        phase = chain[1].phase
        assert made.arms[list(found).index(name)].recipe.groups["chosen"] == " | ".join(f"stage({i})" for i in subset)
        expected = {"train": ("adversarial", "frozen"), "freeze": ("frozen", "adversarial")}.get(
            how, ("adversarial",) * 2
        )
        assert (phase.train["chosen"], phase.train["rest"]) == expected
        slowed = phase.optimizer.groups
        assert (slowed["chosen"].scale == pytest.approx(0.1)) if how == "lr/10" else not slowed


def test_the_weight_perturbations_are_the_fifteen_subsets_and_none() -> None:
    made = plan("awp-blocks.yaml")
    found = chains(made)
    assert list(found) == ["none", *(f"s{subset}" for subset in SUBSETS)] and len(made.nodes) == 16
    for name, (node,) in found.items():
        if name == "none":
            assert node.phase.ascent is None and node.step_passes == (6, 6)
        else:
            wanted = " | ".join(f"stage({i})" for i in name[1:])
            assert node.phase.ascent == {"name": "awp", "select": wanted} and node.step_passes == (7, 7)


def test_norm_layers_that_change_sides_share_two_first_phases() -> None:
    made = plan("partial-norm.yaml")
    kinds = [node.phase.name for node in made.nodes.values()]
    assert [kinds.count(name) for name in ("whole", "norms", "again")] == [2, 6, 12] and len(made.arms) == 18
    assert {node.phase.recalibrate.on for node in made.nodes.values() if node.phase.recalibrate} == {
        "clean",
        "adversarial",
    }


def test_arms_go_on_from_the_best_epoch_of_one_training() -> None:
    """Frozen and rewound parts are parts of the same net at its best epoch, which all arms share."""
    made = plan("overfitting.yaml")
    found = chains(made)
    assert len(found) == 9 and len({chain[0].id for chain in found.values()}) == 1
    assert found["go on"][0].kept == (5, 10, 15, 20, 25, 30, 35)
    backs = {name: chain[1].id for name, chain in found.items() if len(chain) == 3}
    assert len(set(backs.values())) == 1 and set(backs) >= {"go on", "early frozen", "late frozen", "late rewound"}
    (start,) = found["go on"][1].phase.assign.values()
    assert not isinstance(start, str) and (start.phase, start.checkpoint) == ("robust", "best")
    for part, other in (("early", "late"), ("late", "early")):
        assert found[f"{part} frozen"][2].phase.train == {other: "adversarial", "rest": "frozen"}
        (rewound,) = found[f"{part} rewound"][2].phase.start.values()
        assert not isinstance(rewound, str) and rewound.rewind == 5


# Smaller in every number, so that arms run in seconds.
SMALLER = (
    "data.train_images=40",
    "data.test_images=20",
    "training.batch_size=20",
    "model.width=2",
    "attack.steps=1",
    "seeds=1",
    "evaluate.attacks=[fgsm]",
    "evaluate.monitor={attack: fgsm, images: 20}",
    "claims=[]",
)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("block-subsets.yaml", ("factors.stages={s14: {groups.chosen: stage(1) | stage(4)}}",)),
        ("awp-blocks.yaml", ("factors.stages={s4: {phases.robust.ascent.select: stage(4)}}", "phases.robust.epochs=2")),
        ("partial-norm.yaml", ("factors.part={affine: {groups.part: norm.affine}}", "phases.whole.epochs=1")),
        ("overfitting.yaml", ("phases.robust.epochs=6", "phases.onward.epochs=1")),
    ],
)
def test_arms_of_each_run(name: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    made = plan(name, *SMALLER, *overrides)
    outcome = run_plan(made, tmp_path / "out", workers=1, threads=1)
    assert outcome.complete and not outcome.diverged, outcome.failed
    assert outcome.trained == len(made.nodes) and outcome.measured == len(made.arms)
