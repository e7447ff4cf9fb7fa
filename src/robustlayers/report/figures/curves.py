"""Learning curves, one figure per arm: clean and robust accuracy on train and validation after every epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from robustlayers.report import style
from robustlayers.report.figures import Drawing
from robustlayers.report.measured import status
from robustlayers.report.svg import to_svg
from robustlayers.report.wording import plural, slugs
from robustlayers.study.summary import Arm, CurvePoint, Summary

__all__ = ["SERIES", "draw", "mean_curve", "table"]

WIDTH, HEIGHT = 352.0, 262.0
_LEFT, _RIGHT, _BOTTOM, _TOP = 38.0, 48.0, 40.0, 44.0
SERIES = ("train_clean", "train_robust", "validation_clean", "validation_robust")


def draw(summary: Summary) -> list[Drawing]:
    """Return one figure per arm that has curves, all with the same axes."""
    names = slugs([arm.name for arm in summary.arms])
    epochs = max((point.epoch for arm in summary.arms for line in arm.curves.values() for point in line), default=0)
    return [
        _draw(arm, position, names[position], epochs)
        for position, arm in enumerate(summary.arms)
        if any(arm.curves.values())
    ]


def mean_curve(arm: Arm, name: str) -> dict[int, float]:
    """Return epoch -> mean of one series over the seeds that have finished, where all of them have a value.

    A seed that stopped early would otherwise make the mean jump where it leaves.
    """
    whole = [points for seed, points in sorted(arm.curves.items()) if points and status(arm, seed) == "finished"]
    columns = [dict(_finite(points, name)) for points in whole]
    if not columns:
        return {}
    common = sorted(set.intersection(*(set(column) for column in columns)))
    return {epoch: math.fsum(column[epoch] for column in columns) / len(columns) for epoch in common}


def _finite(points: Sequence[CurvePoint], name: str) -> list[tuple[int, float]]:
    """Epoch and value of the points that were measured: an epoch without a measurement holds NaN."""
    return [(point.epoch, value) for point in points if math.isfinite(value := float(getattr(point, name)))]


def table(arm: Arm) -> list[dict[str, object]]:
    """Return the rows of the figure: every point of every seed, then the means."""
    rows: list[dict[str, object]] = []
    for seed, points in sorted(arm.curves.items()):
        for point in points:
            row: dict[str, object] = {"arm": arm.name, "seed": seed, "epoch": point.epoch, "phase": point.phase}
            row.update({name: value if math.isfinite(value := getattr(point, name)) else None for name in SERIES})
            rows.append({**row, "train_loss": point.train_loss, "seconds": point.seconds})
    means = {name: mean_curve(arm, name) for name in SERIES}
    phase_of = {point.epoch: point.phase for points in arm.curves.values() for point in points}
    rows.extend(
        {
            "arm": arm.name,
            "seed": "mean",
            "epoch": epoch,
            "phase": phase_of[epoch],
            **{name: means[name].get(epoch) for name in SERIES},
            "train_loss": None,
            "seconds": None,
        }
        for epoch in sorted(set().union(*means.values()))
    )
    return rows


def _draw(arm: Arm, position: int, slug: str, epochs: int) -> Drawing:
    with style.drawing():
        figure = style.figure(WIDTH, HEIGHT)
        axes = figure.add_axes(
            (_LEFT / WIDTH, _BOTTOM / HEIGHT, 1 - (_LEFT + _RIGHT) / WIDTH, 1 - (_BOTTOM + _TOP) / HEIGHT)
        )
        axes.set_xlim(0.5, epochs + 0.5)
        axes.set_ylim(-3, 103)
        axes.set_yticks([0, 25, 50, 75, 100])
        axes.set_xticks([tick for tick in style.ticks(1, epochs) if tick == int(tick)])
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("epoch")
        figure.text(
            0.0, 1 - 10 / HEIGHT, style.plain(arm.name, 40), parse_math=False, fontweight="bold",
            fontsize=style.FONT_SIZE + 1, va="top",
        )  # fmt: skip
        figure.text(
            0.98, 1 - 10 / HEIGHT, "accuracy in %", va="top", ha="right", color=style.MUTED,
            fontsize=style.FONT_SIZE - 1,
        )  # fmt: skip
        _phases(axes, arm)
        paint = {"clean": style.CLEAN, "robust": style.color(position)}
        ends = {kind: _lines(axes, arm, kind, paint[kind]) for kind in ("clean", "robust")}
        _chosen(axes, arm, paint["robust"])
        _direct(axes, ends, paint)
        text = to_svg(figure)
    return Drawing(
        name=f"curves-{slug}",
        title=arm.name,
        caption=_shared(arm),
        data=table(arm),
        svg=text,
        facts={"arm": arm.name},
    )


def _shared(arm: Arm) -> str:
    """Return which phases the arm has in common with others, in words."""
    said = [
        f"{phase.name}: epochs {first} to {last}"
        + (f", shared by {plural(phase.shared_with, 'arm')}" if phase.shared_with > 1 else "")
        for phase, first, last in _spans(arm)
    ]
    return "; ".join(said)


def _spans(arm: Arm) -> list[tuple]:
    found, before = [], 0
    for phase in arm.phases:
        if phase.epochs > 0:
            found.append((phase, before + 1, before + phase.epochs))
        before += phase.epochs
    return found


def _phases(axes: Axes, arm: Arm) -> None:
    """Mark where phases begin, name them on top, and shade those that other arms share."""
    right = axes.get_xlim()[1]
    for phase, first, last in _spans(arm):
        if first > 1:
            axes.axvline(first - 0.5, color=style.MUTED, linewidth=1.0, zorder=1)
        if phase.shared_with > 1:
            axes.axvspan(first - 0.5, last + 0.5, color=style.RULE, alpha=0.4, linewidth=0, zorder=0)
        room = int((last - first + 1) / max(right - 0.5, 1) * (WIDTH - _LEFT - _RIGHT) / 6.2)
        if room >= 3:
            axes.annotate(
                style.plain(phase.name, room), ((first + last) / 2, 1.0), xycoords=("data", "axes fraction"),
                xytext=(0, 3), textcoords="offset points", ha="center", va="bottom", color=style.MUTED,
                fontsize=style.FONT_SIZE - 2, parse_math=False, annotation_clip=False,
            )  # fmt: skip


def _lines(axes: Axes, arm: Arm, kind: str, paint: str) -> tuple[int, float] | None:
    """Draw train and validation of one accuracy; return where the validation line ends: epoch and percent."""
    end = None
    for split, dashes in (("train", (2.2, 1.6)), ("validation", (None, None))):
        name = f"{split}_{kind}"
        mean = mean_curve(arm, name)
        finished = [seed for seed in arm.curves if status(arm, seed) == "finished"]
        for seed, points in sorted(arm.curves.items()):
            known = _finite(points, name)
            if not known or finished == [seed]:
                continue
            axes.plot(*_percent(known), color=paint, linewidth=0.7, alpha=0.45, dashes=dashes, zorder=3)
            if split == "validation" and status(arm, seed) in ("diverged", "failed"):
                axes.plot(
                    *_percent(known[-1:]), marker="x", markersize=7, markeredgewidth=1.8, color=style.INK, zorder=6
                )
        if mean:
            xs, ys = _percent(list(mean.items()))
            axes.plot(xs, ys, color=paint, linewidth=2.0, dashes=dashes, zorder=4)
            if len(xs) == 1:
                axes.plot(xs, ys, marker="o", markersize=3, color=paint, zorder=4)
            end = (xs[-1], ys[-1]) if split == "validation" else end
    return end


def _percent(known: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [epoch for epoch, _ in known], [100 * value for _, value in known]


def _chosen(axes: Axes, arm: Arm, paint: str) -> None:
    """Ring the epoch that was chosen on validation, on the line of its seed."""
    for seed, epoch in sorted(arm.best_epoch.items()):
        for at, value in _finite(arm.curves.get(seed, ()), "validation_robust"):
            if at == epoch and status(arm, seed) == "finished":
                axes.plot(
                    [epoch], [100 * value], marker="o", markersize=6, color=paint,
                    markerfacecolor=style.PAPER, markeredgewidth=1.4, zorder=5,
                )  # fmt: skip


def _direct(axes: Axes, ends: Mapping[str, tuple[int, float] | None], paint: Mapping[str, str]) -> None:
    """Write `clean` and `robust` at the ends of their lines, apart from each other."""
    known = sorted((end[1], end[0], kind) for kind, end in ends.items() if end is not None)
    heights = [height for height, _, _ in known]
    if len(heights) == 2 and heights[1] - heights[0] < 9:
        middle = sum(heights) / 2
        heights = [middle - 4.5, middle + 4.5]
    for height, (_, epoch, kind) in zip(heights, known, strict=True):
        axes.annotate(
            kind, (epoch, height), xytext=(7, 0), textcoords="offset points", va="center_baseline",
            color=style.INK if kind == "robust" else paint[kind], fontsize=style.FONT_SIZE - 1,
            fontweight="bold" if kind == "robust" else "normal", annotation_clip=False,
        )  # fmt: skip
