"""Phases that recalibrate or set: their results against ones made by hand, and a ledger that catches what else moves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robustlayers.attacks import Linf, Noise
from robustlayers.core.errors import UserError
from robustlayers.core.files import read_json, read_tensors, write_tensors
from robustlayers.core.random import stream
from robustlayers.data import batches
from robustlayers.study import changes, work
from robustlayers.study.definition import load_study
from robustlayers.study.plan import Plan, make_plan
from robustlayers.study.run import run_plan
from robustlayers.study.semantics import build_model, data_of
from robustlayers.study.store import Store
from robustlayers.study.work import train_phase

STUDY = """\
question: What does a change of tensors change?
data: {name: "npz:DATA", validation: 0.2}
model: {name: small-cnn, width: 4, stem_stride: 2}
threat: {norm: linf, eps: 16/255}
attack: fgsm
training: {batch_size: 16, optimizer: {lr: 0.05}}
phases:
  - {name: natural, epochs: 2, train: {all: natural}}
  - {name: robust, epochs: 2, train: {all: adversarial}}
  - {name: change, CHANGE}
seeds: 1
evaluate: {attacks: [fgsm], monitor: {attack: fgsm, images: 16}}
"""

States = list[dict[str, Tensor]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plan(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Plan]:
    """Plan the study with this change as its last phase."""
    file = tmp_path_factory.mktemp("study") / "change.yaml"

    def make(change: str) -> Plan:
        file.write_text(STUDY.replace("DATA", str(images)).replace("CHANGE", change))
        return make_plan(load_study(file))

    return make


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One store for all changes, so that the phases before them are trained once."""
    return Store(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def go(plan: Callable[[str], Plan], store: Store) -> Callable[[str], States]:
    """Do a change after the two phases that are shared, and return the states after all three."""

    def run(change: str) -> States:
        made = plan(change)
        folders = [store.phase(node.id, 0) for node in made.nodes.values()]
        for node, folder in zip(made.nodes.values(), folders, strict=True):
            if not store.whole(folder):
                train_phase(store, node, 0, CPU, lambda kind, facts: None)
        return [read_tensors(folder / "last.safetensors") for folder in folders]

    return run


def ledger(plan: Plan, store: Store) -> dict[str, dict]:
    folder = store.phase(plan.arms[0].nodes[-1], 0)
    return {entry["group"]: entry for entry in read_json(folder / "ledger.json")["groups"]}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Return the names of the tensors that differ in any bit."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


def by_hand(
    plan: Plan,
    state: dict[str, Tensor],
    inputs: Callable[[nn.Module, int, Tensor, Tensor], Tensor],
    momentum: float | None = None,
    only: str = "",
) -> dict[str, Tensor]:
    """Return the state with statistics as torch's own layers track them in training mode over one epoch."""
    recipe, node = plan.arms[0].recipe, plan.nodes[plan.arms[0].nodes[-1]]
    dataset, train, _, _ = data_of(recipe.data)
    model = build_model(recipe.model, dataset, 0)
    model.load_state_dict(state)
    model.eval()
    fixed = copy.deepcopy(model)  # attacks meet the statistics from before
    for name, layer in norms(model).items():
        if name.startswith(only):
            layer.train()
            layer.momentum = momentum
            if momentum is None:
                layer.reset_running_stats()
    for index, (x, y) in enumerate(batches(train, 16, seed=0, epoch=node.first_epoch)):
        x = inputs(fixed, index, x, y)
        with torch.no_grad():
            model(x)
    return model.state_dict()


def draws(plan: Plan, index: int) -> torch.Generator:
    return stream(0, "recalibration", plan.nodes[plan.arms[0].nodes[-1]].first_epoch, index)


def clean(plan: Plan, model: nn.Module, index: int, x: Tensor, y: Tensor) -> Tensor:
    return x


def noisy(plan: Plan, model: nn.Module, index: int, x: Tensor, y: Tensor) -> Tensor:
    return Noise(Linf("16/255"))(model, x, y, generator=draws(plan, index))


def attacked(plan: Plan, model: nn.Module, index: int, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), x)
    return (x + 16 / 255 * slope.sign()).clamp(0, 1).detach()


@pytest.mark.parametrize(
    ("options", "inputs", "momentum", "only"),
    [
        ("{}", clean, None, ""),
        ("{momentum: 0.25}", clean, 0.25, ""),
        ("{on: noise}", noisy, None, ""),
        ("{on: adversarial}", attacked, None, ""),
        ("{on: adversarial, momentum: 0.25}", attacked, 0.25, ""),
        ("{select: stage(2)}", clean, None, "layer2"),
    ],
)
def test_recalibrated_statistics_are_those_that_torch_tracks(
    plan: Callable[[str], Plan],
    go: Callable[[str], States],
    store: Store,
    options: str,
    inputs: Callable[..., Tensor],
    momentum: float | None,
    only: str,
) -> None:
    change = f"recalibrate: {options}"
    made = plan(change)
    _, before, after = go(change)
    expected = by_hand(made, before, lambda *batch: inputs(made, *batch), momentum, only)
    chosen = {name for name in before if ("running" in name or "tracked" in name) and name.startswith(only)}
    assert moved(before, after) == chosen  # nothing else, in any bit
    for name in chosen:
        assert torch.allclose(after[name], expected[name], rtol=1e-4, atol=1e-6), name
        assert not torch.allclose(after[name], before[name], rtol=1e-3)
    groups = ledger(made, store)
    assert groups["statistics"]["moved_buffers"] > 0 and groups["statistics"]["moved_parameters"] == 0
    assert groups["rest"]["signal"] == "frozen" and groups["rest"]["before"] == groups["rest"]["after"]
    assert groups["statistics"]["signal"].startswith("recalibrated on ")


def test_the_inputs_of_a_recalibration_make_a_difference(go: Callable[[str], States]) -> None:
    ends = [
        go(f"recalibrate: {{on: {what}}}")[2]["layer1.0.bn1.running_mean"] for what in ("clean", "noise", "adversarial")
    ]
    assert not torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2]) and not torch.equal(ends[1], ends[2])


def test_a_group_of_the_study_may_be_recalibrated_and_a_name_that_it_does_not_have_may_not(
    plan: Callable[[str], Plan], go: Callable[[str], States]
) -> None:
    with pytest.raises(UserError, match="unknown selector 'late'"):
        plan("recalibrate: {select: late}")
    before, after = go("recalibrate: {select: bn1}")[1:]
    assert {name.rpartition(".")[0] for name in moved(before, after)} == {"bn1"}


# -- set ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["best", "last"])
def test_parts_of_the_norm_layers_are_exchanged_between_two_phases(
    go: Callable[[str], States], plan: Callable[[str], Plan], store: Store, given: str
) -> None:
    """Statistics of the natural phase under the scales and shifts of the robust one; and the other way around."""
    statistics = f"set: {{norm.statistics: {{from: natural, checkpoint: {given}}}, norm.affine: {{from: present}}}}"
    _, robust, one = go(statistics)
    natural = read_tensors(store.phase(plan(statistics).arms[0].nodes[0], 0) / f"{given}.safetensors")
    for name, tensor in one.items():
        source = natural if "running" in name or "tracked" in name else robust
        assert torch.equal(tensor, source[name]), name
    assert moved(robust, one) == {name for name in robust if "running" in name or "tracked" in name} & moved(
        robust, natural
    )
    affine = f"set: {{norm.affine: {{from: natural, checkpoint: {given}}}}}"
    two = go(affine)[2]
    for name, tensor in two.items():
        learned = "bn" in name and name.endswith((".weight", ".bias"))
        assert torch.equal(tensor, (natural if learned else robust)[name]), name
    groups = ledger(plan(statistics), store)
    assert groups["norm.affine"]["moved_parameters"] == 0 and groups["norm.statistics"]["moved_buffers"] > 0
    assert groups["norm.affine"]["signal"] == "set: from present"
    assert groups["rest"]["signal"] == "frozen"


def test_present_is_what_the_phase_before_left(go: Callable[[str], States]) -> None:
    _, before, after = go("set: {all: {from: present}}")
    assert moved(before, after) == set()


def test_a_mix_is_between_what_is_there_and_the_source(go: Callable[[str], States]) -> None:
    natural, robust, mixed = go("set: {norm: {from: natural, mix: 1/4}, conv: {from: initial, mix: 1/2}}")
    assert {name.split(".")[-2][:2] for name in moved(robust, mixed)} == {"bn", "co"}
    for name in ("bn1.weight", "bn1.running_var", "layer2.0.bn1.bias"):
        assert torch.allclose(mixed[name], 0.75 * robust[name] + 0.25 * natural[name], atol=1e-7)
    assert torch.equal(mixed["linear.weight"], robust["linear.weight"])
    assert int(mixed["bn1.num_batches_tracked"]) == int(robust["bn1.num_batches_tracked"])  # a count is not mixed


def test_words_set_as_they_start(go: Callable[[str], States]) -> None:
    _, robust, after = go(
        "set: {norm.statistics: reset-statistics, norm.weight: scale-one, conv: shuffle, head: reinitialize}"
    )
    for name, tensor in after.items():
        if "running_var" in name or ("bn" in name and name.endswith(".weight")):
            assert torch.equal(tensor, torch.ones_like(tensor))
        elif "running_mean" in name or "tracked" in name:
            assert not tensor.any()
        elif "conv" in name:
            assert torch.equal(tensor.flatten().sort().values, robust[name].flatten().sort().values)
            assert not torch.equal(tensor, robust[name])
        else:
            assert torch.equal(tensor, robust[name]) != name.startswith("linear"), name


def test_a_file_sets_a_part_with_other_names(
    plan: Callable[[str], Plan], go: Callable[[str], States], tmp_path: Path
) -> None:
    file = tmp_path / "head.safetensors"
    write_tensors(file, {"fc.weight": torch.full((4, 8), 3.0), "fc.bias": torch.full((4,), -1.0)})
    change = f"set: {{head: {{load: {file}, map: {{fc: linear}}, mix: 0.5}}}}"
    shape = data_of(plan("recalibrate: {}").arms[0].recipe.data)[0]
    model = build_model(plan("recalibrate: {}").arms[0].recipe.model, shape, 0)
    weight = model.state_dict()["linear.weight"]
    write_tensors(file, {"fc.weight": torch.full_like(weight, 3.0), "fc.bias": torch.full((len(weight),), -1.0)})
    _, robust, after = go(change)
    assert torch.allclose(after["linear.weight"], 0.5 * robust["linear.weight"] + 1.5)
    assert moved(robust, after) == {"linear.weight", "linear.bias"}
    first = plan(change).arms[0].nodes
    write_tensors(file, {"fc.weight": torch.full_like(weight, 4.0), "fc.bias": torch.full((len(weight),), -1.0)})
    assert plan(change).arms[0].nodes[:2] == first[:2] and plan(change).arms[0].nodes[2] != first[2]


# -- planted faults ----------------------------------------------------------------------------------------------------


def test_a_recalibration_that_moves_a_weight_fails_with_its_name(
    plan: Callable[[str], Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = changes.Recalibration.end

    def end(self: changes.Recalibration) -> list[str]:
        with torch.no_grad():
            self.model.get_parameter("linear.bias").add_(1e-6)
        return honest(self)

    monkeypatch.setattr(changes.Recalibration, "end", end)
    outcome = run_plan(plan("recalibrate: {}"), tmp_path / "out", workers=1, threads=1)
    (reason,) = outcome.failed.values()
    assert reason == "group 'rest' was promised frozen, but linear.bias moved"


def test_a_change_that_moves_another_group_fails_with_its_name(
    plan: Callable[[str], Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = work.begin

    def begin(model: nn.Module, recipe, phase, *arguments) -> None:
        honest(model, recipe, phase, *arguments)
        if phase.kind == "set":
            model.get_buffer("bn1.num_batches_tracked").add_(1)

    monkeypatch.setattr(work, "begin", begin)
    outcome = run_plan(plan("set: {norm.affine: {from: natural}}"), tmp_path / "out", workers=1, threads=1)
    (reason,) = outcome.failed.values()
    assert reason == "group 'rest' was promised frozen, but bn1.num_batches_tracked moved"


@pytest.mark.parametrize(
    ("one", "two", "equal"),
    [
        ("recalibrate: {}", "recalibrate: {select: norm, on: clean}", True),
        ("recalibrate: {}", "recalibrate: {}, epochs: 1", True),
        ("set: {norm: {from: natural}}", "set: {norm: {from: natural}}, epochs: 1", True),
        ("recalibrate: {}", "recalibrate: {momentum: 0.1}", False),
        ("recalibrate: {on: noise}", "recalibrate: {on: adversarial}", False),
        ("recalibrate: {on: adversarial}", "recalibrate: {on: adversarial}, attack: pgd-2", False),
        ("recalibrate: {}", "recalibrate: {}, attack: pgd-2", True),  # clean inputs need none
        ("recalibrate: {}", "recalibrate: {}, batch_size: 8", False),
        ("set: {norm: {from: natural}}", "set: {norm: {from: natural, mix: 1}}", True),
        ("set: {norm: {from: natural}}", "set: {norm: {from: natural, mix: 0.5}}", False),
        ("set: {norm: {from: natural}}", "set: {norm: {from: natural, checkpoint: best}}", False),
        ("set: {norm: {from: natural}}", "set: {norm: {from: natural}, head: keep}", False),
    ],
)
def test_what_decides_a_change_is_its_identity(plan: Callable[[str], Plan], one: str, two: str, equal: bool) -> None:
    assert (plan(one).arms[0].nodes == plan(two).arms[0].nodes) == equal
