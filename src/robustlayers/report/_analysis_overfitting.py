"""Overfitting across arms: gaps between training and validation by epoch, and the best epoch of each arm against its last."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robustlayers.report import style
from robustlayers.report._analysis_axes import NAME, Panel, empty, legend, panel
from robustlayers.study.summary import Analyzed, Summary

__all__ = ["draw"]

_LINES = (
    ("validation_robust", "Robust accuracy on validation, %"),
    ("robust_gap", "Robust: train minus validation, points"),
    ("clean_gap", "Clean: train minus validation, points"),
)
_CAPTION = (
    "How to read it: epochs of all phases from left to right, a line for each arm; arms that share a phase share its line, "
    "and a vertical line begins a phase of the longest. A robust gap that opens while robust accuracy on validation falls "
    "is robust overfitting; one that opens while it stays is none."
)
_ENDS = (
    "How to read it: the last phase of each arm. A ring is its best epoch on validation, a filled mark its last one; color "
    "is robust accuracy, gray clean accuracy. A colored line to the left of its ring is what was lost by going on."
)


def draw(summary: Summary, shown: Sequence[Analyzed], suffix: str) -> list[Panel]:
    """Return the figures of all arms together: the gaps by epoch, and the best epoch against the last."""
    place = {arm.name: index for index, arm in enumerate(summary.arms)}
    rows = [{"arm": result.arm, **row} for result in shown for row in result.rows]
    numbers = [
        {"arm": result.arm, "number": one["label"], "value": one["value"], "note": one["note"]}
        for result in shown
        for one in result.numbers
    ]
    name = "inside-overfitting-{}" + suffix
    return [
        panel("Train minus validation", _CAPTION, name.format("gaps"), "All arms", rows, lambda: _gaps(shown, place)),
        panel("Best against last", _ENDS, name.format("ends"), "All arms", numbers, lambda: _ends(shown, place)),
    ]


def _gaps(shown: Sequence[Analyzed], place: Mapping[str, int]) -> Figure:
    figure = empty(110.0 + 124.0 * len(_LINES) + 16 * math.ceil(len(shown) / 2), "")
    grid = figure.subplots(len(_LINES), 1, sharex=True, squeeze=False, height_ratios=[1.5, 1, 1])[:, 0]
    for axes, (key, head) in zip(grid, _LINES, strict=True):
        axes.set_title(head, loc="left", fontsize=style.FONT_SIZE)
        for result in shown:
            line = _points(result.rows, key)
            position = place[result.arm]
            axes.plot(
                [x for x, _ in line], [y for _, y in line], color=style.color(position), linewidth=1.3, label=result.arm,
                marker=style.marker(position), markevery=[-1] if line else None, markersize=5.5, markeredgewidth=0,
            )  # fmt: skip
        if key != "validation_robust":
            axes.axhline(0, color=style.MUTED, linewidth=0.8)
        for first in _begins(shown):
            axes.axvline(first - 0.5, color=style.RULE, linewidth=1.0, zorder=0)
        axes.grid(axis="x", visible=False)
    epochs = [int(str(row["epoch"])) for result in shown for row in result.rows]
    grid[-1].set_xticks([tick for tick in style.ticks(1, max(epochs, default=1)) if tick == int(tick)])
    grid[-1].set_xlabel("epoch")
    legend(figure, grid[0], [result.arm for result in shown])
    return figure


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(int(row["epoch"]), 100 * float(row[key])) for row in rows if row[key] is not None]


def _begins(shown: Sequence[Analyzed]) -> list[int]:
    """Return the first epochs of all phases but the first, of the arm that has most epochs."""
    rows = max((list(result.rows) for result in shown), key=len, default=[])
    return [int(str(row["epoch"])) for before, row in itertools.pairwise(rows) if before["phase"] != row["phase"]]


def _ends(shown: Sequence[Analyzed], place: Mapping[str, int]) -> Figure:
    figure = empty(64.0 + 26.0 * len(shown), "")
    axes = figure.add_subplot()
    for height, result in enumerate(shown):
        found: Mapping[str, Any] = result.payload
        clean = (found["clean_at_best"], found["clean_at_last"])
        if None not in clean:
            _pair(axes, height + 0.18, clean, style.CLEAN, "o")
        position = place[result.arm]
        _pair(
            axes,
            height - 0.12,
            (found["best_robust"], found["last_robust"]),
            style.color(position),
            style.marker(position),
        )
    axes.set_yticks(range(len(shown)), [style.plain(result.arm, NAME) for result in shown], parse_math=False)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("accuracy on validation, %")
    return figure


def _pair(axes: Axes, height: float, ends: Sequence[float], color: str, marker: str) -> None:
    best, last = (100 * value for value in ends)
    axes.plot([best, last], [height, height], color=color, linewidth=2.0)
    axes.plot([last], [height], marker=marker, markersize=6.5, color=color, markeredgewidth=0)
    axes.plot([best], [height], marker="o", markersize=7.5, color=color, markerfacecolor="none", markeredgewidth=1.4)
