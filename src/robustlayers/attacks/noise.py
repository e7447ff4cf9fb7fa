"""Noise without a gradient: the control that every attack must beat."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robustlayers.attacks._ascent import Best, Forward, count, prepare, score
from robustlayers.attacks._draws import Generators, normal, own_generator
from robustlayers.attacks._goal import make_goal
from robustlayers.attacks._identity import identity_of
from robustlayers.attacks.threat import Threat
from robustlayers.core.errors import UserError
from robustlayers.core.quantities import number, pixels_text

__all__ = ["Gaussian", "Noise"]


@dataclass(frozen=True)
class Noise:
    """A point drawn uniformly from the ball, clamped to the box; of several `draws` the one of the highest margin loss.

    Cost: a forward for each draw, none for a single one. Too weak to measure robustness with: it is a control, which a
    working attack has to beat.

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

    def identity(self) -> dict[str, Any]:
        """Return what decides the attack as plain data."""
        return identity_of(self)

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        *,
        generator: Generators | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """Return noisy images for `x`, as `PGD` does."""
        return _worst(self, forward, x, y, generator, target)

    def draw(self, x: Tensor, generator: Generators) -> Tensor:
        """Return one noisy image for each image."""
        return self.threat.random_start(x, generator)


@dataclass(frozen=True)
class Gaussian:
    """Gaussian noise of standard deviation `sigma` for each pixel, moved into ball and box; the worst of some `draws`.

    `sigma` is in pixel units. None means eps / 2 in linf, eps / sqrt(d) in l2 and eps / d in l1, d the pixels of an
    image: noise about as long as the ball is wide. For robustness to noise without a ball, give a threat that is wide.

    Cost: a forward for each draw, none for a single one. Too weak to measure robustness with: it is a control.

    Raises `UserError` for values that are not allowed.

    >>> Gaussian(Threat("l2", 2), sigma=0.05, draws=10).describe()
    'gaussian-10, l2 2, sigma 0.05'
    """

    threat: Threat
    sigma: float | str | None = None
    draws: int = 1

    def __post_init__(self) -> None:
        count("draws", self.draws, 1)
        if self.sigma is not None:
            object.__setattr__(self, "sigma", number(self.sigma, "sigma"))
            if float(self.sigma) <= 0:
                raise UserError(f"sigma: {self.sigma} is not allowed; allowed: more than 0, in pixel units")

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
        sigma = "by eps" if self.sigma is None else pixels_text(float(self.sigma))
        return f"gaussian-{self.draws}, {self.threat}, sigma {sigma}"

    def identity(self) -> dict[str, Any]:
        """Return what decides the attack as plain data."""
        return identity_of(self)

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        *,
        generator: Generators | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """Return noisy images for `x`, as `PGD` does."""
        return _worst(self, forward, x, y, generator, target)

    def draw(self, x: Tensor, generator: Generators) -> Tensor:
        """Return one noisy image for each image."""
        pixels = math.prod(x.shape[1:])
        width = {"linf": 2.0, "l2": math.sqrt(pixels), "l1": pixels}[self.threat.norm]
        sigma = self.threat.eps / width if self.sigma is None else float(self.sigma)
        return self.threat.project(x + sigma * normal(x.shape, generator, x.dtype).to(x.device), x)


def _worst(
    attack: Noise | Gaussian,
    forward: Forward,
    x: Tensor,
    y: Tensor,
    generator: Generators | None,
    target: Tensor | None,
) -> Tensor:
    x, y = prepare(x, y)
    if x.numel() == 0:
        return x.clone()
    goal = make_goal("margin", y, target)
    generator = own_generator(x, generator)
    if attack.draws == 1:
        return attack.draw(x, generator)
    best = Best(x)
    for _ in range(attack.draws):
        x_adv = attack.draw(x, generator)
        best.update(goal, x_adv, *score(forward, x_adv, goal.losses))
    return best.x
