import copy

import pytest
import torch
from torch import nn

from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.normalization import inference
from robustlayers.selection import Inventory, select
from robustlayers.selection.selectors import resolve
from robustlayers.training.ledger import snapshot
from robustlayers.training.mixing import interpolate, swap


def chosen(model, selector):
    return resolve(Inventory(model), selector)


def other_of(model):
    """A model of the same kind with other values everywhere."""
    other = copy.deepcopy(model)
    generator = stream(0, "other")
    with torch.no_grad():
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.5)
            else:
                tensor.fill_(11)
    return other


SELECTORS = ["all", "norm.affine", "norm.statistics", "norm.weight & layer1", "random(like=norm, of=conv, seed=0)"]


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("share", [0.25, "1/2", 0.9])
def test_selected_entries_are_the_formula_and_others_stay(net, bits, selector, share):
    model = net("resnet", torch.float64)
    source = snapshot(other_of(model))
    before, selection = snapshot(model), chosen(model, selector)
    names = interpolate(selection, source, share)
    share = 0.5 if share == "1/2" else share
    assert names == list(selection)
    for name, tensor in model.state_dict().items():
        mask = selection._mask(name)
        assert torch.equal(tensor[~mask], before[name][~mask])
        if tensor.is_floating_point():
            wanted = (1 - share) * before[name] + share * source[name]
            assert torch.allclose(tensor[mask], wanted[mask], rtol=1e-14, atol=1e-14)
        elif name in selection:
            assert torch.equal(tensor, source[name] if share >= 0.5 else before[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_ends_are_exact_in_every_bit(net, dtype):
    def bits(model):  # numpy has no bfloat16
        return {name: tensor.reshape(-1).view(torch.uint8).tolist() for name, tensor in model.state_dict().items()}

    model = net("resnet", dtype)
    other = other_of(model)
    with torch.no_grad():  # values that arithmetic would lose
        for each, value in ((model, -0.0), (other, torch.nan)):
            each.linear.bias[0] = value
            each.linear.bias[1] = torch.finfo(dtype).max
        model.linear.bias[2], other.linear.bias[2] = -torch.inf, -0.0
    before = bits(model)
    assert interpolate(chosen(model, "all"), other.state_dict(), 0) == list(Inventory(model).entries)
    assert bits(model) == before
    interpolate(chosen(model, "all"), other.state_dict(), 1.0)
    assert bits(model) == bits(other)
    interpolate(chosen(model, "all"), other.state_dict(), 0.3)  # own with itself
    finite = {name for name, tensor in model.state_dict().items() if tensor.isfinite().all()}
    assert len(finite) > 20 and all(bits(model)[name] == bits(other)[name] for name in finite)


def test_the_path_between_two_checkpoints_is_straight(net):
    ends = net("mlp", torch.float64), other_of(net("mlp", torch.float64))
    middle, thirds = copy.deepcopy(ends[0]), copy.deepcopy(ends[0])
    interpolate(chosen(middle, "all"), ends[1].state_dict(), 0.5)
    interpolate(chosen(thirds, "all"), ends[1].state_dict(), 0.25)
    interpolate(chosen(thirds, "all"), ends[1].state_dict(), 1 / 3)  # 1/4 + 3/4 * 1/3
    for name, tensor in middle.state_dict().items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, thirds.state_dict()[name], rtol=1e-14, atol=1e-14)


def test_halves_are_interpolated_with_more_digits():
    layer = nn.Linear(1, 1, bias=False).half()
    nn.init.constant_(layer.weight, -60000)
    interpolate(chosen(layer, "all"), {"weight": torch.full((1, 1), 60000.0)}, 0.75)  # the difference is no half
    assert layer.weight.item() == 30000


def tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


def test_a_tied_tensor_is_found_under_any_of_its_names():
    model = tied()
    interpolate(chosen(model, "'0.weight'"), {"2.weight": torch.ones(3, 3)}, 1)
    assert torch.equal(model[0].weight, torch.ones(3, 3))


def test_a_source_may_be_the_model_itself_or_lack_counters(net, bits):
    model = net()
    before = bits(model)
    interpolate(chosen(model, "all"), model.state_dict(), 0.3)
    assert bits(model) == before
    source = {name: tensor for name, tensor in other_of(model).state_dict().items() if "num_batches" not in name}
    names = interpolate(chosen(model, "norm.statistics"), source, 0.7)
    assert names == [f"{k}.running_{what}" for k in (2, 5) for what in ("mean", "var")]


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_swap_exchanges_and_twice_is_identity(net, bits, selector):
    one, other = net("resnet"), other_of(net("resnet"))
    with torch.no_grad():
        one.linear.bias[0], other.linear.bias[0] = torch.nan, -0.0
    firsts, lasts = bits(one), bits(other)
    before, theirs, selection = snapshot(one), snapshot(other), chosen(one, selector)
    assert swap(one, other, selector) == list(selection)
    for name in before:
        mask = selection._mask(name)
        wanted = torch.where(mask, theirs[name], before[name]), torch.where(mask, before[name], theirs[name])
        for model, value in zip((one, other), wanted, strict=True):
            assert torch.equal(model.state_dict()[name].nan_to_num(9), value.nan_to_num(9)), name
    assert (bits(one), bits(other)) != (firsts, lasts)
    swap(one, other, selection)
    assert (bits(one), bits(other)) == (firsts, lasts)


def test_swapped_statistics_are_those_that_the_forward_normalizes_by(net, batch):
    one, other = net("mlp"), other_of(net("mlp"))
    hybrid = copy.deepcopy(one)
    hybrid.load_state_dict(snapshot(one) | {name: other.state_dict()[name] for name in select(one, "norm.statistics")})
    swap(one, other, "norm.statistics")
    with inference(one), inference(hybrid):
        assert torch.equal(one(batch()[0]), hybrid(batch()[0]))


def test_mistakes_are_told_and_nothing_is_changed(net, bits):
    model, other = net("mlp"), net("mlp")
    norm, source = chosen(model, "norm"), snapshot(other_of(model))
    before, theirs = bits(model), bits(other)
    missing = {name.replace("weight", "weights"): tensor for name, tensor in source.items()}
    wide, long = copy.deepcopy(other).double(), copy.deepcopy(other)
    long[5] = nn.BatchNorm1d(6)
    cases = [
        (
            r"share: 1.5 is not allowed; allowed: 0 .* to 1 \(as in FILE\)",
            lambda: interpolate(norm, source, 1.5, "FILE"),
        ),
        ("share: -0.1 is not allowed", lambda: interpolate(norm, source, -0.1)),
        ("share: nan is not finite", lambda: interpolate(norm, source, float("nan"))),
        ("the source has no tensor '2.weight'; nearest: 2.weights", lambda: interpolate(norm, missing, 0.5)),
        ("the source has no tensor '5.weight'", lambda: interpolate(norm, missing, 0.0)),
        (
            r"FILE: 5.bias is \[1\], the model has \[5\]",
            lambda: interpolate(norm, source | {"5.bias": torch.ones(1)}, 0.5, "FILE"),
        ),
        ("other model has no tensor '2.weight'", lambda: swap(model, net("resnet"), "norm")),
        (r"2.weight is \[7\] float32, and \[7\] float64 in the other", lambda: swap(model, wide, "norm")),
        (r"5.weight is \[5\] float32, and \[6\] float32 in the other", lambda: swap(model, long, "norm")),
        ("unknown selector 'nom'", lambda: swap(model, other, "nom")),
        ("bound to another model", lambda: swap(other, model, norm)),
    ]
    for message, call in cases:
        with pytest.raises(UserError, match=message):
            call()
        assert bits(model) == before and bits(other) == theirs
    untied = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    for pair in ((tied(), untied), (untied, tied())):
        with pytest.raises(UserError, match=r"0.weight is tied to other tensors"):
            swap(*pair, "all")
