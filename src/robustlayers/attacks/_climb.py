"""Projected ascent: the loop of PGD and of its relative with momentum, with or without images leaving it early."""

from __future__ import annotations

import torch
from torch import Tensor

from robustlayers.attacks._ascent import Best, Forward, gradient, score
from robustlayers.attacks._goal import Goal
from robustlayers.attacks.threat import Threat

__all__ = ["climb", "normalized"]


def climb(
    forward: Forward,
    threat: Threat,
    goal: Goal,
    x: Tensor,
    x_adv: Tensor,
    *,
    steps: int,
    step_size: float,
    momentum: float = 0.0,
    best: Best | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Take all steps from one start, tell `best` about every iterate, and return the last.

    With `momentum` m the direction is that of v <- m v + gradient / mean |gradient|. With `rows`, the places of these
    images in the batch of `best`, images that are broken are left out of the batches that follow.
    """
    project = threat.projector(x)
    velocity = torch.zeros_like(x) if momentum else None
    for _ in range(steps):
        logits, losses, slope = gradient(forward, x_adv, goal.losses)
        if best is not None:
            best.update(goal, x_adv, logits, losses, rows)
            places = None if rows is None else best.compact(rows)
            if rows is not None and places is not None:
                if not len(places):
                    return x_adv
                rows, goal, x, x_adv, slope = rows[places], goal.take(places), x[places], x_adv[places], slope[places]
                velocity = None if velocity is None else velocity[places]
                project = threat.projector(x)
        if velocity is not None:
            velocity = slope = momentum * velocity + normalized(slope)
        x_adv = project(threat.ascend(x_adv, slope, step_size))
    if best is not None:
        best.update(goal, x_adv, *score(forward, x_adv, goal.losses), rows)
    return x_adv


def normalized(slope: Tensor) -> Tensor:
    """Return each image's gradient over the mean of its absolute values; an entry that is not a number is zero."""
    slope = slope.nan_to_num(nan=0.0)
    axes, tiny = tuple(range(1, slope.ndim)), torch.finfo(slope.dtype).tiny
    # Scaled by its largest entry first: a confident network's gradient may be so small that its sum vanishes.
    slope = slope / slope.abs().amax(axes, keepdim=True).clamp_min(tiny)
    return slope / slope.abs().mean(axes, keepdim=True).clamp_min(tiny)
