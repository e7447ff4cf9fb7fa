"""What can be seen of the nets, side by side: filters, input gradients, perturbations and a loss surface of every arm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from robustlayers.analysis import Perturbations
from robustlayers.analysis._sheets import picture
from robustlayers.core.quantities import pixels_text
from robustlayers.report import style
from robustlayers.report._analysis_axes import WIDTH, Panel, empty, slim
from robustlayers.report.figures import Drawing
from robustlayers.report.svg import to_svg
from robustlayers.report.wording import slugs
from robustlayers.study.analyses import ANALYSES
from robustlayers.study.summary import Analyzed, Summary

__all__ = ["draw"]

_Line = tuple[str, Sequence[np.ndarray], Sequence[str]]
"""What stands above, pictures [height, width, 3], a mark for each or none."""

_Rows = Mapping[str, Sequence[Mapping[str, Any]]]
"""Arm -> rows"""

_GAP, _HEAD = 5.0, 25.0

_FILTERS = (
    "How to read it: each square is a filter of the first convolution; mid-gray is weight zero, {}, and full color is the "
    "largest weight of that arm. A filter that is gray all over does little. Smooth filters keep noise out; checkered ones "
    "let the finest patterns of a perturbation in. Arms in which the layer was frozen look the same."
)
_GRADIENTS = (
    "How to read it: the gradient of the loss for each pixel; mid-gray is none, {}. Every map has its own scale, three times "
    "its standard deviation. Gradients of robust nets follow the shape of the object, those of natural nets look like noise."
)
_CHANGES = (
    "How to read it: what the attack changed in each arm, on the same images; mid-gray is no change, {}, and full color is "
    "{}, the largest change that occurs. A cross means that the net is wrong after the attack, on a diamond that it was wrong "
    "before; a tick that it is still right. What has to be done to a robust net follows the object, what is enough for a "
    "natural one looks like noise."
)
_SURFACE = (
    "How to read it: image {} of those above is in the middle; to the right it moves along the sign of the loss's gradient, "
    "up along random signs, which are the same in every arm; brighter is a higher loss, on one scale for all arms. The "
    "solid line is the decision boundary{}. Even stripes mean that one gradient step finds what there is; ridges and pits "
    "near the middle mean that a single-step attack is misled."
)


def draw(summary: Summary, shown: Sequence[Analyzed], suffix: str) -> list[Panel]:
    """Return a panel for each kind of picture; `shown` has one result for each arm.

    Arms stand side by side only where they look at the same images, which they do unless data are a factor of the study.
    """
    alike: dict[bytes, list[Analyzed]] = {}
    for result in shown:
        alike.setdefault(result.arrays["images"].tobytes(), []).append(result)
    sets = list(alike.values())
    ends = [f"-images-{place}" if len(sets) > 1 else "" for place in range(1, len(sets) + 1)]
    return [panel for some, end in zip(sets, ends, strict=True) for panel in _panels(some, end + suffix)]


def _panels(shown: Sequence[Analyzed], suffix: str) -> list[Panel]:
    load = ANALYSES["pictures"].load
    found = {result.arm: load(result.payload, result.arrays) for result in shown}
    rows = {result.arm: result.rows for result in shown}
    some = next(iter(found.values()))
    colored = some["gradients"].images.shape[1] == 3
    signs = "each color channel is shown around it" if colored else "orange is above, blue below it"
    panels = []
    filters = {arm: one["filters"] for arm, one in found.items() if "filters" in one}
    if filters:
        slug = dict(zip(filters, slugs(list(filters)), strict=True))
        colors = next(iter(filters.values())).weights.shape[1] == 3
        text = _FILTERS.format("each color channel is shown around it" if colors else "orange is above, blue below it")
        drawings = []
        for arm, one in filters.items():
            columns = max(8, math.ceil(math.sqrt(2 * len(one.weights))))
            shown_filters = one.maps()
            cut = [shown_filters[first : first + columns] for first in range(0, len(shown_filters), columns)]
            heads = [arm, *[""] * (len(cut) - 1)]
            name = f"inside-pictures-filters-{slug[arm]}{suffix}"
            data = _data({arm: rows[arm]}, "filters")
            drawings.append(
                _sheet(name, arm, columns, [(h, line, ()) for h, line in zip(heads, cut, strict=True)], data)
            )
        panels.append(Panel("First filters", text, drawings))
    images: _Line = ("images", [picture(one) for one in some["gradients"].images], ())
    count = len(images[1])
    name = f"inside-pictures-gradients{suffix}"
    lines: list[_Line] = [images, *((arm, one["gradients"].maps(), ()) for arm, one in found.items())]
    drawing = _sheet(name, "Input gradients", count, lines, _data(rows, "gradients"))
    panels.append(Panel("Input gradients", _GRADIENTS.format(signs), [drawing]))
    made: dict[str, Perturbations] = {arm: one["perturbations"] for arm, one in found.items()}
    reach = max(one.reach for one in made.values())
    lines = [images]
    for arm, one in made.items():
        lines.append((arm, one.maps(reach), [_mark(*pair) for pair in zip(one.right, one.right_attacked, strict=True)]))
    text = _CHANGES.format(signs, pixels_text(round(reach * 255, 2) / 255))
    name = f"inside-pictures-perturbations{suffix}"
    drawing = _sheet(name, "Perturbations", count, lines, _data(rows, "perturbations"))
    panels.append(Panel("Perturbations", text, [drawing]))
    right = sum(one.right.astype(int) for one in made.values())
    panels.append(_surfaces(shown, found, rows, int(np.argmax(right)), suffix))
    return panels


def _mark(before: bool, after: bool) -> str:
    return "✗ before" if not before else "✓" if after else "✗"


def _data(rows: _Rows, part: str) -> list[dict[str, Any]]:
    return [{"arm": arm, **row} for arm, found in rows.items() for row in found if row["part"] == part]


def _sheet(
    name: str, title: str, columns: int, lines: Sequence[_Line], data: Sequence[Mapping[str, object]]
) -> Drawing:
    """Draw lines of pictures, each below its head if it has one."""
    side = (WIDTH - _GAP * (columns - 1)) / columns
    heights = [side + (_HEAD if head else _GAP) for head, *_ in lines]
    with style.drawing():
        figure = style.figure(WIDTH, sum(heights) + 2)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        for place, (head, found, marks) in enumerate(lines):
            bottom = sum(heights[: place + 1])
            weight = "normal" if head == "images" and not place else "bold"
            axes.text(0, bottom - side - 5, style.plain(head, 44), fontweight=weight, parse_math=False)
            for column, shown in enumerate(found):
                left = column * (side + _GAP)
                box = (left, left + side, bottom, bottom - side)
                axes.imshow(np.clip(shown, 0, 1), extent=box, interpolation="none")
                if marks:
                    _stamp(axes, left + side - 8, bottom - side + 9, marks[column])
        axes.set(xlim=(0, WIDTH), ylim=(sum(heights) + 2, 0), aspect="auto")
        text = slim(to_svg(figure))
    return Drawing(name=name, title=title, caption="", data=data, svg=text)


def _stamp(axes: Axes, x: float, y: float, mark: str) -> None:
    """Put a tick or a cross into the corner of a picture, on a ground of its own."""
    axes.plot(
        x, y, "D" if mark == "✗ before" else "s", markersize=12, color=style.ON_LIGHT, markeredgewidth=0, zorder=3
    )
    if mark == "✓":
        axes.plot([x - 3.5, x - 1, x + 3.5], [y, y + 3, y - 3.5], color=style.ON_DARK, linewidth=1.5, zorder=4)
        return
    for sign in (-1, 1):
        axes.plot([x - 3, x + 3], [y - 3 * sign, y + 3 * sign], color=style.ON_DARK, linewidth=1.5, zorder=4)


def _surfaces(
    shown: Sequence[Analyzed], found: Mapping[str, Mapping[str, Any]], rows: _Rows, place: int, suffix: str
) -> Panel:
    """Draw the loss around one image in every arm; colors reach up to the highest loss of them all."""
    key = f"surface {place}"
    highest = max(float(one[key].losses.max()) for one in found.values())
    slug = dict(zip(found, slugs(list(found)), strict=True))
    drawings = []
    for result in shown:
        with style.drawing():
            figure = empty(330.0, result.arm)
            axes = figure.add_subplot()
            found[result.arm][key].plot(axes, highest=highest, eps=result.payload["eps"])
            _shades(axes)
            text = slim(to_svg(figure))
        image = list(dict.fromkeys(row["image"] for row in result.rows if row["part"] == "surface"))[place]
        data = [row for row in _data({result.arm: rows[result.arm]}, "surface") if row["image"] == image]
        drawings.append(Drawing(f"inside-pictures-surface-{slug[result.arm]}{suffix}", result.arm, "", data, text))
    known = (result.payload["eps"] for result in shown)
    balls = {eps for eps in known if isinstance(eps, float)}
    ball = (
        f", the dashed diamond holds what the attack may choose from ({pixels_text(*balls)})" if len(balls) == 1 else ""
    )
    return Panel("Loss around an image", _SURFACE.format(place + 1, ball), drawings)


def _shades(axes: Axes) -> None:
    """Keep white and black as they are, on colors that do not change with the reader's scheme."""
    axes.grid(visible=False)
    for line in axes.lines:
        if to_hex(line.get_color()) == "#ffffff":
            line.set_color(style.ON_DARK)
        line.set_markeredgecolor(style.ON_LIGHT)
    for lines, paint in zip(axes.collections, (style.ON_DARK, style.ON_LIGHT), strict=False):  # below and above
        lines.set_edgecolor(paint)
