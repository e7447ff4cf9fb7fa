"""The crafting forward follows the changes of its model with every refresh: values, tensors, layers, hooks, types."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustlayers.models import build
from robustlayers.normalization.fold import crafting_forward

_spec = importlib.util.spec_from_file_location("fold_cases", Path(__file__).with_name("fold_cases.py"))
assert _spec is not None and _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

CIFAR, X, Y, distance, scramble = cases.CIFAR, cases.X, cases.Y, cases.distance, cases.scramble


@pytest.fixture(params=cases.MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, int, int]:
    return cases.case(request.param)


@pytest.fixture
def small() -> nn.Module:
    return cases.small()


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
