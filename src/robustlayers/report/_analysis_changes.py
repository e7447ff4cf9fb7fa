"""How norm layers change in training, across arms: the drift of their statistics, and the effective rates of groups."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from robustlayers.analysis._axes import round_ticks
from robustlayers.report import style
from robustlayers.report._analysis_axes import empty, head, legend, line, name_layers
from robustlayers.study.summary import Summary

__all__ = ["drift", "rates", "rates_of"]

_LEAST = 1e-6  # of the largest value: what a logarithmic axis goes down to, where what has not moved stands
_LINE = 21.0  # height of one group


def drift(
    arms: Sequence[str],
    place: Mapping[str, int],
    moments: Mapping[str, Sequence[str]],
    layers: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
) -> Figure:
    """Return the drift of running statistics: from the first moment on, from moment to moment, and layer by layer."""
    found = {
        (row["arm"], row["layer"], row["moment"], row["since"]): float(row["value"])
        for row in rows
        if row["metric"] == "kl_mean" and row["value"] is not None
    }
    low = _LEAST * max(found.values(), default=1.0)
    names = max(moments.values(), key=len)
    below = 12.0 * max(len(style.plain(name, 18)) for name in names) / 2 + 10
    figure = empty(110.0 + 3 * 108.0 + below + 16 * math.ceil(len(arms) / 2), "")
    grid = figure.subplots(3, 1, squeeze=False)[:, 0]
    for axes, step in zip(grid[:2], (False, True), strict=True):
        for arm in arms:
            own = moments[arm]
            at = {moment: x for x, moment in enumerate(names)} | {"now": len(names) - 1}
            points = []
            for before, moment in itertools.pairwise(own):
                value = found.get((arm, "all", moment, before if step else own[0]))
                if value is not None and moment in at:
                    points.append((at[moment], max(value, low)))
            line(axes, arm, place[arm], points)
        head(axes, "Since the moment before, nats" if step else "Since the untrained net, nats", "kl_mean")
        axes.set_xlim(-0.3, len(names) - 0.7)
        axes.set_xticks(
            range(len(names)), [style.plain(n, 18) for n in names] if step else [""] * len(names), parse_math=False
        )
        if step and len(names) > 3:
            axes.tick_params(axis="x", rotation=90)
    for arm in arms:
        own = moments[arm]
        values = [(x, found.get((arm, layer, own[-1], own[0]))) for x, layer in enumerate(layers)]
        line(grid[2], arm, place[arm], [(x, max(value, low)) for x, value in values if value is not None])
    head(grid[2], "From the untrained net to now, by layer, nats", "kl_mean")
    name_layers(grid[2:], layers)
    legend(figure, grid[0], arms)
    return figure


def rates_of(summary: Summary, arms: Sequence[str]) -> list[dict[str, Any]]:
    """Return the effective rates of the ledger: a row for each arm, phase and trained group, means over seeds."""
    rows = []
    for arm in summary.arms:
        if arm.name not in arms:
            continue
        known: dict[tuple[str, str], list[float]] = {}
        for one in arm.ledger:
            if one.effective_lr is not None and math.isfinite(one.effective_lr) and one.effective_lr > 0:
                known.setdefault((one.phase, one.group), []).append(one.effective_lr)
        for (phase, group), values in known.items():
            mean = math.fsum(values) / len(values)
            rows.append({"arm": arm.name, "phase": phase, "group": group, "seeds": len(values), "effective_lr": mean})
    return rows


def rates(arms: Sequence[str], place: Mapping[str, int], rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Return the rates as marks on a logarithmic axis: a line for each phase and group, a mark for each arm."""
    lines = list(dict.fromkeys((row["phase"], row["group"]) for row in rows))
    figure = empty(64.0 + _LINE * len(lines) + 16 * math.ceil(len(arms) / 2), "")
    axes = figure.add_subplot()
    for arm in arms:
        mine = [row for row in rows if row["arm"] == arm]
        axes.plot(
            [row["effective_lr"] for row in mine], [lines.index((row["phase"], row["group"])) for row in mine], linestyle="",
            color=style.color(place[arm]), marker=style.marker(place[arm]), markersize=7, alpha=0.85, markeredgewidth=0,
            label=arm,
        )  # fmt: skip
    axes.set_xscale("log")
    values = [row["effective_lr"] for row in rows]
    low, high = math.log10(min(values)), math.log10(max(values))
    if high - low < 1:
        low, high = (low + high) / 2 - 0.5, (low + high) / 2 + 0.5
    axes.set_xlim(10 ** (low - 0.1), 10 ** (high + 0.1))
    axes.xaxis.set_major_locator(FixedLocator(round_ticks(10 ** (low - 0.1), 10 ** (high + 0.1))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_yticks(range(len(lines)), [style.plain(f"{p}: {g}", 24) for p, g in lines], parse_math=False)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlabel("share of a group that one step moves")
    legend(figure, axes, arms)
    return figure
