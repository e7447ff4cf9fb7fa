"""Ascent as a whole: settings, what it is bound to, restoration, and the released algorithms written out with proxies."""

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustlayers.core.errors import UserError
from robustlayers.selection import Inventory
from robustlayers.training.ascent import Ascent, bind, climb, parse_ascent, perturbation, perturbed, stationary
from robustlayers.training.ascent_rules import ASCENTS

# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "apw"}, "unknown ascent 'apw'; nearest: awp"),
        ({"name": "awp", "size": 0}, "ascent: size: 0 is not allowed; allowed: more than 0"),
        ({"name": "awp", "size": "much"}, "ascent: size: 'much' is not a number"),
        ({"name": "sam", "size": -0.1}, "ascent: size: -0.1 is not allowed"),
        ({"name": "sam", "scaling": "global"}, "ascent: scaling: sam does not take it; only awp, rwp"),
        ({"name": "awp", "scaling": "globl"}, "unknown scaling of an ascent 'globl'; nearest: global"),
        ({"name": "sam", "eta": 0.01}, "ascent: eta: sam does not take it; only asam"),
        ({"name": "asam", "eta": -1}, "ascent: eta: -1 is not allowed; allowed: 0 or more"),
        ({"name": "awp", "adaptive_bias": True}, "ascent: adaptive_bias: awp does not take it; only asam"),
        ({"name": "asam", "adaptive_bias": 1}, "ascent: adaptive_bias: 1 is not allowed; allowed: true, false"),
        ({"name": "awp", "vectors": 0}, "ascent: vectors: 0 is not allowed; allowed: true, false"),
        ({"name": "rwp", "steps": 0}, "ascent: steps: 0 is not allowed; allowed: a whole number, 1 or more"),
        ({"name": "rwp", "steps": True}, "ascent: steps: True is not allowed"),
        ({"name": "rwp", "limit": 0}, "ascent: limit: 0 is not allowed; allowed: more than 0"),
        ({"name": "awp", "warmup": 1}, "ascent: warmup: 1 is not allowed; allowed: a share of the phase, 0 to below 1"),
        ({"name": "awp", "warmup": -0.1}, "ascent: warmup: -0.1 is not allowed"),
        ({"name": "awp", "select": 3}, "ascent: select: 3 is not a selector; write all, norm"),
        ({"name": "awp", "gamma": 0.01}, "unknown setting of an ascent 'gamma'; "),
        ({"select": "norm"}, "an ascent is one of awp, rwp, sam, asam, or a mapping with such a name; got"),
    ],
    ids=str,
)
def test_mistakes_are_told(settings, message):
    with pytest.raises(UserError) as caught:
        parse_ascent(settings)
    assert str(caught.value).startswith(message)


def test_an_ascent_is_read_from_a_name_or_a_mapping():
    assert parse_ascent("rwp") == Ascent("rwp") == parse_ascent(Ascent("rwp"))
    assert parse_ascent({"name": "awp", "select": "norm", "vectors": True, "size": "1/100"}) == Ascent(
        "awp", select="norm", size=0.01, vectors=True
    )


@pytest.mark.parametrize("name", ASCENTS)
def test_defaults_are_filled_in_so_that_equal_ascents_have_equal_settings(name):
    own = Ascent(name).resolved()
    assert own.resolved() == own
    assert own == Ascent(name, size=str(own.size), vectors=own.vectors, steps=own.steps, warmup="0").resolved()
    assert own.describe() == Ascent(name).describe()
    assert json.loads(json.dumps(dataclasses.asdict(own))) == dataclasses.asdict(own)
    absent = {entry.name for entry in dataclasses.fields(own) if getattr(own, entry.name) is None}
    assert absent == {"scaling", "eta", "adaptive_bias", "limit"} - set(ASCENTS[name].options) - (
        {"limit"} if name == "rwp" else set()
    )


@pytest.mark.parametrize(
    ("ascent", "text", "steps"),
    [
        (Ascent("awp"), "awp on all, gamma 0.01 for each tensor, no vectors", 1),
        (Ascent("rwp"), "rwp on all, gamma 0.01 over all tensors, 10 steps, losses below 1.7, no vectors", 10),
        (Ascent("sam", select="norm", size=10), "sam on norm, rho 10", 1),
        (
            Ascent("asam", warmup=0.25),
            "asam on all, rho 0.5, eta 0.01, biases as they are, from 25 % of the phase on",
            1,
        ),
        (Ascent("asam", adaptive_bias=True), "asam on all, rho 0.5, eta 0.01, biases by their size too", 1),
        (
            Ascent("sam", vectors=False, steps=3, limit=2),
            "sam on all, rho 0.05, 3 steps, losses below 2, no vectors",
            3,
        ),
    ],
)
def test_the_description_tells_what_decides_and_what_it_costs(ascent, text, steps):
    assert ascent.describe() == text
    assert ascent.passes_per_step == (steps, steps)


@pytest.mark.parametrize(
    ("warmup", "steps", "first"), [(0.0, 7, 0), (0.3, 10, 3), ("1/3", 9, 3), (0.1, 25, 3), (0.9, 5, 5)]
)
def test_the_warm_up_is_a_share_of_the_phase(warmup, steps, first):
    active = [Ascent("awp", warmup=warmup).active(step, steps) for step in range(steps)]
    assert active == [step >= first for step in range(steps)]


# -- what it is bound to ---------------------------------------------------------------------------------------------


def in_norm(model):
    return {
        f"{name}.{attribute}"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for attribute in ("weight", "bias")
    }


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize(
    ("select", "test"),
    [
        ("all", lambda name, norm: True),
        ("~norm", lambda name, norm: not norm),
        ("stage(1)", lambda name, norm: name.startswith("layer1.")),
        ("stage(1) | stage(3)", lambda name, norm: name.startswith(("layer1.", "layer3."))),
        ("norm | conv1", lambda name, norm: norm or name == "conv1.weight"),
    ],
)
def test_selectors_pick_the_parameters_and_vectors_are_a_choice(net, select, test, vectors):
    model = net("resnet")
    norm = in_norm(model)
    expected = [
        name for name, tensor in model.named_parameters() if test(name, name in norm) and (vectors or tensor.dim() > 1)
    ]
    assert expected
    assert bind(Ascent("sam", select=select, vectors=vectors), Inventory(model)) == dict.fromkeys(expected)
    default = bind(Ascent("awp" if not vectors else "sam", select=select), Inventory(model))
    assert default == dict.fromkeys(expected)


def test_only_norm_layers_is_all_that_sam_on_perturbs(net):
    model = net("resnet")
    assert set(bind(Ascent("sam", select="norm"), Inventory(model))) == in_norm(model)


def test_a_part_of_a_tensor_has_a_mask_on_the_device_of_the_tensor(net):
    select = "random(like=norm, of=conv, seed=0)"
    model = net("small-cnn")
    masks = bind(Ascent("awp", select=select), Inventory(model))
    assert sum(int(mask.sum()) for mask in masks.values() if mask is not None) == sum(
        model.get_parameter(n).numel() for n in in_norm(model)
    )
    away = net("small-cnn").to("meta")
    parts = [mask for mask in bind(Ascent("awp", select=select), Inventory(away)).values() if mask is not None]
    assert {mask.device.type for mask in parts} == {"meta"}


def test_a_tied_tensor_is_perturbed_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert bind(Ascent("awp", select='"1"'), Inventory(model)) == {"0.weight": None}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "awp", "select": "norm"}, "ascent awp: awp leaves out tensors with fewer than two dimensions"),
        ({"name": "rwp", "select": "bias"}, "and selector 'bias' picks no others; set vectors: true"),
        ({"name": "sam", "select": "norm", "vectors": False}, "ascent sam: vectors: false leaves out tensors"),
        ({"name": "sam", "select": "norm.statistics"}, "selector 'norm.statistics' picks no parameters, only buffers"),
        ({"name": "sam", "select": "stage(9)"}, "has 3 stage"),
        ({"name": "sam", "select": "norms"}, "unknown selector 'norms'; nearest: norm"),
    ],
)
def test_nothing_to_perturb_is_an_error_that_says_why(net, settings, message):
    with pytest.raises(UserError) as caught:
        bind(Ascent(**settings), Inventory(net("resnet")))
    assert message in str(caught.value)


# -- restoration -----------------------------------------------------------------------------------------------------


def test_weights_come_back_bit_for_bit(net, bits):
    model = net("resnet")
    with torch.no_grad():
        model.get_parameter("linear.bias").copy_(torch.tensor([-0.0, float("nan"), 1e-45]))
    before, tensors = bits(model), dict(model.named_parameters())
    v = {name: torch.full_like(tensor, 0.1) for name, tensor in tensors.items()}
    for _ in range(20):
        with perturbed(tensors, v):
            assert bits(model) != before
    assert bits(model) == before
    # Adding and subtracting, as published code does, is not the same.
    weight = tensors["conv1.weight"].detach()
    assert not torch.equal((weight + 0.1) - 0.1, weight)


def test_weights_come_back_after_an_exception(net, bits):
    model = net("mlp")
    before, tensors = bits(model), dict(model.named_parameters())
    v = {name: torch.ones_like(tensor) for name, tensor in tensors.items()}
    with pytest.raises(ZeroDivisionError), perturbed(tensors, v):
        raise ZeroDivisionError
    assert bits(model) == before
    last = list(v)[-1]
    with pytest.raises(RuntimeError), perturbed(tensors, {**v, last: torch.ones(17)}):  # half of them are in already
        pass
    assert bits(model) == before
    with pytest.raises(KeyError), perturbed(tensors, {**v, "no such tensor": torch.ones(1)}):
        pass
    assert bits(model) == before


def test_the_gradient_inside_is_that_of_a_model_with_other_weights(net, batch):
    model = net("resnet", torch.float64).train()
    tensors, masks = dict(model.named_parameters()), bind(Ascent("sam", size=0.5), Inventory(model))
    v = climb(Ascent("sam", size=0.5), tensors, masks, lambda: slopes(model, batch))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in other.named_parameters():
            tensor += v[name]
    with perturbed(tensors, v):
        inside = slopes(model, batch)
    expected, outside = slopes(other, batch), slopes(model, batch)
    for name in tensors:
        assert torch.equal(inside[name], expected[name]), name
    assert not torch.equal(inside["conv1.weight"], outside["conv1.weight"])


def test_a_climb_leaves_the_weights_and_the_flags(net, batch, bits):
    model = net("mlp", torch.float64).eval()
    model[1].weight.requires_grad_(False)
    flags = [tensor.requires_grad for tensor in model.parameters()]
    before, ascent = bits(model), Ascent("rwp")
    masks, tensors = bind(ascent, Inventory(model)), dict(model.named_parameters())

    def gradients():
        some = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
        x, y = batch(8, dtype=torch.float64)
        found = torch.autograd.grad(functional.cross_entropy(model(x), y), list(some.values()), create_graph=True)
        return dict(zip(some, found, strict=True))

    v = climb(ascent, tensors, masks, gradients)
    assert list(v) == ["4.weight", "6.weight"]
    assert not any(tensor.requires_grad for tensor in v.values())
    assert bits(model) == before
    assert [tensor.requires_grad for tensor in model.parameters()] == flags


# -- several steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_two_steps_by_hand(shared):
    # norm(w) = 5. Step 1: G = [3, 0], v = 0.1 * 5 * [1, 0]. Step 2: G = [3, 0] + [0, 4], v = 0.1 * 5 * [3, 4] / 5.
    w, script = torch.tensor([[3.0, 4.0]], dtype=torch.float64), iter([[[3.0, 0.0]], [[0.0, 4.0]]])
    buffer = torch.zeros(1, 2, dtype=torch.float64)
    seen = []

    def gradients():
        seen.append(w.tolist())
        found = torch.tensor(next(script), dtype=torch.float64)
        return {"w": buffer.copy_(found) if shared else found}  # a caller may use one tensor for all its gradients

    v = climb(Ascent("rwp", size=0.1, steps=2), {"w": w}, {"w": None}, gradients)
    assert seen == [[[3.0, 4.0]], [[3.5, 4.0]]]
    torch.testing.assert_close(v["w"], torch.tensor([[0.3, 0.4]], dtype=torch.float64), rtol=1e-14, atol=0)
    assert w.tolist() == [[3.0, 4.0]]


def test_the_gradients_so_far_are_added():
    w, one, two = (
        {"w": torch.tensor([values], dtype=torch.float64)} for values in ([3.0, 4.0], [3.0, 0.0], [0.0, 4.0])
    )
    added = perturbation(Ascent("rwp"), w, two, {"w": None}, one)
    assert torch.equal(added["w"], perturbation(Ascent("rwp"), w, {"w": one["w"] + two["w"]}, {"w": None})["w"])
    assert torch.equal(
        perturbation(Ascent("rwp"), w, {}, {"w": None}, one)["w"], perturbation(Ascent("rwp"), w, one, {"w": None})["w"]
    )
    assert one["w"].tolist() == [[3.0, 0.0]]


def test_stationary_samples_are_those_below_the_limit():
    generator = torch.Generator().manual_seed(0)
    logits, y = 3 * torch.randn(50, 4, generator=generator), torch.randint(0, 4, (50,), generator=generator)
    losses = -logits.log_softmax(1)[torch.arange(50), y]
    found = stationary(logits, y, 1.7)
    assert 0 < found.sum() < 50
    assert torch.equal(found, losses < 1.7)
    assert not stationary(torch.full((1, 4), float("nan")), torch.tensor([0]), 1.7)


# -- the released algorithms, with proxy models ------------------------------------------------------------------------


def slopes(model, batch, limit=None):
    x, y = batch(12, dtype=torch.float64)
    logits, tensors = model(x), dict(model.named_parameters())
    losses = functional.cross_entropy(logits, y, reduction="none")
    loss = losses.mean() if limit is None else (losses * stationary(logits, y, limit)).mean()
    return dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values())), strict=True))


def differences(old, new):
    """new - old for the tensors that the released code perturbs."""
    return {
        name: (after - before).detach()
        for (name, before), after in zip(old.named_parameters(), new.parameters(), strict=True)
        if before.dim() > 1 and "weight" in name
    }


def ascended(model, loss):
    """A copy of the model after one step of SGD that raises the loss."""
    proxy = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)
    (-loss(proxy)).backward()
    optimizer.step()
    return proxy


def awp_by_proxy(model, x, y, gamma):
    proxy = ascended(model, lambda proxy: functional.cross_entropy(proxy(x), y))
    return {
        name: gamma * model.get_parameter(name).norm() / (difference.norm() + 1e-20) * difference
        for name, difference in differences(model, proxy).items()
    }


def rwp_by_proxy(model, x, y, gamma, limit, steps, counts):
    def loss(proxy):
        losses = functional.cross_entropy(proxy(x), y, reduction="none")
        counts.append(int((losses < limit).sum()))
        return torch.where(losses < limit, losses, 0).sum() / len(x)

    total, scaled = {}, {}
    for _ in range(steps):
        start = copy.deepcopy(model)
        with torch.no_grad():
            for name, v in scaled.items():
                start.get_parameter(name).add_(gamma * v)
        step = differences(start, ascended(start, loss))
        total = {name: step[name] + total.get(name, 0) for name in step}
        weights = torch.cat([model.get_parameter(name).flatten() for name in total])
        whole = weights.norm() / (torch.cat([d.flatten() for d in total.values()]).norm() + 1e-20)
        scaled = {name: (whole * d).detach() for name, d in total.items()}
    return {name: gamma * v for name, v in scaled.items()}


@pytest.mark.parametrize("gamma", [0.01, 0.005])
@pytest.mark.parametrize("name", ["mlp", "small-cnn", "resnet"])
def test_awp_is_the_released_algorithm(net, batch, name, gamma):
    model, (x, y) = net(name, torch.float64).train(), batch(12, dtype=torch.float64)
    ascent = Ascent("awp", size=gamma)
    masks, tensors = bind(ascent, Inventory(model)), dict(model.named_parameters())
    found, expected = perturbation(ascent, tensors, slopes(model, batch), masks), awp_by_proxy(model, x, y, gamma)
    assert list(found) == list(expected)
    for name, v in expected.items():
        assert (found[name] - v).abs().max() < 1e-12
        assert v.abs().max() > 1e-4


@pytest.mark.parametrize("select", ["stage(1)", "stage(1) | stage(3)", "stage(2) | stage(3)", "conv"])
def test_awp_on_some_blocks_is_the_released_one_with_the_other_blocks_left_out(net, batch, select):
    model, (x, y) = net("resnet", torch.float64).train(), batch(12, dtype=torch.float64)
    ascent = Ascent("awp", select=select)
    masks = bind(ascent, Inventory(model))
    found, whole = (
        perturbation(ascent, dict(model.named_parameters()), slopes(model, batch), masks),
        awp_by_proxy(model, x, y, 0.01),
    )
    assert 0 < len(found) < len(whole)
    for name, v in found.items():
        assert (v - whole[name]).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["mlp", "small-cnn", "resnet"])
def test_rwp_is_the_released_algorithm(net, batch, name):
    model, (x, y) = net(name, torch.float64).train(), batch(12, dtype=torch.float64)
    # A limit that some samples are above and some below, and that some of them cross as the losses rise.
    limit = functional.cross_entropy(model(x), y, reduction="none").sort().values[7].item() + 1e-3
    ascent, counts = Ascent("rwp", size=0.02, limit=limit), []
    expected = rwp_by_proxy(model, x, y, 0.02, limit, 10, counts)
    found = climb(
        ascent, dict(model.named_parameters()), bind(ascent, Inventory(model)), lambda: slopes(model, batch, limit)
    )
    assert len(counts) == 10
    assert counts[1] > 0
    assert min(counts) < max(counts) < len(x)
    assert list(found) == list(expected)
    for name, v in expected.items():
        assert (found[name] - v).abs().max() < 1e-12
        assert v.abs().max() > 1e-4


def test_rwp_stops_where_no_sample_is_stationary(net, batch):
    model = net("resnet", torch.float64).train()
    ascent = Ascent("rwp", limit=1e-6)
    v = climb(
        ascent, dict(model.named_parameters()), bind(ascent, Inventory(model)), lambda: slopes(model, batch, 1e-6)
    )
    assert v
    assert not any(tensor.any() for tensor in v.values())
