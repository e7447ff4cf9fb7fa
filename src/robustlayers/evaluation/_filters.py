"""Filters and resampling of batches of images, for corruptions: any size, own draws per image, three kinds of edge."""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Edge", "blur", "box_resize", "disk", "filtered", "luminance", "motion", "sample", "zoomed"]

Edge = Literal["nearest", "mirror", "reflect"]
"""What lies beyond the edge of a b c d: `nearest` a a|, `mirror` c b|, `reflect` b a|."""


def luminance(x: Tensor) -> Tensor:
    """Return the gray image of a batch [n, c, h, w] -> [n, 1, h, w]: 0.299 R + 0.587 G + 0.114 B, else the mean."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def blur(x: Tensor, sigma: float, *, truncate: float = 4.0, edge: Edge = "nearest") -> Tensor:
    """Return a batch [n, c, h, w] after a Gaussian of standard deviation `sigma` pixels, cut off at `truncate` sigma."""
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return x
    at = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    weights = torch.exp(-(at**2) / (2 * sigma**2))
    weights = weights / weights.sum()
    return filtered(filtered(x, weights[:, None], edge), weights[None], edge)


def filtered(x: Tensor, kernel: Tensor, edge: Edge = "mirror") -> Tensor:
    """Return the correlation of every channel with one kernel of odd sides, in the size of the batch."""
    n, c, h, w = x.shape
    high, wide = kernel.shape
    rows = _beyond(torch.arange(-(high // 2), h + high // 2, device=x.device), h, edge)
    columns = _beyond(torch.arange(-(wide // 2), w + wide // 2, device=x.device), w, edge)
    padded = x[:, :, rows[:, None], columns[None]].reshape(n * c, 1, len(rows), len(columns))
    return torch.nn.functional.conv2d(padded, kernel.to(x)[None, None]).view(n, c, h, w)


def disk(radius: float, smooth: float) -> Tensor:
    """Return a kernel with the points of a disk, softened by a Gaussian of 3 x 3 pixels; it sums to 1."""
    reach = math.ceil(radius) + 1
    at = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = (at[:, None] ** 2 + at[None] ** 2 <= radius**2).double()
    side = torch.exp(-torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64) / (2 * smooth**2))
    soft = (side[:, None] * side[None])[None, None]
    kernel = torch.nn.functional.conv2d(kernel[None, None], soft / soft.sum(), padding=1)[0, 0]
    return kernel / kernel.sum()


def motion(x: Tensor, radius: float, sigma: float, degrees: Tensor) -> Tensor:
    """Return a batch smeared along a direction of its own for each image, `degrees` [n] from the horizontal.

    The mean over i = 0 ... 2 radius of the images shifted by i pixels, with weights exp(-i^2 / (2 sigma^2)).
    """
    n, _, h, w = x.shape
    weights = torch.exp(-(torch.arange(2 * math.ceil(radius) + 1, dtype=torch.float64) ** 2) / (2 * sigma**2))
    weights = (weights / weights.sum()).tolist()
    down, right = torch.sin(torch.deg2rad(degrees)).to(x.device), torch.cos(torch.deg2rad(degrees)).to(x.device)
    rows, columns = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
    images = torch.arange(n, device=x.device)[:, None, None, None]
    channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    total = torch.zeros_like(x)
    for i, weight in enumerate(weights):
        at = _beyond(rows + torch.ceil(i * down - 0.5).long()[:, None], h, "nearest")
        across = _beyond(columns + torch.ceil(i * right - 0.5).long()[:, None], w, "nearest")
        total += weight * x[images, channels, at[:, None, :, None], across[:, None, None, :]]
    return total


def sample(x: Tensor, rows: Tensor, columns: Tensor, edge: Edge) -> Tensor:
    """Return a batch [n, c, h, w] read bilinearly at places in pixels, [n, h', w'] or [1, h', w'] each."""
    n, c, h, w = x.shape
    images = torch.arange(n, device=x.device)[:, None, None, None]
    channels = torch.arange(c, device=x.device)[None, :, None, None]
    top, left = rows.floor(), columns.floor()
    total = x.new_zeros(())
    for below, by_row in ((0, 1 - (rows - top)), (1, rows - top)):
        for after, by_column in ((0, 1 - (columns - left)), (1, columns - left)):
            at, across = _beyond(top.long() + below, h, edge), _beyond(left.long() + after, w, edge)
            total = total + (by_row * by_column)[:, None] * x[images, channels, at[:, None], across[:, None]]
    return total.to(x.dtype)


def zoomed(x: Tensor, factor: float) -> Tensor:
    """Return a batch enlarged around its center by linear interpolation, and cut to its size; `factor` is 1 or more."""
    rows, columns = (_stretch(length, factor).to(x) for length in x.shape[2:])
    return rows @ x @ columns.T


@cache
def _stretch(length: int, factor: float) -> Tensor:
    """Return the weights [length, length] of linear interpolation at places drawn together around the middle."""
    places = (torch.arange(length, dtype=torch.float64) - (length - 1) / 2) / factor + (length - 1) / 2
    return (1 - (places[:, None] - torch.arange(length, dtype=torch.float64)).abs()).clamp_min(0)


def box_resize(x: Tensor, height: int, width: int) -> Tensor:
    """Return a batch in another size, each new pixel the mean of the pixels whose centers it covers, at least one."""
    rows, columns = _boxes(x.shape[2], height).to(x), _boxes(x.shape[3], width).to(x)
    return rows @ x @ columns.T


@cache
def _boxes(old: int, new: int) -> Tensor:
    """Return the weights [new, old] of a box filter, by Pillow's convention for which pixels a box covers."""
    scale = old / new
    support = max(scale, 1.0) / 2
    weights = torch.zeros(new, old, dtype=torch.float64)
    for place in range(new):
        center = (place + 0.5) * scale
        first, last = max(0, int(center - support + 0.5)), min(old, int(center + support + 0.5))
        for at in range(first, last):
            weights[place, at] = float(-0.5 < (at - center + 0.5) / max(scale, 1.0) <= 0.5)
    return weights / weights.sum(1, keepdim=True)


def _beyond(index: Tensor, length: int, edge: Edge) -> Tensor:
    """Return which of `length` pixels stands at any whole `index`, also outside."""
    if edge == "nearest" or length == 1:
        return index.clamp(0, length - 1)
    period = 2 * length if edge == "reflect" else 2 * length - 2
    index = index.remainder(period)
    return torch.minimum(index, period - (edge == "reflect") - index)
