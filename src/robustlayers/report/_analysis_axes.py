"""What the figures across arms share: their size, one line for each arm, axes that are logarithmic, the names above."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from robustlayers.analysis._axes import round_ticks
from robustlayers.report import style
from robustlayers.report.figures import Drawing

__all__ = ["NAME", "WIDTH", "Panel", "empty", "head", "legend", "line", "slim"]

WIDTH = 352.0
_TAG = re.compile(r"<[^>]*>")
_DECIMALS = re.compile(r"(?<![\w#+/.-])-?\d+\.\d{3,}(?![\w.+/=])")  # no part of a picture in base64

NAME = 20
"""Letters of an arm's name on an axis."""


@dataclass(frozen=True)
class Panel:
    """Figures of one kind, one for each net or pair of nets, and how to read them."""

    title: str
    caption: str
    drawings: Sequence[Drawing]


def empty(height: float, title: str) -> Figure:
    """Return an empty figure for the width of a phone, `height` units high, with a title unless that is empty."""
    figure = style.figure(WIDTH, height)
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.04)
    if title:
        figure.suptitle(
            style.plain(title, 44), x=0.0, ha="left", fontweight="bold", fontsize=style.FONT_SIZE + 1, parse_math=False
        )
    return figure


def slim(svg: str) -> str:
    """Return bare SVG with lengths to a hundredth of a pixel, which halves figures of many lines; words stay as they are.

    >>> slim('<path d="M 10.123456 2.987654"/><text>0.123456</text>')
    '<path d="M 10.12 2.99"/><text>0.123456</text>'
    """

    def rounded(tag: re.Match[str]) -> str:
        return _DECIMALS.sub(lambda number: f"{float(number[0]):.2f}", tag[0])

    return _TAG.sub(rounded, svg)


def line(axes: Axes, arm: str, position: int, points: Sequence[tuple[float, float]]) -> None:
    """Draw the line of one arm in its color and with its marker."""
    axes.plot(
        [x for x, _ in points], [y for _, y in points], color=style.color(position), marker=style.marker(position),
        markersize=4.5, markeredgewidth=0, linewidth=1.3, label=arm,
    )  # fmt: skip


def head(axes: Axes, title: str, metric: str) -> None:
    """Write a title, and scale the axis by what is drawn: from zero for shares, else logarithmic, a decade at least."""
    axes.set_title(title, loc="left", fontsize=style.FONT_SIZE)
    values = [value for line in axes.lines for value in line.get_ydata() if value > 0]  # type: ignore[union-attr]
    if metric != "dead_share" and values:
        axes.set_yscale("log")
        low, high = math.log10(min(values)), math.log10(max(values))
        if high - low < 1:
            low, high = (low + high) / 2 - 0.5, (low + high) / 2 + 0.5
        axes.set_ylim(10 ** (low - 0.1), 10 ** (high + 0.1))
        decades = [10.0**exponent for exponent in range(math.ceil(low - 0.1), math.floor(high + 0.1) + 1)]
        marks = decades if len(decades) > 1 else round_ticks(10 ** (low - 0.1), 10 ** (high + 0.1))
        axes.yaxis.set_major_locator(FixedLocator(marks[:: -(-len(marks) // 3)]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(0, max(5.0, 1.1 * max(values, default=0.0)))


def legend(figure: Figure, axes: Axes, arms: Sequence[str]) -> None:
    """Name the arms above a figure, two in a row, by the lines of one of its axes."""
    handles, _ = axes.get_legend_handles_labels()
    drawn = figure.legend(
        handles, [style.plain(arm, NAME) for arm in arms], loc="outside upper left", ncols=2, frameon=False,
        fontsize=style.FONT_SIZE - 1,
    )  # fmt: skip
    for text in drawn.get_texts():
        text.set_parse_math(False)
