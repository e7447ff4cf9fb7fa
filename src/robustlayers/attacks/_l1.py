"""The geometry of the l1 ball within the box: exact projection, steepest step, uniform draws (Croce & Hein 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from robustlayers.attacks._draws import Generators, uniform

__all__ = ["draw", "project", "steepest"]


def project(x_adv: Tensor, x: Tensor, eps: float) -> Tensor:
    """Return the Euclidean projection onto the points z with |z - x|_1 <= eps and 0 <= z <= 1: [n, ...] -> [n, ...].

    With d = x_adv - x and r the room in the direction of d, the solution is d' = sign(d) clamp(|d| - t, 0, r), with the
    smallest t >= 0 for which |d'|_1 <= eps. The sum falls piecewise linearly in t, with kinks at |d| - r and |d|, so t
    is found by sorting these (Croce & Hein 2021, "Mind the box"). `x` is in the box.
    """
    wide = torch.float64 if x.device.type != "mps" else torch.float32
    delta, center = (x_adv.to(wide) - x.to(wide)).flatten(1), x.to(wide).flatten(1)
    length = delta.abs()
    room = torch.where(delta > 0, 1 - center, center)
    starts = (length - room).clamp_min(0)  # where an entry begins to shrink; at `length` it is gone
    kinks, order = torch.cat([starts, length], 1).sort(1)
    shrinking = torch.where(order < length.shape[1], 1, -1).cumsum(1)  # how many entries do, after each kink
    whole = torch.minimum(length, room).sum(1, keepdim=True)
    falls = torch.cat([torch.zeros_like(whole), (shrinking[:, :-1] * kinks.diff(dim=1)).cumsum(1)], 1)
    excess = whole - eps  # by so much the sum has to fall
    last = (falls <= excess).sum(1, keepdim=True).sub(1).clamp(0, kinks.shape[1] - 1)
    remaining = (excess - falls.gather(1, last)) / shrinking.gather(1, last).clamp_min(1)
    threshold = torch.where(excess > 0, kinks.gather(1, last) + remaining, 0)
    moved = torch.minimum((length - threshold).clamp_min(0), room)
    # Written by view_as on the flat result and a sum with x: the memory format of x stays.
    return (x + (delta.sign() * moved).view(x.shape).to(x.dtype)).clamp_(0, 1)


def steepest(x_adv: Tensor, gradient: Tensor, step_size: float | Tensor) -> Tensor:
    """Return `x_adv` plus the step of l1 length `step_size` at most that raises a linear function most inside the box.

    The entries of the largest gradient go to the end of the box, one after the other, until the length is spent
    (Croce & Hein 2021). Entries without a gradient do not move.
    """
    slope = gradient.nan_to_num(nan=0.0).flatten(1)
    place = x_adv.flatten(1)
    room = torch.where(slope > 0, 1 - place, place).clamp_min(0) * (slope != 0)
    order = slope.abs().sort(dim=1, descending=True, stable=True).indices
    sorted_room = room.gather(1, order)
    budget = step_size.flatten(1) if isinstance(step_size, Tensor) else step_size
    before = sorted_room.double().cumsum(1) if room.device.type != "mps" else sorted_room.cumsum(1)
    left = (budget - (before - sorted_room)).clamp_min(0).to(room.dtype)
    move = torch.zeros_like(room).scatter_(1, order, torch.minimum(left, sorted_room))
    return x_adv + (slope.sign() * move).view(x_adv.shape)


def draw(x: Tensor, eps: float, generator: Generators) -> Tensor:
    """Return a perturbation drawn uniformly from the l1 ball, on the generator's device.

    |delta_i| = eps E_i / (E_1 + ... + E_(d+1)) with exponential E, and random signs.
    """
    signed = uniform(x.shape, generator, x.dtype).mul_(2).sub_(1)
    tiny = torch.finfo(x.dtype).tiny
    exponential = -signed.abs().clamp_min(tiny).log()
    rest = -(1 - uniform((len(x),), generator, x.dtype)).clamp_min(tiny).log()
    total = (exponential.flatten(1).sum(1) + rest).clamp_min(tiny)
    return signed.sign() * exponential * (eps / total).view(-1, *[1] * (x.ndim - 1))
