import copy
from itertools import product

import pytest
import torch
from torch import nn

import robustlayers as rl
from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.normalization import Setting, inference, normalizing
from robustlayers.normalization.context import normalization
from robustlayers.normalization.layers import DualBatchNorm, FilmNorm, RobustNorm
from robustlayers.selection import norm_layers


class PlainSubclass(nn.BatchNorm2d):
    """A user's class that changes nothing."""


class Stubborn(nn.BatchNorm2d):
    """A user's class that updates its statistics in every training forward, whatever `track_running_stats` says."""

    def forward(self, input):  # noqa: A002
        if self.training:
            mean = input.mean((0, 2, 3), keepdim=True)
            var = ((input - mean) ** 2).mean((0, 2, 3), keepdim=True)
            count = input.numel() / input.shape[1]
            self.num_batches_tracked += 1
            factor = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            with torch.no_grad():
                self.running_mean = (1 - factor) * self.running_mean + factor * mean.flatten()  # another tensor object
                self.running_var.mul_(1 - factor).add_(factor * var.flatten() * count / (count - 1))
        else:
            mean, var = self.running_mean.view(1, -1, 1, 1), self.running_var.view(1, -1, 1, 1)
        out = (input - mean) / (var + self.eps).sqrt()
        return out * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1) if self.affine else out


SHAPES = {"1d": (5, 4), "1d-long": (3, 4, 6), "2d": (3, 4, 2, 3), "3d": (3, 4, 2, 2, 2)}
LAYERS = {
    "BatchNorm1d": (nn.BatchNorm1d, "1d"),
    "BatchNorm1d on sequences": (nn.BatchNorm1d, "1d-long"),
    "BatchNorm2d": (nn.BatchNorm2d, "2d"),
    "BatchNorm3d": (nn.BatchNorm3d, "3d"),
    "SyncBatchNorm": (nn.SyncBatchNorm, "2d"),
    "PlainSubclass": (PlainSubclass, "2d"),
    "Stubborn": (Stubborn, "2d"),
    "InstanceNorm1d": (nn.InstanceNorm1d, "1d-long"),
    "InstanceNorm2d": (nn.InstanceNorm2d, "2d"),
    "InstanceNorm3d": (nn.InstanceNorm3d, "3d"),
}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def make(name, momentum=0.1, affine=True):
    """A float64 layer in the middle of its life, inside a model, and an input."""
    kind, shape = LAYERS[name]
    generator = stream(0, "layer", name)
    layer = kind(4, momentum=momentum, affine=affine, track_running_stats=True)
    with torch.no_grad():
        layer.running_mean.normal_(0, 1, generator=generator)
        layer.running_var.uniform_(0.5, 2, generator=generator)
        layer.num_batches_tracked.fill_(4)
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 2, generator=generator)
    x = torch.randn(SHAPES[shape], generator=generator, dtype=torch.float64) * 2 + 1
    return nn.Sequential(layer.double()), x


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


def buffers_of(layer):
    return {name: getattr(layer, name).clone() for name in BUFFERS}


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


def state_of(model):
    """Everything that a context could leave behind."""
    return [
        (
            name,
            module.training,
            getattr(module, "momentum", None),
            getattr(module, "track_running_stats", None),
            [(key, id(tensor), tensor is None or tensor.clone().tolist()) for key, tensor in module._buffers.items()],
            [
                (key, id(tensor), tensor.requires_grad)
                for key, tensor in module._parameters.items()
                if tensor is not None
            ],
            {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks") and value is not None},
            sorted(vars(module)),
            id(vars(module).get("forward")),
        )
        for name, module in model.named_modules()
    ]


SETTINGS = list(product(["batch", "running"], [True, False]))


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


class Breaks(nn.BatchNorm2d):
    def forward(self, input):  # noqa: A002
        super().forward(input)
        raise RuntimeError("inside the layer")


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


# -- the context for anyone's code ---------------------------------------------------------------------------------

BATCH_NORMS = [name for name in LAYERS if "Instance" not in name]


def mixture_by_hand(layer, x, alpha):
    axes, shape = (0, *range(2, x.ndim)), [1, -1] + [1] * (x.ndim - 2)
    mean = x.mean(axes)
    var = ((x - mean.view(shape)) ** 2).mean(axes)
    mean = alpha * mean + (1 - alpha) * layer.running_mean
    var = alpha * var + (1 - alpha) * layer.running_var
    return (x - mean.view(shape)) / (var.view(shape) + layer.eps).sqrt() * layer.weight.view(shape) + layer.bias.view(
        shape
    )


@pytest.mark.parametrize("name", BATCH_NORMS)
@pytest.mark.parametrize("alpha", [0, 0.3, "3/4", 1])
@pytest.mark.parametrize("update", [True, False])
def test_the_mixture_is_the_formula_in_values_and_gradients(name, alpha, update):
    model, x = make(name)
    layer = model[0]
    reference = copy.deepcopy(layer).train()
    x.requires_grad_()
    weights = torch.randn(x.shape, generator=stream(0, "w"), dtype=x.dtype)
    expected = mixture_by_hand(layer, x, 0.75 if alpha == "3/4" else alpha)
    tensors = [x, *layer.parameters()]
    wanted = torch.autograd.grad((expected**2 * weights).sum(), tensors)
    before = buffers_of(layer)
    with normalization(model, by="mixture", alpha=alpha, update=update):
        out = model(x)
    found = torch.autograd.grad((out**2 * weights).sum(), tensors)
    assert torch.allclose(out, expected, rtol=0, atol=1e-12)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)
    reference(x)
    for key in BUFFERS:
        assert torch.equal(getattr(layer, key), getattr(reference, key) if update else before[key])


def test_the_mixture_passes_gradcheck():
    model, x = make("BatchNorm2d")
    with normalization(model, by="mixture", alpha=0.4):
        assert torch.autograd.gradcheck(model, x.requires_grad_())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("by", "update"), [*SETTINGS, ("frozen", True), ("frozen", False)])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("inside", [None, "train", "eval"])
def test_the_users_mode_neither_matters_nor_is_lost(name, by, update, mode, inside):
    """`model.train()` and `model.eval()` before or inside the block change nothing for the norm layers."""
    model, x = make(name)
    layer = model[0]
    model.append(nn.Dropout(0.0))
    getattr(model, mode)()
    reference, trained = copy.deepcopy(layer), copy.deepcopy(layer).train()
    expected = reference.train()(x) if by == "batch" else reference.eval()(x)
    trained(x)
    before = buffers_of(layer)
    with normalization(model, by=by, update=update):
        if inside is not None:
            getattr(model, inside)()
        out = model(x)
    assert torch.equal(out, expected)
    for key in BUFFERS:
        assert torch.equal(getattr(layer, key), getattr(trained, key) if update else before[key]), key
    assert all(module.training == ((inside or mode) == "train") for module in model.modules())
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("update", [True, False])
def test_by_left_out_is_what_the_mode_says(mode, update):
    model, x = make("BatchNorm2d")
    getattr(model, mode)()
    expected = copy.deepcopy(model)(x)
    trained = copy.deepcopy(model).train()
    trained(x)
    before = buffers_of(model[0])
    with normalization(model, update=update):
        out = model(x)
    assert torch.equal(out, expected)
    for key in BUFFERS:
        assert torch.equal(getattr(model[0], key), getattr(trained[0], key) if update else before[key])


@pytest.mark.parametrize("name", LAYERS)
def test_frozen_statistics_are_those_on_entry_while_the_running_ones_move(name):
    model, x = make(name)
    layer = model[0]
    expected = copy.deepcopy(layer).eval()
    reference = copy.deepcopy(layer).train()
    x.requires_grad_()
    with normalization(model, by="frozen", update=True):
        for factor in (1.0, 3.0, -2.0):
            assert torch.equal(model(factor * x), expected(factor * x))
            reference(factor * x)
        last = model(x)
        reference(x)
    for key in BUFFERS:
        assert torch.equal(getattr(layer, key), getattr(reference, key))
    (found,) = torch.autograd.grad((last**2).sum(), x)
    (wanted,) = torch.autograd.grad((expected(x) ** 2).sum(), x)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("momentum", [0.5, "1/4", 1, "cumulative"])
@pytest.mark.parametrize("by", ["batch", "running", "frozen"])
@pytest.mark.parametrize("name", ["BatchNorm2d", "Stubborn", "BatchNorm1d"])
def test_another_momentum_for_the_block(name, by, momentum):
    model, x = make(name)
    layer = model[0]
    reference = copy.deepcopy(layer).train()
    reference.momentum = None if momentum == "cumulative" else 0.25 if momentum == "1/4" else float(momentum)
    with normalization(model, by=by, update=True, momentum=momentum):
        for factor in (1.0, 2.0):
            model(factor * x)
            reference(factor * x)
        assert layer.momentum == 0.1
    for key in BUFFERS:
        assert torch.equal(getattr(layer, key), getattr(reference, key))


def test_cumulative_statistics_of_a_fresh_layer_are_the_mean_over_batches():
    layer = nn.BatchNorm1d(1)
    with normalization(layer, by="batch", update=True, momentum="cumulative"):
        for value in (1.0, 3.0, 8.0):
            layer(torch.tensor([[value - 1], [value + 1]]))
    assert layer.running_mean.item() == pytest.approx(4.0) and int(layer.num_batches_tracked) == 3


@pytest.mark.parametrize(("outer", "inner"), list(product(SETTINGS, SETTINGS)))
@pytest.mark.parametrize("name", ["BatchNorm2d", "Stubborn"])
def test_the_inner_block_holds_and_the_outer_one_after_it(name, outer, inner):
    model, x = make(name)
    model.eval()
    layer, reference = model[0], copy.deepcopy(model[0])

    def expect(setting):
        out = copy.deepcopy(reference).train(setting[0] == "batch")(x)
        if setting[1]:
            reference.train()(x)
        return out

    with normalization(model, by=outer[0], update=outer[1]):
        for setting in (outer, inner, outer):
            if setting is inner:
                with normalization(model, by=inner[0], update=inner[1]):
                    assert torch.equal(model(x), expect(inner))
            else:
                assert torch.equal(model(x), expect(outer))
        with inference(model):
            assert torch.equal(model(x), expect(("running", False)))
    for key in BUFFERS:
        assert torch.equal(getattr(layer, key), getattr(reference, key))
    assert "forward" not in vars(layer)


def test_what_the_inner_block_leaves_open_is_the_outer_ones():
    model, x = make("BatchNorm2d")
    model.eval()
    expected, trained = copy.deepcopy(model).train()(x), copy.deepcopy(model).train()
    trained(x)
    before = buffers_of(model[0])
    with normalization(model, by="batch", update=True):
        with normalization(model, update=False):
            assert torch.equal(model(x), expected)
        assert all(torch.equal(getattr(model[0], key), before[key]) for key in BUFFERS)
        plain = make("BatchNorm2d")[0].eval()(x)
        with normalization(model, by="running"):
            assert torch.equal(model(x), plain)
    assert all(torch.equal(getattr(model[0], key), getattr(trained[0], key)) for key in BUFFERS)


@pytest.mark.parametrize("by", ["batch", "running", "frozen", "mixture"])
@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("where", ["body", "layer"])
def test_an_exception_in_the_block_leaves_no_trace(by, update, where):
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), Breaks(4), Stubborn(4)).eval()
    before = state_of(model)

    def run():
        with normalization(model, by=by, update=update, alpha=0.5 if by == "mixture" else None):
            if where == "layer":
                model[2](torch.ones(2, 4, 1, 2))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        run()
    if where == "layer" and by == "batch" and update:
        assert int(model[2].num_batches_tracked) == 1
    else:
        assert state_of(model) == before


def test_a_layer_that_is_used_twice_is_steered_once_and_updates_twice():
    layer = nn.BatchNorm2d(2)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    x = torch.randn(3, 2, 2, 2, generator=stream(0, "x"))
    with normalization(model, by="running", update=True):
        model["a"](x)
        model["b"](x)
    assert int(layer.num_batches_tracked) == 2 and "forward" not in vars(layer)


def test_a_selector_picks_layers_and_the_others_are_let_be():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).eval()
    x = torch.randn(4, 2, generator=stream(0, "x"))
    with normalization(model, by="batch", update=True, select="'1.weight'"):
        model(x)
    assert [int(layer.num_batches_tracked) for layer in model] == [0, 1]
    model.train()
    with normalization(model, by="running", select="'1'"):
        model(x)
    assert [int(layer.num_batches_tracked) for layer in model] == [1, 1]


def test_a_copy_made_inside_is_not_steered_afterwards():
    model, x = make("BatchNorm2d")
    model.eval()
    with normalization(model, by="batch", update=True):
        double = copy.deepcopy(model)
    expected = copy.deepcopy(model)(x)
    assert torch.equal(double(x), expected)
    assert torch.equal(double[0].running_mean, model[0].running_mean)
    assert not torch.equal(double.train()(x), expected)


@pytest.mark.parametrize("branch", ["main", "auxiliary"])
def test_the_branch_is_set_and_put_back(branch):
    layer = DualBatchNorm(nn.BatchNorm2d(2))
    with torch.no_grad():
        layer.auxiliary.weight.fill_(3)
    model = nn.Sequential(nn.BatchNorm2d(2), layer).train()
    x = torch.randn(3, 2, 2, 2, generator=stream(0, "x"))
    with normalization(model, branch=branch):
        out = model(x)
        assert layer.branch == branch
    assert layer.branch == "main"
    assert torch.allclose(out.std(), torch.tensor(3.0 if branch == "auxiliary" else 1.0), atol=0.2)
    moved = {key for key, t in model.state_dict().items() if "tracked" in key and int(t)}
    assert moved == {"0.num_batches_tracked", f"1.{branch}.num_batches_tracked"}  # statistics are as ever
    with normalization(model, by="running", update=False, branch=branch):
        model(x)
    assert moved == {key for key, t in model.state_dict().items() if "tracked" in key and int(t)}


def test_the_condition_is_set_and_put_back():
    model = nn.Sequential(FilmNorm(DualBatchNorm(nn.BatchNorm2d(2))))
    with normalization(model, by="batch", condition=0.3):
        assert (model[0].condition, model[0].norm.branch) == (0.3, "auxiliary")
    assert (model[0].condition, model[0].norm.branch) == (0.0, "main")


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("by", ["batch", "running", "frozen"])
def test_layers_of_ones_own_are_steered_too(by, update):
    layer = RobustNorm(2, tracked="both")
    layer(torch.rand(4, 2, 3, 3, generator=stream(0, "first")))
    x = torch.rand(4, 2, 3, 3, generator=stream(0, "second")) * 2
    expected = copy.deepcopy(layer).train(by == "batch")(x)
    trained = copy.deepcopy(layer)
    trained(x)
    before = {key: t.clone() for key, t in layer.named_buffers()}
    with normalization(layer.eval(), by=by, update=update):
        assert torch.equal(layer(x), expected)
    after = dict(layer.named_buffers())
    wanted = dict(trained.named_buffers()) if update else before
    assert all(torch.equal(after[key], wanted[key]) for key in before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "bach"}, "unknown statistics to normalize by 'bach'; nearest: batch"),
        ({"by": "mixture"}, "alpha, the share of the batch"),
        (
            {"by": "mixture", "alpha": 0.5},
            "2: RobustNorm has no running mean and variance per channel to mix; allowed: ",
        ),
        ({"by": "batch", "momentum": 0.5}, "momentum: nothing is updated; add update=True"),
        ({"update": True, "momentum": 2}, "momentum: 2 is not allowed; allowed: more than 0 up to 1, or cumulative"),
        (
            {"update": True, "momentum": "cumulative"},
            "1: InstanceNorm2d does not count its batches, so there is no cumulative average",
        ),
        ({"branch": "auxilary"}, "unknown branch 'auxilary'; nearest: auxiliary"),
        ({"branch": "main", "select": "'1'"}, "branch 'main': no norm layer has branches"),
        ({"condition": 0.5}, "condition: no norm layer is conditional (norm=film)"),
        ({"by": "batch", "select": "'4'"}, "selector \"'4'\" picks no norm layer of Sequential"),
    ],
)
def test_what_cannot_be_done_is_an_error_and_leaves_no_trace(arguments, message):
    model = nn.Sequential(
        nn.BatchNorm2d(2),
        nn.InstanceNorm2d(2, track_running_stats=True),
        RobustNorm(2, tracked="both"),
        DualBatchNorm(nn.BatchNorm2d(2)),
        nn.Conv2d(2, 2, 1),
    )
    before = state_of(model)
    with pytest.raises(UserError) as error, normalization(model, **arguments):
        pass
    assert message in str(error.value)
    assert state_of(model) == before
    with pytest.raises(UserError, match="has no norm layers"), normalization(nn.Linear(1, 1), by="batch"):
        pass


def test_the_package_is_the_context():
    model, x = make("BatchNorm2d")
    with rl.normalization(model, by="batch"):
        one = model(x)
    with normalization(model, by="batch"):
        assert torch.equal(model(x), one)
    assert rl.normalization.NormPolicy is rl.NormPolicy


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
