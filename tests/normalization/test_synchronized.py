"""Batch norm over a shared batch: which layers have such a form; what it computes is tested with two processes in training."""

import copy
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from robustlayers import models
from robustlayers.core.errors import UserError
from robustlayers.core.ranks import ALONE
from robustlayers.normalization.context import Setting, normalization, normalizing
from robustlayers.normalization.synchronized import Shared, check_layers, shared, sharing, synchronize


class Own(nn.BatchNorm1d):
    def forward(self, input):  # noqa: A002
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2), Own(2)), r"batch norm only, not for 1: Own; allowed: none, mean"),
        (lambda: models.build("small-cnn", norm="robust"), r"not for bn1: RobustNorm, .*; allowed"),
    ],
)
def test_layers_without_a_synchronized_form_are_told(model, text):
    with pytest.raises(UserError, match=text):
        check_layers(model())


@pytest.mark.parametrize("norm", ["dual", "random", "group", "instance", "film", "adapter", "joint"])
def test_layers_made_of_batch_norm_have_one(norm):
    check_layers(models.build("small-cnn", norm=norm))


@pytest.fixture
def layer():
    made = nn.BatchNorm2d(3)
    with torch.no_grad():
        made.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
        made.running_mean.fill_(0.3)  # pyright: ignore
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_shared_by_one_process_it_is_batch_norm(dtype, memory_format, momentum, layer):
    layer = layer.to(dtype)
    layer.momentum = momentum
    twin = copy.deepcopy(layer).train()
    x = torch.rand(5, 3, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(1)).to(memory_format=memory_format)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    for _ in range(2):
        with (
            sharing(Shared(ALONE, (5,))),
            normalizing(layer, {layer: Setting("batch", True)}, training=True),
        ):
            assert "forward" in vars(layer)
            y = layer(one)
        z = twin(other)
    weights = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
    found = torch.autograd.grad((y * weights).sum(), [one, layer.weight, layer.bias])
    expected = torch.autograd.grad((z * weights).sum(), [other, twin.weight, twin.bias])
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(y, z, **close)
    torch.testing.assert_close(found, expected, **close)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(layer.get_buffer(name), buffer, **close)
    assert "forward" not in vars(layer) and shared() is None


def test_by_running_statistics_it_is_the_layer_itself(layer):
    x = torch.rand(5, 3, 4, 4)
    expected = layer.eval()(x)
    with sharing(Shared(ALONE, (5,))), normalizing(layer, {layer: Setting("running", False)}, training=True):
        assert torch.equal(layer(x), expected)


def test_a_block_around_does_not_hold_inside(layer):
    x = torch.rand(5, 3, 4, 4)
    before = layer.running_mean.clone()
    with normalization(layer, by="running"):
        with sharing(Shared(ALONE, (5,))), normalizing(layer, {layer: Setting("batch", False)}, training=True):
            torch.testing.assert_close(layer(x).mean((0, 2, 3)), layer.bias)
        torch.testing.assert_close(layer(x), copy.deepcopy(layer).eval()(x))
    assert torch.equal(layer.running_mean, before)


def test_without_a_shared_batch_nothing_is_changed(layer):
    with ExitStack() as undo:
        synchronize(layer, undo, mean=True)
        assert "forward" not in vars(layer)


def test_one_value_per_channel_is_an_error_as_in_torch():
    layer = nn.BatchNorm1d(3).train()
    with ExitStack() as undo, sharing(Shared(ALONE, (1,))):
        synchronize(layer, undo, mean=True)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            layer(torch.rand(1, 3))
