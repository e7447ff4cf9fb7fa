"""Clean against robust accuracy: one mark per seed, the mean of every arm, and the arms that no other arm beats."""

from __future__ import annotations

import math
from itertools import pairwise

from matplotlib.axes import Axes

from robustlayers.report import style
from robustlayers.report.figures import Drawing
from robustlayers.report.figures.labels import Box, place, width_of
from robustlayers.report.measured import accuracy, values
from robustlayers.report.statistics import Interval, pareto, reach
from robustlayers.report.svg import to_svg
from robustlayers.report.wording import listing, slugs
from robustlayers.study.summary import Arm, Summary

__all__ = ["draw", "table"]

WIDTH, HEIGHT = 376.0, 344.0
_LEFT, _RIGHT, _BOTTOM, _TOP = 44.0, 8.0, 44.0, 8.0
_DOT, _MEAN = 6.0, 10.5


def draw(summary: Summary) -> list[Drawing]:
    """Return one figure per checkpoint that has results, all with the same axes."""
    shown = [one for one in summary.checkpoints if any(_pair(arm, one) for arm in summary.arms)]
    limits = _limits(summary, shown)
    return [_draw(summary, checkpoint, limits, slug) for checkpoint, slug in zip(shown, slugs(shown), strict=True)]


def table(summary: Summary, checkpoint: str) -> list[dict[str, object]]:
    """Return the rows of the figure: every seed, then the mean of every arm with its interval."""
    rows: list[dict[str, object]] = []
    front = set(_front(summary, checkpoint))
    for position, arm in enumerate(summary.arms):
        clean, robust = values(arm, checkpoint, "clean"), values(arm, checkpoint, "robust")
        blank = dict.fromkeys(("clean_low", "clean_high", "robust_low", "robust_high", "pareto"))
        rows.extend(
            {
                "arm": arm.name,
                "checkpoint": checkpoint,
                "seed": seed,
                "clean": clean[seed],
                "robust": robust[seed],
                **blank,
            }
            for seed in clean
            if seed in robust
        )
        pair = _pair(arm, checkpoint)
        if pair:
            x, y = pair
            rows.append(
                {
                    "arm": arm.name,
                    "checkpoint": checkpoint,
                    "seed": "mean",
                    "clean": x.mean,
                    "robust": y.mean,
                    "clean_low": x.low,
                    "clean_high": x.high,
                    "robust_low": y.low,
                    "robust_high": y.high,
                    "pareto": position in front,
                }
            )
    return rows


def _pair(arm: Arm, checkpoint: str) -> tuple[Interval, Interval] | None:
    clean, robust = accuracy(arm, checkpoint, "clean"), accuracy(arm, checkpoint, "robust")
    return None if clean.mean is None or robust.mean is None else (clean, robust)


def _front(summary: Summary, checkpoint: str) -> list[int]:
    """Positions of the arms whose mean no other arm's mean beats, by clean accuracy."""
    known = [
        (position, pair[0].mean or 0.0, pair[1].mean or 0.0)
        for position, arm in enumerate(summary.arms)
        if (pair := _pair(arm, checkpoint))
    ]
    return [known[index][0] for index in pareto((x, y) for _, x, y in known)]


def _limits(summary: Summary, checkpoints: list[str]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Axes that hold every mark of every checkpoint and the intervals near them, in percent.

    With two seeds an interval may be wider than all accuracies there are: it then runs out of the picture.
    """
    ends = []
    for metric in ("clean", "robust"):
        known = [(arm, one) for one in checkpoints for arm in summary.arms]
        low, high = reach(
            [value for arm, one in known for value in values(arm, one, metric).values()],
            [end for arm, one in known for end in _clipped(accuracy(arm, one, metric))],
        )
        pad = max(9 * (high - low), 2.0)
        ends.append((100 * low - pad, min(100 * high + pad, 100 + pad / 2)))
    return ends[0], ends[1]


def _clipped(found: Interval) -> list[float]:
    return [min(max(end, 0.0), 1.0) for end in (found.low, found.high) if end is not None]


def _draw(
    summary: Summary, checkpoint: str, limits: tuple[tuple[float, float], tuple[float, float]], slug: str
) -> Drawing:
    with style.drawing():
        figure = style.figure(WIDTH, HEIGHT)
        axes = figure.add_axes(
            (_LEFT / WIDTH, _BOTTOM / HEIGHT, 1 - (_LEFT + _RIGHT) / WIDTH, 1 - (_BOTTOM + _TOP) / HEIGHT)
        )
        axes.set_xlim(*limits[0])
        axes.set_ylim(*limits[1])
        axes.set_xlabel(f"clean accuracy in %, checkpoint {style.plain(checkpoint)}", parse_math=False)
        axes.set_ylabel("robust accuracy in %")
        for axis, (low, high) in ((axes.xaxis, limits[0]), (axes.yaxis, limits[1])):
            axis.set_ticks([tick for tick in style.ticks(low, high) if 0 <= tick <= 100])
        obstacles = _front_line(axes, summary, checkpoint)
        obstacles += _marks(axes, summary, checkpoint)
        _names(axes, summary, checkpoint, obstacles)
        text = to_svg(figure)
    drawn = [arm.name for arm in summary.arms if _pair(arm, checkpoint)]
    lost = [arm.name for arm in summary.arms if arm.name not in drawn]
    caption = "How to read: up is more robust, right is more accurate on clean images, so the upper right corner is the best. "
    if len(summary.seeds) > 1:
        caption += (
            "A small mark is one seed, the large one the mean of its arm, the cross its 95% t intervals, which may run "
            "out of the picture."
        )
    else:
        caption += "A mark is the one seed of its arm."
    if len(_front(summary, checkpoint)) > 1:
        caption += (
            " The dashed line joins the arms that no other arm beats in one accuracy without losing in the other "
            "(Pareto front of the means)."
        )
    if lost:
        caption += f" Not drawn, since no seed has finished: {listing(lost)}."
    return Drawing(
        name=f"tradeoff-{slug}",
        title=f"Clean against robust accuracy, checkpoint {checkpoint}",
        caption=caption,
        data=table(summary, checkpoint),
        svg=text,
    )


def _pixels(axes: Axes, x: float, y: float) -> tuple[float, float]:
    placed = axes.transData.transform((x, y))
    return float(placed[0]), float(placed[1])


def _around(axes: Axes, x: float, y: float, size: float) -> Box:
    here, there = _pixels(axes, x, y)
    return Box(here - size / 2, there - size / 2, here + size / 2, there + size / 2)


def _front_line(axes: Axes, summary: Summary, checkpoint: str) -> list[Box]:
    pairs = [_pair(summary.arms[position], checkpoint) for position in _front(summary, checkpoint)]
    known = [(100 * (pair[0].mean or 0.0), 100 * (pair[1].mean or 0.0)) for pair in pairs if pair]
    if len(known) < 2:
        return []
    axes.plot(*zip(*known, strict=True), color=style.MUTED, linewidth=1.2, dashes=(4, 3), zorder=2)
    boxes = []
    for (x0, y0), (x1, y1) in pairwise(known):
        steps = max(2, math.ceil(math.dist(_pixels(axes, x0, y0), _pixels(axes, x1, y1)) / 6))
        boxes += [_around(axes, x0 + (x1 - x0) * k / steps, y0 + (y1 - y0) * k / steps, 2) for k in range(1, steps)]
    return boxes


def _marks(axes: Axes, summary: Summary, checkpoint: str) -> list[Box]:
    boxes = []
    for position, arm in enumerate(summary.arms):
        pair = _pair(arm, checkpoint)
        if not pair:
            continue
        paint, shape = style.color(position), style.marker(position)
        clean, robust = values(arm, checkpoint, "clean"), values(arm, checkpoint, "robust")
        dots = [(100 * clean[seed], 100 * robust[seed]) for seed in clean if seed in robust]
        x, y = 100 * (pair[0].mean or 0.0), 100 * (pair[1].mean or 0.0)
        half = [100 * side.half if side.half is not None else 0.0 for side in pair]
        axes.plot([x - half[0], x + half[0]], [y, y], color=paint, linewidth=1.4, alpha=0.75, zorder=3)
        axes.plot([x, x], [y - half[1], y + half[1]], color=paint, linewidth=1.4, alpha=0.75, zorder=3)
        if len(dots) > 1:
            axes.plot(
                *zip(*dots, strict=True), linestyle="", marker=shape, markersize=_DOT, color=paint,
                markeredgecolor=style.PAPER, markeredgewidth=0.6, alpha=0.8, zorder=4,
            )  # fmt: skip
        axes.plot(
            [x], [y], linestyle="", marker=shape, markersize=_MEAN, color=paint,
            markeredgecolor=style.INK, markeredgewidth=1.2, zorder=5,
        )  # fmt: skip
        boxes += [_around(axes, *dot, _DOT) for dot in dots]
        boxes.append(_around(axes, x, y, _MEAN + 2))
        for dx, dy in ((half[0], 0.0), (0.0, half[1])):
            boxes += [_around(axes, x + dx * k / 4, y + dy * k / 4, 2) for k in (-4, -3, -2, -1, 1, 2, 3, 4)]
    return boxes


def _names(axes: Axes, summary: Summary, checkpoint: str, obstacles: list[Box]) -> None:
    """Write the name of each arm beside its mean; where that stays ambiguous, every name carries the mark of its arm."""
    named = [
        (position, style.plain(arm.name, 28), _pixels(axes, 100 * (pair[0].mean or 0.0), 100 * (pair[1].mean or 0.0)))
        for position, arm in enumerate(summary.arms)
        if (pair := _pair(arm, checkpoint))
    ]
    size = style.FONT_SIZE
    bounds = Box(_LEFT + 2, _BOTTOM + 2, WIDTH - 4, HEIGHT - 4)
    points = [at for _, _, at in named]
    boxes = place(points, [(width_of(name, size), size) for _, name, _ in named], obstacles, bounds)
    lead = 0.0
    if any(box.astray for box in boxes):
        lead = size
        boxes = place(points, [(width_of(name, size) + lead, size) for _, name, _ in named], obstacles, bounds)
    for (position, name, at), box in zip(named, boxes, strict=True):
        x, y = box.center
        if box.far or box.astray:
            end = (min(max(at[0], box.x0), box.x1), min(max(at[1], box.y0), box.y1))
            axes.annotate(
                "", end, at, xycoords="figure pixels", textcoords="figure pixels", zorder=2.5,
                arrowprops={"arrowstyle": "-", "color": style.MUTED, "linewidth": 0.8, "shrinkA": 6, "shrinkB": 0},
            )  # fmt: skip
        # The font of the reader is as a rule narrower than assumed: the text hugs the side that faces the point.
        side = "left" if box.x0 >= at[0] or lead else "right" if box.x1 <= at[0] else "center"
        start = {"left": box.x0 + lead, "right": box.x1, "center": x}[side]
        if lead:
            axes.plot(
                [box.x0 + lead / 2 - 1], [y], transform=None, marker=style.marker(position), markersize=6.5,
                color=style.color(position), markeredgecolor=style.INK, markeredgewidth=0.7, clip_on=False, zorder=6,
            )  # fmt: skip
        axes.annotate(
            name, (start, y), xycoords="figure pixels", ha=side, va="center_baseline", fontsize=size,
            fontweight="bold", color=style.INK, parse_math=False, zorder=6,
        )  # fmt: skip
