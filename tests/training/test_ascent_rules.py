"""The rules of ascent: by hand on two parameters, to first order on networks, and by what leaves them unchanged."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from robustlayers.selection import Inventory
from robustlayers.training.ascent import Ascent, bind, perturbation, perturbed, stationary
from robustlayers.training.ascent_rules import ASCENTS

EVERY = [
    Ascent("awp"),
    Ascent("awp", scaling="global", vectors=True),
    Ascent("rwp", vectors=True),
    Ascent("rwp", scaling="tensor"),
    Ascent("sam"),
    Ascent("asam"),
    Ascent("asam", eta=0, adaptive_bias=True),
]
IDS = [ascent.describe() for ascent in EVERY]


def double(values):
    return torch.tensor(values, dtype=torch.float64)


# Norms 5 and 12 of the weights, 13 together; norms 3 and 4 of the gradients, 5 together.
WEIGHTS = {"a.weight": double([[3.0, 4.0]]), "b.weight": double([[12.0, 0.0]])}
GRADIENTS = {"a.weight": double([[0.0, 3.0]]), "b.weight": double([[4.0, 0.0]])}
WHOLE = dict.fromkeys(WEIGHTS)


@pytest.mark.parametrize(
    ("ascent", "a", "b"),
    [
        # 0.1 * 5 * [0, 3] / 3 and 0.1 * 12 * [4, 0] / 4
        (Ascent("awp", size=0.1), [0, 0.5], [1.2, 0]),
        # 0.1 * 13 * [0, 3] / 5 and 0.1 * 13 * [4, 0] / 5
        (Ascent("awp", size=0.1, scaling="global"), [0, 0.78], [1.04, 0]),
        (Ascent("rwp", size=0.1), [0, 0.78], [1.04, 0]),
        (Ascent("rwp", size=0.1, scaling="tensor"), [0, 0.5], [1.2, 0]),
        # 0.5 * [0, 3] / 5 and 0.5 * [4, 0] / 5
        (Ascent("sam", size=0.5), [0, 0.3], [0.4, 0]),
    ],
    ids=str,
)
def test_two_parameters_by_hand(ascent, a, b):
    found = perturbation(ascent, WEIGHTS, GRADIENTS, WHOLE)
    torch.testing.assert_close(found["a.weight"], double([a]), rtol=1e-14, atol=0)
    torch.testing.assert_close(found["b.weight"], double([b]), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("adaptive", "slope", "expected"),
    [
        # T = 2 + 1 and 1, T g = 3 * 1 and 1 * 4, of norm 5: 0.5 * 9 * 1 / 5 and 0.5 * 1 * 4 / 5
        (False, 4.0, (0.9, 0.4)),
        # T = 2 + 1 and 1 + 1, T g = 3 * 1 and 2 * 2, of norm 5: 0.5 * 9 * 1 / 5 and 0.5 * 4 * 2 / 5
        (True, 2.0, (0.9, 0.8)),
    ],
)
def test_asam_by_hand_with_a_bias(adaptive, slope, expected):
    ascent = Ascent("asam", size=0.5, eta=1, adaptive_bias=adaptive)
    weights = {"weight": double([[-2.0]]), "bias": double([1.0])}
    found = perturbation(ascent, weights, {"weight": double([[1.0]]), "bias": double([slope])}, dict.fromkeys(weights))
    assert [found["weight"].item(), found["bias"].item()] == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("name", "bias"),
    [
        ("bias", True),
        ("layer.bias", True),
        ("attention.in_proj_bias", True),
        ("lstm.bias_ih_l0", True),
        ("weight", False),
        ("bias.weight", False),
        ("unbiased.scale", False),
        ("attention.in_proj_weight", False),
    ],
)
def test_asam_knows_a_bias_by_the_last_part_of_its_name(name, bias):
    weights, gradients = {name: double([9.0])}, {name: double([1.0])}
    plain, adaptive = (Ascent("asam", adaptive_bias=flag, size=1, eta=0) for flag in (False, True))
    assert perturbation(adaptive, weights, gradients, {name: None})[name].item() == pytest.approx(9)
    assert perturbation(plain, weights, gradients, {name: None})[name].item() == pytest.approx(1 if bias else 9)


@pytest.mark.parametrize("ascent", EVERY, ids=IDS)
def test_entries_outside_the_mask_neither_move_nor_count(ascent):
    mask = torch.tensor([[True, True, False]])
    weights = {**WEIGHTS, "a.weight": double([[3.0, 4.0, 100.0]])}
    gradients = {**GRADIENTS, "a.weight": double([[0.0, 3.0, float("nan")]])}  # not even what is not a number counts
    found = perturbation(ascent, weights, gradients, {"a.weight": mask, "b.weight": None})
    without = perturbation(ascent, WEIGHTS, GRADIENTS, WHOLE)
    assert found["a.weight"][0, 2] == 0
    assert torch.equal(found["a.weight"][:, :2], without["a.weight"])
    assert torch.equal(found["b.weight"], without["b.weight"])


@pytest.mark.parametrize("ascent", EVERY, ids=IDS)
def test_tensors_that_are_not_selected_neither_move_nor_count(ascent):
    found = perturbation(ascent, WEIGHTS, GRADIENTS, {"a.weight": None})
    alone = perturbation(
        ascent, {"a.weight": WEIGHTS["a.weight"]}, {"a.weight": GRADIENTS["a.weight"]}, {"a.weight": None}
    )
    assert list(found) == ["a.weight"]
    assert torch.equal(found["a.weight"], alone["a.weight"])


@pytest.mark.parametrize("ascent", EVERY, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_gradient_gives_a_zero_perturbation(ascent, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in WEIGHTS.items()}
    for found in perturbation(
        ascent, weights, {name: torch.zeros_like(w) for name, w in weights.items()}, WHOLE
    ).values():
        assert torch.equal(found, torch.zeros_like(found))
    assert perturbation(ascent, weights, {}, WHOLE) == {}


@pytest.mark.parametrize("ascent", EVERY, ids=IDS)
def test_a_tensor_without_gradient_is_one_with_a_zero_gradient(ascent):
    some = {"a.weight": GRADIENTS["a.weight"]}
    absent = perturbation(ascent, WEIGHTS, some, WHOLE)
    zero = perturbation(ascent, WEIGHTS, {**some, "b.weight": torch.zeros(1, 2, dtype=torch.float64)}, WHOLE)
    assert list(absent) == ["a.weight"]
    assert torch.equal(absent["a.weight"], zero["a.weight"])
    assert not zero["b.weight"].any()


@pytest.mark.parametrize("ascent", EVERY, ids=IDS)
def test_nothing_waits_for_the_device(ascent):
    # Tensors without values: reading one on the host is an error.
    weights = {name: torch.empty(2, 3, device="meta") for name in WEIGHTS}
    masks = {"a.weight": torch.empty(2, 3, dtype=torch.bool, device="meta"), "b.weight": None}
    found = perturbation(ascent, weights, weights, masks, weights)
    assert {tensor.device.type for tensor in found.values()} == {"meta"}
    with perturbed(weights, found):
        pass
    logits, y = torch.empty(4, 3, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    assert stationary(logits, y, 1.7).dtype == torch.bool


# -- on networks -----------------------------------------------------------------------------------------------------


def loss_of(model, batch):
    x, y = batch(12, dtype=torch.float64)
    return functional.cross_entropy(model(x), y)


def slopes(model, batch):
    tensors = dict(model.named_parameters())
    return dict(zip(tensors, torch.autograd.grad(loss_of(model, batch), list(tensors.values())), strict=True))


def predicted(ascent, tensors, gradients, masks):
    """What the loss rises by to first order, from the selected entries of each tensor as one vector."""
    own = ascent.resolved()
    take = {name: slice(None) if mask is None else mask for name, mask in masks.items()}
    w = {name: tensors[name].detach()[take[name]].flatten() for name in masks}
    g = {name: gradients[name][take[name]].flatten() for name in masks}
    if own.name in ("awp", "rwp") and own.scaling == "tensor":
        return own.size * sum(w[name].norm() * g[name].norm() for name in masks)
    if own.name in ("awp", "rwp"):
        return own.size * torch.cat(list(w.values())).norm() * torch.cat(list(g.values())).norm()
    if own.name == "asam":
        still = {name: name.endswith(".bias") and not own.adaptive_bias for name in masks}
        g = {name: g[name] if still[name] else g[name] * (w[name].abs() + own.eta) for name in masks}
    return own.size * torch.cat(list(g.values())).norm()


@pytest.mark.parametrize("ascent", EVERY, ids=IDS)
@pytest.mark.parametrize(
    ("name", "select"),
    [
        ("resnet", "all"),
        ("resnet", "~norm"),
        ("resnet", "stage(1)"),
        ("resnet", "random(like=norm, of=conv, seed=1)"),
        ("small-cnn", "norm"),
        ("mlp", "linear & channels(linear, 0.5)"),
    ],
)
def test_the_loss_rises_as_predicted_to_first_order(net, batch, ascent, name, select):
    model = net(name, torch.float64).train()
    ascent = Ascent(**{**vars(ascent), "select": select, "vectors": True if select == "norm" else ascent.vectors})
    tensors, masks = dict(model.named_parameters()), bind(ascent, Inventory(model))
    gradients = slopes(model, batch)
    found = perturbation(ascent, tensors, gradients, masks)
    expected = predicted(ascent, tensors, gradients, masks)
    rise = torch.zeros((), dtype=torch.float64)
    for sign in (1, -1):
        with perturbed(tensors, {name: sign * 1e-5 * v for name, v in found.items()}), torch.no_grad():
            rise += sign * loss_of(model, batch)
    assert expected > 0
    assert (rise / 2e-5).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("ascent", [ascent for ascent in EVERY if ascent.name != "asam"], ids=str)
def test_the_perturbation_is_as_long_as_its_size_says(net, batch, ascent):
    model = net("resnet", torch.float64)
    tensors, masks = dict(model.named_parameters()), bind(ascent, Inventory(model))
    found = perturbation(ascent, tensors, slopes(model, batch), masks)
    size = ascent.resolved().size
    if ascent.resolved().scaling == "tensor":
        for name, v in found.items():
            assert v.norm().item() == pytest.approx(size * tensors[name].norm().item(), rel=1e-12)
        return
    length = torch.cat([v.flatten() for v in found.values()]).norm().item()
    whole = torch.cat([tensors[name].detach().flatten() for name in masks]).norm().item()
    assert length == pytest.approx(size * (1 if ascent.name == "sam" else whole), rel=1e-12)


@given(scale=st.floats(1e-6, 1e6))
@pytest.mark.parametrize("ascent", EVERY, ids=IDS)
def test_the_scale_of_the_loss_does_not_matter(ascent, scale):
    scaled = perturbation(ascent, WEIGHTS, {name: scale * g for name, g in GRADIENTS.items()}, WHOLE)
    for name, v in perturbation(ascent, WEIGHTS, GRADIENTS, WHOLE).items():
        torch.testing.assert_close(scaled[name], v, rtol=1e-12, atol=0)


@given(seed=st.integers(0, 1000))
def test_asam_follows_a_change_of_scale_of_the_weights(seed):
    # Kwon et al. 2021: where f(A w) = f(w), gradients at A w are g / A, and v(A w) = A v(w); eta would be in the way.
    generator = torch.Generator().manual_seed(seed)
    scales = {name: 10 ** (2 * torch.rand(w.shape, generator=generator).double() - 1) for name, w in WEIGHTS.items()}
    ascent = Ascent("asam", eta=0)
    found = perturbation(ascent, WEIGHTS, GRADIENTS, WHOLE)
    weights = {name: w * scales[name] for name, w in WEIGHTS.items()}
    scaled = perturbation(ascent, weights, {name: g / scales[name] for name, g in GRADIENTS.items()}, WHOLE)
    for name, v in found.items():
        torch.testing.assert_close(scaled[name], v * scales[name], rtol=1e-12, atol=0)


def test_asam_sees_through_the_scale_of_neurons_and_sam_does_not(batch):
    # A ReLU network whose neurons are made larger before and smaller after is the same function.
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(*shape, generator=generator).double() / 4 for shape in ((9, 64), (3, 9)))
    scale = 10 ** (2 * torch.rand(9, generator=generator).double() - 1)

    def risen(ascent, one, two):
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 9, bias=False), nn.ReLU(), nn.Linear(9, 3, bias=False)
        ).double()
        tensors = dict(model.named_parameters())
        with torch.no_grad():
            tensors["1.weight"].copy_(one)
            tensors["3.weight"].copy_(two)
        found = perturbation(ascent, tensors, slopes(model, batch), bind(ascent, Inventory(model)))
        with perturbed(tensors, found), torch.no_grad():
            return loss_of(model, batch).item()

    plain, scaled = (first, second), (first * scale[:, None], second / scale)
    for ascent, same in ((Ascent("asam", eta=0), True), (Ascent("sam", size=0.5), False)):
        assert (risen(ascent, *plain) == pytest.approx(risen(ascent, *scaled), rel=1e-10)) == same


def test_every_rule_is_covered_here():
    assert {ascent.name for ascent in EVERY} == set(ASCENTS)
