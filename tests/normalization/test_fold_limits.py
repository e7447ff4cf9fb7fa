"""What does not fold runs as it is: what no trace can hold, layers shared or read twice, hooks, other types."""

import copy
import importlib.util
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from robustlayers.normalization import inference
from robustlayers.normalization.fold import crafting_forward

_spec = importlib.util.spec_from_file_location("fold_cases", Path(__file__).with_name("fold_cases.py"))
assert _spec is not None and _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

X, distance, images, scramble = cases.X, cases.distance, cases.images, cases.scramble


class Squeeze(nn.Module):
    """Control flow on values: cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) if x.mean() > -100 else x


class Counting(nn.Module):
    """A forward with a side effect, and an attribute that changes what it does."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(None)
        return x * 2


class Scale(nn.Module):
    """Reads an attribute that user code may set at any time, a parameter, and a buffer on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 2.0
        self.options = {"power": 1}
        self.gain = nn.Parameter(torch.tensor(0.3))
        self.offset: Tensor
        self.register_buffer("offset", torch.tensor([0.1]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor * self.gain.exp() ** self.options["power"] + self.offset.cos()


class Secret(nn.Module):
    """Keeps a tensor that no state_dict knows."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.rand(4, 1, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


class Jump(nn.Module):
    """Draws in Python while it runs: a trace would hold one draw for ever."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if random.random() < 2 else x


class OwnNorm(nn.BatchNorm2d):
    """A user's subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) * 2


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor([2.0], dtype=torch.float64)


def around(module: nn.Module) -> nn.Module:
    """Put a module between two pairs that fold."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), module, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(),
            nn.Linear(64, 3),
        )  # fmt: skip
    return scramble(net).double()


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (Squeeze, "traced"),
        (Counting, "attributes"),
        (Secret, "tensor"),
        (OwnNorm, "known"),
        (Constant, "traced"),
        (lambda: nn.MultiheadAttention(4, 1), "known"),
    ],
)
def test_a_module_that_cannot_be_traced_runs_as_it_is_and_the_rest_folds(make: Callable[..., Any], word: str) -> None:
    module = make(4) if make is OwnNorm else make()
    if isinstance(module, nn.MultiheadAttention):
        attention, module = module, nn.Sequential()
        module.add_module("attention", _Attention(attention))
    model = around(module)
    forward = crafting_forward(model)
    assert forward.folded == 2
    assert len(forward.as_it_is) == 1 and all(name.startswith("2") for name in forward.as_it_is)
    assert word in forward.reason and forward.reason.startswith("2")
    assert distance(model, forward, X) < 1e-10
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.mul_(2)
    forward.refresh()
    assert distance(model, forward, X) < 1e-10


class _Attention(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).reshape(x.shape)


def test_tracing_has_no_side_effect() -> None:
    module = Counting()
    seen = module.seen
    crafting_forward(around(module))
    assert module.calls == 0 and module.seen is seen and seen == []


def test_attributes_parameters_and_buffers_of_traced_modules_are_followed() -> None:
    scale = Scale()
    model = around(scale)
    forward = crafting_forward(model)
    assert not forward.as_it_is
    changes: list[Callable[[], object]] = [
        lambda: setattr(scale, "factor", 0.5),
        lambda: scale.options.update(power=2),
        lambda: scale.gain.data.add_(0.5),
        lambda: scale.offset.add_(0.5),
    ]
    for change in changes:
        change()
        assert distance(model, forward, X) > 1e-6
        forward.refresh()
        assert distance(model, forward, X) < 1e-10


def test_a_forward_that_draws_in_python_is_not_traced() -> None:
    state = random.getstate()
    model = around(Jump())
    forward = crafting_forward(model)
    assert random.getstate() == state
    assert (forward.folded, list(forward.as_it_is)) == (0, [""])
    assert "random" in forward.reason and forward.reason.startswith("the model")
    assert distance(model, forward, X) < 1e-10


class Branching(nn.Module):
    """Control flow in the model's own forward, which also takes an option."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten())

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        out = self.body(x)
        return out * 2 if twice or out.sum() > 1e9 else out


def test_the_whole_model_runs_as_it_is_in_the_last_resort() -> None:
    model = Branching().double().train()
    scramble(model)
    forward = crafting_forward(model)
    assert (forward.folded, forward.fused, list(forward.as_it_is)) == (0, 0, [""])
    before = copy.deepcopy(model.state_dict())
    assert distance(model, forward, X) < 1e-10
    forward(X.clone().requires_grad_()).sum().backward()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    model.body[0].get_parameter("weight").data.mul_(2)
    assert distance(model, forward, X) < 1e-10


class Shared(nn.Module):
    """One convolution before two norm layers, a norm layer used twice, an output read twice, weights tied."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.tied = nn.Conv2d(3, 3, 3, padding=1)
        self.tied.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv(x)).relu()
        x = self.bn2(self.conv(x)).relu()
        x = self.bn2(self.conv(x))  # the same pair again
        y = self.tied(x)
        x = self.bn3(y) + y  # not this one: y is read twice
        x = self.bn3(x.relu())  # nothing to fold it into
        return self.bn1(self.tied(x)).flatten(1)


@pytest.mark.parametrize("again", [False, True])
def test_modules_used_twice_and_tied_weights(again: bool) -> None:
    model = Shared().double()
    scramble(model)
    forward = crafting_forward(model)
    assert (forward.folded, forward.fused, forward.as_it_is) == (3, 1, {})
    if again:
        scramble(model, seed=7)
        model.conv.weight.data.mul_(2)
        forward.refresh()
    assert distance(model, forward, X) < 1e-10


class ReadTwice(nn.Module):
    """A ReLU whose operand is needed again: overwriting it would change the result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        folded = self.bn(self.conv(x))
        total = functional.relu(folded) + folded
        total = total.relu() - total
        fused = self.last(total)
        return (torch.relu(fused) * fused).flatten(1)


def test_relu_overwrites_nothing_that_is_read_again() -> None:
    net = scramble(ReadTwice()).double()
    forward = crafting_forward(net)
    assert (forward.folded, forward.fused) == (1, 1)
    assert distance(net, forward, X) < 1e-10


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
@pytest.mark.parametrize("place", ["0", "1", ""])
def test_hooks_keep_their_effect(kind: str, place: str) -> None:
    model = around(nn.ReLU())
    module: Any = model.get_submodule(place)
    if kind == "forward":
        module.register_forward_hook(lambda module, inputs, output: output * 2)
    elif kind == "pre":
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    else:
        module.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 2,))
    forward = crafting_forward(model)
    assert forward.folded == (1 if place else 0)
    assert distance(model, forward, X) < 1e-10


def test_parametrized_layers_and_forwards_of_their_own_do_not_fold() -> None:
    model: Any = around(nn.ReLU())
    parametrizations.weight_norm(model[0])
    model[3].forward = lambda x: functional.conv2d(x, model[3].weight) * 2
    forward = crafting_forward(model)
    assert forward.folded == 0 and set(forward.as_it_is) == {"0", "3"}
    assert distance(model, forward, X) < 1e-10


def test_norm_layers_without_running_statistics_normalize_by_the_batch() -> None:
    model = around(nn.BatchNorm2d(4, track_running_stats=False))
    forward = crafting_forward(model)
    assert (forward.folded, forward.fused) == (2, 0)
    assert distance(model, forward, X) < 1e-10


def test_a_linear_layer_of_sequences_has_its_channels_elsewhere() -> None:
    # As many positions as features: folding would find no wrong shape, only wrong numbers.
    net = scramble(nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3), nn.Flatten())).double()
    x = images(5, 3, 8)
    forward = crafting_forward(net)
    assert distance(net, forward, x) < 1e-10
    net = scramble(nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4))).double()
    forward = crafting_forward(net)
    assert (forward.folded, forward.fused) == (1, 1)
    assert distance(net, forward, x) < 1e-10


def test_volumes_fold_and_mixed_precision_does_not() -> None:
    net = scramble(nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.BatchNorm3d(4))).double()
    forward = crafting_forward(net)
    assert (forward.folded, forward.fused) == (1, 1)
    assert distance(net, forward, images(2, 2, 5, 5, 5)) < 1e-10
    mixed = nn.Sequential(nn.Conv2d(3, 4, 3).bfloat16(), nn.BatchNorm2d(4))
    forward = crafting_forward(mixed)
    assert (forward.folded, forward.fused) == (0, 1)
    x = images(2, 3, 5, 5, dtype=torch.bfloat16)
    with inference(mixed):
        assert torch.equal(forward(x), mixed(x))
