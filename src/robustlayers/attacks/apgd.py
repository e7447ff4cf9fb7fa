"""Auto-PGD: projected gradient descent with momentum that halves its own step size where an image makes no progress."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from robustlayers.attacks._ascent import (
    Best,
    Forward,
    Objective,
    count,
    differentiating,
    flag,
    gradient,
    own_generator,
    prepare,
    score,
    select,
)
from robustlayers.attacks.losses import find_loss
from robustlayers.attacks.threat import Threat
from robustlayers.core.errors import UserError

__all__ = ["APGD", "checkpoints"]

MOMENTUM = 0.75  # alpha of the paper: weight of the new step against the last move
PROGRESS = 0.75  # rho of the paper: share of steps since the last checkpoint that must have raised the loss


def checkpoints(steps: int) -> tuple[int, ...]:
    """Return the iterations at which the step size may be halved: ceil(p_j steps), inside 1 .. steps - 1.

    p_0 = 0, p_1 = 0.22, p_(j+1) = p_j + max(p_j - p_(j-1) - 0.03, 0.06) (Croce & Hein 2020, section 3).

    >>> checkpoints(100)
    (22, 41, 57, 70, 80, 87, 93, 99)
    """
    found: list[int] = []
    before, percent = 0, 22  # in whole percent: 0.7 * 100 is more than 70 in floating point
    while percent < 100:
        iteration = -(-percent * steps // 100)
        if 0 < iteration < steps and iteration not in found:
            found.append(iteration)
        before, percent = percent, percent + max(percent - before - 3, 6)
    return tuple(found)


@dataclass(frozen=True)
class APGD:
    """Auto-PGD without a step size to choose (Croce & Hein 2020, section 3, algorithm 1), for linf and l2.

    The step size starts at 2 eps. A step is z = P(x_k + eta * direction), x_(k+1) = P(x_k + 0.75 (z - x_k) + 0.25
    (x_k - x_(k-1))). At each checkpoint, an image whose loss rose in fewer than 75 % of the steps since the last one,
    or whose best loss and step size are both as they were there, halves its step size and goes on from its best
    point. Decisions are taken image by image.

    `loss` is `ce`, `dlr` or `margin`. The best iterate is returned: misclassified before not, then the higher loss.
    Restarts are nested, as those of `PGD`.

    Raises `UserError` for values that are not allowed.

    >>> attack = APGD(Threat("linf", "8/255"), loss="dlr")
    >>> attack.describe(), attack.forward_passes, attack.backward_passes
    ('apgd-dlr-100, linf 8/255, 1 restart, best iterate', 101, 100)
    """

    threat: Threat
    steps: int = 100
    loss: str = "ce"
    restarts: int = 1
    random_start: bool = True

    def __post_init__(self) -> None:
        count("steps", self.steps, 1)
        count("restarts", self.restarts, 1)
        flag("random_start", self.random_start)
        if self.restarts > 1 and not self.random_start:
            raise UserError("restarts: several restarts without random_start are all the same; use restarts=1")
        if find_loss(self.loss).against_clean:
            raise UserError(f"loss {self.loss}: not offered for apgd; allowed: ce, dlr, margin")

    @property
    def forward_passes(self) -> int:
        """Forward passes for each image."""
        return (self.steps + 1) * self.restarts

    @property
    def backward_passes(self) -> int:
        """Backward passes for each image."""
        return self.steps * self.restarts

    def describe(self) -> str:
        """Return one line with everything that decides the attack's strength."""
        restarts = f"{self.restarts} restart{'s' if self.restarts > 1 else ''}"
        start = "" if self.random_start else ", from the clean image"
        return f"apgd-{self.loss}-{self.steps}, {self.threat}, {restarts}, best iterate{start}"

    def __call__(self, forward: Forward, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return adversarial images for `x`, as `PGD` does."""
        x, y = prepare(x, y)
        if x.numel() == 0:
            return x.clone()
        generator = own_generator(x, generator)
        objective = partial(find_loss(self.loss), y=y)
        best = Best(x, y)
        with differentiating():
            for _ in range(self.restarts):
                start = self.threat.random_start(x, generator) if self.random_start else x.clone()
                self._climb(forward, x, start, objective, best)
        return best.x.detach()

    def _climb(self, forward: Forward, x: Tensor, x_adv: Tensor, objective: Objective, best: Best) -> None:
        project, ascend = self.threat.projector(x), self.threat.ascend
        checks = checkpoints(self.steps)

        logits, losses, slope = gradient(forward, x_adv, objective)
        best.update(x_adv, logits, losses)
        # The algorithm's own best is by loss alone; `best` also prefers misclassified points.
        peak_x, peak_slope, peak = x_adv, slope, losses
        eta = x.new_full((len(x), *[1] * (x.ndim - 1)), 2 * self.threat.eps)
        before, last_check = x_adv, 0
        rises = torch.zeros_like(losses)  # steps since the last checkpoint that raised the loss
        eta_then, peak_then = eta, peak

        for k in range(1, self.steps + 1):
            z = project(ascend(x_adv, slope, eta))
            if k > 1:
                z = project(x_adv + MOMENTUM * (z - x_adv) + (1 - MOMENTUM) * (x_adv - before))
            before, x_adv, losses_before = x_adv, z, losses
            if k == self.steps:  # no step follows: no gradient is needed
                best.update(x_adv, *score(forward, x_adv, objective))
                break
            logits, losses, slope = gradient(forward, x_adv, objective)
            best.update(x_adv, logits, losses)
            rises = rises + (losses > losses_before)
            higher = losses > peak
            peak = torch.where(higher, losses, peak)
            peak_x, peak_slope = select(higher, x_adv, peak_x), select(higher, slope, peak_slope)
            if k in checks:
                stuck = (eta.flatten() == eta_then.flatten()) & (peak == peak_then)
                halve = (rises < PROGRESS * (k - last_check)) | stuck
                eta_then, peak_then, last_check = eta, peak, k
                eta = select(halve, eta / 2, eta)
                x_adv, slope = select(halve, peak_x, x_adv), select(halve, peak_slope, slope)
                losses = torch.where(halve, peak, losses)
                rises = torch.zeros_like(rises)
