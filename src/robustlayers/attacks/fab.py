"""FAB-T: the smallest perturbation to each of the likeliest wrong classes, by steps to the linearized boundary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustlayers.attacks._ascent import Best, Forward, count, differentiating, gradient, prepare, score, select
from robustlayers.attacks._draws import Generators
from robustlayers.attacks._goal import Goal, make_goal
from robustlayers.attacks._hyperplane import to_hyperplane
from robustlayers.attacks._identity import identity_of
from robustlayers.attacks.losses import find_loss
from robustlayers.attacks.targeted import likeliest_targets
from robustlayers.attacks.threat import Threat

__all__ = ["FAB"]

OVERSHOOT = 1.05  # eta of the paper: how far a step goes beyond the linearized boundary
ORIGINAL = 0.1  # alpha_max: the most weight of the step that starts from the image itself
BACK = 0.9  # beta: how far from the image one goes on after a point of another class
_ROWS = {"cpu": 64}  # runs of several targets go together until a batch is so full
_ROWS_ELSEWHERE = 1000


@dataclass(frozen=True)
class FAB:
    """The targeted fast adaptive boundary attack, FAB-T (Croce & Hein 2020, "Minimally distorted", algorithm 1).

    For each of the `targets` likeliest classes beside the label, `steps` steps look for the nearest point at which the
    model decides otherwise. A step linearizes z_t - z_y at the iterate x_i, moves x_i and the image x to that hyperplane
    inside the box, by d_i and d, and takes x_(i+1) = (1 - a) (x_i + 1.05 d_i) + a (x + 1.05 d), a = min(|d_i| / (|d_i| +
    |d|), 0.1). A point of another class counts by its distance; from there the search goes on at x + 0.9 (x_(i+1) - x).
    Without random starts and without a final search, as in AutoAttack's standard.

    An image is broken as soon as such a point is inside the threat; then it takes no part in what follows. One that is not
    comes back with the point of the largest margin. Nothing is random.

    Cost: at most 1 + targets (2 steps + 1) forwards and targets * steps backwards. Too weak where gradients are
    masked. Third attack of AutoAttack, with 9 targets and 100 steps; it seldom breaks what `TargetedAPGD` does not.

    Raises `UserError` for values that are not allowed.

    >>> attack = FAB(Threat("linf", "8/255"))
    >>> attack.describe(), attack.forward_passes, attack.backward_passes
    ('fab-t-100, linf 8/255, 9 targets, stops when broken', 1810, 900)
    """

    threat: Threat
    steps: int = 100
    targets: int = 9

    def __post_init__(self) -> None:
        count("steps", self.steps, 1)
        count("targets", self.targets, 1)

    @property
    def forward_passes(self) -> int:
        """Forward passes for each image, at most; one that is broken costs less."""
        return 1 + self.targets * (2 * self.steps + 1)

    @property
    def backward_passes(self) -> int:
        """Backward passes for each image, at most."""
        return self.targets * self.steps

    def describe(self) -> str:
        """Return one line with everything that decides the attack's strength."""
        targets = f"{self.targets} target{'s' if self.targets > 1 else ''}"
        return f"fab-t-{self.steps}, {self.threat}, {targets}, stops when broken"

    def identity(self) -> dict[str, Any]:
        """Return what decides the attack as plain data."""
        return identity_of(self)

    def __call__(self, forward: Forward, x: Tensor, y: Tensor, *, generator: Generators | None = None) -> Tensor:
        """Return adversarial images for `x`, as `PGD` does; `generator` is not drawn from."""
        x, y = prepare(x, y)
        if x.numel() == 0:
            return x.clone()
        goal, best = make_goal("margin", y), Best(x, stop=True)
        with differentiating():
            with torch.no_grad():
                logits = forward(x)
            best.update(goal, x, logits, find_loss("margin")(logits, y))
            targets = likeliest_targets(logits, y, self.targets)
            first, width = 0, _ROWS.get(x.device.type, _ROWS_ELSEWHERE)
            while first < targets.shape[1] and len(rows := best.standing()):
                together, part = targets[rows, first : first + max(1, width // len(rows))], goal.take(rows)
                found = self._nearest(forward, x[rows], part, together)
                for points in found:  # by falling likelihood: the first that breaks an image stays
                    points = self.threat.project(points, x[rows])
                    best.update(part, points, *score(forward, points, part.losses), rows)
                first += together.shape[1]
        return best.x.detach()

    def _nearest(self, forward: Forward, x: Tensor, goal: Goal, targets: Tensor) -> list[Tensor]:
        """Return for each class of `targets` [n, k] the nearest point that each image was found to be wrong at: k batches.

        The image itself where there is none. Runs end where an image is broken, by them or towards a likelier class.
        """
        (n, k), device = targets.shape, x.device
        points, nearest = x.repeat(k, *[1] * (x.ndim - 1)), x.new_full((n * k,), torch.inf)
        rows = torch.arange(n * k, device=device)  # run r goes from image r % n towards the class of rank r // n
        broken_at = torch.full((n,), k, device=device)  # rank of the likeliest class that an image is broken towards
        target = targets.T.reshape(-1)
        x, goal = points.clone(), goal.take(rows % n)
        x_adv = x
        for step in range(self.steps):
            x_adv = self._step(x, x_adv, *_linearized(forward, x_adv, goal.y, target))
            logits, _ = score(forward, x_adv, goal.losses)
            wrong, distance = goal.broken(logits), self.threat.size(x_adv - x)
            done = wrong & goal.settled(logits) & (distance <= self.threat.eps)
            nearer = done | (wrong & (distance < nearest[rows]))
            points[rows] = select(nearer, x_adv, points[rows])
            nearest[rows] = torch.where(nearer, distance, nearest[rows])
            x_adv = select(wrong, x + BACK * (x_adv - x), x_adv)
            if step + 1 < self.steps and bool(done.any()):
                ranks, images = rows // n, rows % n
                broken_at.scatter_reduce_(0, images, torch.where(done, ranks, k), "amin")
                places = (~done & (ranks < broken_at[images])).nonzero().squeeze(1)
                if not len(places):
                    break
                rows, target, goal = rows[places], target[places], goal.take(places)
                x, x_adv = x[places], x_adv[places]
        return list(points.unflatten(0, (k, n)).unbind(0))

    def _step(self, x: Tensor, x_adv: Tensor, ahead: Tensor, slope: Tensor) -> Tensor:
        """Return the next iterate, from how far the target is `ahead` of the label at `x_adv`, and its slope."""
        away, norm = (x_adv - x).flatten(1), self.threat.norm
        slope = slope.flatten(1)
        here = to_hyperplane(x_adv.flatten(1), slope, ahead, norm).view_as(x)
        there = to_hyperplane(x.flatten(1), slope, ahead - (slope * away).sum(1), norm).view_as(x)
        from_here, from_there = (self.threat.size(move).clamp_min(1e-8) for move in (here, there))
        share = (from_here / (from_here + from_there)).clamp_max(ORIGINAL).view(-1, *[1] * (x.ndim - 1))
        return torch.lerp(x_adv + OVERSHOOT * here, x + OVERSHOOT * there, share).clamp_(0, 1)


def _linearized(forward: Forward, x_adv: Tensor, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return z_t - z_y at each image, and its gradient for the image."""

    def ahead(logits: Tensor) -> Tensor:
        return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)

    _, difference, slope = gradient(forward, x_adv, ahead)
    return difference, slope
