"""The few statistics that a report needs: mean and t interval over seeds, and which arms no other arm beats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from robustlayers.study.statistics import t_interval

__all__ = ["Interval", "interval", "pareto", "reach"]


@dataclass(frozen=True)
class Interval:
    """A mean over `n` values with its 95% t interval; what cannot be computed from so few values is None.

    The ends are not clipped to [0, 1], so that a wide interval is seen to be wide.
    """

    n: int
    mean: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def interval(values: Iterable[float]) -> Interval:
    """Return mean and interval; values that are not finite drop out.

    >>> found = interval([0.4, 0.5, 0.6])
    >>> found.n, round(found.mean, 3), round(found.half, 4)
    (3, 0.5, 0.2484)
    >>> interval([0.4])
    Interval(n=1, mean=0.4, low=None, high=None)
    """
    finite = [value for value in values if math.isfinite(value)]
    return Interval(len(finite), *t_interval(finite)) if finite else Interval(0)


def pareto(points: Iterable[tuple[float, float]]) -> list[int]:
    """Return the positions of the points that no other point beats in one coordinate without losing in the other.

    More is better in both. The positions are ordered by the first coordinate, ascending.

    >>> pareto([(0.9, 0.0), (0.8, 0.4), (0.7, 0.3), (0.7, 0.5)])
    [3, 1, 0]
    """
    found = list(points)
    best = [
        position
        for position, (x, y) in enumerate(found)
        if not any(u >= x and v >= y and (u > x or v > y) for u, v in found)
    ]
    return sorted(best, key=lambda position: (found[position][0], -found[position][1], position))


def reach(marks: Sequence[float], ends: Sequence[float], most: float = 0.5) -> tuple[float, float]:
    """Return a scale that holds all `marks`, and of the `ends` of intervals what lies near enough not to dwarf them.

    `most` is how far the scale may go beyond the marks on each side, as a share of their span.

    >>> reach([0.2, 0.4], [0.15, 0.45]), reach([0.2, 0.4], [-3.0, 3.0]), reach([], [])
    ((0.15, 0.45), (0.1, 0.5), (0.0, 1.0))
    """
    if not marks:
        return 0.0, 1.0
    low, high = min(marks), max(marks)
    room = most * (high - low)
    lowest, highest = min([low, *ends]), max([high, *ends])
    return max(lowest, low - room), min(highest, high + room)
