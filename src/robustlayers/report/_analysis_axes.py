"""What the figures across arms share: their size, one line for each arm, axes that are logarithmic, the names above."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from robustlayers.analysis._axes import round_ticks
from robustlayers.report import style
from robustlayers.report.figures import Drawing
from robustlayers.report.loupe import groups
from robustlayers.report.svg import to_svg

__all__ = ["NAME", "WIDTH", "Panel", "empty", "head", "legend", "line", "name_layers", "panel", "slim"]

WIDTH = 352.0
_TAG = re.compile(r"<[^>]*>")
_DECIMALS = re.compile(r"(?<![\w#+/.-])-?\d+\.\d{3,}(?![\w.+/=])")  # no part of a picture in base64

_NAMED = 16  # more layers than that cannot be named one by one
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


def panel(
    title: str, caption: str, name: str, label: str, data: Sequence[Mapping[str, object]], draw: Callable[[], Figure]
) -> Panel:
    """Return a panel of one figure of all arms, drawn with the settings of the report; `label` is read aloud."""
    with style.drawing():
        text = slim(to_svg(draw()))
    return Panel(title, caption, [Drawing(name, label, "", data, text)])


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


def name_layers(grid: Iterable[Axes], layers: Sequence[str]) -> None:
    """Name layers at 0, 1, ... below the last of some axes: a few one by one, many by the part that they belong to.

    Of many layers without parts every few have their number.
    """
    parts = groups(layers)
    for axes in grid:
        if len(layers) <= _NAMED:
            places, names = list(range(len(layers))), list(layers)
        elif 1 < len(parts) <= _NAMED // 2:
            axes.grid(axis="x", visible=False)
            for first, _ in parts[1:]:
                axes.axvline(first - 0.5, color=style.RULE, linewidth=0.8, zorder=0)
            ends = [first for first, _ in parts[1:]] + [len(layers)]
            places = [(first + end - 1) / 2 for (first, _), end in zip(parts, ends, strict=True)]
            names = [name for _, name in parts]
        else:
            places = list(range(0, len(layers), -(-len(layers) // _NAMED)))
            names = [str(place + 1) for place in places]
        axes.set_xticks(places, [style.plain(name, 26) for name in names], rotation=90, parse_math=False)


def legend(figure: Figure, axes: Axes, arms: Sequence[str]) -> None:
    """Name the arms above a figure, two in a row, by the lines of one of its axes."""
    handles, _ = axes.get_legend_handles_labels()
    drawn = figure.legend(
        handles, [style.plain(arm, NAME) for arm in arms], loc="outside upper left", ncols=2, frameon=False,
        fontsize=style.FONT_SIZE - 1,
    )  # fmt: skip
    for text in drawn.get_texts():
        text.set_parse_math(False)
