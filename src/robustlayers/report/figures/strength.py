"""Accuracy against the strength of the attack, arm by arm: how far it falls with eps, and with steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes

from robustlayers.report import style
from robustlayers.report.figures import Drawing
from robustlayers.report.measured import primary, values
from robustlayers.report.svg import to_svg
from robustlayers.report.wording import slugs
from robustlayers.study.summary import Arm, Summary

__all__ = ["draw", "table"]

WIDTH, HEIGHT = 352.0, 340.0
_LEFT, _RIGHT, _TOP, _PANEL, _GAP = 40.0, 10.0, 34.0, 110.0, 64.0
_SETTINGS = ("eps", "steps")

CAPTION = (
    "How to read: the share of the first test images that PGD leaves right, as its eps or its number of steps grows. The line "
    "has to fall, against eps down to 0; where it is flat above 0 or rises, the attack fails, and no accuracy is to be "
    "trusted. Thick line: mean over seeds; thin ones: single seeds. The axes of eps and steps are not to scale."
)


def draw(summary: Summary) -> list[Drawing]:
    """Return one figure for each arm whose accuracy was measured so, at the checkpoint that the answer is given for."""
    found = []
    for position, (arm, slug) in enumerate(zip(summary.arms, slugs([a.name for a in summary.arms]), strict=True)):
        rows = table(summary, arm)
        if rows:
            with style.drawing():
                text = _figure(rows, arm, position)
            found.append(Drawing(name=f"sanity-{slug}", title=arm.name, caption=CAPTION, data=rows, svg=text))
    return found


def table(summary: Summary, arm: Arm) -> list[dict[str, object]]:
    """Return the rows of an arm's figure: every seed at every eps and number of steps."""
    checkpoint = primary(summary)
    rows: list[dict[str, object]] = []
    for metric in arm.results.get(checkpoint, {}):
        setting, _, value = metric.removeprefix("sanity:").partition("=")
        if metric.startswith("sanity:") and setting in _SETTINGS:
            rows += [
                {
                    "arm": arm.name,
                    "checkpoint": checkpoint,
                    "setting": setting,
                    "value": value,
                    "seed": seed,
                    "right": right,
                }
                for seed, right in values(arm, checkpoint, metric).items()
            ]
    return rows


def _figure(rows: Sequence[dict[str, object]], arm: Arm, position: int) -> str:
    figure = style.figure(WIDTH, HEIGHT)
    figure.text(_LEFT / WIDTH, 1 - 14 / HEIGHT, style.plain(arm.name, 40), weight="bold", parse_math=False)
    for place, setting in enumerate(_SETTINGS):
        bottom = HEIGHT - _TOP - _PANEL - place * (_PANEL + _GAP)
        axes = figure.add_axes(
            (_LEFT / WIDTH, bottom / HEIGHT, 1 - (_LEFT + _RIGHT) / WIDTH, _PANEL / HEIGHT),
        )
        _panel(axes, [row for row in rows if row["setting"] == setting], setting, position)
    return to_svg(figure)


def _panel(axes: Axes, rows: Sequence[dict[str, object]], setting: str, position: int) -> None:
    names = list(dict.fromkeys(str(row["value"]) for row in rows))
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    known = {(row["seed"], str(row["value"])): 100 * float(str(row["right"])) for row in rows}
    paint = style.color(position)
    for seed in seeds if len(seeds) > 1 else ():
        points = [(place, known[seed, name]) for place, name in enumerate(names) if (seed, name) in known]
        axes.plot(*zip(*points, strict=True), color=paint, linewidth=0.9, alpha=0.6)
    columns = [[known[seed, name] for seed in seeds if (seed, name) in known] for name in names]
    means = [math.fsum(column) / len(column) for column in columns]
    axes.plot(range(len(names)), means, color=paint, marker=style.marker(position), markersize=5, linewidth=2)
    axes.set_xticks(range(len(names)), [style.plain(name, 9) for name in names], rotation=30 if setting == "eps" else 0)
    axes.set_ylim(-4, 104)
    axes.set_yticks([0, 50, 100])
    axes.set_xlim(-0.3, len(names) - 0.7)
    axes.set_title(f"right in %, by {setting}", fontsize=style.FONT_SIZE - 1, color=style.MUTED, loc="left")
