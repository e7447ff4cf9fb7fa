"""A small net with batch norm that has learned its images, for the tests of the evaluation."""

import pytest
import torch
from torch import Tensor, nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1))
        self.head = nn.Linear(54, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def _train() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    templates = torch.rand(4, 1, 5, 5, generator=generator)
    y = torch.arange(120) % 4
    x = (templates[y] + 0.3 * torch.randn(120, 1, 5, 5, generator=generator)).clamp(0, 1)
    x = (x * 255).round().to(torch.uint8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net()
        for _ in range(60):  # plain gradient descent: importing torch's optimizers takes longer than all of this
            slopes = torch.autograd.grad(nn.functional.cross_entropy(net(x / 255), y), list(net.parameters()))
            with torch.no_grad():
                for parameter, slope in zip(net.parameters(), slopes, strict=True):
                    parameter -= 0.3 * slope
    y[:5] = (y[:5] + 1) % 4  # some labels that the net gets wrong
    return net.eval(), x, y


@pytest.fixture(scope="session")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A small net in evaluation mode, 120 images as bytes, and labels of which five are wrong."""
    return _train()
