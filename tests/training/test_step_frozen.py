"""What is frozen is bit-equal after a phase, whatever momentum, weight decay and train-mode crafting do; planted faults."""

from itertools import product

import pytest
import torch

from robustlayers.attacks import PGD, Linf
from robustlayers.core.random import stream
from robustlayers.normalization import NormPolicy, Setting, Switch
from robustlayers.selection import Partition
from robustlayers.training import OptimizerSettings, PartialStep, build_optimizer

ATTACK = PGD(Linf(0.1), steps=2, keep="last")
FROZEN = [
    "norm",
    "norm.statistics",
    "norm.affine",
    "~norm",
    "head",
    "conv",
    "stage(1)",
    "random(like=linear.bias)",
    "bias",
]
ON_MLP = ["norm", "norm.statistics", "norm.affine", "~norm", "head", "random(like=linear.bias)", "linear.bias"]
SIGNALS = ["natural", "adversarial", {"natural": 0.5, "adversarial": 0.5}]
POLICIES = {
    "default": NormPolicy(),
    "train-mode crafting": NormPolicy(craft=Switch("batch", True)),
    "crafting by batch": NormPolicy(craft=Switch("batch", False)),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def words(tensor):
    """The bits of every entry."""
    kinds = {4: torch.int32, 8: torch.int64}
    return tensor.detach().clone().view(kinds[tensor.element_size()])


def changed_entries(model, before):
    """Tensor name -> mask of the entries whose bits differ from before."""
    return {name: words(tensor) != before[name] for name, tensor in model.state_dict().items()}


def broken(selection, changed):
    """Tensors of a frozen selection of which an entry changed."""
    return [
        name
        for name, mask in selection.parts.items()
        if bool((changed[name] if mask is None else changed[name][mask]).any())
    ]


def run_phase(model, batch, frozen, signal, optimizer, policy, steps=3):
    """Some steps of a phase in a loop of the user's own; return the partition and what changed.

    The optimizer holds every parameter and has momentum from a step in which all of them learned; gradients of that step
    are still there.
    """
    x, y = batch()
    warm = PartialStep(model, Partition(model, {"all": "all"}), {"all": "natural"}, optimizer=optimizer)
    warm(x, y)
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    partition = Partition(model, {"frozen": frozen, "others": "rest"})
    step = PartialStep(
        model, partition, {"frozen": "frozen", "others": signal}, optimizer=optimizer, attack=ATTACK, policy=policy
    )
    before = {name: words(tensor) for name, tensor in model.state_dict().items()}
    for index in range(steps):
        step(*batch(seed=index), generator=stream(0, "attack", index))
    return partition, changed_entries(model, before)


MATRIX = [
    *(("mlp", *case) for case in product(ON_MLP, range(3), OPTIMIZERS, POLICIES)),
    # On the larger nets every pair of settings, not every triple.
    *(
        (name, frozen, (i + j) % 3, list(OPTIMIZERS)[(i + 2 * j) % 3], policy)
        for name in ("small-cnn", "resnet")
        for i, frozen in enumerate(FROZEN)
        for j, policy in enumerate(POLICIES)
    ),
]


@pytest.mark.parametrize(("name", "frozen", "signal", "optimizer", "policy"), MATRIX)
def test_a_frozen_group_is_bit_equal_after_the_phase(net, batch, name, frozen, signal, optimizer, policy):
    model = net(name)
    partition, changed = run_phase(
        model, batch, frozen, SIGNALS[signal], OPTIMIZERS[optimizer](model.parameters()), POLICIES[policy]
    )
    assert broken(partition["frozen"], changed) == []
    for key, mask in partition["others"].parts.items():  # and the rest did learn, counters and all
        if key.startswith("normalize."):
            continue
        moved = changed[key] if mask is None else changed[key][mask]
        assert bool(moved.any()), key
        if not partition.inventory[key].buffer and "linear" in key:
            assert float(moved.float().mean()) > 0.9, key


@pytest.mark.parametrize("name", ["small-cnn", "resnet"])
@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_an_optimizer_of_the_phase_holds_no_frozen_parameter(net, batch, name, kind):
    model = net(name)
    partition = Partition(model, {"some": "random(like=norm, of=conv)", "norm": "norm", "others": "rest"})
    signals = {"some": {"adversarial": 1.0}, "norm": {}, "others": {}}
    settings = OptimizerSettings(kind, lr=0.05, weight_decay=0.1)
    optimizer = build_optimizer(partition, signals, settings)
    assert optimizer is not None
    held = [name for group in optimizer.param_groups for name in group["names"]]
    assert held == list(partition["some"])
    step = PartialStep(
        model, partition, {g: s or "frozen" for g, s in signals.items()}, optimizer=optimizer, attack=ATTACK
    )
    before = {key: words(tensor) for key, tensor in model.state_dict().items()}
    for index in range(4):
        step(*batch(seed=index))
    changed = changed_entries(model, before)
    assert broken(partition["norm"], changed) == broken(partition["others"], changed) == []
    for key, mask in partition["some"].parts.items():
        assert mask is not None and torch.equal(changed[key] & ~mask, torch.zeros_like(mask))
        assert float(changed[key][mask].float().mean()) > 0.5


def test_frozen_entries_of_a_tensor_stay_in_every_bit_even_minus_zero_and_nan(net, batch):
    model = net("mlp")
    partition = Partition(model, {"some": "random(like=linear.bias, of=1.weight)", "others": "rest"})
    mask = partition["others"].parts["1.weight"]
    assert mask is not None
    place = mask.nonzero()[0].tolist()
    with torch.no_grad():
        model[1].weight[place[0], place[1]] = -0.0
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    before = {key: words(tensor) for key, tensor in model.state_dict().items()}
    step = PartialStep(model, partition, {"some": "natural", "others": "frozen"}, optimizer=optimizer)
    for index in range(3):
        step(*batch(seed=index))
    assert broken(partition["others"], changed_entries(model, before)) == []
    assert str(float(model[1].weight[place[0], place[1]].detach())) == "-0.0"


# -- planted faults: the checks above would notice -----------------------------------------------------------------


def all_frozen_but_head(net, batch, policy=None):
    model = net("small-cnn")
    return run_phase(
        model, batch, "~head", "adversarial", OPTIMIZERS["sgd"](model.parameters()), policy or NormPolicy()
    )


def test_without_a_fault_nothing_is_broken(net, batch):
    partition, changed = all_frozen_but_head(net, batch)
    assert broken(partition["frozen"], changed) == []


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_planted_zero_gradients_in_the_place_of_none_let_weight_decay_and_momentum_move_what_is_frozen(
    net, batch, monkeypatch, optimizer
):
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]
    honest = kind.step

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return honest(self, closure)

    monkeypatch.setattr(kind, "step", step)
    model = net("small-cnn")
    partition, changed = run_phase(
        model, batch, "~head", "adversarial", OPTIMIZERS[optimizer](model.parameters()), NormPolicy()
    )
    parameters = [name for name in partition["frozen"] if not partition.inventory[name].buffer]
    assert broken(partition["frozen"], changed) == parameters


def test_planted_settings_that_update_frozen_statistics_are_noticed(net, batch, monkeypatch):
    monkeypatch.setattr(Switch, "resolve", lambda self, trained, here: Setting("batch", True))
    partition, changed = all_frozen_but_head(net, batch)
    assert broken(partition["frozen"], changed) == [
        name for name in partition["frozen"] if partition.inventory[name].buffer and "bn1" in name
    ]


def test_planted_evaluation_mode_that_counts_batches_is_noticed(net, batch, monkeypatch):
    honest = Switch.resolve

    def resolve(self, trained, here):
        setting = honest(self, trained, here)
        return setting._replace(update=self is not POLICIES["default"].craft and setting.by == "running")

    monkeypatch.setattr(Switch, "resolve", resolve)
    partition, changed = all_frozen_but_head(net, batch)
    assert "bn1.num_batches_tracked" in broken(partition["frozen"], changed)


def test_planted_neglect_of_divided_tensors_is_noticed(net, batch, monkeypatch):
    monkeypatch.setattr("robustlayers.training.binding._divided", lambda entries: {})
    model = net("mlp")
    partition, changed = run_phase(
        model, batch, "random(like=linear.bias)", "natural", OPTIMIZERS["sgd"](model.parameters()), NormPolicy()
    )
    divided = [name for name, mask in partition["frozen"].parts.items() if mask is not None]
    assert divided and broken(partition["frozen"], changed) == divided
