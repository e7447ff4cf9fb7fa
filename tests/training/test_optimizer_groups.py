"""Optimizer settings per group: each group moves as an optimizer of its own would move it."""

import copy

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
)

GROUPS = {"norm": "norm", "head": "head", "rest": "rest"}
SIGNALS = {"norm": "natural", "head": "natural", "rest": "natural"}
OWN = {"norm": GroupSettings(lr=0.01, weight_decay=0.0), "head": GroupSettings(momentum=0.0)}


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


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_each_group_moves_as_an_optimizer_of_its_own_would_move_it(net, batch, kind):
    model = net("small-cnn", torch.float64)
    reference = copy.deepcopy(model).train()
    x, y = batch(8, 0, torch.float64)
    own = OWN if kind == "sgd" else {"norm": OWN["norm"]}
    settings = OptimizerSettings(kind, lr=0.05, weight_decay=0.1, groups=own)
    partition, _ = stepped(model, settings, (x, y))
    optimizers = []
    for group in GROUPS:
        of = settings.of(group)
        tensors = [
            dict(reference.named_parameters())[n] for n in partition[group] if n in dict(reference.named_parameters())
        ]
        if kind == "sgd":
            made = torch.optim.SGD(tensors, lr=of.lr, momentum=of.momentum, weight_decay=of.weight_decay)
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
    with pytest.raises(UserError, match="unknown decay 'weight'; nearest: weights"):
        OptimizerSettings(decay="weight")
    divided = Partition(model, {"part": "random(like=norm, of=conv, seed=0)", "others": "rest"})
    both = {"part": {"natural": 1.0}, "others": {"natural": 1.0}}
    with pytest.raises(UserError, match="is divided between 'part' and 'others': their settings must be equal"):
        build(OptimizerSettings(groups={"part": GroupSettings(lr=1.0)}), both, divided)
