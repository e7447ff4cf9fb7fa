"""Square windows of images, another one for each image of a batch, and the l2 Square attack's pattern inside them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["Windows", "corner", "pattern", "tiles"]


class Windows:
    """One window of `side` x `side` pixels for each image, all channels, with its upper left corner at (top, left)."""

    def __init__(self, top: Tensor, left: Tensor, side: int, channels: int) -> None:
        span = torch.arange(side, device=top.device)
        n = torch.arange(len(top), device=top.device)[:, None, None, None]
        c = torch.arange(channels, device=top.device)[None, :, None, None]
        self._index = (n, c, (top[:, None] + span)[:, None, :, None], (left[:, None] + span)[:, None, None, :])

    def read(self, images: Tensor) -> Tensor:
        """Return the pixels inside: [n, c, side, side]."""
        return images[self._index]

    def write(self, images: Tensor, values: Tensor | float) -> None:
        """Set the pixels inside, in place."""
        images[self._index] = values if isinstance(values, Tensor) else images.new_tensor(values)


def corner(u: Tensor, room: int) -> Tensor:
    """Turn draws from [0, 1) into whole numbers 0 .. room, all as likely."""
    return (u * (room + 1)).long().clamp_(0, room)


@functools.lru_cache(maxsize=256)
def pattern(side: int) -> Tensor:
    """Return the l2 pattern of norm 1: two blunt pyramids of opposite sign, one above the other, [side, side].

    A pyramid over a x b pixels is sum of 1 / k^2 over k from 1 + the distance to its middle, in rows or columns
    whichever is more, to 1 + half its longer side (Andriushchenko et al. 2020).
    """
    upper = side // 2
    parts = [sign * _pyramid(rows, side) for sign, rows in ((1, upper), (-1, side - upper)) if rows]
    both = torch.cat(parts)
    return both / both.norm()


def _pyramid(rows: int, columns: int) -> Tensor:
    distance = torch.maximum(
        (torch.arange(rows) - rows // 2).abs()[:, None], (torch.arange(columns) - columns // 2).abs()[None, :]
    )
    terms = 1 / torch.arange(1, max(rows, columns) // 2 + 2, dtype=torch.float64).square()
    sums = terms.flip(0).cumsum(0).flip(0)  # sums[d] = terms[d] + terms[d + 1] + ...
    values = sums[distance]
    return values / values.norm()


def tiles(height: int, width: int) -> tuple[int, list[tuple[int, int]]]:
    """Return the side and the corners of the squares that cover an image, five in the shorter direction."""
    side = max(1, min(height, width) // 5)
    first = (height % side) // 2, (width % side) // 2
    corners = [
        (first[0] + row * side, first[1] + column * side)
        for row in range(height // side)
        for column in range(width // side)
    ]
    return side, corners
