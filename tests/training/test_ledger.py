"""The ledger tells what moved and by how much, and which promise is broken: planted faults down to a single bit."""

import math

import pytest
import torch
from torch import nn

from robustlayers.selection import Partition
from robustlayers.training import compare, snapshot

GROUPS = {"norm": "norm", "others": "rest"}


def ledger(model, before, signals, groups=None):
    changes = compare(Partition(model, groups or GROUPS), signals, before, snapshot(model))
    return {change.group: change for change in changes}


def move_all(model, by=0.25):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by


TRAINED, FROZEN = {"natural": 1.0}, {}


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("one ulp", lambda m: m[2].weight[3:4].copy_(torch.nextafter(m[2].weight[3:4], torch.tensor(9.0)))),
        ("a counter", lambda m: m[2].num_batches_tracked.add_(1)),
        ("a statistic", lambda m: m[2].running_var[0:1].mul_(1 + 1e-6)),
        ("the sign of zero", lambda m: m[2].bias[0:1].neg_()),
        ("not a number", lambda m: m[2].running_mean[0:1].fill_(math.nan)),
    ],
)
def test_a_planted_change_of_a_frozen_tensor_is_named(net, name, fault):
    model = net("mlp")
    with torch.no_grad():
        model[2].bias[0] = 0.0
    before = snapshot(model)
    move_all(nn.ModuleList([model[1], model[4], model[6]]))
    assert ledger(model, before, {"norm": FROZEN, "others": TRAINED})["norm"].kept
    with torch.no_grad():
        fault(model)
    found = ledger(model, before, {"norm": FROZEN, "others": TRAINED})
    wanted = {
        "one ulp": "2.weight",
        "a counter": "2.num_batches_tracked",
        "a statistic": "2.running_var",
        "the sign of zero": "2.bias",
        "not a number": "2.running_mean",
    }
    assert found["norm"].broken == (wanted[name],) and not found["norm"].kept
    assert found["norm"].moved_parameters + found["norm"].moved_buffers == 1
    assert found["others"].kept


def test_another_nan_is_a_change_and_the_same_nan_is_none():
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.view(torch.int32).copy_(torch.tensor([[0x7FC00000, 0x7FC00000]]))
    before = snapshot(model)
    assert ledger(model, before, {"all": FROZEN}, {"all": "all"})["all"].kept
    with torch.no_grad():
        model[0].weight.view(torch.int32)[0, 1] = 0x7FC00001
    assert ledger(model, before, {"all": FROZEN}, {"all": "all"})["all"].moved_parameters == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_bit_counts_in_every_float_type(dtype):
    model = nn.Sequential(nn.Linear(2, 1, bias=False)).to(dtype)
    with torch.no_grad():
        model[0].weight.zero_()
    before = snapshot(model)
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
    change = ledger(model, before, {"all": FROZEN}, {"all": "all"})["all"]
    assert change.broken == ("0.weight",) and change.moved_parameters == 1 and change.largest == 0.0


def test_a_change_outside_the_mask_of_a_group_is_the_other_groups(net):
    model = net("mlp")
    groups = {"some": "random(like=linear.bias, of=1.weight)", "others": "rest"}
    partition = Partition(model, groups)
    mask = partition["some"].parts["1.weight"]
    before = snapshot(model)
    with torch.no_grad():
        model[1].weight[mask] += 1
    signals = {"some": TRAINED, "others": FROZEN}
    found = ledger(model, before, signals, groups)
    assert found["some"].kept and found["others"].kept and found["some"].moved_parameters == int(mask.sum())
    outside = (~mask).nonzero()[0]
    with torch.no_grad():
        model[1].weight[tuple(outside)] += 1e-6
    found = ledger(model, before, signals, groups)
    assert found["some"].kept and found["others"].broken == ("1.weight",)


def test_a_trained_tensor_that_did_not_move_is_named(net):
    model = net("mlp")
    before = snapshot(model)
    move_all(nn.ModuleList([model[1], model[4]]))
    found = ledger(model, before, {"norm": FROZEN, "others": TRAINED})
    assert found["norm"].kept and found["others"].broken == ("6.weight", "6.bias")


def test_a_group_of_buffers_is_kept_when_one_of_them_moved(net):
    model = net("mlp")
    groups = {"statistics": "norm.statistics", "others": "rest"}
    before = snapshot(model)
    found = ledger(model, before, {"statistics": TRAINED, "others": FROZEN}, groups)
    assert len(found["statistics"].broken) == 6
    model[2].running_mean.add_(1)
    found = ledger(model, before, {"statistics": TRAINED, "others": FROZEN}, groups)
    assert found["statistics"].kept and found["statistics"].moved_buffers == 7


def test_the_numbers_are_counts_and_norms_of_the_change():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        model[1].weight.zero_()
    before = snapshot(model)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0.6], [-0.8, 4.0]]))
        model[1].weight[0] = 2.0
        model[1].running_mean += 5
        model[1].num_batches_tracked += 2
    found = ledger(model, before, {"norm": {"natural": 0.5, "adversarial": 0.5}, "others": TRAINED})
    others, norm = found["others"], found["norm"]
    assert (others.tensors, others.parameters, others.buffers) == (1, 4, 0)
    assert (others.moved_parameters, others.moved_buffers) == (2, 0)
    assert others.relative_l2 == pytest.approx(1.0 / 5.0) and others.largest == pytest.approx(0.8)
    assert (norm.tensors, norm.parameters, norm.buffers) == (5, 4, 5)
    assert (norm.moved_parameters, norm.moved_buffers) == (1, 3)
    assert norm.largest == 2.0 and norm.relative_l2 == 2.0  # relative to nothing: the change itself
    assert norm.signal == "0.5 natural + 0.5 adversarial" and others.signal == "natural"
    assert norm.broken == ("1.bias",)


def test_a_snapshot_is_a_copy_of_every_tensor(net):
    model = net("resnet")
    taken = snapshot(model)
    assert list(taken) == list(model.state_dict())
    move_all(model)
    fresh = net("resnet").state_dict()
    assert all(torch.equal(taken[name], fresh[name]) and not taken[name].requires_grad for name in taken)
