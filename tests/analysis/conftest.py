"""A small convolutional net that has learned its images, and a check that an analysis leaves it as it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn


def _net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 4),
    )


@pytest.fixture(scope="session")
def _learned() -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    templates = torch.rand(4, 1, 8, 8, generator=generator)
    y = torch.arange(120) % 4
    x = (templates[y] + 0.25 * torch.randn(120, 1, 8, 8, generator=generator)).clamp(0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = _net()
        start = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        for _ in range(40):
            slopes = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), list(net.parameters()))
            with torch.no_grad():
                for parameter, slope in zip(net.parameters(), slopes, strict=True):
                    parameter -= 0.2 * slope
    y[:6] = (y[:6] + 1) % 4  # some labels that the net gets wrong
    return start, net.state_dict(), (x * 255).round().to(torch.uint8), y


@pytest.fixture
def learned(
    _learned: tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor],
) -> tuple[nn.Module, dict[str, Tensor], Tensor, Tensor]:
    """A trained net of its own, its state before training, 120 images as bytes, and labels of which six are wrong."""
    start, end, x, y = _learned
    with torch.random.fork_rng(devices=[]):
        net = _net()
    net.load_state_dict(end)
    return net.train(), start, x, y


@pytest.fixture(scope="session")
def no_trace() -> Callable[[nn.Module], object]:
    """`with no_trace(model):` fails where the block leaves tensors, gradients, modes, hooks or random states changed."""

    @contextmanager
    def check(model: nn.Module) -> Iterator[None]:
        model[3].eval()  # type: ignore[index]  # a mode that no bare train() or eval() restores
        hook = model[0].register_forward_hook(lambda *_: None)  # type: ignore[index]
        first = next(model.parameters())
        first.grad = torch.ones_like(first)
        first.requires_grad_(False)

        def facts() -> list[object]:
            tensors = [
                (name, id(tensor), tensor.detach().numpy().tobytes(), tensor.requires_grad)
                for name, tensor in (*model.named_parameters(), *model.named_buffers())
            ]
            modes = [(module.training, dict(vars(module)).keys()) for module in model.modules()]
            hooks = [list(m._forward_hooks) + list(m._forward_pre_hooks) for m in model.modules()]
            momenta = [(getattr(m, "momentum", 0), getattr(m, "track_running_stats", 0)) for m in model.modules()]
            grads = [None if p.grad is None else p.grad.sum().item() for p in model.parameters()]
            return [tensors, modes, hooks, momenta, grads, torch.get_rng_state().tolist(), torch.is_grad_enabled()]

        before = facts()
        try:
            yield
        finally:
            after = facts()
            hook.remove()
            first.grad = None
            first.requires_grad_(True)
            assert before == after

    return check
