"""Transfer between arms as one heat map of all of them, means over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from robustlayers.analysis._axes import ink_on
from robustlayers.evaluation import CrossTable
from robustlayers.report import style
from robustlayers.report._analysis_axes import NAME, Panel, empty, slim
from robustlayers.report.figures import Drawing
from robustlayers.report.svg import to_svg
from robustlayers.study.analyses import ANALYSES
from robustlayers.study.summary import Analyzed

__all__ = ["draw"]

_READ = (
    "How to read it: each row is the arm that images were crafted on, each column the arm that is measured on them, in percent "
    "right{}; dark is fooled, the outlined diagonal is the attack on the net itself. A column that is darker anywhere than on "
    "its diagonal is a sign of masked gradients; rows that darken all columns are arms whose images transfer."
)
_DECIMALS, _NUMBERS = 6, 12  # most arms for numbers with a decimal, and for numbers at all


def draw(results: Sequence[Analyzed], suffix: str) -> list[Panel]:
    """Return one heat map for each set of arms that was looked at together; equal numbers of images make pooling a mean."""
    sets: dict[tuple[str, ...], list[Analyzed]] = {}
    for result in results:
        sets.setdefault(tuple(result.arms), []).append(result)
    drawings = []
    for place, (arms, some) in enumerate(sets.items(), start=1):
        tables = [ANALYSES["transfer"].load(one.payload, one.arrays)["transfer"] for one in some]
        title = "All arms" if len(sets) == 1 else f"{len(arms)} arms"
        name = f"inside-transfer{'' if len(sets) == 1 else f'-set-{place}'}{suffix}"
        data = [{"seed": one.seed, **row} for one in some for row in one.rows]
        drawings.append(_drawn(name, title, pooled(tables), data))
    seeds = max(len(some) for some in sets.values())
    return [
        Panel(
            "Crafted on one, measured on another",
            _READ.format(f", mean of {seeds} seeds" if seeds > 1 else ""),
            drawings,
        )
    ]


def pooled(tables: Sequence[CrossTable]) -> CrossTable:
    """Return the counts of several tables of the same names together."""
    names = tables[0].names
    return CrossTable(
        names,
        {name: sum(one.clean[name] for one in tables) for name in names},
        {a: {b: sum(one.counts[a][b] for one in tables) for b in names} for a in names},
        sum(one.total for one in tables),
        tables[0].attack,
    )


def _drawn(name: str, title: str, table: CrossTable, data: Sequence[dict[str, Any]]) -> Drawing:
    count = len(table.names)
    with style.drawing():
        line = 24.0 if count <= _NUMBERS else 15.0
        figure = empty((118.0 if count <= _NUMBERS else 160.0) + line * (count + 1), "")
        axes = figure.add_subplot()
        table.plot(axes)
        _settle(axes, table, count)
        text = slim(to_svg(figure))
    return Drawing(name=name, title=title, caption="", data=data, svg=text)


def _settle(axes: Axes, table: CrossTable, count: int) -> None:
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    short = NAME if count <= _NUMBERS else 14
    names = [style.plain(name, short) for name in table.names]
    axes.set_xticks(range(count), names, rotation=90, parse_math=False, fontsize=style.FONT_SIZE - 1)
    axes.set_yticks(range(count + 1), ["no attack", *names], parse_math=False, fontsize=style.FONT_SIZE - 1)
    for text in axes.texts:
        shade = float(text.get_text()) / 100
        text.set_color(style.ON_DARK if ink_on(shade) == "white" else style.ON_LIGHT)
        text.set_fontsize(style.FONT_SIZE - 1)
        if count > _DECIMALS:
            text.set_text(f"{float(text.get_text()):.0f}" if count <= _NUMBERS else "")
    if count > _NUMBERS:
        bar = axes.figure.colorbar(axes.images[0], ax=axes, location="top", fraction=0.05, aspect=30, pad=0.02)
        bar.set_ticks([0, 0.5, 1], labels=["0", "50", "100"])
        bar.set_label("accuracy, %", fontsize=style.FONT_SIZE - 1)
    axes.axhline(0.5, color=style.PAPER, linewidth=4)  # what is not under attack stands apart
    for place in range(count):
        axes.add_patch(
            Rectangle((place - 0.47, place + 0.53), 0.94, 0.94, fill=False, edgecolor=style.ON_DARK, linewidth=2.4)
        )
        axes.add_patch(
            Rectangle((place - 0.47, place + 0.53), 0.94, 0.94, fill=False, edgecolor=style.ON_LIGHT, linewidth=1.0)
        )
