"""What every norm layer does in a pass that is told its setting, and that nothing of it is left behind."""

import copy
import importlib.util
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from robustlayers.core.random import stream
from robustlayers.normalization import Setting, inference, normalizing
from robustlayers.selection import norm_layers

_spec = importlib.util.spec_from_file_location("layer_cases", Path(__file__).with_name("layer_cases.py"))
assert _spec is not None and _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

BUFFERS, LAYERS, SETTINGS = cases.BUFFERS, cases.LAYERS, cases.SETTINGS
Breaks, PlainSubclass, Stubborn = cases.Breaks, cases.PlainSubclass, cases.Stubborn
buffers_of, make, state_of = cases.buffers_of, cases.make, cases.state_of


def by_hand(layer, x, by, update):
    """Output and buffers from the formulas of Ioffe & Szegedy 2015 (and of Ulyanov et al. 2016 for instance norm)."""
    instance = isinstance(layer, nn.modules.instancenorm._InstanceNorm)
    axes = tuple(range(2, x.ndim)) if instance else (0, *range(2, x.ndim))
    mean = x.mean(axes, keepdim=True)
    var = ((x - mean) ** 2).mean(axes, keepdim=True)
    count = x.numel() / mean.numel()
    shape = [1, -1] + [1] * (x.ndim - 2)
    old_mean, old_var = layer.running_mean.clone(), layer.running_var.clone()
    tracked = layer.num_batches_tracked.clone()
    if update:
        tracked += 0 if instance else 1
        factor = layer.momentum
        if factor is None:
            factor = 0.0 if instance else 1 / float(tracked)
        new_mean, new_var = (t.mean(0).flatten() for t in (mean, var * count / (count - 1)))
        buffers = (old_mean * (1 - factor) + new_mean * factor, old_var * (1 - factor) + new_var * factor, tracked)
    else:
        buffers = (old_mean, old_var, tracked)
    if by == "running":
        mean, var = old_mean.view(shape), old_var.view(shape)
    out = (x - mean) / (var + layer.eps).sqrt()
    if layer.affine:
        out = out * layer.weight.view(shape) + layer.bias.view(shape)
    return out, dict(zip(BUFFERS, buffers, strict=True))


ALL = list(product(LAYERS, ["batch", "running"], [True, False], [0.1, 0.3, None], [True, False]))


@pytest.mark.parametrize(("name", "by", "update", "momentum", "affine"), ALL)
def test_each_setting_is_the_formula(name, by, update, momentum, affine):
    model, x = make(name, momentum, affine)
    layer = model[0]
    expected, expected_buffers = by_hand(layer, x, by, update)
    objects = [getattr(layer, name) for name in BUFFERS]
    with normalizing(model, {layer: (by, update)}, training=True):
        out = model(x)
    assert torch.allclose(out, expected, rtol=1e-12, atol=1e-12)
    for key, value in expected_buffers.items():
        assert torch.allclose(getattr(layer, key), value, rtol=1e-12, atol=1e-12), key
    if not (name == "Stubborn" and update):  # which puts other tensors there by itself
        assert all(getattr(layer, key) is buffer for key, buffer in zip(BUFFERS, objects, strict=True))


@pytest.mark.parametrize(
    ("name", "by", "update", "momentum"), list(product(LAYERS, ["batch", "running"], [True, False], [0.1, None]))
)
def test_each_setting_is_torchs_own_forward_bit_for_bit(name, by, update, momentum):
    model, x = make(name, momentum)
    layer = model[0]
    reference, trained = copy.deepcopy(layer), copy.deepcopy(layer).train()
    expected = reference.train()(x) if by == "batch" else reference.eval()(x)
    trained(x)
    before = buffers_of(layer)
    with normalizing(model, {layer: (by, update)}, training=True):
        out = model(x)
    assert torch.equal(out, expected)
    for key in BUFFERS:
        assert torch.equal(getattr(layer, key), getattr(trained, key) if update else before[key]), key
    if not isinstance(layer, nn.modules.instancenorm._InstanceNorm) or momentum is not None:
        moved = any(not torch.equal(getattr(layer, key), before[key]) for key in BUFFERS)
        assert moved == update


@pytest.mark.parametrize(("name", "momentum"), list(product(LAYERS, [0.2, None])))
def test_several_forwards_update_several_times_each_by_the_statistics_before_it(name, momentum):
    model, x = make(name, momentum)
    layer = model[0]
    reference = copy.deepcopy(layer)
    with normalizing(model, {layer: ("running", True)}, training=False):
        for factor in (1.0, 2.0, -1.0):
            out = model(factor * x)
            assert torch.equal(out, reference.eval()(factor * x))
            reference.train()(factor * x)
    for key in BUFFERS:
        assert torch.equal(getattr(layer, key), getattr(reference, key))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("later", ["own update", "later pass"])
def test_the_gradient_is_that_of_the_statistics_that_normalized(name, later):
    """Autograd keeps running statistics by reference and is not told of updates: a known trap."""
    model, x = make(name)
    layer = model[0]
    reference = copy.deepcopy(model).eval()
    x.requires_grad_()
    weights = torch.randn(x.shape, generator=stream(0, "w"), dtype=x.dtype)
    wanted = torch.autograd.grad((reference(x) ** 2 * weights).sum(), [x, *reference.parameters()])
    if later == "own update":
        with normalizing(model, {layer: ("running", True)}, training=True):
            out = model(x)
    else:
        with normalizing(model, {layer: ("running", False)}, training=True, moving=[layer]):
            out = model(x)
        with normalizing(model, {layer: ("batch", True)}, training=True):
            model(x.detach())
    assert not torch.equal(layer.running_var, reference[0].running_var)
    found = torch.autograd.grad((out**2 * weights).sum(), [x, *model.parameters()])
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def mixed():
    """A model with every kind of layer, each in a mode and with attributes of its own."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1),
        nn.BatchNorm2d(4),
        nn.Sequential(PlainSubclass(4, momentum=None), nn.Dropout(0.5), nn.InstanceNorm2d(4, track_running_stats=True)),
        nn.GroupNorm(2, 4),
        nn.BatchNorm2d(4, track_running_stats=False),
        Stubborn(4),
        nn.SyncBatchNorm(4, momentum=0.7),
    )
    for place, module in enumerate(model.modules()):
        module.training = place % 3 != 1
    model[6].track_running_stats = False  # as some people do to freeze a layer
    return model


def settings_of(model, by, update):
    return dict.fromkeys(norm_layers(model).values(), (by, update))


@pytest.mark.parametrize(("by", "update"), SETTINGS)
@pytest.mark.parametrize("training", [True, False])
def test_everything_is_put_back(by, update, training):
    model = mixed()
    before = state_of(model)
    with normalizing(model, settings_of(model, by, update), training=training):
        norms = norm_layers(model).values()
        assert all(module.training == training for module in model.modules() if module not in norms)
        assert all(module.training == (by == "batch") for module in norms)
    assert state_of(model) == before
    with inference(model):
        assert not any(module.training for module in model.modules())
    assert state_of(model) == before


@pytest.mark.parametrize(("by", "update"), SETTINGS)
def test_a_pass_without_update_leaves_the_buffers_in_every_bit(by, update, bits):
    model = mixed()
    before, frozen = state_of(model), bits(model)
    with normalizing(model, settings_of(model, by, update), training=True):
        model(torch.randn(3, 2, 2, 2, generator=stream(0, "x")))
    if update:
        assert {k for k, v in bits(model).items() if v != frozen[k]} == {
            f"{place}.{key}"
            for place in ("1", "2.0", "2.2", "5")  # 6 does not track
            for key in BUFFERS
            if (place, key) != ("2.2", "num_batches_tracked")  # instance norm never counts
        }
    else:
        assert state_of(model) == before


@pytest.mark.parametrize(("outer", "inner"), list(product(SETTINGS, SETTINGS)))
def test_contexts_nest(outer, inner):
    model, x = make("BatchNorm2d")
    stubborn, _ = make("Stubborn")
    both = nn.Sequential(model[0], stubborn[0]).eval()
    both[1].train()
    before = state_of(both)
    expected = {}
    for setting in (outer, inner):
        alone = copy.deepcopy(both)
        with normalizing(alone, settings_of(alone, setting[0], False), training=True):
            expected[setting] = alone(x)
    no_update = {key: settings_of(both, key[0], False) for key in (outer, inner)}
    with normalizing(both, settings_of(both, *outer), training=True):
        middle = state_of(both)
        with normalizing(both, settings_of(both, *inner), training=False):
            pass
        assert state_of(both) == middle
        with normalizing(both, no_update[inner], training=False):
            assert torch.equal(both(x), expected[inner])
        with normalizing(both, no_update[outer], training=False), inference(both):
            pass
    assert state_of(both) == before
    with normalizing(both, no_update[outer], training=True):
        assert torch.equal(both(x), expected[outer])
    assert state_of(both) == before


@pytest.mark.parametrize(("by", "update"), SETTINGS)
@pytest.mark.parametrize("where", ["body", "layer", "settings"])
def test_an_exception_leaves_no_trace(by, update, where):
    model = mixed()
    if where == "layer":
        model.append(Breaks(4))
    before = state_of(model)
    settings = settings_of(model, by, update)
    if where == "settings":
        settings[model[6]] = ("batch",)  # too few values to unpack

    def run():
        with normalizing(model, settings, training=True), torch.no_grad():
            if where == "layer":
                model[-1](torch.ones(2, 4, 1, 2))
            raise RuntimeError

    with pytest.raises(IndexError if where == "settings" else RuntimeError):
        run()
    if where == "layer" and by == "batch" and update:  # the update itself was asked for and had happened
        before, after = ([entry[:4] + entry[5:] for entry in state] for state in (before, state_of(model)))
        assert before == after
    else:
        assert state_of(model) == before


def test_a_layer_without_a_setting_normalizes_by_running_statistics():
    model, x = make("BatchNorm2d")
    expected = copy.deepcopy(model).eval()(x)
    before = buffers_of(model[0])
    model.train()
    with normalizing(model, {}, training=True):
        assert torch.equal(model(x), expected)
    assert all(torch.equal(getattr(model[0], key), before[key]) for key in BUFFERS)


def test_layers_without_running_statistics_always_normalize_by_their_input():
    for layer in (
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.InstanceNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(2),
    ):
        x = torch.randn(3, 4, 2, 2, generator=stream(0, "x"))
        expected = layer(x)
        for by, update in SETTINGS:
            with normalizing(layer, {layer: (by, update)}, training=True):
                assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_mode_that_the_user_left_does_not_matter(mode):
    for by, update in SETTINGS:
        results = []
        for first in (mode, "train"):
            model, x = make("BatchNorm2d")
            getattr(model, first)()
            with normalizing(model, {model[0]: (by, update)}, training=True):
                results.append(model(x))
            results.append(torch.cat([getattr(model[0], key).flatten() for key in BUFFERS]))
            assert model[0].training == (first == "train")
        assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


def test_inference_is_evaluation_mode_for_dropout_too():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4))
    x = torch.randn(3, 4, generator=stream(0, "x"))
    expected = copy.deepcopy(model).eval()(x)
    with inference(model):
        assert torch.equal(model(x), expected)
    assert model[0].training and model[1].training


@pytest.mark.parametrize(("by", "update"), SETTINGS)
def test_a_strict_pass_withstands_a_change_of_modes(by, update):
    """Blanket `train()` after an attack, or `eval()` inside one."""
    for mode in ("train", "eval"):
        model, x = make("BatchNorm2d")
        reference, _ = make("BatchNorm2d")
        with normalizing(model, {model[0]: Setting(by, update)}, training=False, strict=True):
            getattr(model, mode)()
            out = model(x)
        with normalizing(reference, {reference[0]: (by, update)}, training=False):
            assert torch.equal(out, reference(x))
        assert all(torch.equal(getattr(model[0], key), getattr(reference[0], key)) for key in BUFFERS)
        assert model.training and model[0].training
