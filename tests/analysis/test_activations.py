import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustlayers import models
from robustlayers.analysis.activations import Layer, activations, batches, capture, inputs, layers_of, pooled
from robustlayers.core.errors import UserError


class Crossed(nn.Module):
    """Registered in another order than it runs, with a shared module, functional and in-place activations."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 2)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Linear(4, 6)
        self.first = nn.Linear(3, 4)
        self.never = nn.Linear(3, 3)

    def forward(self, x):
        x = self.act(self.first(x))
        x = self.act(torch.tanh(self.second(x)))
        return self.head(functional.relu_(x - 0.1))


@pytest.fixture
def crossed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Crossed()


X = torch.rand(7, 3, generator=torch.Generator().manual_seed(3))


def names(model, *arguments, **named):
    return [layer.name for layer in layers_of(model, *arguments, **named)]


def test_layers_come_in_execution_order_with_functional_and_repeated_activations(crossed):
    assert names(crossed, example=X) == ["first", "act", "second", ":tanh", "act#2", ":relu", "head"]


def test_a_selector_stands_for_the_modules_that_own_what_it_picks(crossed):
    assert names(crossed, "linear", example=X) == ["first", "second", "head"]  # and `never` is not there
    assert names(crossed, "head.bias | first.weight", example=X) == ["first", "head"]
    assert names(crossed, 'before("head")', example=X) == ["first", "second"]


def test_activations_that_follow_a_chosen_layer_are_taken_along(crossed):
    assert names(crossed, "second", activations=True, example=X) == ["second", ":tanh", "act#2", ":relu"]
    assert names(crossed, ["first"], activations=True, example=X) == ["first", "act"]
    assert names(crossed, activations=False, example=X) == ["first", "second", "head"]


def test_names_pick_exactly_these_in_execution_order(crossed):
    assert names(crossed, [":relu", "act#2", "first"], example=X) == ["first", "act#2", ":relu"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["frist"], "unknown layer of Crossed 'frist'; nearest: first"),
        ([], "no layer is named"),
        ("never", "picks no layer of Crossed"),
        ("convv", "unknown selector"),
    ],
)
def test_unknown_layers_are_errors(crossed, layers, message):
    with pytest.raises(UserError, match=message):
        layers_of(crossed, layers, example=X)


def test_inputs_the_model_does_not_take_are_an_error(crossed):
    with pytest.raises(UserError, match="cannot be run on inputs of shape"):
        layers_of(crossed, example=torch.rand(4, 5))
    with pytest.raises(UserError, match="no sample"):
        layers_of(crossed, example=X[:0])


def test_outputs_are_those_of_the_formula_although_later_operators_write_into_them(crossed):
    found = [*activations(crossed, X, batch_size=3)]
    assert [len(batch["first"]) for batch in found] == [3, 2, 2]
    joined = {name: torch.cat([batch[name] for batch in found]) for name in found[0]}
    with torch.no_grad():
        first = X @ crossed.first.weight.T + crossed.first.bias
        second = first.clamp(min=0) @ crossed.second.weight.T + crossed.second.bias
        last = (second.tanh().clamp(min=0) - 0.1).clamp(min=0)
        expected = {
            "first": first,
            "act": first.clamp(min=0),
            "second": second,
            ":tanh": second.tanh(),
            "act#2": second.tanh().clamp(min=0),
            ":relu": last,
            "head": last @ crossed.head.weight.T + crossed.head.bias,
        }
    assert list(joined) == list(expected)
    for name, value in expected.items():
        assert torch.allclose(joined[name], value, atol=1e-6), name


@pytest.mark.parametrize("name", ["small-cnn", "resnet"])
def test_layers_of_our_nets_are_all_convolutions_norm_layers_and_activations_with_their_parts(net, batch, name):
    model = net(name)
    layers = layers_of(model, example=batch()[0])
    kinds = [layer.kind for layer in layers]
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert kinds.count("conv") == kinds.count("norm") == convolutions
    assert kinds.count("activation") == (7 if name == "resnet" else 3)  # shortcuts have none
    assert kinds.count("linear") == 1 and layers[-1] == Layer("linear", "linear", "head")
    assert [str(layer) for layer in layers[:3]] == ["conv1", "bn1", ":relu"]
    assert [layer.part for layer in layers[:3]] == ["stem"] * 3
    parts = [layer.part for layer in layers]
    assert parts == sorted(parts, key=["stem", "stage(1)", "stage(2)", "stage(3)", "head"].index)


def test_a_model_without_visible_parts_and_a_model_that_is_one_layer():
    convolution = nn.Conv2d(1, 2, 3)
    assert layers_of(nn.Sequential(convolution), example=torch.rand(4, 1, 5, 5)) == (Layer("0", "conv"),)
    assert layers_of(convolution, example=torch.rand(4, 1, 5, 5)) == (Layer("Conv2d", "conv"),)
    assert len(layers_of(convolution)) == 1  # on a guessed input


def test_a_parametrized_layer_is_found_by_selector():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU())
    assert names(model, "linear | all", example=X) == ["0"]


@pytest.mark.parametrize("norm", ["dual", "film", "random", "group"])
def test_a_norm_layer_of_several_modules_counts_as_one(norm):
    """So that nets with different norm layers can be compared layer by layer."""
    plain, model = (models.build("resnet", seed=0, depth=8, width=4, norm=kind) for kind in ("batch", norm))
    x = torch.rand(4, 3, 8, 8)
    assert names(model, example=x) == names(plain, example=x)
    assert names(model, "norm & stem", activations=True, example=x) == ["bn1", ":relu"]
    if norm == "dual":
        assert names(model, ["bn1.main"], example=x) == ["bn1.main"]


def state(model):
    return {
        "modes": [module.training for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "gradients": [(p.requires_grad, p.grad is None) for p in model.parameters()],
    }


class Failing(nn.Module):
    def forward(self, x):
        if len(x) > 4:  # not in the trial run
            raise ZeroDivisionError
        return x


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_left_behind(net, batch, bits, fails, training):
    model = nn.Sequential(net("small-cnn"), Failing() if fails else nn.Identity())
    model.train(training)
    model[0].bn1.eval()
    next(model.parameters()).requires_grad_(False)
    handle = model[0].register_forward_hook(lambda *_: None)
    before, values, random = copy.deepcopy(state(model)), bits(model), torch.get_rng_state()
    if fails:
        with pytest.raises(ZeroDivisionError):
            list(activations(model, batch(6)[0]))
    else:
        steps = activations(model, batch(6)[0], batch_size=3)
        next(steps)  # left in the middle
        assert state(model) == before
    assert state(model) == before and bits(model) == values and torch.equal(torch.get_rng_state(), random)
    handle.remove()


def test_an_exception_of_the_receiver_leaves_nothing_behind(net, batch, bits):
    model, (x, _) = net("resnet"), batch()
    layers = layers_of(model, example=x)
    before, values = state(model), bits(model)

    def receive(index, output):
        if index == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(model, x, layers, receive)
    assert state(model) == before and bits(model) == values


def test_norm_layers_use_running_statistics_so_that_batches_do_not_matter(net, batch):
    model, (x, _) = net("resnet", torch.float64).train(), batch(6, dtype=torch.float64)
    (whole,) = activations(model, x, "norm")
    parts = list(activations(model, x, "norm", batch_size=2))
    for name, value in whole.items():
        assert torch.allclose(value, torch.cat([part[name] for part in parts]), atol=1e-12)


def test_capture_returns_the_output_of_the_model_and_says_what_did_not_run(crossed):
    found = {}
    output = capture(crossed, X, layers_of(crossed, ["head"], example=X), found.__setitem__)
    assert torch.equal(found[0], output) and torch.equal(output, crossed(X))
    with pytest.raises(UserError, match="did not run on a batch: never"):
        capture(crossed, X, [Layer("never", "linear")], lambda *_: None)


def test_pooled_is_the_mean_over_positions(crossed):
    output = torch.rand(2, 3, 4, 5)
    assert torch.allclose(pooled(output), output.mean((2, 3)))
    assert torch.equal(pooled(X), X)
    model = models.build("small-cnn", seed=0)
    x = torch.rand(2, 3, 8, 8)
    (whole,), (means,) = activations(model, x, "conv"), activations(model, x, "conv", pool=True)
    assert torch.allclose(means["conv1"], whole["conv1"].mean((2, 3)), atol=1e-6)


def test_bytes_are_images_and_other_numbers_are_refused(crossed):
    images = torch.tensor([[0, 255, 51]], dtype=torch.uint8)
    assert torch.allclose(inputs(images, crossed), torch.tensor([[0, 1, 0.2]]))
    assert inputs(images, copy.deepcopy(crossed).double()).dtype == torch.float64
    with pytest.raises(UserError, match="int64"):
        inputs(images.long(), crossed)


def test_batches_are_of_nearly_equal_size():
    assert batches(1001, 250) == [slice(0, 201), slice(201, 401), slice(401, 601), slice(601, 801), slice(801, 1001)]
    with pytest.raises(UserError, match="batch_size: 3 is not allowed; allowed: a whole number, 4 or more"):
        batches(10, 3, 4)
    with pytest.raises(UserError, match="too few"):
        batches(3, 250, 4)
    with pytest.raises(UserError, match="too few"):
        batches(7, 6, 4)
