"""Put names beside points so that they cover neither each other nor anything drawn: no legend is needed then."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Box", "place", "width_of"]


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, y upwards; of a label: `anchor` is the point that it names, `far` asks for a line to it."""

    x0: float
    y0: float
    x1: float
    y1: float
    far: bool = False

    @property
    def center(self) -> tuple[float, float]:
        """The middle of the rectangle."""
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2

    def overlap(self, other: Box) -> float:
        """The common area."""
        wide = min(self.x1, other.x1) - max(self.x0, other.x0)
        high = min(self.y1, other.y1) - max(self.y0, other.y0)
        return wide * high if wide > 0 and high > 0 else 0.0

    def outside(self, bounds: Box) -> float:
        """By how much the rectangle leaves `bounds`, summed over its sides."""
        return (
            max(0.0, bounds.x0 - self.x0)
            + max(0.0, self.x1 - bounds.x1)
            + max(0.0, bounds.y0 - self.y0)
            + max(0.0, self.y1 - bounds.y1)
        )


def width_of(text: str, size: float) -> float:
    """Return about how wide a text of `size` pixels is set in a sans-serif font, the same on every machine."""
    return size * sum(0.32 if letter in "iljtf.,:;'|!()[] " else 0.9 if letter in "mwMW@%" else 0.6 for letter in text)


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[Box],
    bounds: Box,
) -> list[Box]:
    """Return one box per point: near it, off the obstacles, off each other, inside the bounds where that can be had.

    Greedy and deterministic: labels are placed in the order of how crowded their points are, then each is placed anew
    twice with all the others known.
    """
    near = [
        sum(1 / (1 + math.dist(here, (box.center)) / 20) for box in obstacles if box.center != here) for here in points
    ]
    order = sorted(range(len(points)), key=lambda position: (-near[position], position))
    placed: dict[int, Box] = {}
    for _ in range(3):
        for position in order:
            others = [box for other, box in placed.items() if other != position]
            placed[position] = min(
                _candidates(points[position], sizes[position]),
                key=lambda pair: pair[0] + _cost(pair[1], others, obstacles, bounds),
            )[1]
    return [placed[position] for position in range(len(points))]


def _candidates(point: tuple[float, float], size: tuple[float, float]) -> list[tuple[float, Box]]:
    """Boxes around a point with what each costs by itself: nearer is better, then right, above, below, left."""
    x, y = point
    wide, high = size
    found = []
    for ring, distance in enumerate((10.0, 16.0, 26.0, 40.0, 58.0)):
        for turn in range(16):
            angle = turn * math.pi / 8
            dx, dy = math.cos(angle), math.sin(angle)
            # The edge of the box that faces the point stands `distance` away from it.
            left = x + distance * dx - wide / 2 * (1 - dx)
            bottom = y + distance * dy - high / 2 * (1 - dy)
            bias = 0.6 * (1 - dx) + 0.2 * (1 - dy)
            found.append((7.0 * ring + bias, Box(left, bottom, left + wide, bottom + high, far=ring >= 2)))
    return found


def _cost(box: Box, others: Sequence[Box], obstacles: Sequence[Box], bounds: Box) -> float:
    area = (box.x1 - box.x0) * (box.y1 - box.y0)
    cost = 10.0 * box.outside(bounds)
    cost += sum(400.0 * box.overlap(other) / area for other in others)
    return cost + sum(30.0 * (box.overlap(one) > 0) + 2.0 * box.overlap(one) for one in obstacles)
