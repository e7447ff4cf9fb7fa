"""Axes to draw an analysis on: a figure without global state, and colors that every kind of color vision tells apart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["GRAY", "INK", "MARKERS", "SERIES", "axes_or_new", "by_depth", "dots", "round_ticks"]

# Okabe and Ito's palette, as in the report, which exchanges these very colors for those of the reader's scheme.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
GRAY, INK = "#66707b", "#1b2026"


def axes_or_new(axes: Axes | None, width: float, height: float) -> Axes:
    """Return the given axes, or those of a new figure of `width` x `height` inches; `axes.figure` saves it."""
    if axes is not None:
        return axes
    from matplotlib.figure import Figure  # takes long to import, and most uses never draw

    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def by_depth(count: int) -> list[Any]:
    """Return colors for lines in order of execution: apart for a few lines, else lighter with depth.

    The ends of the map are left out, since they cannot be seen on black or on white.
    """
    if count <= len(SERIES):
        return list(SERIES[:count])
    from matplotlib import colormaps

    return [colormaps["cividis"](0.25 + 0.6 * place / (count - 1)) for place in range(count)]


def dots(axes: Axes, names: list[str], series: dict[str, list[float]], label: str) -> Axes:
    """Draw one line of dots for each name, from the top down: a marker for each series, joined where there are two."""
    places = range(len(names))
    if len(series) == 2:
        one, two = series.values()
        axes.hlines(list(places), one, two, color=GRAY, linewidth=1)
    for place, (name, values) in enumerate(series.items()):
        axes.plot(values, list(places), MARKERS[place], color=SERIES[place], markersize=6, linestyle="", label=name)
    axes.axvline(0, color=GRAY, linewidth=0.8)
    axes.set_yticks(list(places), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label)
    if len(series) > 1:
        axes.legend(frameon=False)
    return axes


def round_ticks(low: float, high: float) -> list[float]:
    """Return three or more round numbers between `low` and `high` for a logarithmic axis, where there are as many."""
    found: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), np.arange(1, 10, 0.5), np.arange(1, 10, 0.1)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [float(f"{digit * 10.0**power:.3g}") for power in powers for digit in digits]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) >= 3:
            break
    return found[:: -(-len(found) // 6)] if found else []
