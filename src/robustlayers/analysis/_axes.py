"""Axes to draw an analysis on: a figure without global state, and colors that every kind of color vision tells apart."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["GRAY", "INK", "MARKERS", "SERIES", "axes_or_new", "dots", "ink_on", "lines", "round_ticks"]

# As in the report, which exchanges these very colors for those of the reader's scheme.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#703000", "#4f1d8c")
MARKERS = ("o", "s", "^", "D", "v", "P")
GRAY, INK = "#66707b", "#1b2026"


def axes_or_new(axes: Axes | None, width: float, height: float) -> Axes:
    """Return the given axes, or those of a new figure of `width` x `height` inches; `axes.figure` saves it."""
    if axes is not None:
        return axes
    from matplotlib.figure import Figure  # takes long to import, and most uses never draw

    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def ink_on(share: float) -> str:
    """Return the ink, white or black, of the larger contrast on cividis at `share` of its scale; that of paper for NaN.

    >>> ink_on(0.2), ink_on(0.8)
    ('white', 'black')
    """
    from matplotlib import colormaps

    if math.isnan(share):
        return INK
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colormaps["cividis"](share)[:3]]
    luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))
    return "white" if luminance < 0.179 else "black"  # where (1 + 0.05) / (L + 0.05) is (L + 0.05) / 0.05: WCAG 2


def dots(axes: Axes, names: list[str], series: dict[str, list[float]], label: str) -> Axes:
    """Draw one line of dots for each name, from the top down: a marker for each series, joined where there are two."""
    places = range(len(names))
    if len(series) == 2:
        one, two = series.values()
        axes.hlines(list(places), one, two, color=GRAY, linewidth=1)
    for place, (name, values) in enumerate(series.items()):
        size = (
            6.0 + 2 * (len(series) - 1 - place) - (len(series) - 1)
        )  # where two marks meet, the first looks out below
        axes.plot(values, list(places), MARKERS[place], color=SERIES[place], markersize=size, linestyle="", label=name)
    axes.axvline(0, color=GRAY, linewidth=0.8)
    axes.set_yticks(list(places), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label)
    if len(series) > 1:
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(series), borderaxespad=0.2)
    return axes


def lines(axes: Axes, series: Mapping[str, Sequence[float]], dashed: Collection[str] = ()) -> Axes:
    """Draw one line for each name over 0, 1, ..., the first ones wider, so that they are seen where others run over them."""
    for place, (name, values) in enumerate(series.items()):
        step = max(1, len(values) // 12)
        axes.plot(
            range(len(values)), values, "--" if name in dashed else "-", color=SERIES[place % len(SERIES)],
            marker=MARKERS[place % len(MARKERS)], markevery=(place * step // 2 % step, step),
            markersize=5 + 0.7 * (len(series) - 1 - place), markeredgewidth=0,
            linewidth=1.3 + 0.8 * (len(series) - 1 - place), label=name,
        )  # fmt: skip
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
