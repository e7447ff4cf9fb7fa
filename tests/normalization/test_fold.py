"""The crafting forward equals the plain model in evaluation mode, follows its changes, and leaves no trace in it."""

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from robustlayers.attacks import PGD, Linf
from robustlayers.models import build
from robustlayers.normalization import inference
from robustlayers.normalization.fold import crafting_forward
from robustlayers.normalization.fold_scaling import Scaling, Scalings

Forward = Callable[[Tensor], Tensor]


def scramble(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every tensor of norm layers a value that is far from the identity's; fresh layers would hide most faults."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for name, low, high in (
                    ("weight", -1.5, 1.5),
                    ("bias", -1, 1),
                    ("running_mean", -1, 1),
                    ("running_var", 1e-4, 2),
                ):
                    tensor = getattr(module, name)
                    if tensor is not None:
                        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
            elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                module.bias.copy_(torch.rand(module.bias.shape, generator=generator) - 0.5)
    return model


def both(forward: Forward, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and the gradient of an uneven function of them for the images."""
    x = x.detach().clone().requires_grad_()
    logits = forward(x)
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)
    (slope,) = torch.autograd.grad((logits.sin() * weights).sum(), x)
    return logits.detach(), slope


def distance(model: nn.Module, forward: Forward, x: Tensor) -> float:
    """Return the largest difference of logits and of gradients, relative to the largest entry of each."""
    with inference(model):
        wanted = both(model, x)
    found = both(forward, x)
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in zip(wanted, found, strict=True))


def images(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Bottleneck(nn.Module):
    """As user code has it: layers reused (one ReLU), in-place ReLU, biases before norms, `+=`, a downsampling path."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=2, padding_mode="reflect")
        self.bn2 = nn.BatchNorm2d(width, eps=1e-2)
        self.conv3 = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * width, affine=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, 2 * width, 1, stride), nn.BatchNorm2d(2 * width))

    def forward(self, x: Tensor) -> Tensor:
        identity = self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class UserNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(Bottleneck(6, 4, 1), Bottleneck(8, 4, 2))
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.dropout(self.blocks(self.stem(x)), 0.5, self.training)
        x = self.pool(x)
        return self.fc(x.view(x.size(0), -1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(27, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 4, bias=False),
        nn.BatchNorm1d(4, affine=False),
    )  # fmt: skip


CIFAR = {"channels": 3, "classes": 5}
# name -> (make, size of the images, folded, fused)
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    "resnet-A": (lambda: build("resnet", seed=0, depth=14, width=4, **CIFAR), 9, 13, 1),
    "resnet-B": (lambda: build("resnet", seed=0, depth=8, width=4, shortcut="B", mean=0.4, std=0.2, **CIFAR), 8, 9, 1),
    "resnet-none": (lambda: build("resnet", seed=0, depth=8, width=4, norm="none", **CIFAR), 8, 0, 1),
    "preact": (lambda: build("preact-resnet", seed=0, width=4, **CIFAR), 8, 8, 10),
    "preact-none": (lambda: build("preact-resnet", seed=0, width=4, norm="none", **CIFAR), 8, 0, 1),
    "wide": (lambda: build("wide-resnet", seed=0, depth=10, widen=1, **CIFAR), 8, 3, 5),
    "small-cnn": (lambda: build("small-cnn", seed=0, **CIFAR), 9, 3, 1),
    "user": (UserNet, 8, 9, 0),
    "mlp": (mlp, 3, 2, 0),
}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, int, int]:
    make, size, folded, fused = MODELS[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = scramble(make())
    return model.double(), images(3, 3, size, size), folded, fused


@pytest.fixture
def small() -> nn.Module:
    return scramble(build("resnet", seed=0, depth=8, width=4, **CIFAR)).double()


X = images(4, 3, 8, 8)
Y = torch.tensor([0, 3, 1, 4])


@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_the_plain_model(case: tuple[nn.Module, Tensor, int, int], channels_last: bool) -> None:
    model, x, folded, fused = case
    forward = crafting_forward(model, channels_last=channels_last)
    assert (forward.folded, forward.fused, forward.as_it_is, forward.reason) == (folded, fused, {}, "")
    assert distance(model, forward, x) < 1e-10


def test_equals_the_plain_model_in_single_precision(case: tuple[nn.Module, Tensor, int, int]) -> None:
    model, x, _, _ = case
    model.float()
    assert distance(model, crafting_forward(model), x.float()) < 1e-4


def test_channels_last_only_where_the_code_cannot_notice(small: nn.Module) -> None:
    assert crafting_forward(small, channels_last=True).channels_last
    assert not crafting_forward(UserNet(), channels_last=True).channels_last  # calls view


def test_folding_removes_the_norm_layers_from_the_autograd_graph(small: nn.Module) -> None:
    def kinds(logits: Tensor) -> set[str]:
        seen, todo = set(), [logits.grad_fn]
        while todo:
            function = todo.pop()
            if function is not None and function not in seen:
                seen.add(function)
                todo += [parent for parent, _ in function.next_functions]
        return {type(function).__name__ for function in seen}

    x = X.clone().requires_grad_()
    with inference(small):
        assert any("BatchNorm" in kind for kind in kinds(small(x)))
    found = kinds(crafting_forward(small)(x))
    assert not any("BatchNorm" in kind for kind in found)
    assert sum("AccumulateGrad" in kind for kind in found) == 1  # the images', no parameter's


# -- following the model ---------------------------------------------------------------------------------------------


def test_refresh_follows_training_and_without_it_the_forward_is_stale(case: tuple[nn.Module, Tensor, int, int]) -> None:
    model, x, _, _ = case
    forward = crafting_forward(model)
    before = forward(x).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    for _ in range(3):
        model.train()
        optimizer.zero_grad()
        functional.cross_entropy(model(x), Y[:3] % 4).backward()
        optimizer.step()
    assert torch.equal(forward(x), before)
    assert distance(model, forward, x) > 1e-3
    forward.refresh()
    assert distance(model, forward, x) < 1e-10


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_refresh_reads_every_tensor_of_a_norm_layer(small: Any, name: str) -> None:
    for norm in (small.bn1, small.layer3[0].bn2):
        forward = crafting_forward(small)
        getattr(norm, name).data.mul_(1.5).add_(0.1)
        assert distance(small, forward, X) > 1e-6
        forward.refresh()
        assert distance(small, forward, X) < 1e-10


def test_refresh_reads_a_loaded_state_and_the_input_normalization(small: Any) -> None:
    forward = crafting_forward(small)
    other = scramble(build("resnet", seed=5, depth=8, width=4, mean=0.1, std=0.7, **CIFAR), seed=5)
    small.load_state_dict(other.double().state_dict())
    forward.refresh()
    assert distance(small, forward, X) < 1e-10


def _replace_parameter(net: Any) -> None:
    net.conv1.weight = nn.Parameter(net.conv1.weight.detach() * 2)


def _replace_norm(net: Any) -> None:
    net.bn1 = scramble(nn.BatchNorm2d(4), 9).double()


def _remove_norm(net: Any) -> None:
    net.layer2[0].bn1 = nn.Identity()


def _new_storage(net: Any) -> None:
    for tensor in (net.linear.weight, net.bn1.weight, net.conv1.weight):
        tensor.data = tensor.data * 1.5


def _replace_buffer(net: Any) -> None:
    net.bn1.running_mean = net.bn1.running_mean + 1


def _set_eps(net: Any) -> None:
    net.bn1.eps = 0.5


def _set_padding(net: Any) -> None:
    net.layer1[0].conv1.padding_mode = "circular"
    net.layer1[0].conv1._reversed_padding_repeated_twice = [1, 1, 1, 1]


def _add_hook(net: Any) -> None:
    net.conv1.register_forward_hook(lambda module, inputs, output: output * 2)


def _drop_statistics(net: Any) -> None:
    net.bn1.running_mean = net.bn1.running_var = None


@pytest.mark.parametrize(
    "change",
    [
        _replace_parameter, _replace_norm, _remove_norm, _new_storage, _replace_buffer, _set_eps, _set_padding, _add_hook,
        _drop_statistics,
    ],
)  # fmt: skip
def test_refresh_notices_a_change_of_structure(small: nn.Module, change: Callable[[nn.Module], None]) -> None:
    forward = crafting_forward(small)
    change(small)
    assert distance(small, forward, X) > 1e-6
    for _ in range(2):
        forward.refresh()
        assert distance(small, forward, X) < 1e-10


def test_refresh_follows_a_conversion(small: nn.Module) -> None:
    forward = crafting_forward(small)
    small.float()
    forward.refresh()
    assert forward(X.float()).dtype == torch.float32
    assert distance(small, forward, X.float()) < 1e-4
    small.to("meta")
    forward.refresh()
    assert forward(X.float().to("meta")).device.type == "meta"


def test_refresh_follows_a_conversion_that_replaces_no_tensor() -> None:
    net = build("resnet", seed=0, depth=8, width=4, norm="none", **CIFAR).double()
    net.normalize = nn.Identity()  # parameters keep their objects in a conversion, buffers do not
    forward = crafting_forward(net)
    net.float()
    forward.refresh()
    assert distance(net, forward, X.float()) < 1e-4


def test_a_replaced_tensor_of_one_entry_with_an_equal_value_is_noticed() -> None:
    net = nn.Sequential(nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1), nn.Flatten()).double()
    forward = crafting_forward(net)
    net[1].weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
    forward.refresh()
    with torch.no_grad():
        net[1].weight.mul_(3)
    forward.refresh()
    assert distance(net, forward, X) < 1e-10


def test_an_unchanged_model_is_not_traced_again(small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = crafting_forward(small)
    monkeypatch.setattr("robustlayers.normalization.fold.plan", None)
    for training in (True, False, True):
        small.train(training)
        small(X)
        forward.refresh()
    small.requires_grad_(False)
    forward.refresh()


# -- what does not fold ----------------------------------------------------------------------------------------------


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


def test_wrong_images_get_the_models_own_message(small: nn.Module) -> None:
    forward = crafting_forward(small)
    for wrong in (X[:, :1], X[0], (X * 255).byte()):
        with pytest.raises(Exception) as plain:
            small(wrong)
        with pytest.raises(type(plain.value), match="model input") as folded:
            forward(wrong)
        assert str(folded.value) == str(plain.value)


# -- no trace, attacks, planted faults -------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was(case: tuple[nn.Module, Tensor, int, int]) -> None:
    model, x, _, _ = case
    model.train()
    next(model.modules()).training = False  # an uneven state
    next(model.parameters()).requires_grad_(False)
    last = list(model.parameters())[-1]
    last.grad = torch.ones_like(last)

    def state() -> list[Any]:
        tensors = [*model.parameters(), *model.buffers()]
        held = [(id(t), t.data_ptr(), t.requires_grad, id(t.grad), t._version, t.detach().clone()) for t in tensors]
        modules = [(id(m), m.training, {k: id(v) for k, v in vars(m).items()}) for m in model.modules()]
        hooks = [list(v) for m in model.modules() for k, v in sorted(vars(m).items()) if "hooks" in k]
        return [[row[:-1] for row in held], modules, hooks, [row[-1] for row in held], torch.get_rng_state()]

    before = state()
    forward = crafting_forward(model)
    images = x.clone().requires_grad_()
    forward(images).sum().backward()
    forward.refresh()
    PGD(Linf("8/255"), steps=2)(forward, x, Y[:3] % 4)
    after = state()
    assert before[:3] == after[:3]
    assert all(torch.equal(a, b) for a, b in zip(before[3], after[3], strict=True))
    assert torch.equal(before[4], after[4])
    assert not isinstance(forward, nn.Module)


@pytest.mark.parametrize("name", ["resnet-B", "preact"])
def test_pgd_finds_the_same_images(name: str) -> None:
    make, size, _, _ = MODELS[name]
    model = scramble(make()).double()
    x = images(4, 3, size, size)
    attack = PGD(Linf("8/255"), steps=5, step_size="2/255")
    forward = crafting_forward(model)
    with inference(model):
        wanted = attack(model, x, Y, generator=torch.Generator().manual_seed(3))
    found = attack(forward, x, Y, generator=torch.Generator().manual_seed(3))
    # Where the gradient is rounding noise around zero, its sign may differ.
    assert float(((wanted - found).abs() > 1e-9).double().mean()) < 1e-3
    assert not torch.equal(wanted, x)


def test_works_in_every_grad_mode(small: nn.Module) -> None:
    with torch.inference_mode():
        forward = crafting_forward(small)
        forward.refresh()
        values = forward(X)
    assert distance(small, forward, X) < 1e-10
    assert not forward(X).requires_grad
    assert torch.allclose(values, forward(X))


def _without_eps(self: Scaling) -> None:
    self.eps = 0.0


def _without_bias(self: Scaling) -> None:
    self.bias = None


def _without_beta(self: Scaling) -> None:
    self.beta = None


@pytest.mark.parametrize("fault", [_without_eps, _without_bias, _without_beta])
def test_a_planted_fault_is_caught(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Scaling], None]) -> None:
    model = scramble(UserNet()).double()
    assert distance(model, crafting_forward(model), X) < 1e-10
    right = Scaling.__post_init__

    def wrong(self: Scaling) -> None:
        right(self)
        fault(self)

    monkeypatch.setattr(Scaling, "__post_init__", wrong)
    assert distance(model, crafting_forward(model), X) > 1e-4


def test_scaling_by_hand() -> None:
    norm = nn.BatchNorm1d(1, eps=0.5)
    for tensor, value in ((norm.weight, 3.0), (norm.bias, 7.0), (norm.running_mean, 2.0), (norm.running_var, 3.5)):
        assert tensor is not None
        tensor.data.fill_(value)
    scaling = Scaling.of(norm, torch.tensor([11.0]))
    with torch.no_grad():
        Scalings([scaling]).compute()
    assert math.isclose(scaling.scale.item(), 1.5, rel_tol=1e-6)
    assert math.isclose(scaling.shift.item(), 1.5 * (11 - 2) + 7, rel_tol=1e-6)
