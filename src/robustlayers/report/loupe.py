"""Batch norm under the loupe: what the norm layers of one network hold, layer by layer in execution order.

Drawn from the rows of `normalization.norm_report` alone. All panels share their columns, one for each layer; color is kept
for what differs by pass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from robustlayers.report import style
from robustlayers.report.figures import Drawing
from robustlayers.report.figures.labels import width_of
from robustlayers.report.svg import to_svg
from robustlayers.report.wording import percent, plural

__all__ = ["draw", "groups", "means"]

WIDTH = 352.0
_LEFT, _RIGHT = 44.0, 10.0
_TITLE, _HEAD, _LEGEND, _PANEL, _GAP = 30.0, 20.0, 16.0, 74.0, 18.0
_NAMED = 16  # more layers than that are named by the part that they belong to
_SPAN = 1e-6  # of the largest value: what a logarithmic axis goes down to

_USUAL = ("clean", "adversarial", "noise")
_SPREAD = ("min", "q25", "median", "q75", "max")
_PANELS = ("scale", "shift", "dead_share", "kl_mean", "lipschitz", "scale_rate")
_HEADS = {
    "scale": "Scale γ",
    "shift": "Shift β",
    "dead_share": "Dead channels in %",
    "kl_mean": "Distance from the running statistics",
    "lipschitz": "Stretch |γ| / σ",
    "scale_rate": "Gradient by weight ‖g‖ / ‖γ‖",
}
_SAID = {
    "scale": "Scale and shift: from the least to the largest channel (thin), the middle half (thick), the median (dot).",
    "dead_share": "Dead channels: |γ| under {}.",
    "kl_mean": "Distance: symmetric KL divergence between the running statistics and those of the layer's inputs in each "
    "pass, as Gaussians, mean over channels.",
    "lipschitz": "Stretch: |γ| over the running standard deviation, median channel (dot) and largest (end of the line).",
    "scale_rate": "Gradient by weight: the share of γ that a step of size 1 would move.",
}
_LOG = ("kl_mean", "lipschitz", "scale_rate")

Key = tuple[str, str, str]
"""layer, pass, metric"""


def draw(
    rows: Sequence[Mapping[str, Any]], *, name: str = "loupe", title: str = "BatchNorm under the loupe"
) -> Drawing | None:
    """Return the figure of one network's norm report; None where its rows are about no layer.

    `rows` are those of `NormReport.rows` or of `study_rows`, layers in the order in which they are to stand. Several values
    of one layer, pass and metric, as of several seeds, are drawn as their mean. Panels that no row is about are left out.
    `name` is that of the files. One unit is a CSS pixel; the figure is 352 wide, for the width of a phone.
    """
    known = means(rows)
    layers = list(dict.fromkeys(layer for layer, _, _ in known if layer != "all"))
    panels = [panel for panel in _PANELS if any(_points(known, layer, panel) for layer in layers)]
    if not panels:
        return None
    passes = sorted({one: None for _, one, _ in known if one}, key=_rank)
    with style.drawing():
        text = to_svg(_figure(known, layers, panels, passes, title))
    return Drawing(
        name=name, title=title, caption=_caption(panels, layers, known), data=[dict(row) for row in rows], svg=text
    )


def _rank(name: str) -> int:
    """The usual passes first, so that they have the same colors in every figure; then in the order of the rows."""
    return _USUAL.index(name) if name in _USUAL else len(_USUAL)


def means(rows: Sequence[Mapping[str, Any]]) -> dict[Key, float]:
    """Return (layer, pass, metric) -> mean of its finite values, in the order of the rows.

    >>> means([{"layer": "bn", "pass": "", "metric": "dead_share", "value": value} for value in (0.5, 0.25, None)])
    {('bn', '', 'dead_share'): 0.375}
    """
    found: dict[Key, list[float]] = {}
    for row in rows:
        value = row["value"]
        if value is not None and math.isfinite(value):
            found.setdefault((row["layer"], row["pass"], row["metric"]), []).append(float(value))
    return {key: math.fsum(values) / len(values) for key, values in found.items()}


def groups(layers: Sequence[str]) -> list[tuple[int, str]]:
    """Return where each part of a network begins among its layers, and its name: what stands before the blocks' numbers.

    >>> groups(["bn1", "layer1.0.bn1", "layer1.0.bn2", "layer2.0.bn1", "stages.2.1.norm"])
    [(0, 'bn1'), (1, 'layer1'), (3, 'layer2'), (4, 'stages.2')]
    """
    found: list[tuple[int, str]] = []
    for place, layer in enumerate(layers):
        first, *rest = layer.split(".")
        part = f"{first}.{rest[0]}" if rest and rest[0].isdigit() and not re.search(r"\d$", first) else first
        if not found or found[-1][1] != part:
            found.append((place, part))
    return found


def _points(known: Mapping[Key, float], layer: str, panel: str) -> list[float]:
    """The values of one layer that a panel without passes shows, in order; of panels with passes, all of them."""
    if panel in ("scale", "shift"):
        keys = [(layer, "", f"{panel}_{one}") for one in _SPREAD]
    elif panel == "lipschitz":
        keys = [(layer, "", "lipschitz_median"), (layer, "", "lipschitz_max")]
    else:
        keys = [key for key in known if key[0] == layer and key[2] == panel]
    return [known[key] for key in keys] if all(key in known for key in keys) else []


def _caption(panels: Sequence[str], layers: Sequence[str], known: Mapping[Key, float]) -> str:
    threshold = known.get(("all", "", "dead_threshold"))
    under = "a threshold" if threshold is None else f"{threshold:g}"
    said = [_SAID[panel].format(under) for panel in panels if panel in _SAID]
    if "shift" in panels and "scale" not in panels:
        said.insert(0, _SAID["scale"])
    if any(panel in _LOG for panel in panels):
        said.append("On logarithmic axes, what is under a millionth of the largest value stands at the lower edge.")
    return f"{plural(len(layers), 'norm layer')} in execution order, from left to right. " + " ".join(said)


def _figure(
    known: Mapping[Key, float], layers: Sequence[str], panels: Sequence[str], passes: Sequence[str], title: str
) -> Figure:
    labels = _labels(layers)
    below = 12 + max(width_of(label, style.FONT_SIZE - 1) for _, label in labels)
    heads = [_HEAD + (_LEGEND if panel == _first_with_passes(panels) else 0) for panel in panels]
    height = _TITLE + sum(heads) + (_PANEL + _GAP) * len(panels) - _GAP + below
    figure = style.figure(WIDTH, height)
    figure.text(
        0.0, 1 - 6 / height, style.plain(title, 44), parse_math=False, fontweight="bold",
        fontsize=style.FONT_SIZE + 1, va="top",
    )  # fmt: skip
    top = _TITLE
    for panel, head in zip(panels, heads, strict=True):
        figure.text(0.0, 1 - top / height, _HEADS[panel], va="top", color=style.INK, parse_math=False)
        if panel == "dead_share" and ("all", "", panel) in known:
            figure.text(
                1 - _RIGHT / WIDTH, 1 - top / height, f"all layers {percent(known['all', '', panel])}", va="top",
                ha="right", color=style.MUTED, fontsize=style.FONT_SIZE - 1, parse_math=False,
            )  # fmt: skip
        if head > _HEAD:
            _legend(figure, passes, 1 - (top + _HEAD) / height)
        bottom = top + head + _PANEL
        axes = figure.add_axes((_LEFT / WIDTH, 1 - bottom / height, 1 - (_LEFT + _RIGHT) / WIDTH, _PANEL / height))
        _panel(axes, known, layers, panel, passes)
        axes.set_xlim(-0.7, len(layers) - 0.3)
        axes.grid(axis="x", visible=False)
        for place, _ in groups(layers)[1:] if len(layers) > _NAMED else ():
            axes.axvline(place - 0.5, color=style.RULE, linewidth=0.8, zorder=0)
        axes.xaxis.set_major_locator(FixedLocator([place for place, _ in labels]))
        last = panel == panels[-1]
        axes.set_xticklabels(
            [label if last else "" for _, label in labels], rotation=90, va="top", ha="center", parse_math=False
        )
        top = bottom + _GAP
    return figure


def _labels(layers: Sequence[str]) -> list[tuple[float, str]]:
    """Where names stand on the axis: few layers are named one by one, many by part, or by their number."""
    if len(layers) <= _NAMED:
        return [(place, style.plain(layer or "the model", 26)) for place, layer in enumerate(layers)]
    parts = groups(layers)
    if len(parts) <= _NAMED // 2:
        ends = [place for place, _ in parts[1:]] + [len(layers)]
        return [((first + end - 1) / 2, style.plain(part, 26)) for (first, part), end in zip(parts, ends, strict=True)]
    step = -(-len(layers) // _NAMED)
    return [(place, str(place + 1)) for place in range(0, len(layers), step)]


def _first_with_passes(panels: Sequence[str]) -> str | None:
    return next((panel for panel in panels if panel in ("kl_mean", "scale_rate")), None)


def _legend(figure: Figure, passes: Sequence[str], at: float) -> None:
    """Write the passes beside each other, each behind its mark."""
    x = _LEFT
    height = figure.get_figheight() * 72
    for place, name in enumerate(passes):
        axes = figure.add_axes((x / WIDTH, at - 8 / height, 12 / WIDTH, 12 / height))
        axes.set_axis_off()
        axes.plot([0], [0], marker=style.marker(place), color=style.color(place), markersize=6)
        said = style.plain(name, 18)
        figure.text(
            (x + 15) / WIDTH, at, said, va="center_baseline", parse_math=False,
            fontsize=style.FONT_SIZE - 1, color=style.INK,
        )  # fmt: skip
        x += 15 + width_of(said, style.FONT_SIZE - 1) + 12


def _panel(axes: Axes, known: Mapping[Key, float], layers: Sequence[str], panel: str, passes: Sequence[str]) -> None:
    if panel in ("scale", "shift"):
        drawn = _ranges(axes, known, layers, panel)
    elif panel == "dead_share":
        drawn = _bars(axes, known, layers)
    elif panel == "lipschitz":
        drawn = _stretch(axes, known, layers)
    else:
        drawn = _lines(axes, known, layers, panel, passes)
    if panel not in _LOG:
        axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
        low, high = min(0.0, *drawn), max(0.0, *drawn)
        room = 0.08 * (high - low) or 0.5
        axes.set_ylim(low - (room if low < 0 or panel != "dead_share" else 0), high + room)
    if panel == "dead_share":
        axes.set_ylim(0, max(5.0, 1.1 * max(drawn)))


def _ranges(axes: Axes, known: Mapping[Key, float], layers: Sequence[str], panel: str) -> list[float]:
    """Draw how one kind of number is spread over the channels of each layer."""
    thick = _thickness(layers)
    drawn: list[float] = []
    axes.axhline(0, color=style.MUTED, linewidth=0.8, zorder=1)
    for place, layer in enumerate(layers):
        points = _points(known, layer, panel)
        if points:
            low, lower, middle, upper, high = points
            axes.plot([place] * 2, [low, high], color=style.CLEAN, linewidth=max(1.0, thick / 5), zorder=2)
            axes.plot([place] * 2, [lower, upper], color=style.CLEAN, linewidth=thick, solid_capstyle="butt", zorder=3)
            axes.plot(
                [place], [middle], marker="o", markersize=max(2.5, min(thick - 1, 5)), color=style.PAPER,
                markeredgecolor=style.INK, markeredgewidth=0.9, zorder=4,
            )  # fmt: skip
            drawn += points
    return drawn


def _bars(axes: Axes, known: Mapping[Key, float], layers: Sequence[str]) -> list[float]:
    shares = {place: 100 * known[layer, "", "dead_share"] for place, layer in enumerate(layers)
              if (layer, "", "dead_share") in known}  # fmt: skip
    axes.bar(
        list(shares),
        list(shares.values()),
        width=min(0.7, 2 * _thickness(layers) / _column(layers)),
        color=style.CLEAN,
        zorder=2,
    )
    return list(shares.values())


def _stretch(axes: Axes, known: Mapping[Key, float], layers: Sequence[str]) -> list[float]:
    pairs = {place: points for place, layer in enumerate(layers) if (points := _points(known, layer, "lipschitz"))}
    low = _logarithmic(axes, [value for points in pairs.values() for value in points])
    for place, (middle, high) in pairs.items():
        middle, high = max(middle, low), max(high, low)
        axes.plot([place] * 2, [middle, high], color=style.CLEAN, linewidth=max(1.2, _thickness(layers) / 3))
        axes.plot([place], [middle], marker="o", markersize=4, color=style.CLEAN, zorder=3)
    return [value for points in pairs.values() for value in points]


def _lines(
    axes: Axes, known: Mapping[Key, float], layers: Sequence[str], panel: str, passes: Sequence[str]
) -> list[float]:
    """Draw a line for each pass, the first ones wider, so that they are seen where others run over them."""
    values = [value for (layer, _, metric), value in known.items() if metric == panel and layer != "all"]
    low = _logarithmic(axes, values)
    for position, name in enumerate(passes):
        line = {x: known[layer, name, panel] for x, layer in enumerate(layers) if (layer, name, panel) in known}
        over = len(passes) - 1 - position
        axes.plot(
            list(line), [max(value, low) for value in line.values()], color=style.color(position),
            linewidth=min(1.0 + 1.2 * over, 4.6), marker=style.marker(position), markeredgewidth=0.5,
            markersize=min(3.5 + 1.5 * over, 8) * (1 if len(layers) <= 30 else 0.7), markeredgecolor=style.PAPER,
            zorder=3 + position,
        )  # fmt: skip
    return values


def _logarithmic(axes: Axes, values: Sequence[float]) -> float:
    """Give the axis a logarithmic scale that holds the values; return its lower edge, where smaller ones stand."""
    top = max(values, default=0.0) or 1.0
    positive = [value for value in values if value >= _SPAN * top]
    least = min(positive, default=top)
    low, high = math.log10(least), math.log10(top)
    if high - low < 1:  # a decade at the least, so that noise does not fill the panel
        middle = (low + high) / 2
        low, high = middle - 0.5, middle + 0.5
    axes.set_yscale("log")
    axes.set_ylim(10 ** (low - 0.08 * (high - low)), 10 ** (high + 0.1 * (high - low)))
    marks = _decades(low - 0.08 * (high - low), high + 0.1 * (high - low))
    axes.yaxis.set_major_locator(FixedLocator([factor * 10.0**exponent for factor, exponent in marks]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticklabels([_power(factor, exponent) for factor, exponent in marks])
    return 10**low


def _decades(low: float, high: float) -> list[tuple[int, int]]:
    """Return (factor, exponent) of two to four round numbers between 10^low and 10^high."""
    exponents = range(math.ceil(low), math.floor(high) + 1)
    if len(exponents) >= 2:
        step = -(-len(exponents) // 4)
        return [(1, exponent) for exponent in exponents if exponent % step == 0]
    every = ((factor, exponent) for exponent in range(math.floor(low), math.ceil(high) + 1) for factor in (1, 2, 5))
    return [(factor, exponent) for factor, exponent in every if low <= math.log10(factor) + exponent <= high]


def _power(factor: int, exponent: int) -> str:
    if -4 <= exponent <= 4:
        return f"{factor * 10.0**exponent:g}"
    return f"{factor}e{exponent}".replace("-", "\N{MINUS SIGN}")


def _thickness(layers: Sequence[str]) -> float:
    return min(9.0, 0.6 * _column(layers))


def _column(layers: Sequence[str]) -> float:
    return (WIDTH - _LEFT - _RIGHT) / max(1, len(layers))
