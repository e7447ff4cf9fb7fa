"""Uniform noise of the ball: the control that every attack must beat."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from robustlayers.attacks._ascent import Best, Forward, count, own_generator, prepare, score
from robustlayers.attacks.losses import find_loss
from robustlayers.attacks.threat import Threat

__all__ = ["Noise"]


@dataclass(frozen=True)
class Noise:
    """A point drawn uniformly from the ball, clamped to the box; of several `draws` the one of the highest margin loss.

    >>> Noise(Threat("linf", "8/255"), draws=10).describe()
    'noise-10, linf 8/255'
    """

    threat: Threat
    draws: int = 1

    def __post_init__(self) -> None:
        count("draws", self.draws, 1)

    @property
    def forward_passes(self) -> int:
        """Forward passes for each image: a single draw needs none."""
        return self.draws if self.draws > 1 else 0

    @property
    def backward_passes(self) -> int:
        """Backward passes for each image."""
        return 0

    def describe(self) -> str:
        """Return one line with everything that decides the attack's strength."""
        return f"noise-{self.draws}, {self.threat}"

    def __call__(self, forward: Forward, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return noisy images for `x`, as `PGD` does."""
        x, y = prepare(x, y)
        if x.numel() == 0:
            return x.clone()
        generator = own_generator(x, generator)
        if self.draws == 1:
            return self.threat.random_start(x, generator)
        objective = partial(find_loss("margin"), y=y)
        best = Best(x, y)
        for _ in range(self.draws):
            x_adv = self.threat.random_start(x, generator)
            best.update(x_adv, *score(forward, x_adv, objective))
        return best.x
