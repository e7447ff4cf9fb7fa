"""Auto-PGD: projected gradient descent with momentum that halves its own step size where an image makes no progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from robustlayers.attacks._ascent import (
    Best,
    Forward,
    count,
    differentiating,
    flag,
    gradient,
    prepare,
    score,
    select,
)
from robustlayers.attacks._draws import Generators, own_generator
from robustlayers.attacks._goal import Goal, make_goal
from robustlayers.attacks._identity import identity_of, later
from robustlayers.attacks._sparse import climb_sparsely, phases
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
    """Auto-PGD without a step size to choose (Croce & Hein 2020, section 3, algorithm 1).

    The step size starts at 2 eps. A step is z = P(x_k + eta * direction), x_(k+1) = P(x_k + 0.75 (z - x_k) + 0.25
    (x_k - x_(k-1))). At each checkpoint, an image whose loss rose in fewer than 75 % of the steps since the last one,
    or whose best loss and step size are both as they were there, halves its step size and goes on from its best
    point. Decisions are taken image by image. In l1 the steps are sparse instead, and lead through balls of 3 and 2 eps
    to that of eps (Croce & Hein 2021, "Mind the box").

    `loss` is `ce`, `dlr` or `margin`. The best iterate is returned: misclassified before not, then the higher loss.
    Restarts are nested, as those of `PGD`. With `early_exit`, an image takes no part in further steps and restarts once
    it is misclassified, as in AutoAttack: as many images are broken, at a lower cost on a weak model.

    Cost: steps + 1 forwards (l1: steps + 3) and `steps` backwards for each restart. Too weak on its own where gradients
    are masked, and with `ce` where logits saturate; `dlr` and the targeted `TargetedAPGD` see through a scale of the
    logits.

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
    early_exit: bool = later(False)

    def __post_init__(self) -> None:
        count("steps", self.steps, 1)
        count("restarts", self.restarts, 1)
        flag("random_start", self.random_start)
        if self.restarts > 1 and not self.random_start:
            raise UserError("restarts: several restarts without random_start are all the same; use restarts=1")
        if find_loss(self.loss).against_clean:
            raise UserError(f"loss {self.loss}: not offered for apgd; allowed: ce, dlr, margin")
        flag("early_exit", self.early_exit)

    @property
    def forward_passes(self) -> int:
        """Forward passes for each image; with `early_exit` the most that it can cost."""
        return forwards(self.threat, self.steps) * self.restarts

    @property
    def backward_passes(self) -> int:
        """Backward passes for each image."""
        return self.steps * self.restarts

    def describe(self) -> str:
        """Return one line with everything that decides the attack's strength."""
        restarts = f"{self.restarts} restart{'s' if self.restarts > 1 else ''}"
        start = "" if self.random_start else ", from the clean image"
        stop = ", stops when broken" if self.early_exit else ""
        return f"apgd-{self.loss}-{self.steps}, {self.threat}, {restarts}, best iterate{start}{stop}"

    def identity(self) -> dict[str, Any]:
        """Return what decides the attack as plain data; options that came later only where they are used."""
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
        """Return adversarial images for `x`, as `PGD` does."""
        x, y = prepare(x, y)
        if x.numel() == 0:
            return x.clone()
        generator = own_generator(x, generator)
        goal = make_goal(self.loss, y, target)
        best = Best(x, stop=self.early_exit)
        with differentiating():
            for _ in range(self.restarts):
                start = self.threat.random_start(x, generator) if self.random_start else x.clone()
                if not self.early_exit:
                    climb_by_itself(forward, self.threat, goal, x, start, self.steps, best)
                elif len(rows := best.standing()):
                    part = goal.take(rows), x[rows], start[rows]
                    climb_by_itself(forward, self.threat, *part, self.steps, best, rows)
        return best.x.detach()


def forwards(threat: Threat, steps: int) -> int:
    """Return the forward passes of a run: one for each step, and one for the start of each phase."""
    return steps + (len(phases(steps)) if threat.norm == "l1" else 1)


@dataclass
class _State:
    """Everything that Auto-PGD remembers of a batch, image by image."""

    x: Tensor
    x_adv: Tensor
    before: Tensor  # the iterate before x_adv
    slope: Tensor
    losses: Tensor
    # The algorithm's own best is by loss alone; `Best` also prefers misclassified points.
    peak_x: Tensor
    peak_slope: Tensor
    peak: Tensor
    eta: Tensor  # step size [n, 1, ...]
    rises: Tensor  # steps since the last checkpoint that raised the loss
    eta_then: Tensor  # at the last checkpoint
    peak_then: Tensor

    def take(self, places: Tensor) -> _State:
        return _State(**{part.name: getattr(self, part.name)[places] for part in fields(self)})


def climb_by_itself(
    forward: Forward,
    threat: Threat,
    goal: Goal,
    x: Tensor,
    start: Tensor,
    steps: int,
    best: Best,
    rows: Tensor | None = None,
) -> None:
    """Take all steps of Auto-PGD from one start and tell `best` about every iterate.

    With `rows`, the places of these images in the batch of `best`, images that are broken are left out of the batches
    that follow.
    """
    if threat.norm == "l1":
        climb_sparsely(forward, threat, goal, x, start, steps, best, rows)
        return
    project, checks = threat.projector(x), checkpoints(steps)
    logits, losses, slope = gradient(forward, start, goal.losses)
    best.update(goal, start, logits, losses, rows)
    eta = x.new_full((len(x), *[1] * (x.ndim - 1)), 2 * threat.eps)
    now = _State(x, start, start, slope, losses, start, slope, losses, eta, torch.zeros_like(losses), eta, losses)
    last_check = 0
    for k in range(1, steps + 1):
        places = None if rows is None else best.compact(rows)
        if rows is not None and places is not None:
            if not len(places):
                return
            rows, goal, now = rows[places], goal.take(places), now.take(places)
            project = threat.projector(now.x)
        z = _step(threat, project, now, first=k == 1)
        now.before, now.x_adv, losses_before = now.x_adv, z, now.losses
        if k == steps:  # no step follows: no gradient is needed
            best.update(goal, now.x_adv, *score(forward, now.x_adv, goal.losses), rows)
            break
        logits, now.losses, now.slope = gradient(forward, now.x_adv, goal.losses)
        best.update(goal, now.x_adv, logits, now.losses, rows)
        now.rises = now.rises + (now.losses > losses_before)
        higher = now.losses > now.peak
        now.peak = torch.where(higher, now.losses, now.peak)
        now.peak_x, now.peak_slope = select(higher, now.x_adv, now.peak_x), select(higher, now.slope, now.peak_slope)
        if k in checks:
            _check(now, k - last_check)
            last_check = k


def _step(threat: Threat, project: Callable[[Tensor], Tensor], now: _State, *, first: bool) -> Tensor:
    z = project(threat.ascend(now.x_adv, now.slope, now.eta))
    if first:
        return z
    return project(now.x_adv + MOMENTUM * (z - now.x_adv) + (1 - MOMENTUM) * (now.x_adv - now.before))


def _check(now: _State, since: int) -> None:
    """Halve the step of the images that made no progress since the last checkpoint; they go on from their peak."""
    stuck = (now.eta.flatten() == now.eta_then.flatten()) & (now.peak == now.peak_then)
    halve = (now.rises < PROGRESS * since) | stuck
    now.eta_then, now.peak_then = now.eta, now.peak
    now.eta = select(halve, now.eta / 2, now.eta)
    now.x_adv, now.slope = select(halve, now.peak_x, now.x_adv), select(halve, now.peak_slope, now.slope)
    now.losses = torch.where(halve, now.peak, now.losses)
    now.rises = torch.zeros_like(now.rises)
