"""Plans: shared phases are named alike, and a name changes with all that decides a result and with nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from robustlayers.attacks import PGD
from robustlayers.study.definition import Study, load_study
from robustlayers.study.describe import describe_plan
from robustlayers.study.plan import Plan, make_plan
from robustlayers.study.run import plan_size

Plans = Callable[..., Plan]

# Identities of the study below. They change only if recipes mean something else than before: then `SCHEMA` is raised,
# since stored results would otherwise be taken for results of the new meaning.
GOLDEN_STUDY = """\
question: Golden?
data: {name: fashion-mnist-mini, validation: 0.1, train_images: 500, test_images: 100, augment: {crop: 2, flip: true}}
model: {name: resnet, depth: 8, width: 4}
threat: {norm: linf, eps: 8/255}
attack: {name: pgd, steps: 3, step_size: 4/255}
groups: {early: stem | stage(1)}
training: {optimizer: {lr: 0.05}, schedule: {name: one-cycle}}
phases:
  - {name: pretrain, epochs: 2, train: {all: natural}}
  - {name: adapt, epochs: 1, train: {early: {adversarial: 0.5, natural: 0.5}, rest: frozen}, batch_size: 50}
factors:
  group: {early: {}, random: {phases.adapt.train: {"random(like=norm, of=conv, seed=0)": adversarial, rest: frozen}}}
evaluate: {attacks: [pgd-5, apgd-ce-5], monitor: {attack: fgsm, images: 100}}
"""
GOLDEN_NODES = ["4bcfa9e08805134b", "1bc8a09db0070d46", "cb214307ad148b3e"]
GOLDEN_RUNS = ["1566d14e992f09af", "b8e0d5b1bc440556"]


def _names(plan: Plan) -> tuple[list[str], list[str]]:
    return list(plan.nodes), [arm.run for arm in plan.arms]


def test_identities_are_what_they_were(tmp_path: Path) -> None:
    (tmp_path / "golden.yaml").write_text(GOLDEN_STUDY)
    assert _names(make_plan(load_study(tmp_path / "golden.yaml"))) == (GOLDEN_NODES, GOLDEN_RUNS)


def test_a_default_step_counts_as_the_number_it_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = GOLDEN_STUDY.replace(", step_size: 4/255", "").replace("attack: fgsm", "attack: pgd-2")
    (tmp_path / "golden.yaml").write_text(text)
    before = _names(make_plan(load_study(tmp_path / "golden.yaml")))
    monkeypatch.setattr(PGD, "step", property(lambda attack: 3 * attack.threat.eps / attack.steps))
    after = _names(make_plan(load_study(tmp_path / "golden.yaml")))
    assert all(was != now for was, now in zip(before[0] + before[1], after[0] + after[1], strict=True))


def test_arms_share_their_equal_first_phases(plan: Plans) -> None:
    made = plan()
    assert [len(arm.nodes) for arm in made.arms] == [1, 2, 2]
    assert len({arm.nodes[0] for arm in made.arms}) == 1 and len(made.nodes) == 3
    assert made.nodes[made.arms[0].nodes[0]].arms == ("none", "norm", "all")
    assert (made.trainings, made.trainings_unshared) == (6, 10)
    for arm in made.arms[1:]:
        last = made.nodes[arm.nodes[1]]
        assert (last.parent, last.first_epoch, last.arms) == (arm.nodes[0], 1, (arm.name,))


def test_a_phase_after_a_different_one_is_not_shared(plan: Plans) -> None:
    made = plan("factors.group.norm={phases.pretrain.epochs: 2}", "factors.group.all={}")
    assert len({arm.nodes[0] for arm in made.arms}) == 2
    assert len({arm.nodes[-1] for arm in made.arms}) == 3  # equal second phases, but after different first ones


def test_a_phase_without_epochs_is_no_part_of_the_identity(write: Callable[..., Path]) -> None:
    phase = "  - {name: pretrain, epochs: 1, train: {all: natural}}\n"
    none = ("{phases.adapt.epochs: 0}", "{phases.adapt.train: {head: adversarial, rest: frozen}}")
    empty = make_plan(load_study(write(none, (phase, phase.replace("1", "0")))))
    absent = make_plan(load_study(write(none, (phase, ""))))
    assert _names(empty) == _names(absent)


def test_identities_do_not_depend_on_the_order_of_keys_or_the_process(write: Callable[..., Path]) -> None:
    path = write()
    expected = _names(make_plan(load_study(path)))

    def reversed_(value: object) -> object:
        if isinstance(value, dict):
            return {key: reversed_(item) for key, item in reversed(value.items())}
        return [reversed_(item) for item in value] if isinstance(value, list) else value

    document = reversed_(yaml.safe_load(path.read_text()))
    assert isinstance(document, dict)
    document["factors"]["group"] = dict(reversed(document["factors"]["group"].items()))  # the order of arms stays
    other = path.with_name("reversed.yaml")
    other.write_text(yaml.safe_dump(document, sort_keys=False))
    assert _names(make_plan(load_study(other))) == expected

    script = (
        "import json, sys; from robustlayers.study.definition import load_study; "
        "from robustlayers.study.plan import make_plan; p = make_plan(load_study(sys.argv[1])); "
        "print(json.dumps([list(p.nodes), [arm.run for arm in p.arms]]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(other)], capture_output=True, text=True, env=environment, check=True
    )
    assert tuple(json.loads(done.stdout)) == expected


# What decides the result of the first phase, of natural training; and with it of all that come after.
DECIDES_FIRST = [
    "data.validation=0.3",
    "data.validation_seed=1",
    "data.augment={flip: true}",
    "data.augment={crop: 1}",
    "data.train_images=40",
    "model.width=5",
    "model.name=resnet",
    "model.stem_stride=1",
    "model.mean=0.3",
    "phases.pretrain.epochs=2",
    "phases.pretrain.name=first",
    "phases.pretrain.train={all: {natural: 0.5}}",
    "phases.pretrain.train={all: adversarial}",
    "phases.pretrain.train={norm: natural, rest: frozen}",
    "phases.pretrain.train={norm: natural, rest: natural}",
    "phases.pretrain.batch_size=20",
    "phases.pretrain.optimizer={name: adam}",
    "training.batch_size=20",
    "training.optimizer.lr=0.06",
    "training.optimizer.momentum=0.8",
    "training.optimizer.weight_decay=0",
    "training.optimizer.nesterov=true",
    "training.schedule={name: cosine}",
    "training.schedule={warmup: 0.1}",
    "training.schedule={name: piecewise, milestones: [0.6]}",
    "training.normalization={clean: {by: running}}",
    "evaluate.monitor.attack=pgd-2",
    "evaluate.monitor.attack=fgsm",
    "evaluate.monitor.images=15",
    "evaluate.monitor.select=robust",
    "evaluate.batch_size=10",
    "threat.eps=7/255",  # through the monitor, which chooses the best epoch
    "threat.norm=l2",
]
# What decides only the second phase, of adversarial training.
DECIDES_SECOND = [
    "attack=pgd-2",
    "attack={name: pgd, steps: 1, step_size: 3/255}",
    "attack={name: pgd, steps: 1, random_start: false}",
    "attack={name: pgd, steps: 1, keep: best}",
    "attack={name: pgd, steps: 1, loss: margin}",
    "attack=fgsm",
    "phases.adapt.attack=pgd-2",
    "phases.adapt.epochs=3",
    "phases.adapt.optimizer={lr: 0.01}",
    "phases.adapt.normalization={craft: {by: batch, update: true}}",
]
# What decides only what is measured after training.
DECIDES_MEASURING = [
    "evaluate.attacks=[pgd-3]",
    "evaluate.attacks=[pgd-2, fgsm]",
    "evaluate.attacks=[{name: pgd, steps: 2, restarts: 2}]",
    "evaluate.checkpoints=[last]",
    "data.test_images=20",
]
DECIDES_NOTHING = [
    "question=Why?",
    "name=other",
    "seeds=5",
    "seeds=[7]",
    "claims=[]",
    "factors.group.more={phases.adapt.train: {head: adversarial, rest: frozen}}",
    "training.optimizer.lr=5e-2",
    "threat.eps=0.03137254901960784",
    "attack={name: pgd, steps: 1}",
    "attack={name: pgd, steps: 1, keep: last}",
    "groups={unused: norm}",
    "model.norm=batch",
    "training.batch_size=16",
    "phases.adapt.batch_size=16",
    "phases.pretrain.start={all: keep}",
    "phases.pretrain.attack=pgd-7",  # natural training crafts nothing
]


@pytest.mark.parametrize("override", DECIDES_FIRST)
def test_what_decides_the_first_phase_renames_everything(override: str, plan: Plans) -> None:
    nodes, runs = _names(plan())
    other_nodes, other_runs = _names(plan(override))
    assert not set(nodes) & set(other_nodes) and not set(runs) & set(other_runs)


@pytest.mark.parametrize("override", DECIDES_SECOND)
def test_what_decides_the_second_phase_keeps_the_first(override: str, plan: Plans) -> None:
    before, after = plan(), plan(override)
    shared = {before.arms[0].nodes[0]}
    assert set(before.nodes) & set(after.nodes) == shared
    assert before.arms[0].run == after.arms[0].run
    assert not {arm.run for arm in before.arms[1:]} & {arm.run for arm in after.arms}


@pytest.mark.parametrize("start", ["reinitialize", "reset-statistics", "{from: initial}", "{from: pretrain}"])
def test_a_start_of_a_group_renames_the_phase(start: str, plan: Plans) -> None:
    before, after = plan(), plan(f"factors.group.norm={{phases.adapt.start: {{norm: {start}}}}}")
    assert [a.run == b.run for a, b in zip(before.arms, after.arms, strict=True)] == [True, False, True]
    assert before.arms[1].nodes[0] == after.arms[1].nodes[0]


@pytest.mark.parametrize("override", DECIDES_MEASURING)
def test_what_decides_the_measuring_keeps_all_phases(override: str, plan: Plans) -> None:
    nodes, runs = _names(plan())
    other_nodes, other_runs = _names(plan(override))
    assert nodes == other_nodes and not set(runs) & set(other_runs)


@pytest.mark.parametrize("override", DECIDES_NOTHING)
def test_what_decides_nothing_renames_nothing(override: str, plan: Plans) -> None:
    nodes, runs = _names(plan())
    other_nodes, other_runs = _names(plan(override))
    assert (other_nodes[:3], other_runs[:3]) == (nodes, runs)


def test_the_content_of_the_data_counts_and_its_place_does_not(plan: Plans, images: Path, tmp_path: Path) -> None:
    import numpy as np

    (tmp_path / "copy.npz").write_bytes(images.read_bytes())
    assert _names(plan(f"data.name=npz:{tmp_path / 'copy.npz'}")) == _names(plan())
    arrays = dict(np.load(images))
    arrays["train_images"] = arrays["train_images"].copy()
    arrays["train_images"][0, 0, 0] ^= 1
    np.savez(tmp_path / "other.npz", **arrays)
    assert not set(plan(f"data.name=npz:{tmp_path / 'other.npz'}").nodes) & set(plan().nodes)


def test_the_description_of_a_plan_adds_up(study: Callable[..., Study]) -> None:
    made = make_plan(study())
    facts = json.loads(json.dumps(describe_plan(made)))
    assert facts["data"].startswith("tiny: 64 train, 16 validation, 24 test images, 8x8x1")
    none, norm, everything = facts["arms"]
    assert none["trained_parameters"] == 0 and everything["trained_parameters"] == facts["model_parameters"]
    assert norm["trained_parameters"] == facts["norm_parameters"]
    for arm in facts["arms"]:
        for phase in arm["phases"]:
            assert sum(group["parameters"] for group in phase["groups"]) == facts["model_parameters"]
            assert sum(group["share"] for group in phase["groups"]) == pytest.approx(1)
        assert arm["forward_passes"] == sum(phase["forward_passes"] for phase in arm["phases"])
    # 64 images: one clean pass in the first epoch; one to craft (pgd-1) and one to learn in each of two more.
    assert [arm["forward_passes"] for arm in facts["arms"]] == [64, 64 * 5, 64 * 5]
    assert [arm["backward_passes"] for arm in facts["arms"]] == [64, 64 * 5, 64 * 5]
    assert plan_size(made) == 2 * plan_size(make_plan(study("seeds=1")))
