"""Ridge plots: how a ratio is spread in each layer, one density below the other in execution order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from robustlayers.analysis._axes import GRAY, SERIES, axes_or_new, round_ticks
from robustlayers.analysis._marks import label_layers
from robustlayers.analysis.activations import Layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["density", "limits_of", "ridges"]

Limits = tuple[float, float]
"""From the lowest to the highest ratio that is shown."""

_POINTS = 61
_FAINT = 0.01  # of its top: where a ridge ends
_FILLED = 2  # series that are filled; further ones are dashed, and seen where they lie on these
_CROWDED = 16  # with more layers than that ridges reach into the one above, else they would be too flat to see


def density(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return a Gaussian kernel density of some values at the points of an even grid, its top at 1; 0 where there are none.

    The width of the kernel is Silverman's rule of thumb, a step of the grid at the least.

    >>> density(np.array([0.5]), np.array([0.0, 0.5, 1.0])).round(3)
    array([0.607, 1.   , 0.607])
    """
    if not len(values):
        return np.zeros(len(grid))
    width = max(1.06 * float(values.std()) * len(values) ** -0.2, float(grid[1] - grid[0]))
    found = np.exp(-0.5 * ((grid[:, None] - values[None]) / width) ** 2).sum(1)
    return found / (found.max() or 1.0)


def limits_of(series: Mapping[str, Sequence[np.ndarray]]) -> Limits:
    """Return the ratios between which nearly all lie: those at 0.5% and at 99.5% of all that are positive and finite."""
    known = np.concatenate(
        [values[np.isfinite(values) & (values > 0)] for found in series.values() for values in found]
    )
    low, high = np.quantile(known, [0.005, 0.995]) if len(known) else (0.1, 10.0)
    return float(low), float(high)


def ridges(
    axes: Axes | None,
    layers: Sequence[Layer],
    series: Mapping[str, Sequence[np.ndarray]],
    label: str,
    limits: Limits | None = None,
) -> Axes:
    """Draw the densities of positive ratios on a logarithmic scale: a line down for each layer, a color for each series.

    `series`: name -> for each layer its ratios. Those that are zero, infinite or NaN have no place on the scale. `limits`:
    ends of the scale, so that several nets share it.
    """
    axes = axes_or_new(axes, 5.2, 1.4 + 0.17 * len(layers))
    logs = {
        name: [np.log10(values[np.isfinite(values) & (values > 0)]) for values in found]
        for name, found in series.items()
    }
    low, high = np.log10(limits or limits_of(series))
    room = max(0.02, 0.04 * (high - low))
    grid = np.linspace(low - room, high + room, _POINTS)
    reach = 0.9 if len(layers) <= _CROWDED else 1.5
    shown = 10**grid
    for place in range(len(layers)):
        for position, (name, found) in enumerate(logs.items()):
            color = SERIES[position % len(SERIES)]
            height = density(found[place], grid)
            seen = np.flatnonzero(height > _FAINT)
            part = slice(seen[0], seen[-1] + 1) if len(seen) else slice(0, len(grid))
            top = place + 0.45 - reach * height[part]
            line = {"color": color, "zorder": 2 + place, "label": None if place else name}
            if position < _FILLED:
                axes.fill_between(
                    shown[part], top, place + 0.45, color=color, alpha=0.25, linewidth=0, zorder=2 + place
                )
                axes.plot(shown[part], top, linewidth=1.1, **line)
            else:
                axes.plot(shown[part], top, linewidth=1.4, linestyle=(0, (2.5, 1.5)), **line)
    axes.set_xscale("log")
    axes.set_xlim(shown[0], shown[-1])
    ticks = round_ticks(shown[0], shown[-1])
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    if shown[0] < 1 < shown[-1]:
        axes.axvline(1, color=GRAY, linewidth=0.8)
    axes.set_ylim(len(layers) - 0.5, 0.4 - reach)
    label_layers(axes, layers, "y")
    axes.set_xlabel(label)
    axes.grid(axis="y", visible=False)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)
    return axes
