"""Optimizer settings per group: each group moves as an optimizer of its own would move it."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustlayers.core.errors import UserError
from robustlayers.selection import Partition
from robustlayers.training import (
    GroupSettings,
    OptimizerSettings,
    PartialStep,
    Schedule,
    build_optimizer,
    load_optimizer,
    optimizer_tensors,
    owners,
)

GROUPS = {"norm": "norm", "head": "head", "rest": "rest"}
SIGNALS = {"norm": "natural", "head": "natural", "rest": "natural"}
BOTH = {"norm": {"natural": 1.0}, "others": {"natural": 1.0}}
OWN = {"norm": GroupSettings(lr=0.01, weight_decay=0.0), "head": GroupSettings(momentum=0.0)}
NESTEROV = {
    "norm": GroupSettings(scale=0.3, nesterov=False),
    "head": GroupSettings(momentum=0.0),
    "rest": GroupSettings(momentum=0.5),
}


def stepped(model, settings, batch, steps=3, groups=GROUPS, signals=SIGNALS, schedule=None):
    partition = Partition(model, groups)
    step = PartialStep(model, partition, signals, optimizer=None)
    optimizer = build_optimizer(partition, step.signals, settings)
    step.optimizer = optimizer
    x, y = batch
    for index in range(steps):
        if schedule is not None:
            schedule.apply(optimizer, index, steps)
        step(x, y)
    return partition, optimizer


@pytest.mark.parametrize("kind", ["sgd", "nesterov", "adam", "adamw"])
def test_each_group_moves_as_an_optimizer_of_its_own_would_move_it(net, batch, kind):
    model = net("small-cnn", torch.float64)
    reference = copy.deepcopy(model).train()
    x, y = batch(8, 0, torch.float64)
    own = {"sgd": OWN, "nesterov": NESTEROV}.get(kind, {"norm": OWN["norm"]})
    nesterov = kind == "nesterov"
    kind = "sgd" if nesterov else kind
    settings = OptimizerSettings(kind, lr=0.05, weight_decay=0.1, nesterov=nesterov, groups=own)
    assert [settings.of(group).nesterov for group in GROUPS] == [False, False, nesterov]
    partition, _ = stepped(model, settings, (x, y))
    optimizers = []
    for group in GROUPS:
        of = settings.of(group)
        tensors = [
            dict(reference.named_parameters())[n] for n in partition[group] if n in dict(reference.named_parameters())
        ]
        if kind == "sgd":
            made = torch.optim.SGD(
                tensors,
                lr={"norm": 0.05 * 0.3}.get(group, 0.05) if nesterov else of.lr,
                momentum={"norm": 0.9, "head": 0.0, "rest": 0.5}[group] if nesterov else of.momentum,
                weight_decay=of.weight_decay,
                nesterov=nesterov and group == "rest",
            )
        else:
            made = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind](
                tensors, lr=of.lr, weight_decay=of.weight_decay
            )
        optimizers.append(made)
    for _ in range(3):
        reference.zero_grad()
        functional.cross_entropy(reference(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-10, atol=1e-12, msg=name)


def test_decay_of_weights_spares_norm_layers_and_biases(net):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    partition = Partition(model, {"all": "all"})
    optimizer = build_optimizer(partition, {"all": {"natural": 1.0}}, OptimizerSettings(decay="weights"))
    decays = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["names"]}
    assert decays == {
        "0.weight": 5e-4,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "3.weight": 5e-4,
        "3.bias": 0.0,
    }
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 0.0]


def test_the_schedule_reaches_every_group(net, batch):
    schedule = Schedule("piecewise", milestones=(0.5,), factor=0.1)
    settings = OptimizerSettings(lr=0.05, groups=OWN, decay="weights")
    _, optimizer = stepped(net("small-cnn"), settings, batch(8, 0, torch.float32), schedule=schedule)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.1 * settings.of(group["group"]).lr)


def test_the_state_goes_through_a_checkpoint(net, batch):
    settings = OptimizerSettings(lr=0.05, groups=OWN, decay="weights")
    data = batch(8, 0, torch.float32)
    model = net("small-cnn")
    _, optimizer = stepped(model, settings, data)
    other = net("small-cnn")
    partition = Partition(other, GROUPS)
    again = build_optimizer(partition, PartialStep(other, partition, SIGNALS, optimizer=None).signals, settings)
    saved = optimizer_tensors(optimizer)
    assert saved
    load_optimizer(again, saved)
    assert {name: tensor.tolist() for name, tensor in optimizer_tensors(again).items()} == {
        name: tensor.tolist() for name, tensor in saved.items()
    }


def test_a_group_can_ask_for_nesterov_alone(net):
    settings = OptimizerSettings(momentum=0.0, groups={"norm": GroupSettings(momentum=0.9, nesterov=True)})
    optimizer = build_optimizer(Partition(net(), {"norm": "norm", "others": "rest"}), BOTH, settings)
    assert [(group["nesterov"], group["momentum"]) for group in optimizer.param_groups] == [(True, 0.9), (False, 0.0)]


def test_parameter_groups_say_whose_they_are(net):
    own = Schedule("cosine")
    settings = OptimizerSettings(lr=0.5, groups={"norm": GroupSettings(scale=0.1, schedule=own)})
    optimizer = build_optimizer(Partition(net(), {"norm": "norm", "others": "rest"}), BOTH, settings)
    norm, others = optimizer.param_groups
    assert (norm["group"], norm["base_lr"], norm["schedule"]) == ("norm", 0.05, own)
    assert (others["group"], others["base_lr"], others["schedule"]) == ("others", 0.5, None)
    assert "rate" not in norm
    assert owners(optimizer) == {
        **dict.fromkeys(["2.weight", "2.bias", "5.weight", "5.bias"], "norm"),
        **dict.fromkeys(["1.weight", "1.bias", "4.weight", "4.bias", "6.weight", "6.bias"], "others"),
    }
    assert owners(None) == {}


def test_layer_rates_divide_groups_by_module_and_nothing_else_changes(net, batch, bits):
    fixed, rgn = net("small-cnn"), net("small-cnn")
    settings = OptimizerSettings(lr=0.05, decay="weights", groups=OWN)
    _, plain = stepped(fixed, settings, batch(8, 0, torch.float32))
    _, optimizer = stepped(rgn, replace(settings, rates="rgn"), batch(8, 0, torch.float32))
    assert bits(fixed) == bits(rgn)  # all rates are 1 until they are measured
    assert owners(plain) == owners(optimizer)
    assert len(optimizer.param_groups) > len(plain.param_groups)
    for group in optimizer.param_groups:
        assert {name.rpartition(".")[0] for name in group["names"]} == {group["module"]} and group["rate"] == 1.0
    keys = [(group["group"], group["module"], group["weight_decay"] > 0) for group in optimizer.param_groups]
    assert len(keys) == len(set(keys))


def test_settings_are_told_in_words():
    own = GroupSettings(
        momentum=0.5,
        nesterov=False,
        weight_decay=0,
        scale=0.1,
        clip=2.5,
        every=4,
        drift=True,
        schedule=Schedule("linear"),
    )
    assert str(own) == (
        "lr x 0.1, momentum 0.5, no Nesterov, weight decay 0, schedule linear, gradient norm at most 2.5, "
        "updated every 4 steps with linear drift"
    )
    assert str(GroupSettings(lr=0.1, nesterov=True, every=1)) == "lr 0.1, Nesterov, updated every step"
    assert str(OptimizerSettings(groups={"norm": GroupSettings(every=2)})).endswith("; norm: updated every 2 steps")
    for name in GroupSettings.__dataclass_fields__:  # no setting is left unsaid
        value = {"nesterov": True, "drift": True, "schedule": Schedule("cosine"), "every": 7, "momentum": 0.7}.get(
            name, 7
        )
        needs = {"every": 3} if name == "drift" else {}
        assert str(GroupSettings(**{name: value}, **needs)) != str(GroupSettings(**needs)), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.1, "scale": 2.0}, "lr 0.1 and scale 2 exclude each other; give one of them"),
        ({"scale": 0.0}, "scale 0.0; allowed: a number of more than 0"),
        ({"clip": math.nan}, "clip nan; allowed: a number of more than 0"),
        ({"every": 0}, "every 0; allowed: a whole number of at least 1"),
        ({"every": 1.5}, "every 1.5; allowed: a whole number of at least 1"),
        ({"drift": True}, "drift needs an every of more than 1, the steps to spread an update over"),
        ({"drift": True, "every": 1}, "drift needs an every of more than 1, the steps to spread an update over"),
    ],
)
def test_a_mistake_in_a_group_is_told(options, message):
    with pytest.raises(UserError) as error:
        GroupSettings(**options)
    assert str(error.value) == f"optimizer of a group: {message}"


def test_mistakes_are_told(net):
    model = net("small-cnn")
    partition = Partition(model, GROUPS)
    frozen = {"norm": {"natural": 1.0}, "head": {}, "rest": {}}

    def build(settings, signals=frozen, of=partition):
        return build_optimizer(of, signals, settings)

    with pytest.raises(UserError, match="unknown group 'nrm'; nearest: norm"):
        build(OptimizerSettings(groups={"nrm": GroupSettings(lr=1.0)}))
    with pytest.raises(UserError, match="group 'head' is frozen: it has no optimizer settings"):
        build(OptimizerSettings(groups={"head": GroupSettings(lr=1.0)}))
    with pytest.raises(UserError, match="group 'norm' has a momentum, which only sgd takes"):
        OptimizerSettings("adam", groups={"norm": GroupSettings(momentum=0.5)})
    with pytest.raises(UserError, match="group 'norm' has a nesterov, which only sgd takes"):
        OptimizerSettings("adamw", groups={"norm": GroupSettings(nesterov=True)})
    with pytest.raises(UserError, match="nesterov of group 'norm' needs a momentum above 0"):
        OptimizerSettings(groups={"norm": GroupSettings(nesterov=True, momentum=0.0)})
    with pytest.raises(UserError, match="unknown decay 'weight'; nearest: weights"):
        OptimizerSettings(decay="weight")
    divided = Partition(model, {"part": "random(like=norm, of=conv, seed=0)", "others": "rest"})
    both = {"part": {"natural": 1.0}, "others": {"natural": 1.0}}
    for own in (GroupSettings(lr=1.0), GroupSettings(every=2), GroupSettings(clip=1.0)):
        with pytest.raises(UserError, match="is divided between 'part' and 'others': their settings must be equal"):
            build(OptimizerSettings(groups={"part": own}), both, divided)
    assert build(OptimizerSettings(lr=0.5, groups={"part": GroupSettings(scale=1.0, every=1)}), both, divided)
