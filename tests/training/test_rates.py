"""Layer rates by relative gradient norm, against the definition written out."""

import itertools
import math

import pytest
import torch
from torch.nn import functional

from robustlayers.core.errors import UserError
from robustlayers.core.files import read_tensors, write_tensors
from robustlayers.selection import Partition
from robustlayers.training import (
    GroupSettings,
    OptimizerSettings,
    Schedule,
    apply_rates,
    average_norms,
    build_optimizer,
    load_optimizer,
    optimizer_tensors,
    relative_gradient_norms,
)

SIGNALS = {"norm": {"natural": 1.0}, "others": {"natural": 1.0}}
SETTINGS = OptimizerSettings(lr=0.2, rates="rgn", decay="weights", groups={"norm": GroupSettings(scale=0.5)})


def built(model, settings=SETTINGS, groups=None, signals=SIGNALS):
    optimizer = build_optimizer(Partition(model, groups or {"norm": "norm", "others": "rest"}), signals, settings)
    assert optimizer is not None
    return optimizer


def gradients_of(model, x, y):
    names, tensors = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(functional.cross_entropy(model(x), y), tensors), strict=True))


def by_definition(model, batches):
    """Rate of each module: mean over batches of ||g|| / ||theta||, over the largest of them; in plain Python."""
    means = {}
    for gradients in batches:
        for name, module in model.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if own:
                square = sum(float(gradients[f"{name}.{key}"].square().sum()) for key in own)
                size = sum(float(tensor.detach().square().sum()) for tensor in own.values())
                means[name] = means.get(name, 0.0) + math.sqrt(square / size) / len(batches)
    return {name: value / max(means.values()) for name, value in means.items()}


@pytest.mark.parametrize("name", ["mlp", "small-cnn", "resnet"])
def test_the_rates_are_those_of_the_definition(net, batch, name):
    model = net(name, torch.float64).train()
    optimizer = built(model)
    batches = [gradients_of(model, *batch(6, seed, torch.float64)) for seed in range(3)]
    rates = apply_rates(
        optimizer, average_norms([relative_gradient_norms(optimizer, gradients) for gradients in batches])
    )
    wanted = by_definition(model, batches)
    assert len(wanted) > 4
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        assert group["rate"] == rate == pytest.approx(wanted[group["module"]], rel=1e-12)
    assert max(rates) == 1.0 and min(rates) > 0
    Schedule("linear").apply(optimizer, 1, 4)
    for group in optimizer.param_groups:
        base = 0.1 if group["group"] == "norm" else 0.2
        assert group["lr"] == pytest.approx(base * 0.75 * wanted[group["module"]], rel=1e-12)


def test_a_frozen_module_does_not_count_in_the_maximum(net, batch):
    model = net(dtype=torch.float64).train()
    gradients = gradients_of(model, *batch(6, 0, torch.float64))
    every = built(model)
    highest = relative_gradient_norms(every, gradients).index(max(relative_gradient_norms(every, gradients)))
    name = every.param_groups[highest]["names"][0].rpartition(".")[0]
    frozen = {"out": f"{name}.*", "others": "rest"}
    optimizer = built(
        model, OptimizerSettings(rates="rgn"), groups=frozen, signals={"out": {}, "others": {"natural": 1.0}}
    )
    assert max(apply_rates(optimizer, relative_gradient_norms(optimizer, gradients))) == 1.0
    assert all(group["module"] != name for group in optimizer.param_groups)


def test_a_module_has_one_rate_in_however_many_parameter_groups_it_stands(net, batch):
    model = net()
    groups = {"biases": "bias", "others": "rest"}
    optimizer = built(
        model, OptimizerSettings(rates="rgn"), groups, {"biases": {"natural": 1}, "others": {"natural": 1}}
    )
    rates = apply_rates(optimizer, relative_gradient_norms(optimizer, gradients_of(model, *batch())))
    found = {}
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        found.setdefault(group["module"], []).append(rate)
    assert all(len(values) == 2 and len(set(values)) == 1 for values in found.values())


def test_without_modules_each_parameter_group_is_a_layer():
    weights = [torch.nn.Parameter(torch.full((4,), value)) for value in (1.0, 2.0)]
    optimizer = torch.optim.SGD([{"params": [w], "names": [n]} for n, w in zip("ab", weights, strict=True)], lr=1.0)
    assert relative_gradient_norms(optimizer, {"a": torch.ones(4), "b": torch.ones(4)}) == [1.0, 0.5]


def test_norms_of_zero(net):
    model = net()
    optimizer = built(model)
    index = {tuple(group["names"]): place for place, group in enumerate(optimizer.param_groups)}
    gradients = {name: torch.ones_like(tensor) for name, tensor in model.named_parameters()}
    gradients["4.weight"].zero_()
    del gradients["4.bias"]  # a tensor that got none
    with torch.no_grad():
        model[6].weight.zero_()
        model[6].bias.zero_()
    rates = apply_rates(optimizer, relative_gradient_norms(optimizer, gradients))
    assert rates[index["4.weight",]] == rates[index["4.bias",]] == 0.0  # nothing to learn: it stays
    assert rates[index["6.weight",]] == rates[index["6.bias",]] == 1.0  # it may leave zero
    others = [rate for place, rate in enumerate(rates) if optimizer.param_groups[place]["module"] in "125"]
    assert max(others) == 1.0 and 0 < min(others) < 1.0  # and the others are not squeezed by its infinity
    assert apply_rates(optimizer, relative_gradient_norms(optimizer, {})) == [1.0] * len(rates)


def test_the_order_of_the_batches_does_not_matter():
    measured = [[0.1, 1e16], [0.2, 1.0], [0.3, -1e16], [1e-9, 3.0]]
    assert {tuple(average_norms(some)) for some in itertools.permutations(measured)} == {
        ((0.1 + 0.2 + 0.3 + 1e-9) / 4, 1.0)
    }


def test_the_rates_come_back_from_a_file(net, batch, tmp_path):
    model = net()
    optimizer = built(model)
    rates = apply_rates(optimizer, relative_gradient_norms(optimizer, gradients_of(model, *batch())))
    assert len(set(rates)) > 3
    for name, gradient in gradients_of(model, *batch()).items():
        model.get_parameter(name).grad = gradient
    optimizer.step()
    state = optimizer_tensors(optimizer)
    write_tensors(tmp_path / "state", state)

    resumed = built(net())
    assert [group["rate"] for group in resumed.param_groups] != rates  # the state is not what it begins with
    load_optimizer(resumed, read_tensors(tmp_path / "state"))
    assert [group["rate"] for group in resumed.param_groups] == rates
    again = optimizer_tensors(resumed)
    assert set(again) == set(state) and all(torch.equal(again[name], state[name]) for name in state)
    assert all("rate" not in slots for slots in resumed.state.values())
    load_optimizer(resumed, {})
    assert [group["rate"] for group in resumed.param_groups] == [1.0] * len(rates)
    Schedule().apply(optimizer, 0, 1)
    assert [group["lr"] for group in optimizer.param_groups] == [
        group["base_lr"] * rate for group, rate in zip(optimizer.param_groups, rates, strict=True)
    ]


def test_mistakes_are_told(net):
    model = net()
    optimizer = built(model)
    gradients = {name: torch.ones_like(tensor) for name, tensor in model.named_parameters()}
    gradients["4.bias"][0] = math.nan
    with pytest.raises(UserError, match=r"^layer rates: the gradient of 4\.(weight|bias) or its layer is not finite$"):
        relative_gradient_norms(optimizer, gradients)
    with pytest.raises(UserError, match=r"^layer rates need at least one batch to be measured on$"):
        average_norms([])
    count = len(optimizer.param_groups)
    with pytest.raises(UserError, match=f"^layer rates: 2 norms for {count} parameter groups$"):
        apply_rates(optimizer, [1.0, 2.0])
