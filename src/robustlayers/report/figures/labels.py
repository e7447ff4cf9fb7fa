"""Put names beside points so that they cover neither each other nor anything drawn: no legend is needed then."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Box", "place", "width_of"]

_RINGS = (10.0, 16.0, 26.0, 40.0, 58.0)  # pixels between a point and its label
_TURNS = 16
_FAR = 2  # from this ring on, a line leads from the label to its point


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, y upwards; of a label, `far` asks for a line to its point, `astray` for more than that."""

    x0: float
    y0: float
    x1: float
    y1: float
    far: bool = False
    astray: bool = False  # another point is about as near as its own

    @property
    def center(self) -> tuple[float, float]:
        """The middle of the rectangle."""
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2


def width_of(text: str, size: float) -> float:
    """Return about how wide a text of `size` pixels is set in a bold sans-serif font, the same on every machine."""
    return size * sum(0.38 if letter in "iljtf.,:;'|!()[] " else 1.0 if letter in "mwMW@%" else 0.68 for letter in text)


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
    blocked = np.array([(box.x0, box.y0, box.x1, box.y1) for box in obstacles]).reshape(-1, 4)
    options = [_options(point, size) for point, size in zip(points, sizes, strict=True)]
    astray = [_astray(options[position], points, position) for position in range(len(points))]
    fixed = [_fixed_cost(option, blocked, bounds) for option in options]
    middle = (blocked[:, :2] + blocked[:, 2:]) / 2
    crowd = [float((1 / (1 + np.hypot(*(middle - point).T) / 20)).sum()) for point in points]
    order = sorted(range(len(points)), key=lambda position: (-crowd[position], position))
    chosen: dict[int, int] = {}
    for _ in range(3):
        for position in order:
            others = np.array([options[other][pick] for other, pick in chosen.items() if other != position])
            wide, high = sizes[position]
            clash = _overlap(options[position], others.reshape(-1, 4)).sum(axis=1) / (wide * high)
            chosen[position] = int(np.argmin(fixed[position] + 25.0 * astray[position] + 400.0 * clash))
    return [
        Box(*map(float, options[position][pick]), far=pick >= _FAR * _TURNS, astray=bool(astray[position][pick]))
        for position, pick in sorted(chosen.items())
    ]


def _options(point: tuple[float, float], size: tuple[float, float]) -> np.ndarray:
    """Boxes [rings x turns, 4] around a point; the edge of a box that faces the point stands the ring's radius away."""
    angle = np.arange(_TURNS) * (2 * math.pi / _TURNS)
    dx, dy = np.cos(angle), np.sin(angle)
    reach = np.array(_RINGS)[:, None]
    left = point[0] + reach * dx - size[0] / 2 * (1 - dx)
    bottom = point[1] + reach * dy - size[1] / 2 * (1 - dy)
    return np.stack([left, bottom, left + size[0], bottom + size[1]], axis=-1).reshape(-1, 4)


def _astray(boxes: np.ndarray, points: Sequence[tuple[float, float]], own: int) -> np.ndarray:
    """Whether each box is about as near to another point as to its own, and so would be read as the other's name."""
    here = np.array(points)
    nearest = np.clip(here[None], boxes[:, None, :2], boxes[:, None, 2:])
    away = np.hypot(*np.moveaxis(nearest - here[None], -1, 0))
    others = np.delete(away, own, axis=1)
    return others.min(axis=1, initial=np.inf) < away[:, own] + 6.0


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Common areas [boxes, others]."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.clip(high - low, 0, None).prod(axis=-1)


def _fixed_cost(boxes: np.ndarray, blocked: np.ndarray, bounds: Box) -> np.ndarray:
    """What each box costs whatever the other labels do: nearer is better, then right, above, below, left."""
    angle = np.tile(np.arange(_TURNS) * (2 * math.pi / _TURNS), len(_RINGS))
    cost = 7.0 * np.repeat(np.arange(len(_RINGS)), _TURNS) + 0.6 * (1 - np.cos(angle)) + 0.2 * (1 - np.sin(angle))
    area = _overlap(boxes, blocked)
    cost = cost + (30.0 * (area > 0) + 2.0 * area).sum(axis=1)
    low = np.array([bounds.x0, bounds.y0])
    high = np.array([bounds.x1, bounds.y1])
    outside = np.clip(low - boxes[:, :2], 0, None) + np.clip(boxes[:, 2:] - high, 0, None)
    return cost + 10.0 * outside.sum(axis=1)
