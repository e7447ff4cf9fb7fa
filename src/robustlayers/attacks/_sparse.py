"""Auto-PGD in l1: sparse steps that adapt to the perturbation, in balls that shrink to the threat's."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from robustlayers.attacks._ascent import Best, Forward, gradient, score, select
from robustlayers.attacks._goal import Goal
from robustlayers.attacks.threat import Threat

__all__ = ["climb_sparsely", "phases", "sparse_step"]

FIRST = 0.2  # share of the pixels that the first steps change
EVERY = 0.04  # share of the steps between two checkpoints
SPARSER = 1.5  # a step changes so many times fewer pixels than the best perturbation has
SHORTER = 1.5  # the step size is divided by so much where the perturbation stays as dense ...
LEAST = 0.1  # ... down to this share of eps
SAME = 0.95  # a perturbation of more than this share of the pixels it had is as dense


def phases(steps: int) -> tuple[tuple[float, int], ...]:
    """Return the radii, in units of eps, and the steps taken in each: 30 % at 3, 30 % at 2, the rest at 1.

    >>> phases(100), phases(2)
    (((3.0, 30), (2.0, 30), (1.0, 40)), ((1.0, 2),))
    """
    early = math.ceil(0.3 * steps)
    if steps < 2 * early + 1:
        return ((1.0, steps),)
    return (3.0, early), (2.0, early), (1.0, steps - 2 * early)


@dataclass
class _State:
    """Everything that the algorithm remembers of a batch, image by image."""

    x: Tensor
    x_adv: Tensor
    slope: Tensor
    peak_x: Tensor
    peak_slope: Tensor
    peak: Tensor
    eta: Tensor  # step size [n, 1, ...]
    pixels: Tensor  # how many a step changes [n]
    dense: Tensor  # how many the best perturbation had changed at the last checkpoint [n]

    def take(self, places: Tensor) -> _State:
        return _State(**{part.name: getattr(self, part.name)[places] for part in fields(self)})


def climb_sparsely(
    forward: Forward,
    threat: Threat,
    goal: Goal,
    x: Tensor,
    start: Tensor,
    steps: int,
    best: Best,
    rows: Tensor | None = None,
) -> None:
    """Take all steps from one start and tell `best` about every iterate inside the threat (Croce & Hein 2021, l1-APGD).

    A step adds sign(gradient) eta / k on the k pixels of the largest gradient and projects. At each checkpoint k
    becomes the number of pixels that the best perturbation changes, over 1.5; where that has fallen by 5 %, eta is eps
    again and the image goes on from its best point, elsewhere eta is divided by 1.5, down to eps / 10. The first 60 % of the
    steps are taken in balls of 3 and 2 eps, each projected into the next. `rows` as in `apgd.climb_by_itself`.
    """
    point = start
    for number, (radius, count) in enumerate(phases(steps)):
        ball = Threat("l1", radius * threat.eps)
        last = radius == 1.0
        point = ball.project(point, x)
        point = _phase(
            forward, ball, goal, x, point, count, number == 0, best if last else None, rows if last else None
        )


def _phase(
    forward: Forward,
    ball: Threat,
    goal: Goal,
    x: Tensor,
    start: Tensor,
    steps: int,
    first: bool,
    best: Best | None,
    rows: Tensor | None,
) -> Tensor:
    """Take the steps in one ball and return the point of the highest loss."""
    project, every = ball.projector(x), max(1, int(EVERY * steps))
    logits, losses, slope = gradient(forward, start, goal.losses)
    if best is not None:
        best.update(goal, start, logits, losses, rows)
    total = x[0].numel()
    changed = _changed(start, x)
    pixels = torch.full_like(changed, FIRST * total) if first else changed / SPARSER
    dense = torch.full_like(changed, total) if first else changed
    eta = x.new_full((len(x), *[1] * (x.ndim - 1)), ball.eps)
    now = _State(x, start, slope, start, slope, losses, eta, pixels, dense)
    for k in range(1, steps + 1):
        places = None if best is None or rows is None else best.compact(rows)
        if rows is not None and places is not None:
            if not len(places):
                break
            rows, goal, now = rows[places], goal.take(places), now.take(places)
            project = ball.projector(now.x)
        now.x_adv = project(now.x_adv + sparse_step(now.slope, now.pixels, now.eta))
        if k == steps:  # no step follows: no gradient is needed
            logits, losses = score(forward, now.x_adv, goal.losses)
        else:
            logits, losses, now.slope = gradient(forward, now.x_adv, goal.losses)
        if best is not None:
            best.update(goal, now.x_adv, logits, losses, rows)
        higher = losses > now.peak
        now.peak = torch.where(higher, losses, now.peak)
        now.peak_x, now.peak_slope = select(higher, now.x_adv, now.peak_x), select(higher, now.slope, now.peak_slope)
        if k % every == 0:
            _check(now, ball.eps)
    return now.peak_x


def _check(now: _State, eps: float) -> None:
    changed = _changed(now.peak_x, now.x)
    sparser = changed < SAME * now.dense
    now.pixels, now.dense = changed / SPARSER, changed
    now.eta = select(sparser, torch.full_like(now.eta, eps), (now.eta / SHORTER).clamp_min(LEAST * eps))
    now.x_adv = select(sparser, now.peak_x, now.x_adv)
    now.slope = select(sparser, now.peak_slope, now.slope)


def sparse_step(slope: Tensor, pixels: Tensor, eta: Tensor) -> Tensor:
    """Return the step of l1 length `eta` [n, 1, ...] that changes the `pixels` [n] of the largest gradient, all alike.

    >>> slope = torch.tensor([[3.0, -2.0, 1.0, 0.0]])
    >>> sparse_step(slope, torch.tensor([2.0]), torch.tensor([[1.0]]))
    tensor([[ 0.5000, -0.5000,  0.0000,  0.0000]])
    """
    slope = slope.nan_to_num(nan=0.0)
    size = slope.abs().flatten(1)
    place = pixels.long().clamp(1, size.shape[1]) - 1
    least = size.sort(dim=1, descending=True).values.gather(1, place[:, None])
    chosen = slope.sign() * (slope.abs() >= least.view(-1, *[1] * (slope.ndim - 1)))
    axes = tuple(range(1, slope.ndim))
    return chosen * (eta / chosen.abs().sum(axes, keepdim=True).clamp_min(1))


def _changed(x_adv: Tensor, x: Tensor) -> Tensor:
    """Return how many pixels of each image are changed, as a float."""
    return (x_adv != x).flatten(1).sum(1).to(x.dtype)
