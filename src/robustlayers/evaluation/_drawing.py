"""Axes to draw an evaluation on: a figure without global state, and colors that every kind of color vision tells apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["GRAY", "MARKERS", "SERIES", "axes_or_new", "grid"]

# As in the report, which exchanges these very colors for those of the reader's scheme.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#703000", "#4f1d8c")
MARKERS = ("o", "s", "^", "D", "v", "P")
GRAY = "#66707b"


def axes_or_new(axes: Axes | None, width: float, height: float) -> Axes:
    """Return the given axes, or those of a new figure of `width` x `height` inches; `axes.figure` saves it."""
    if axes is not None:
        return axes
    from matplotlib.figure import Figure  # takes long to import, and most uses never draw

    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def grid(
    axes: Axes | None,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    across: str,
    down: str,
) -> Axes:
    """Draw a table of shares in [0, 1] as percentages on colors from dark (0) to light (1)."""
    axes = axes_or_new(axes, 1.6 + 0.62 * len(columns), 0.9 + 0.32 * len(rows))
    axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            axes.text(
                column,
                row,
                f"{100 * value:.1f}",
                ha="center",
                va="center",
                fontsize="small",
                color="#ffffff" if value < 0.55 else "#1b2026",
            )
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xticks(range(len(columns)), list(columns))
    axes.set_xlabel(across)
    axes.set_ylabel(down)
    axes.tick_params(length=0)
    return axes
