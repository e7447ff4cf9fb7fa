"""What all tests share: one thread, property tests that draw the same examples every time, small nets with images."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from robustlayers import models
from robustlayers.core.random import stream

torch.set_num_threads(1)  # several workers share the machine, and the order of sums is then the same everywhere
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 7),
        nn.BatchNorm1d(7),
        nn.ReLU(),
        nn.Linear(7, 5),
        nn.BatchNorm1d(5),
        nn.Linear(5, 3),
    )


_NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": _mlp,
    "small-cnn": lambda: models.build("small-cnn", seed=1, width=3, channels=1, classes=3),
    "resnet": lambda: models.build("resnet", seed=1, depth=8, width=3, channels=1, classes=3, shortcut="B"),
}


@pytest.fixture(scope="session")
def net() -> Callable[..., nn.Module]:
    """Build `mlp`, `small-cnn` or `resnet` (8 layers) for images [n, 1, 8, 8] of 3 classes, always the same weights.

    Norm layers have a scale, a shift and running statistics as after some training, so that a mix-up shows.
    """

    def make(name: str = "mlp", dtype: torch.dtype = torch.float32) -> nn.Module:
        generator = stream(0, "test-net", name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _NETS[name]()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.normal_(0, 0.3, generator=generator)
                    module.running_mean.normal_(0, 0.3, generator=generator)  # pyright: ignore
                    module.running_var.uniform_(0.5, 1.5, generator=generator)  # pyright: ignore
                    module.num_batches_tracked.fill_(3)  # pyright: ignore
        return model.to(dtype)

    return make


@pytest.fixture(scope="session")
def batch() -> Callable[..., tuple[Tensor, Tensor]]:
    """Draw a batch (x, y) for these nets: x [n, 1, 8, 8] in [0, 1], y in 0, 1, 2."""

    def make(n: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        generator = stream(seed, "test-batch")
        return torch.rand(n, 1, 8, 8, generator=generator).to(dtype), torch.randint(0, 3, (n,), generator=generator)

    return make


@pytest.fixture(scope="session")
def bits() -> Callable[[nn.Module], dict[str, bytes]]:
    """Read every tensor of `state_dict()` as bytes, so that equal means equal in every bit."""
    return lambda model: {
        name: tensor.detach().cpu().contiguous().numpy().tobytes() for name, tensor in model.state_dict().items()
    }
