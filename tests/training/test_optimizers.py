import copy
import math

import pytest
import torch

from robustlayers.core.errors import UserError
from robustlayers.core.files import read_tensors, write_tensors
from robustlayers.selection import Partition
from robustlayers.training import OPTIMIZERS, OptimizerSettings, build_optimizer, load_optimizer, optimizer_tensors

NATURAL, FROZEN = {"natural": 1.0}, {}
SETTINGS = [
    OptimizerSettings("sgd", lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    OptimizerSettings("sgd", lr=0.1, momentum=0.0, weight_decay=0.0),
    OptimizerSettings("adam", lr=0.01, weight_decay=0.01, betas=(0.8, 0.95)),
    OptimizerSettings("adamw", lr=0.01, weight_decay=0.01),
]
PLAIN = [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    lambda p: torch.optim.SGD(p, lr=0.1),
    lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01, betas=(0.8, 0.95)),
    lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.01),
]


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def make(model, settings):
    partition = Partition(model, {"norm": "norm", "others": "rest"})
    optimizer = build_optimizer(partition, {"norm": NATURAL, "others": NATURAL}, settings)
    assert optimizer is not None
    return optimizer


@pytest.mark.parametrize(("settings", "plain"), list(zip(SETTINGS, PLAIN, strict=True)), ids=map(str, SETTINGS))
def test_it_steps_as_torchs_own(net, bits, settings, plain):
    model = net("mlp")
    other = copy.deepcopy(model)
    mine, its = make(model, settings), plain(other.parameters())
    for seed in range(3):
        for m, optimizer in ((model, mine), (other, its)):
            give_gradients(m, seed)
            optimizer.step()
    assert bits(model) == bits(other)


@pytest.mark.parametrize("settings", SETTINGS, ids=map(str, SETTINGS))
def test_its_state_comes_back_from_a_file_bit_for_bit(net, bits, tmp_path, settings):
    model = net("mlp")
    optimizer = make(model, settings)
    for seed in range(2):
        give_gradients(model, seed)
        optimizer.step()
    state = optimizer_tensors(optimizer)
    slots = {"sgd": {"momentum_buffer"} if settings.momentum else set(), "adam": {"step", "exp_avg", "exp_avg_sq"}}
    assert {name.rpartition("/")[2] for name in state} == slots["sgd" if settings.name == "sgd" else "adam"]
    assert {name.rpartition("/")[0] for name in state} == (set(dict(model.named_parameters())) if state else set())
    write_tensors(tmp_path / "state", state)

    other = copy.deepcopy(model)
    resumed = make(other, settings)
    load_optimizer(resumed, read_tensors(tmp_path / "state"))
    again = optimizer_tensors(resumed)
    assert set(again) == set(state)
    for name, tensor in state.items():
        assert torch.equal(tensor, again[name]) and tensor.dtype == again[name].dtype, name
    for seed in range(2, 4):
        for m, o in ((model, optimizer), (other, resumed)):
            give_gradients(m, seed)
            o.step()
    assert bits(model) == bits(other)


@pytest.mark.parametrize("settings", SETTINGS, ids=map(str, SETTINGS))
def test_a_state_is_a_copy(net, settings):
    model = net("mlp")
    optimizer = make(model, settings)
    give_gradients(model, 0)
    optimizer.step()
    state = optimizer_tensors(optimizer)
    kept = {name: tensor.clone() for name, tensor in state.items()}
    load_optimizer(optimizer, state)
    give_gradients(model, 1)
    optimizer.step()
    assert all(torch.equal(state[name], kept[name]) for name in kept)


def test_a_state_from_before_the_first_step_clears_what_came_after(net, bits):
    model = net("mlp")
    optimizer = make(model, SETTINGS[0])
    state = optimizer_tensors(optimizer)
    give_gradients(model, 0)
    optimizer.step()
    load_optimizer(optimizer, state)
    assert optimizer_tensors(optimizer) == {}


def test_groups_are_the_trained_ones_and_fixed(net):
    model = net("mlp")
    drawn = "random(like=linear.bias, of=1.weight)"
    partition = Partition(model, {"some": drawn, "norm": "norm", "first": f"1.weight - {drawn}", "others": "rest"})
    signals = {"some": NATURAL, "norm": NATURAL, "first": NATURAL, "others": FROZEN}
    optimizer = build_optimizer(partition, signals, OptimizerSettings(lr=0.3))
    assert optimizer is not None
    found = {group["group"]: group["names"] for group in optimizer.param_groups}
    # a tensor that two groups divide stands in the first; buffers and frozen parameters in none
    assert found == {"some": ["1.weight"], "norm": ["2.weight", "2.bias", "5.weight", "5.bias"]}
    parameters = dict(model.named_parameters())
    for group in optimizer.param_groups:
        assert [id(p) for p in group["params"]] == [id(parameters[name]) for name in group["names"]]
        assert group["base_lr"] == group["lr"] == 0.3


def test_buffers_alone_need_no_optimizer(net):
    partition = Partition(net("mlp"), {"statistics": "norm.statistics", "others": "rest"})
    optimizer = build_optimizer(partition, {"statistics": NATURAL, "others": FROZEN}, OptimizerSettings())
    assert optimizer is None and optimizer_tensors(None) == {}
    load_optimizer(None, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "sdg"}, "unknown optimizer 'sdg'; nearest: sgd; allowed: adam, adamw, sgd"),
        ({"nesterov": True, "momentum": 0.0}, "optimizer: nesterov needs a momentum above 0"),
        (
            {"name": "adam", "betas": (0.9, 1.0)},
            "optimizer: betas [0.9, 1.0]; allowed: two numbers from 0 to less than 1",
        ),
        ({"lr": 0}, "optimizer: lr 0; allowed: a number of more than 0"),
        ({"lr": math.inf}, "optimizer: lr inf; allowed: a number of more than 0"),
        ({"momentum": 1.0}, "optimizer: momentum 1.0; allowed: a number from 0 to less than 1"),
        ({"weight_decay": -0.1}, "optimizer: weight decay -0.1; allowed: a number of at least 0"),
        ({"clip": 0.0}, "optimizer: clip 0.0; allowed: a number of more than 0"),
        ({"rates": "rng"}, "unknown rates 'rng'; nearest: rgn; allowed: fixed, rgn"),
        ({"rates_batches": 0}, "optimizer: rates batches 0; allowed: a whole number of at least 1"),
        ({"rates_batches": True}, "optimizer: rates batches True; allowed: a whole number of at least 1"),
    ],
)
def test_a_mistake_is_told(options, message):
    with pytest.raises(UserError) as error:
        OptimizerSettings(**options)
    assert str(error.value) == message


def test_the_text_says_all_that_counts():
    assert str(SETTINGS[0]) == "sgd, lr 0.1, momentum 0.9, Nesterov, weight decay 0.01"
    assert str(SETTINGS[2]) == "adam, lr 0.01, betas 0.8, 0.95, weight decay 0.01"
    assert str(OptimizerSettings(clip=2, rates="rgn", rates_batches=1)).endswith(
        "weight decay 0.0005, gradient norm at most 2, layer rates by relative gradient norm of 1 batch"
    )
    assert {settings.name for settings in SETTINGS} == set(OPTIMIZERS)
