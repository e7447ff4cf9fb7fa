import pytest
import torch

from robustlayers.core.errors import UserError
from robustlayers.selection import Partition
from robustlayers.training import STARTS, copy_entries, snapshot, start_group

NORM = {"norm": "norm", "rest": "rest"}


def started(model, start, groups=None, group="norm", seed=0):
    before = snapshot(model)
    partition = Partition(model, groups or NORM)
    names = start_group(partition[group], start, seed)
    return before, snapshot(model), names, partition


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("start", STARTS)
def test_only_the_group_changes(net, start):
    model = net("small-cnn")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.num_batches_tracked += 3
    before, after, names, partition = started(model, start)
    assert moved(before, after)  # not all: a permutation of a few values can be the same one
    assert moved(before, after) <= set(names) <= set(partition["norm"])


def test_reset_statistics_is_what_torch_calls_reset(net):
    model, reference = net("small-cnn"), net("small-cnn")
    for each in (model, reference):
        each.train()(torch.rand(4, each.conv1.in_channels, 8, 8))
    started(model, "reset-statistics")
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_shuffle_keeps_the_values_and_loses_their_order(net):
    before, after, names, _ = started(net("small-cnn"), "shuffle", {"conv": "conv", "rest": "rest"}, "conv")
    assert names
    for name in names:
        assert torch.equal(before[name].flatten().sort().values, after[name].flatten().sort().values)
        assert not torch.equal(before[name], after[name])


@pytest.mark.parametrize(
    ("start", "low", "high"),
    [
        ("scale-uniform", 0, 1),
        ("scale-one", 1, 1),
        ("scale-signs", -1, 1),
        ("shift-one", 1, 1),
        ("scale-shift-one", 1, 1),
    ],
)
def test_initializers_of_norm_layers_stay_in_their_range(net, start, low, high):
    _, after, names, _ = started(net("resnet"), start)
    values = torch.cat([after[name] for name in names])
    assert low <= values.min() <= values.max() <= high
    if low < high:  # a uniform draw fills its range
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.15)
        assert values.std().item() == pytest.approx((high - low) / 12**0.5, rel=0.2)


def test_draws_depend_on_the_seed_and_the_tensor_only(net):
    first = started(net("small-cnn"), "scale-uniform", seed=1)[1]
    again = started(net("small-cnn"), "scale-uniform", seed=1)[1]
    other = started(net("small-cnn"), "scale-uniform", seed=2)[1]
    alone = started(net("small-cnn"), "scale-uniform", {"one": "bn1", "rest": "rest"}, "one", seed=1)[1]
    assert torch.equal(first["bn1.weight"], again["bn1.weight"])
    assert torch.equal(first["bn1.weight"], alone["bn1.weight"])
    assert not torch.equal(first["bn1.weight"], other["bn1.weight"])


def test_a_part_of_a_tensor_begins_anew_and_the_other_entries_stay(net):
    model = net("small-cnn")
    groups = {"part": "random(like=norm, of=conv, seed=0)", "rest": "rest"}
    partition = Partition(model, groups)
    before = snapshot(model)
    source = {name: torch.full_like(tensor, 7) for name, tensor in before.items()}
    changed = copy_entries(partition["part"], source, "sevens")
    after = snapshot(model)
    assert sum(int((after[name] == 7).sum()) for name in changed) == partition["part"].parameters
    for name in before:
        mask = partition["part"].parts.get(name)
        rest = torch.ones_like(before[name], dtype=torch.bool) if mask is None else ~mask
        assert torch.equal(before[name][rest], after[name][rest])


def test_mistakes_are_told(net):
    model = net("small-cnn")
    partition = Partition(model, {"head": "head", "rest": "rest"})
    with pytest.raises(UserError, match="unknown start 'shufle'; nearest: shuffle"):
        start_group(partition["head"], "shufle", 0)
    with pytest.raises(UserError, match="start 'scale-one' concerns no tensor of the group"):
        start_group(partition["head"], "scale-one", 0)
    with pytest.raises(UserError, match=r"FILE has no tensor 'linear.weight'; nearest: linear.weights"):
        copy_entries(partition["head"], {"linear.weights": torch.zeros(1)}, "FILE", strict=True)
    with pytest.raises(UserError, match=r"FILE: linear.weight is \[1\], the model has"):
        copy_entries(partition["head"], {"linear.weight": torch.zeros(1)}, "FILE")
