"""Models with a known answer, and a small trained one, for the tests of the attacks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture
def linear() -> Callable[..., nn.Module]:
    """Make a linear classifier of images, whose worst case is known in closed form."""

    def make(shape: tuple[int, ...], classes: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        layer = nn.Linear(int(torch.tensor(shape).prod()), classes, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator))
        return nn.Sequential(nn.Flatten(), layer)

    return make


def _train() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    templates = torch.rand(4, 1, 5, 5, generator=generator)
    y = torch.arange(160) % 4
    x = (templates[y] + 0.25 * torch.randn(160, 1, 5, 5, generator=generator)).clamp(0, 1)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 24), nn.ReLU(), nn.Linear(24, 4)
    )
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
        net[0].bias.zero_(), net[4].bias.zero_(), net[6].bias.zero_()  # torch drew them from its global state
    for _ in range(100):  # plain gradient descent: importing torch's optimizers takes longer than all of this
        slopes = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), list(net.parameters()))
        with torch.no_grad():
            for parameter, slope in zip(net.parameters(), slopes, strict=True):
                parameter -= 0.2 * slope
    return net.eval(), x, y


@pytest.fixture(scope="session")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A small convolutional net with batch norm in evaluation mode, and the 160 images it has learned."""
    return _train()
