"""Every option of a phase, from the YAML file to the weights: what it does is compared with runs that do not need it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from robustlayers.core.files import read_json, read_tensors
from robustlayers.study.definition import load_study
from robustlayers.study.describe import describe_plan
from robustlayers.study.plan import Plan, make_plan
from robustlayers.study.run import run_plan
from robustlayers.study.store import Store
from robustlayers.study.work import train_phase

# 64 training images in 4 batches of 16.
STUDY = """\
question: What does a phase do?
name: phases
data: {name: "npz:DATA", validation: 0.2}
model: {name: small-cnn, width: 4, stem_stride: 2}
threat: {norm: linf, eps: 8/255}
attack: pgd-1
training: {batch_size: 16, optimizer: {lr: 0.05, momentum: 0, weight_decay: 0}}
phases:
PHASES
seeds: 1
evaluate: {attacks: [pgd-1], monitor: {attack: fgsm, images: 16}}
"""


class Ran:
    """One arm of a finished study, seed 0."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.store = plan, Store(folder)
        self.nodes = [plan.nodes[name] for name in plan.arms[0].nodes]

    def file(self, name: str, phase: int = -1) -> Path:
        return self.store.phase(self.nodes[phase].id, 0) / name

    def state(self, phase: int = -1, which: str = "last") -> dict[str, Tensor]:
        return read_tensors(self.file(f"{which}.safetensors", phase))

    def points(self, phase: int = -1) -> list[dict[str, Any]]:
        return read_json(self.file("curve.json", phase))["points"]

    def ledger(self, phase: int = -1) -> dict[str, dict[str, Any]]:
        groups = {entry["group"]: entry for entry in read_json(self.file("ledger.json", phase))["groups"]}
        assert all(entry["kept"] for entry in groups.values())
        return groups

    def passes(self, phase: int = -1) -> tuple[int, int]:
        found = read_json(self.file("ledger.json", phase))
        return found["forward_passes"], found["backward_passes"]


Go = Callable[..., Ran]


@pytest.fixture(scope="module")
def made(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Plan]:
    """Plan a study of these phases, each one line."""
    file = tmp_path_factory.mktemp("studies") / "phases.yaml"

    def make(*phases: str) -> Plan:
        lines = "\n".join(f"  - {{{phase}}}" for phase in phases)
        file.write_text(STUDY.replace("DATA", str(images)).replace("PHASES", lines))
        return make_plan(load_study(file))

    return make


@pytest.fixture(scope="module")
def go(made: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory) -> Go:
    """Train these phases, each one line, or return what was trained by the same lines before."""
    folder = tmp_path_factory.mktemp("runs")
    known: dict[tuple[str, ...], Ran] = {}

    def run(*phases: str) -> Ran:
        if phases not in known:
            ran = Ran(made(*phases), folder / str(len(known)))
            for node in ran.nodes:
                train_phase(ran.store, node, 0, torch.device("cpu"), lambda kind, facts: None)
            known[phases] = ran
        return known[phases]

    return run


def same(one: dict[str, Tensor], two: dict[str, Tensor], *parts: str) -> bool:
    """Tell whether the tensors whose names hold one of the parts are bit-equal; all of them without parts."""
    names = [name for name in one if not parts or any(part in name for part in parts)]
    assert names and one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in names)


FIRST = "name: first, epochs: 1, train: {all: natural}"
ROBUST = "name: robust, epochs: 2, train: {norm: adversarial, rest: natural}"

OPTIONS = {
    "steps": "name: robust, steps: 6, train: {all: adversarial}",
    "fewer steps than an epoch has": "name: robust, steps: 3, train: {all: natural}",
    "windows": f"{ROBUST}, windows: {{norm: [0, 0.5]}}",
    "late window": f"{ROBUST}, windows: {{rest: [1/4, 1]}}",
    "ramp": f"{ROBUST}, perturbation: ramp",
    "hinge": f"{ROBUST}, perturbation: {{name: hinge, since: 0.5, until: 0.75}}",
    "awp": f"{ROBUST}, ascent: awp",
    "awp with vectors": f"{ROBUST}, ascent: {{name: awp, select: norm, vectors: true, warmup: 0.5}}",
    "rwp": f"{ROBUST}, ascent: {{name: rwp, steps: 2}}",
    "sam": f"{ROBUST}, ascent: {{name: sam, select: norm, size: 0.1}}",
    "asam": f"{ROBUST}, ascent: asam",
    "ema": f"{ROBUST}, average: {{name: ema, decay: 0.5}}",
    "swa": f"{ROBUST}, average: {{name: swa, start: 0, select: norm}}",
    "swa on attacks": f"{ROBUST}, average: {{name: swa, statistics: recalibrate, on: adversarial}}",
    "average of statistics": f"{ROBUST}, average: {{name: ema, statistics: average}}",
    "live statistics": f"{ROBUST}, average: {{name: ema, statistics: live}}",
    "clip": f"{ROBUST}, optimizer: {{clip: 0.1}}",
    "rgn": f"{ROBUST}, optimizer: {{rates: rgn, rates_batches: 2}}",
    "group": f"{ROBUST}, optimizer: {{momentum: 0.5, groups: {{norm: {{scale: 0.1, nesterov: true, clip: 0.1, "
    "schedule: {name: linear}}}}",
    "multirate": f"{ROBUST}, optimizer: {{groups: {{norm: {{every: 2}}, rest: {{every: 3, drift: true}}}}}}",
    "all at once": f"{ROBUST}, windows: {{norm: [0, 0.75]}}, perturbation: ramp, ascent: {{name: sam, warmup: 0.25}}, "
    "average: {name: ema, decay: 0.9}, optimizer: {name: adam, lr: 1e-3, clip: 1, groups: {rest: {every: 2}}}, "
    "schedule: {name: cyclic, cycles: 2}",
    "recalibrate": "name: again, recalibrate: {}",
    "recalibrate on attacks": "name: again, recalibrate: {on: adversarial, select: stage(1), momentum: 0.1}",
    "recalibrate on noise": "name: again, recalibrate: {on: noise}, batch_size: 32, attack: pgd-3",
    "set": "name: again, set: {norm: {from: initial, mix: 0.5}, head: reinitialize}",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_what_an_option_costs_is_what_the_plan_says(
    made: Callable[..., Plan], go: Go, option: str, tmp_path: Path
) -> None:
    """The passes made are the planned ones, every promise is kept, and the phase has one point for each epoch."""
    plan = made(FIRST, OPTIONS[option])
    outcome = run_plan(plan, tmp_path / "out", workers=1, threads=1)
    assert outcome.complete and (outcome.trained, outcome.measured) == (2, 1), (outcome.failed, outcome.diverged)
    ran, plain = Ran(plan, tmp_path / "out"), go(FIRST, ROBUST)
    node = ran.nodes[-1]
    assert ran.passes() == (node.forward_passes, node.backward_passes)
    assert [point["epoch"] for point in ran.points()] == [2 + number for number in range(node.epochs)]
    ran.ledger()
    assert f'"{node.phase.name}"' in json.dumps(describe_plan(plan))
    assert plain.nodes[0].id == ran.nodes[0].id and plain.nodes[1].id != node.id
    assert not same(plain.state(), ran.state())


@pytest.mark.parametrize(
    "option",
    [
        "perturbation: constant",
        "windows: {}",
        "average: null, ascent: null, stop: null",
        "optimizer: {rates: fixed, rates_batches: 3}",
        "schedule: {name: constant, cycles: 3}",
        "start: {norm: keep}",
    ],
)
def test_an_option_that_does_nothing_is_not_part_of_the_identity(made: Callable[..., Plan], option: str) -> None:
    assert made(ROBUST).arms[0].nodes == made(f"{ROBUST}, {option}").arms[0].nodes


def test_steps_are_the_first_steps_of_epochs(go: Go) -> None:
    """4 steps are an epoch; after 6, a phase has seen its first 96 images."""
    assert same(
        go("name: a, steps: 4, train: {all: natural}").state(), go("name: a, epochs: 1, train: {all: natural}").state()
    )
    cut = go("name: a, steps: 6, train: {all: natural}", "name: b, epochs: 1, train: {all: natural}")
    assert cut.passes(0) == (96, 96) and [point["epoch"] for point in cut.points(0)] == [1, 2]
    assert [point["epoch"] for point in cut.points(1)] == [3]  # a cut epoch counts as one


def test_a_window_is_as_two_phases(go: Go) -> None:
    """In half of two epochs the norm layers learn: as one epoch in which they do and one in which they are frozen."""
    one = go(f"{ROBUST}, windows: {{norm: [0, 0.5]}}")
    two = go(
        "name: both, epochs: 1, train: {norm: adversarial, rest: natural}",
        "name: rest, epochs: 1, train: {norm: frozen, rest: natural}",
    )
    assert same(one.state(), two.state())
    assert one.passes() == tuple(map(sum, zip(two.passes(0), two.passes(1), strict=True)))
    assert one.ledger()["norm"]["gradient_passes"] == 64 and one.ledger()["rest"]["gradient_passes"] == 128


def test_progressive_unfreezing_is_as_phases(go: Go) -> None:
    one = go("name: a, epochs: 3, train: {head: natural, stage(2): natural, rest: natural}, "
             "windows: {stage(2): [1/3, 1], rest: [2/3, 1]}")  # fmt: skip
    three = go(
        "name: a, epochs: 1, train: {head: natural, rest: frozen}",
        "name: b, epochs: 1, train: {head: natural, stage(2): natural, rest: frozen}",
        "name: c, epochs: 1, train: {all: natural}",
    )
    assert same(one.state(), three.state())


def test_at_an_eps_of_zero_nothing_is_crafted(go: Go) -> None:
    """A hinge at 0 for half of two epochs: 8 steps of t = 0, 1/8, ...; crafting begins after t = 4/8."""
    hinge = "perturbation: {name: hinge, since: 0.5, until: 0.75}"
    ran = go(f"name: a, epochs: 2, train: {{all: adversarial}}, {hinge}")
    assert ran.passes() == (128 + 3 * 16, 128 + 3 * 16)
    first = go("name: a, epochs: 1, train: {all: adversarial}, perturbation: {name: ramp, until: 1, low: 0.999}")
    natural = go("name: a, epochs: 1, train: {all: natural}")
    assert not same(first.state(), natural.state())
    never = go("name: a, epochs: 1, train: {all: adversarial}, perturbation: {name: hinge, since: 0.99, until: 1}")
    assert same(never.state(), natural.state())  # the same images, so the same weights and statistics


def test_an_ascent_of_nothing_much_is_no_ascent(go: Go) -> None:
    """With a size of 1e-12 the gradient is taken at the same weights; with 0.1 at others."""
    plain, tiny = go(ROBUST), go(f"{ROBUST}, ascent: {{name: sam, size: 1e-12}}")
    large, late = (go(f"{ROBUST}, ascent: {{name: sam, size: 0.1, warmup: {warmup}}}") for warmup in (0, 0.99))
    assert all(torch.allclose(plain.state()[n], tiny.state()[n], atol=1e-6) for n in plain.state())
    assert not same(plain.state(), large.state(), "weight") and same(plain.state(), late.state())
    assert large.passes()[0] == 2 * late.passes()[0] - 128  # crafting, one pass an image, is not made twice


def test_the_result_of_a_phase_is_its_average_and_the_next_one_begins_there(go: Go) -> None:
    """The mean of the weights after each of two epochs, which are known from a shorter run; statistics are not averaged."""
    phase = "name: a, epochs: {0}, train: {{all: natural}}"
    ends = [go(phase.format(epochs)).state() for epochs in (1, 2)]
    swa = "average: {name: swa, start: 0, select: norm, statistics: live}"
    averaged = go(f"{phase.format(2)}, {swa}", "name: b, epochs: 1, train: {head: natural, rest: frozen}")
    state = averaged.state(0)
    for name, tensor in state.items():
        learned = "bn" in name and name.endswith((".weight", ".bias"))
        expected = (ends[0][name] + ends[1][name]) / 2 if learned else ends[1][name]
        assert torch.allclose(tensor, expected, atol=1e-7) if learned else torch.equal(tensor, expected), name
    assert same(state, averaged.state(1), "bn", "conv") and not same(state, averaged.state(1), "linear")


def test_a_phase_stops_when_its_metric_does_not_rise(go: Go) -> None:
    """With a least rise of 1 no rise counts: patience 2 ends the phase after 3 of 6 epochs, without a step more."""
    stop = "stop: {patience: 2, metric: clean, least: 1}"
    ran = go(
        f"name: a, epochs: 6, train: {{all: natural}}, {stop}",
        "name: b, epochs: 1, train: {all: natural}, start: {all: {rewind: 5}}",
    )
    assert [point["epoch"] for point in ran.points(0)] == [1, 2, 3] and ran.passes(0) == (192, 192)
    assert ran.nodes[0].forward_passes == 6 * 64  # the plan says at most how many
    assert [point["epoch"] for point in ran.points(1)] == [7]  # places in time do not depend on what was seen
    whole = go("name: a, epochs: 3, train: {all: natural}")
    assert same(ran.state(0), whole.state())
    again = go("name: a, epochs: 6, train: {all: natural}, stop: {patience: 6}")
    assert len(again.points()) == 6


def test_clipping_bounds_what_a_phase_moves(go: Go) -> None:
    """Without momentum and decay, 8 steps of lr 0.05 and a norm of at most 1e-3 go at most 4e-4 far."""
    clipped = go(f"{ROBUST}, optimizer: {{clip: 1e-3}}")
    one = go(f"{ROBUST}, optimizer: {{groups: {{norm: {{clip: 1e-3}}}}}}")

    def distance(ran: Ran, *parts: str) -> float:
        initial = go("name: a, set: {norm: {from: initial}}").state()
        pairs = [
            (t, initial[n])
            for n, t in ran.state().items()
            if n.endswith(("weight", "bias")) and any(p in n for p in parts)
        ]
        return float(sum((a - b).square().sum() for a, b in pairs) ** 0.5)

    assert 0 < distance(clipped, "") <= 8 * 0.05 * 1e-3 * 1.001
    assert 0 < distance(one, "bn") <= 8 * 0.05 * 1e-3 * 1.001 < distance(one, "conv", "linear")


def test_a_group_has_its_own_rate_schedule_and_turns(go: Go) -> None:
    def state(own: str, phase: str = ROBUST) -> dict[str, Tensor]:
        return go(f"{phase}, optimizer: {{groups: {{norm: {own}}}}}").state()

    assert same(state("{scale: 0.5}"), state("{lr: 0.025}"))
    assert not same(state("{scale: 0.5}"), state("{scale: 1}"), "bn1.weight")
    assert same(
        state("{schedule: {name: linear}}"),
        state("{schedule: {name: linear}}", f"{ROBUST}, schedule: {{name: constant}}"),
    )
    assert not same(state("{schedule: {name: linear}}"), state("{}"), "bn1.weight")
    assert same(state("{every: 1}"), state("{}"))
    slow = go(f"{ROBUST}, optimizer: {{groups: {{norm: {{every: 4}}}}}}")
    assert slow.ledger()["norm"]["gradient_passes"] == 2 * 16 and slow.ledger()["rest"]["gradient_passes"] == 128
    assert slow.ledger()["norm"]["effective_lr"] > 0
    drift = go(f"{ROBUST}, optimizer: {{groups: {{norm: {{every: 4, drift: true}}}}}}")
    assert drift.passes() == slow.passes() and not same(drift.state(), slow.state(), "linear.weight")


def test_nesterov_of_a_group_needs_its_momentum(go: Go) -> None:
    heavy = "optimizer: {momentum: 0.9, groups: {norm: {nesterov: true}}}"
    plain = go(f"{ROBUST}, optimizer: {{momentum: 0.9}}").state()
    one = go(f"{ROBUST}, {heavy}").state()
    all_ = go(f"{ROBUST}, optimizer: {{momentum: 0.9, nesterov: true, groups: {{rest: {{nesterov: false}}}}}}").state()
    assert not same(plain, one, "bn1.weight") and same(one, all_)


def test_relative_gradient_norms_change_rates_and_nothing_else(go: Go) -> None:
    rgn, plain = go(f"{ROBUST}, optimizer: {{rates: rgn, rates_batches: 2}}"), go(ROBUST)
    assert (
        rgn.passes()[0] - plain.passes()[0] == 2 * 2 * 16 * 3
    )  # two epochs, two batches; natural, crafting, adversarial
    assert not same(rgn.state(), plain.state(), "linear.weight")
    counter = "bn1.num_batches_tracked"
    assert torch.equal(rgn.state()[counter], plain.state()[counter])


@pytest.mark.parametrize("kind", ["recalibrate: {}", "set: {norm: reset-statistics}"])
def test_a_change_may_come_first_or_be_left_out(go: Go, kind: str) -> None:
    ran = go(f"name: a, {kind}", "name: b, epochs: 1, train: {head: natural, rest: frozen}")
    assert [point["epoch"] for point in ran.points(0) + ran.points(1)] == [1, 2]
    without = go(f"name: a, epochs: 0, {kind}", "name: b, epochs: 1, train: {head: natural, rest: frozen}")
    assert len(without.nodes) == 1
    only = go(f"name: a, {kind}")
    assert same(only.state(), ran.state(0)) and same(only.state(), only.state(which="best"))


@pytest.mark.parametrize(
    "option",
    [
        f"{ROBUST}, ascent: {{name: sam, select: SELECTOR}}",
        f"{ROBUST}, average: {{name: ema, select: SELECTOR}}",
        "name: robust, epochs: 1, train: {SELECTOR: natural, rest: frozen}",
        "name: robust, recalibrate: {select: SELECTOR}",
        "name: robust, set: {SELECTOR: reinitialize}",
    ],
)
def test_a_file_of_scores_counts_by_its_content(made: Callable[..., Plan], tmp_path: Path, option: str) -> None:
    """Else results for one choice of layers would be taken for those of another."""
    scores = tmp_path / "scores.json"
    option = option.replace("SELECTOR", f"'top(\"{scores}\", count=1)'")
    scores.write_text('{"layer1.0.bn1": 2, "layer2.0.bn1": 1}')
    first = made(option).arms[0].nodes
    scores.write_text('{"layer1.0.bn1": 1, "layer2.0.bn1": 2}')
    assert made(option).arms[0].nodes != first
    scores.write_text('{"layer1.0.bn1": 2, "layer2.0.bn1": 1}')
    assert made(option).arms[0].nodes == first
