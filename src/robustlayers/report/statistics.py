"""The few statistics that a report needs: mean, standard deviation and t interval over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["LEVEL", "Interval", "interval", "pareto"]

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over `n` values with its t interval; what cannot be computed from so few values is None."""

    n: int
    mean: float | None = None
    sd: float | None = None  # sample standard deviation, n - 1 in the denominator
    half: float | None = None  # half the width of the interval

    @property
    def low(self) -> float | None:
        """The lower end; not clipped to [0, 1], so that a wide interval is seen to be wide."""
        return None if self.mean is None or self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """The upper end, not clipped."""
        return None if self.mean is None or self.half is None else self.mean + self.half


def interval(values: Iterable[float], level: float = LEVEL) -> Interval:
    """Return mean and two-sided t interval of the mean: mean ± t(n - 1) sd / sqrt(n); values that are not finite drop out.

    With one value there is a mean but no interval.

    >>> found = interval([0.4, 0.5, 0.6])
    >>> found.n, round(found.mean, 3), round(found.half, 4)
    (3, 0.5, 0.2484)
    >>> interval([0.4])
    Interval(n=1, mean=0.4, sd=None, half=None)
    """
    finite = [value for value in values if math.isfinite(value)]
    n = len(finite)
    if n == 0:
        return Interval(0)
    mean = math.fsum(finite) / n
    if n == 1:
        return Interval(1, mean)
    from scipy.special import stdtrit  # scipy.stats would take a second to import

    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in finite) / (n - 1))
    return Interval(n, mean, sd, float(stdtrit(n - 1, (1 + level) / 2)) * sd / math.sqrt(n))


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
