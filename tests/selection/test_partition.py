from functools import reduce
from operator import or_

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robustlayers.core.errors import UserError
from robustlayers.selection import Partition, resolve

ATOMS = [
    "norm",
    "conv",
    "linear",
    "stem",
    "head",
    "stage(1)",
    "bias",
    "norm.statistics",
    "layer2.*",
    "random(like=norm)",
    "random(like=head, seed=2)",
    "normalize",
]


@pytest.fixture(scope="module")
def model(net):
    return net("resnet")


def covered(partition):
    """How many groups hold each entry of each tensor of the state_dict."""
    counts = {name: torch.zeros(tensor.shape, dtype=torch.int) for name, tensor in partition.model.state_dict().items()}
    for selection in partition.groups.values():
        for name, mask in selection.parts.items():
            for alias in partition.inventory[name].names:
                counts[alias] += 1 if mask is None else mask.int()
    return counts


def check(partition):
    counts = covered(partition)
    assert counts and all(bool((count == 1).all()) for count in counts.values())
    assert all(len(selection) and bool(selection) for selection in partition.groups.values())


@given(st.lists(st.sampled_from(ATOMS), min_size=1, max_size=5, unique=True), st.booleans(), st.randoms())
def test_every_entry_is_in_exactly_one_group_or_the_error_says_why_not(model, atoms, separate, random):
    names = [f"g{index}" for index in range(len(atoms))]
    if separate:  # g1 - g0, g2 - g0 - g1, ...: disjoint by construction, perhaps empty
        texts = [" - ".join([f"({atom})", *(f"({earlier})" for earlier in atoms[:i])]) for i, atom in enumerate(atoms)]
    else:
        texts = atoms
    groups = dict(zip(names, texts, strict=True)) | {"left": "rest"}
    keys = list(groups)
    random.shuffle(keys)  # `rest` may stand anywhere
    groups = {key: groups[key] for key in keys}
    try:
        partition = Partition(model, groups)
    except UserError as error:
        told = str(error)
    else:
        check(partition)
        assert list(partition) == keys and len(partition) == len(keys)
        assert sum(partition[key].parameters for key in keys) == partition.inventory.parameters
        return
    inventory = Partition(model, {"all": "all"}).inventory
    found = []
    for text in texts:
        try:
            found.append(resolve(inventory, text))
        except UserError:
            found.append(None)
    empty = any(selection is None for selection in found)
    overlap = any(a & b for i, a in enumerate(found) for b in found[:i] if a is not None and b is not None)
    nothing_left = not empty and not ~reduce(or_, found)
    assert empty or overlap or nothing_left
    assert ("picks nothing from" in told) == empty
    if not empty:
        assert ("overlaps with" in told) == overlap and ("picks nothing: the other groups" in told) == nothing_left


def test_tied_tensors_are_in_one_group_under_all_their_names(user):
    partition = Partition(user("tied"), {"out": "out", "norm": "norm", "others": "rest"})
    check(partition)
    assert partition.group_of("out.weight") == partition.group_of("embed.weight") == ["out"]
    assert partition.group_of("again.1.running_var") == ["norm"]


def test_a_divided_tensor_has_several_groups(model):
    partition = Partition(model, {"some": "random(like=bn1, of=conv1 | head)", "others": "rest"})
    check(partition)
    assert partition.group_of("conv1.weight") == ["some", "others"]
    assert partition.group_of("bn1.weight") == ["others"]
    with pytest.raises(KeyError):
        partition.group_of("nothing")


def test_a_group_may_be_called_like_a_selector(model):
    partition = Partition(model, {"norm": "conv", "rest": "norm", "conv": "rest"})
    check(partition)
    assert "bn1.weight" in partition["rest"] and "conv1.weight" in partition["norm"]


@pytest.mark.parametrize(
    ("groups", "faults"),
    [
        ({}, ["a partition needs at least one group"]),
        (
            {"a": "nrm", "b": "stage(9)", "c": "conv &", "d": "rest", "e": " rest "},
            [
                "e: 'rest' is given to 2 groups: d, e",
                "a: unknown selector 'nrm'; nearest: norm, normalize, norm.bias",
                "b: ResNet has 3 stage(s), not 9",
                "c: selector 'conv &': something is missing at column 7",
            ],
        ),
        (
            {"a": "norm", "b": "bn1", "c": "stem"},
            [
                "b: overlaps with group 'a': bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var and 1 more",
                "c: overlaps with group 'a': bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var and 1 more",
                "c: overlaps with group 'b': bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var and 1 more",
                "groups leave out normalize.mean, normalize.std, layer1.0.conv1.weight, layer1.0.conv2.weight and 8 more; "
                "add them, or a group 'rest', to say what they learn from",
            ],
        ),
        (
            {"a": "all", "b": "rest"},
            ["b: picks nothing: the other groups hold every tensor already"],
        ),
        (
            {"a": "~linear.bias"},
            ["groups leave out linear.bias; add them, or a group 'rest', to say what they learn from"],
        ),
        (  # entries of one tensor
            {"a": "random(like=linear.bias, of=linear.weight)", "b": "linear", "c": "rest"},
            ["b: overlaps with group 'a': linear.weight"],
        ),
        ({"a": "norm & linear", "b": "rest"}, ["a: selector 'norm & linear' picks nothing from ResNet"]),
    ],
)  # fmt: skip
def test_all_faults_are_told_at_once(model, groups, faults):
    with pytest.raises(UserError) as error:
        Partition(model, groups)
    assert [str(fault) for fault in error.value.faults] == faults


def test_a_model_of_buffers_only_can_be_partitioned():
    check(Partition(nn.BatchNorm1d(2, affine=False), {"all": "all"}))
