"""The oracle of the norm layers: two steps of training beside torch's own layer, then evaluation, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robustlayers.core.random import stream


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Draw float64 values with another mean and spread for each channel."""
    generator = stream(seed, "norm-layer-test", *shape)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    channel = torch.arange(shape[1], dtype=torch.float64).view(1, -1, *(1,) * (len(shape) - 2))
    return values * (0.5 + channel) + 2 * channel - 1


@pytest.fixture(scope="session")
def values() -> Callable[..., Tensor]:
    return draw


def _affine(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters() if p.requires_grad]


def _randomize(parameters: list[nn.Parameter]) -> None:
    for index, parameter in enumerate(parameters):
        parameter.data = torch.rand(parameter.shape, generator=stream(index, "affine"), dtype=torch.float64) + 0.5


def _close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.fixture(scope="session")
def same_as_torch() -> Callable[..., None]:
    """Compare forward, gradients (input and parameters) and buffers over two training steps and an evaluation.

    `ours` and `theirs` have equally many parameters, in the same order; `buffers` names ours -> torch's.
    """

    def compare(
        ours: nn.Module,
        theirs: nn.Module,
        *shape: int,
        buffers: dict[str, str] | None = None,
        feed: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        ours.double().train()
        theirs.double().train()
        mine, its = _affine(ours), _affine(theirs)
        assert len(mine) == len(its)
        _randomize(mine)
        _randomize(its)
        for step, training in enumerate((True, True, False, True)):
            ours.train(training)
            theirs.train(training)
            x = draw(*shape, seed=step)
            outputs, gradients = [], []
            for layer, parameters in ((ours, mine), (theirs, its)):
                leaf = x.clone().requires_grad_()
                y = layer(feed(leaf))
                weights = torch.rand(y.shape, generator=stream(step, "weights"), dtype=torch.float64)
                gradients.append(torch.autograd.grad((y * weights).sum(), [leaf, *parameters]))
                outputs.append(y)
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, gradients[-1][1:], strict=True):
                        parameter -= 0.01 * gradient
            _close(*outputs)
            for one, other in zip(*gradients, strict=True):
                _close(one, other)
            state, reference = ours.state_dict(), theirs.state_dict()
            for name, other in (buffers or {}).items():
                assert state[name].dtype == reference[other].dtype
                _close(state[name], reference[other])

    return compare
