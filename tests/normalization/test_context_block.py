"""The context for anyone's code: what a block says holds inside it, whatever the modes, and is gone after it."""

import copy
import importlib.util
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

import robustlayers as rl
from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.normalization import inference
from robustlayers.normalization.context import normalization
from robustlayers.normalization.layers import DualBatchNorm, FilmNorm, RobustNorm

_spec = importlib.util.spec_from_file_location("layer_cases", Path(__file__).with_name("layer_cases.py"))
assert _spec is not None and _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

BUFFERS, LAYERS, SETTINGS = cases.BUFFERS, cases.LAYERS, cases.SETTINGS
Breaks, Stubborn, buffers_of = cases.Breaks, cases.Stubborn, cases.buffers_of
make, state_of = cases.make, cases.state_of

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
