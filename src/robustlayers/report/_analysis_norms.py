"""Norm layers across arms and over time: one figure for all arms, since one arm at a time they are drawn elsewhere."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from robustlayers.report import loupe, style
from robustlayers.report.figures import Drawing
from robustlayers.report.svg import to_svg
from robustlayers.study.summary import Analyzed, Summary

__all__ = ["NAME", "WIDTH", "Panel", "draw", "empty", "slim"]

WIDTH = 352.0
_TAG = re.compile(r"<[^>]*>")
_DECIMALS = re.compile(r"(?<![\w#+/.-])-?\d+\.\d{3,}(?![\w.+/=])")  # no part of a picture in base64

NAME = 20
"""Letters of an arm's name on an axis."""

_NORM_PANELS = (
    ("", "dead_share", "Dead channels, %", 100.0),
    ("clean", "kl_mean", "Distance, clean images", 1.0),
    ("adversarial", "kl_mean", "Distance, attacked images", 1.0),
    ("", "lipschitz_median", "Stretch |γ| / σ, median", 1.0),
)
_NORM_CAPTION = (
    "How to read it: norm layers in execution order from left to right, a line for each arm. Distance is the symmetric KL "
    "divergence of the running statistics from those of the layer's inputs in that pass: where an arm's line lies high, its "
    "statistics do not fit these images."
)
_TIME_CAPTION = (
    "How to read it: the mean over all norm layers at each moment of training that was kept, from the untrained net to the "
    "net as it is. A distance on attacked images that falls while that on clean ones rises is a net whose statistics move "
    "over to the attack."
)


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


def draw(summary: Summary, shown: Sequence[Analyzed], suffix: str) -> list[Panel]:
    """Return the figures of all arms together: layer by layer as the nets are, and over the moments that were kept."""
    place = {arm.name: index for index, arm in enumerate(summary.arms)}
    rows = [{"arm": result.arm, **row} for result in shown for row in result.rows]
    layers = list(dict.fromkeys(str(row["layer"]) for row in rows if row["layer"] != "all"))
    arms = [result.arm for result in shown]
    now = {arm: loupe.means([row for row in rows if row["arm"] == arm and row["moment"] == "now"]) for arm in arms}
    with style.drawing():
        text = slim(to_svg(_across(arms, place, layers, now)))
    panels = [
        Panel(
            "Layer by layer",
            _NORM_CAPTION,
            [Drawing(f"inside-norms-layers{suffix}", "All arms", "", [r for r in rows if r["moment"] == "now"], text)],
        )
    ]
    moments = {arm: list(dict.fromkeys(str(row["moment"]) for row in rows if row["arm"] == arm)) for arm in arms}
    if all(len(names) > 1 for names in moments.values()):
        with style.drawing():
            text = slim(to_svg(_over_time(arms, place, moments, rows)))
        data = [row for row in rows if row["layer"] == "all"]
        panels.append(
            Panel("Over time", _TIME_CAPTION, [Drawing(f"inside-norms-time{suffix}", "Over time", "", data, text)])
        )
    return panels


def _across(
    arms: Sequence[str], place: Mapping[str, int], layers: Sequence[str], now: Mapping[str, Mapping[Any, float]]
) -> Figure:
    kinds = [k for k in _NORM_PANELS if any((layer, k[0], k[1]) in now[arm] for arm in arms for layer in layers)]
    figure = empty(50.0 + 108.0 * len(kinds) + 16 * math.ceil(len(arms) / 2), "")
    grid = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (shown, metric, head, scale) in zip(grid, kinds, strict=True):
        for arm in arms:
            found = [(x, now[arm].get((layer, shown, metric))) for x, layer in enumerate(layers)]
            _line(axes, arm, place[arm], [(x, scale * value) for x, value in found if value is not None])
        _head(axes, head, metric)
    names = layers if len(layers) <= 16 else [str(number + 1) for number in range(len(layers))]
    step = -(-len(layers) // 16)
    marks = range(0, len(layers), step)
    grid[-1].set_xticks(list(marks), [style.plain(names[x], 26) for x in marks], rotation=90, parse_math=False)
    _legend(figure, grid[0], arms)
    return figure


def _over_time(
    arms: Sequence[str],
    place: Mapping[str, int],
    moments: Mapping[str, Sequence[str]],
    rows: Sequence[Mapping[str, Any]],
) -> Figure:
    whole = {
        (row["arm"], row["moment"], row["pass"], row["metric"]): row["value"] for row in rows if row["layer"] == "all"
    }
    kinds = [kind for kind in _NORM_PANELS if any(key[2:] == kind[:2] for key in whole)]
    names = max(moments.values(), key=len)
    figure = empty(70.0 + 108.0 * len(kinds) + 16 * math.ceil(len(arms) / 2), "")
    grid = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (shown, metric, head, scale) in zip(grid, kinds, strict=True):
        for arm in arms:
            # The net as it is stands last, also where an arm has fewer moments.
            at = {moment: x for x, moment in enumerate(names)} | {"now": len(names) - 1}
            points = [(at[m], whole.get((arm, m, shown, metric))) for m in moments[arm] if m in at]
            _line(axes, arm, place[arm], [(x, scale * value) for x, value in points if value is not None])
        _head(axes, head, metric)
    grid[-1].set_xticks(range(len(names)), [style.plain(name, 18) for name in names], parse_math=False)
    if len(names) > 3:
        grid[-1].tick_params(axis="x", rotation=90)
    _legend(figure, grid[0], arms)
    return figure


def _line(axes: Axes, arm: str, position: int, points: Sequence[tuple[float, float]]) -> None:
    axes.plot(
        [x for x, _ in points], [y for _, y in points], color=style.color(position), marker=style.marker(position),
        markersize=4.5, markeredgewidth=0, linewidth=1.3, label=arm,
    )  # fmt: skip


def _head(axes: Axes, head: str, metric: str) -> None:
    axes.set_title(head, loc="left", fontsize=style.FONT_SIZE)
    values = [value for line in axes.lines for value in line.get_ydata() if value > 0]  # type: ignore[union-attr]
    if metric != "dead_share" and values:
        axes.set_yscale("log")
        low, high = math.log10(min(values)), math.log10(max(values))
        if high - low < 1:
            low, high = (low + high) / 2 - 0.5, (low + high) / 2 + 0.5
        axes.set_ylim(10 ** (low - 0.1), 10 ** (high + 0.1))
        marks = range(math.ceil(low - 0.1), math.floor(high + 0.1) + 1)
        step = -(-len(marks) // 3)
        axes.yaxis.set_major_locator(FixedLocator([10.0**exponent for exponent in marks[::step]]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(0, max(5.0, 1.1 * max(values, default=0.0)))


def _legend(figure: Figure, axes: Axes, arms: Sequence[str]) -> None:
    handles, _ = axes.get_legend_handles_labels()
    legend = figure.legend(
        handles, [style.plain(arm, NAME) for arm in arms], loc="outside upper left", ncols=2, frameon=False,
        fontsize=style.FONT_SIZE - 1,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)
