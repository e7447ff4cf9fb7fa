"""A small net that has learned its images, pictures, and processes that are threads, for the tests of the evaluation."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustlayers.core.ranks import Ranks
from robustlayers.evaluation._filters import blur


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


@pytest.fixture(scope="session")
def pictures() -> Tensor:
    """Smooth colored pictures with edges, [24, 3, 32, 32]."""
    x = blur(torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0)), 1.5)
    x = (x - x.amin((1, 2, 3), keepdim=True)) / (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))
    x[:, :, 8:14, 6:26] = 0.9 * x[:, :, 8:14, 6:26].flip(2)
    return x


class Meeting:
    """Where threads that stand for processes exchange values; one that fails lets the others fail too.

    One computes at a time: tracing a net replaces functions for all threads.
    """

    def __init__(self, count: int) -> None:
        self.barrier, self.values = threading.Barrier(count, timeout=60), [None] * count
        self.turn = threading.Lock()

    def exchange(self, index: int, value: Any) -> list[Any]:
        """Return the values of all."""
        self.values[index] = value
        self.turn.release()
        try:
            self.barrier.wait()
            found = list(self.values)
            self.barrier.wait()
        finally:
            self.turn.acquire()
        return found


class Thread(Ranks):
    """One of some threads in the place of processes."""

    def __init__(self, index: int, meeting: Meeting) -> None:
        super().__init__(index, len(meeting.values))
        self.meeting = meeting

    def total(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self.meeting.exchange(self.index, tensor.clone())).sum(0))

    def copy(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(self.meeting.exchange(self.index, tensor.clone())[0])

    def tell(self, value: Any = None) -> Any:
        return self.meeting.exchange(self.index, value)[0]


Together = Callable[[int, Callable[[Ranks], Any]], list[Any]]


@pytest.fixture
def together() -> Together:
    """Do `work(ranks)` in so many threads that stand for processes, and return what each returns."""

    def run(count: int, work: Callable[[Ranks], Any]) -> list[Any]:
        meeting = Meeting(count)

        def one(index: int) -> Any:
            try:
                with meeting.turn:
                    return work(Thread(index, meeting))
            except BaseException:
                meeting.barrier.abort()
                raise

        with ThreadPoolExecutor(count) as pool:
            futures = [pool.submit(one, index) for index in range(count)]
            errors = [future.exception() for future in futures]
            for error in errors:
                if error is not None and not isinstance(error, threading.BrokenBarrierError):
                    raise error
            return [future.result() for future in futures]

    return run
