"""Gradients stay channels-last through slices and pools, and are the gradients of the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import robustlayers as rl
from robustlayers.models import build
from robustlayers.normalization import fold_rules


class Layouts(TorchDispatchMode):
    """Counts gradients of images that reach a ReLU, by whether they are channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.right = self.wrong = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.threshold_backward.default:
            gradient = args[0]
            if gradient.dim() == 4:
                last = gradient.is_contiguous(memory_format=torch.channels_last)
                self.right, self.wrong = self.right + last, self.wrong + (not last)
        return func(*args, **(kwargs or {}))


class Strided(nn.Module):
    """Strided slices of several kinds, a mean over space, and a pool, between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.first(x))
        x = functional.relu(self.second(x[:, :, ::2, ::3])) + functional.avg_pool2d(x, (2, 3), ceil_mode=True)
        x = functional.relu(x)[:, :, 1:, :]
        return self.head(functional.relu(self.second(x)).mean((2, 3)))


def _nets() -> list[nn.Module]:
    resnet = build("resnet", seed=0, depth=8, width=4, shortcut="A")
    return [resnet, Strided()]


def _gradient(forward: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Layouts]:
    x = x.clone().requires_grad_()
    with Layouts() as seen:
        (gradient,) = torch.autograd.grad(forward(x).square().sum(), x)
    return gradient, seen


@pytest.mark.parametrize("net", _nets(), ids=["resnet", "strided"])
def test_gradients_stay_channels_last_and_are_right(net: nn.Module) -> None:
    net = net.double().eval()
    x = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    folded, seen = _gradient(rl.crafting_forward(net), x)
    assert seen.right > 0 and seen.wrong == 0
    torch.testing.assert_close(folded, _gradient(net, x)[0])


@pytest.mark.parametrize("net", _nets(), ids=["resnet", "strided"])
def test_planted_fault_without_it_some_are_not(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_rules, "keep_layout", lambda *_: None)
    _, seen = _gradient(rl.crafting_forward(net.float().eval()), torch.rand(2, 3, 12, 12))
    assert seen.wrong > 0


def test_a_graph_without_channels_last_is_left_alone() -> None:
    net = Strided().eval()
    forward = rl.crafting_forward(net, channels_last=False)
    run = forward._plan.run
    assert isinstance(run, fx.GraphModule)
    names = [getattr(node.target, "__name__", "") for node in run.graph.nodes]
    assert "subsample" not in names and "_laid" not in names


def test_a_slice_of_a_batch_of_vectors_or_volumes_is_as_written() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.relu(x)[:, :, ::2, ::2].flatten(1)

    x = torch.rand(2, 3, 4, 4, 5)
    torch.testing.assert_close(rl.crafting_forward(Net().eval())(x), Net()(x))


def test_what_is_overwritten_afterwards_is_as_written() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            y = x[:, :, ::2, ::2]
            y += 1
            return torch.cat([x.flatten(1), y.sigmoid_().flatten(1)], dim=1)

    net = Net().double().eval()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(_gradient(rl.crafting_forward(net), x)[0], _gradient(net, x)[0])
