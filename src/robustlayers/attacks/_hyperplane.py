"""The nearest point of a hyperplane inside the box [0, 1]: what a step of FAB needs, without sorting in linf and l2."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["to_hyperplane"]


def to_hyperplane(points: Tensor, normal: Tensor, value: Tensor, norm: str) -> Tensor:
    """Return the shortest move from each point to its hyperplane inside the box: points, normals [n, d] -> [n, d].

    `value` [n] is that of the affine function with gradient `normal` at each point: the move m solves min |m| subject to
    normal . m = -value and 0 <= point + m <= 1 (Croce & Hein 2020, "Minimally distorted", section 2). Where the box does
    not reach the hyperplane, the move ends in the corner that is nearest to it by value. An entry without a slope is not
    moved.

    Every coordinate moves towards the hyperplane by min(mu s, room), with s = 1 in linf and |normal| in l2, so that the
    change of value, sum |normal| min(mu s, room), is concave and piecewise linear in mu. Newton's method from mu = 0 is
    then exact after as many steps as it meets pieces, a handful. In l1 the steepest coordinates are used up in turn.

    >>> to_hyperplane(torch.tensor([[0.5, 0.9]]), torch.tensor([[1.0, 1.0]]), torch.tensor([-0.4]), "linf")
    tensor([[0.3000, 0.1000]])
    """
    # A confident network's gradient may be 1e-30; and one that is not a number leads nowhere.
    normal = normal.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    largest = normal.abs().amax(1, keepdim=True).clamp_min(torch.finfo(normal.dtype).tiny)
    normal, value = normal / largest, (value / largest.squeeze(1)).nan_to_num(nan=0.0)
    toward = torch.sign(normal) * torch.where(value < 0, 1.0, -1.0).to(normal)[:, None]
    slope, wanted = normal.abs(), value.abs()
    room = torch.where(toward > 0, 1 - points, points)
    reach = slope * room
    outside = reach.sum(1) <= wanted
    wanted = wanted.masked_fill(outside, 0.0)
    length = _greedy(slope, room, reach, wanted) if norm == "l1" else _newton(slope, room, reach, wanted, norm)
    return toward * torch.where(outside[:, None], room, length)


def _newton(slope: Tensor, room: Tensor, reach: Tensor, wanted: Tensor, norm: str) -> Tensor:
    """Return min(mu s, room) with the smallest mu >= 0 that changes the value by as much as is wanted."""
    pace = torch.ones_like(slope) if norm == "linf" else slope
    rate = slope * pace
    tiny = torch.finfo(slope.dtype).tiny
    mu = (wanted / rate.sum(1).clamp_min(tiny))[:, None]
    full = torch.zeros_like(slope, dtype=torch.bool)
    while True:
        now = room < mu * pace
        # The tangents lie above the function, so mu only rises, and a coordinate without room stays so.
        now |= full
        if torch.equal(now, full):
            return torch.where(full, room, mu * pace)
        full = now
        rest = wanted - torch.where(full, reach, 0).sum(1)
        mu = torch.maximum(mu, (rest / torch.where(full, 0, rate).sum(1).clamp_min(tiny))[:, None])


def _greedy(slope: Tensor, room: Tensor, reach: Tensor, wanted: Tensor) -> Tensor:
    """Return the lengths that use up the room of the steepest coordinates first."""
    steepest = slope.argsort(1, descending=True)
    reached = reach.gather(1, steepest)
    left = (wanted[:, None] - (reached.cumsum(1) - reached)).clamp_min_(0)
    length = torch.minimum(room.gather(1, steepest), left / slope.gather(1, steepest).clamp_min(1e-12))
    return torch.zeros_like(slope).scatter_(1, steepest, length)
