"""Looking inside: the section of a report with what the analyses of its nets found, a table and figures for each.

A figure is the plot of the analysis' own result object, set for the width of a phone, with what its docstring says of how
to read it. Norm layers and pictures are drawn across arms instead, and transfer is of all arms together.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from robustlayers.analysis import ChannelSpread, Contrast, Line, SignalRatio
from robustlayers.analysis._ridges import limits_of
from robustlayers.report import _analysis_features as features
from robustlayers.report import _analysis_norms as norms
from robustlayers.report import _analysis_overfitting as overfitting
from robustlayers.report import _analysis_pictures as pictures
from robustlayers.report import _analysis_transfer as transfer
from robustlayers.report import style
from robustlayers.report._analysis_axes import Panel, empty, slim
from robustlayers.report.figures import Drawing
from robustlayers.report.figures.labels import width_of
from robustlayers.report.svg import to_svg
from robustlayers.report.tables import Cell, Column, Table
from robustlayers.report.wording import listing, plural, sentence, slugs
from robustlayers.study.analyses import ANALYSES, Analysis
from robustlayers.study.analyzed import number_text
from robustlayers.study.summary import Analyzed, Summary

__all__ = ["Inside", "Panel", "gather", "how_to_read"]

_ACROSS: dict[str, Callable[[Summary, Sequence[Analyzed], str], list[Panel]]] = {
    "norms": norms.draw,
    "overfitting": overfitting.draw,
    "pictures": pictures.draw,
}
"""What is drawn of all arms in one figure, or side by side on one scale."""


@dataclass(frozen=True)
class Inside:
    """What one analysis found, under one setting."""

    name: str
    title: str
    text: str
    setting: str
    tables: Sequence[Table]
    panels: Sequence[Panel]


def gather(summary: Summary) -> list[Inside]:
    """Return one part for each analysis and setting, in the order of the registry; figures are of the first seed."""
    found = []
    for name, one in ANALYSES.items():
        settings: dict[tuple[Any, ...], list[Analyzed]] = {}
        for result in summary.analyses:
            if result.analysis == name:
                key = (result.checkpoint, result.images, result.attack, result.select)
                settings.setdefault(key, []).append(result)
        for place, results in enumerate(settings.values(), start=1):
            found.append(_inside(summary, one, results, f"-{place}" if len(settings) > 1 else ""))
    return found


def how_to_read(of: object) -> str:
    """Return what a docstring says after `How to read it:`, up to the end of that paragraph, on one line.

    >>> def plot():
    ...     '''Draw it.
    ...
    ...     How to read it: a bright square
    ...     is good.
    ...     '''
    >>> how_to_read(plot)
    'How to read it: a bright square is good.'
    """
    match = re.search(r"How to read it:.*?(?=\n\s*\n|\Z)", inspect.getdoc(of) or "", re.DOTALL)
    if not match:
        return ""
    plain = re.sub(r"`([^`]*)`", lambda name: name[1].replace("_", " "), match[0])
    return " ".join(plain.split())


def _inside(summary: Summary, one: Analysis, results: Sequence[Analyzed], suffix: str) -> Inside:
    first = results[0]
    seeds = sorted({result.seed for result in results})
    shown = [result for result in results if result.seed == seeds[0]]
    parts = [f"{plural(first.images, 'validation image')}"] if first.images else []
    parts.append(f"attack {first.attack}")
    parts += [f"layers: {first.select}"] if first.select else []
    parts += [f"checkpoint {first.checkpoint}", f"seed{'s' if len(seeds) > 1 else ''} {listing(seeds)}"]
    parts += [f"figures of seed {seeds[0]}"] if len(seeds) > 1 and not one.together else []
    setting = sentence("; ".join(parts))
    tables = [
        _table(one, [result for result in results if bool(result.against) == pairs], pairs)
        for pairs in (False, True)
        if any(bool(result.against) == pairs for result in results)
    ]
    if one.together:
        panels = transfer.draw(results, suffix)
    elif one.name in _ACROSS:
        panels = _ACROSS[one.name](summary, shown, suffix)
    else:
        panels = _panels(summary, one, shown, suffix)
    return Inside(one.name, one.title, one.text, setting, tables, panels)


def _table(one: Analysis, results: Sequence[Analyzed], pairs: bool) -> Table:
    """Return the headline numbers: a row for each net or pair, means over seeds."""
    seeds = len({result.seed for result in results})
    labels = list(dict.fromkeys(_general(n["label"], r) for r in results for n in r.numbers))
    # A number of an analysis of several arms says which of them it is about.
    found = [(str(n.get("arm", r.arm)), r.against, _general(n["label"], r), n) for r in results for n in r.numbers]
    nets = list(dict.fromkeys((arm, against) for arm, against, *_ in found))
    blocks = []
    for net in nets:
        arm, against = net
        numbers = [(label, number) for *of, label, number in found if tuple(of) == net]
        cells: list[Cell | None] = [Cell(arm, kind="arm"), *([Cell(against)] if pairs else [])]
        cells += [_cell([number for of, number in numbers if of == label], seeds) for label in labels]
        blocks.append([cells])
    heads = [Column("Arm"), *([Column("Against")] if pairs else [])]
    caption = f"Means over {seeds} seeds, with the smallest and the largest." if seeds > 1 else ""
    return Table("inside", caption, [*heads, *(Column(label, True) for label in labels)], blocks, len(nets) > 1)


def _general(label: Any, result: Analyzed) -> str:
    """Return a label without the names of the arms, so that pairs share their columns."""
    if not result.against:
        return str(label)
    text = str(label).replace(f"in {result.arm} from {result.against}", "in the arm, from the other")
    return text.replace(f"in {result.against} from {result.arm}", "in the other, from the arm")


def _cell(numbers: Sequence[Mapping[str, Any]], seeds: int) -> Cell:
    """Return the mean of a number, with its range; `seeds` is how many there are where the number is known for all."""
    known = [one for one in numbers if one["value"] is not None]
    if not known:
        return Cell("–")
    values = [one["value"] for one in known]
    word, often = Counter(one["note"] for one in known).most_common(1)[0]
    if len(known) == 1:
        return Cell(number_text(known[0]), word, values[0])
    notes = [f"{word} in {often} of {len(known)}"] if word else []
    mean = math.fsum(values) / len(values)
    texts = [number_text({**known[0], "value": value}) for value in (mean, min(values), max(values))]
    span = f"{texts[1]} to {texts[2]}" + (f", n = {len(known)}" if len(known) < seeds else "")
    return Cell(texts[0], "; ".join([span, *notes]), mean)


# Figures of one net, or of a pair -------------------------------------------------------------------------------------


def _panels(summary: Summary, one: Analysis, shown: Sequence[Analyzed], suffix: str) -> list[Panel]:
    slug = dict(zip([arm.name for arm in summary.arms], slugs([arm.name for arm in summary.arms]), strict=True))
    kinds: dict[str, list[tuple[Analyzed, Any]]] = {}
    for result in shown:
        for key, found in one.load(result.payload, result.arrays).items():
            kinds.setdefault(("between " if result.against else "") + key, []).append((result, found))
    panels = []
    for kind, pairs in kinds.items():
        key = kind.removeprefix("between ")
        drawings = []
        options = _shared([found for _, found in pairs])
        for result, found in pairs:
            title = f"{result.arm} against {result.against}" if result.against else result.arm
            name = "-".join(
                ["inside", one.name, slugs([key])[0], slug.get(result.arm, "arm")]
                + (["against", slug.get(result.against, "arm")] if result.against else [])
            )
            drawings.append(_drawn(one.name, key, found, result, name + suffix, title, options))
        some = pairs[0][1]
        title, caption = _KINDS[one.name].get(key) or (f"With values from: {key}", _REWOUND)
        read = how_to_read(type(some).plot) or how_to_read(type(some))
        panels.append(Panel(title, caption or read, drawings))
    return panels


_REWOUND = (
    "Read as above, with the values that the group had at that moment; groups that have not moved since are left out. A "
    "group at zero was by then as good as it got."
)
_ROOM, _HANDLE = 292.0, 32.0  # of a legend: its width above most axes, what a name needs beside its letters
_UNTRAINED = (
    "How to read it: a group far to the right is critical, since the model needs the values that it learned; one at zero "
    "could have kept those that training began with."
)
_FRESH = "Read as above, with a fresh draw of initial values: a group at zero could hold anything."
_FITTING = (
    "Read as above, with all running statistics estimated anew after each transplant: what fails here fails for other "
    "reasons than statistics that do not fit."
)
_SHARP = (
    "How to read it: how much the loss rises one step up the gradient of a part, a step of 5% of the part's norm. A part far "
    "to the right lies in a sharp valley: small changes of its weights cost most."
)
_PARTS = "Read as above, for whole parts of the net and all norm layers; parts overlap."
_LOSSES = (
    "How to read it: above the loss on clean images, below that on attacked ones. A line that falls evenly from left to right "
    "is a part that training moved on purpose; a flat one did not have to move; a hump between two good ends is a barrier, "
    "which separates two valleys."
)
_BETWEEN = (
    "How to read it: above the loss on clean images, below that on attacked ones, from the other arm (0) to the arm (1). A "
    "hump between two good ends is a barrier: the two nets lie in different valleys."
)
_ANEW = (
    "Read as above, with all running statistics estimated anew at each position: a hump that is left is in the weights."
)

# Analysis -> what a figure is drawn from -> its heading, and how to read it where its own docstring does not say it best.
_KINDS: dict[str, dict[str, tuple[str, str]]] = {
    "cka": features.CKA_KINDS,
    "signal": features.SIGNAL_KINDS,
    "criticality": {
        "worst case": ("The worst weights nearby", ""),
        "initial": ("With values from before training", _UNTRAINED),
        "random": ("With random values", _FRESH),
    },
    "transplant": {
        "kept": ("Statistics as they came", ""),
        "re-estimated": ("Statistics estimated anew", _FITTING),
    },
    "interpolation": {
        "lines": ("From initial to trained, part by part", _LOSSES),
        "sharpness": ("Sharpness of each part", _SHARP),
        "kept": ("Between two arms, statistics on the line", _BETWEEN),
        "re-estimated": ("Between two arms, statistics estimated anew", _ANEW),
    },
    "probes": {"probes": ("Accuracy of probes", "")},
    "rift": {
        "line": ("From the net to the fine-tuned one", ""),
        "modules": ("The worst weights nearby, by module", ""),
        "groups": ("The worst weights nearby, by part of the net", _PARTS),
    },
}


def _shared(found: Sequence[Any]) -> dict[str, Any]:
    """Return what the plots of one panel have in common, so that they can be compared."""
    differences = [np.abs(one.values) for one in found if isinstance(one, Contrast)]
    if differences:
        return {"reach": max(float(np.nanmax(each, initial=0.0)) for each in differences)}
    spans = [limits_of(one.values) for one in found if isinstance(one, ChannelSpread)]
    spans += [
        limits_of({name: list(one.ratios(name)) for name in one.samples})
        for one in found
        if isinstance(one, SignalRatio)
    ]
    return {"limits": (min(low for low, _ in spans), max(high for _, high in spans))} if spans else {}


def _drawn(
    analysis: str, key: str, found: Any, result: Analyzed, name: str, title: str, options: Mapping[str, Any]
) -> Drawing:
    with style.drawing():
        figure = empty(_height(analysis, key, found), title)
        if isinstance(found, Line):
            _losses(figure, found, result)
        else:
            axes = figure.add_subplot()
            found.plot(axes, **options)
            _settle(analysis, key, axes, result)
        for one in figure.axes:
            _fix(one)
        text = slim(to_svg(figure))
    rows = [row for row in result.rows if _belongs(analysis, key, row)] or list(result.rows)
    return Drawing(name=name, title=title, caption=_kept(analysis, key, result), data=rows, svg=text)


def _kept(analysis: str, key: str, result: Analyzed) -> str:
    """Say where a net lies that an analysis has made."""
    file = result.payload.get("weights")
    if not file or key != "line":
        return ""
    return f"The fine-tuned net: analyses/{analysis}/{result.identity}/{file}"


def _height(analysis: str, key: str, found: Any) -> float:
    if analysis == "cka":
        return features.heat_height(key, len(getattr(found, "moments", ())))
    if key in ("ratio", "channels"):
        return 120.0 + max(9.0, min(16.0, 480 / len(found.layers))) * len(found.layers)
    if key == "amplification":
        return 110.0 + 17.0 * len(found.layers)
    if analysis == "criticality" or key in ("sharpness", "modules", "groups"):
        return 118.0 + 17.0 * len(found.results)
    if analysis == "transplant":
        return 110.0 + 22.0 * len({row.group for row in found.results})
    return 410.0 if isinstance(found, Line) else 300.0


def _losses(figure: Figure, line: Line, result: Analyzed) -> None:
    """Draw the loss on clean images above that on attacked ones, along the same lines."""
    grid = figure.subplots(2, 1, sharex=True)
    for axes, metric in zip(grid, ("clean_loss", "robust_loss"), strict=True):
        line.plot(axes, metric=metric)
        if metric == "clean_loss":
            _legend_above(axes, 3)
        elif axes.get_legend() is not None:
            axes.get_legend().remove()
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.set_xlabel("")
    end = f"0 {result.against or 'initial'}, 1 {result.arm}"
    grid[1].set_xlabel(f"position: {style.plain(end, 44)}", parse_math=False)


def _settle(analysis: str, key: str, axes: Axes, result: Analyzed) -> None:
    """Say on the axes what the plot alone cannot know, and keep what fits a narrow figure."""
    if analysis == "cka":
        features.settle(key, axes, result)
        _legend_above(axes, 2)
    elif analysis == "transplant":
        axes.grid(visible=False)
        axes.set_title("")
        axes.set_xticks(axes.get_xticks(), [f"{label.get_text()}, %" for label in axes.get_xticklabels()])
        axes.yaxis.labelpad = 10  # letters of the browser may be wider than those that the layout was made with
        hosts = [style.plain(label.get_text(), 20) for label in axes.get_xticklabels(minor=True)]
        axes.set_xticks(axes.get_xticks(minor=True), [f"\n{host}" for host in hosts], minor=True, parse_math=False)
    elif analysis == "criticality" or key in ("sharpness", "amplification", "modules", "groups"):
        axes.grid(axis="y", visible=False)
        _numbers(axes)
        _legend_above(axes, 2)
    elif key in ("ratio", "channels", "excess", "probes") or analysis == "rift":
        axes.grid(axis="y", visible=key not in ("ratio", "channels"))
        _legend_above(axes, 3 if analysis == "signal" else 2)


def _legend_above(axes: Axes, columns: int) -> None:
    """Put the legend above the lines, where it covers none of them, in as many columns as there is room for."""
    lines, names = axes.get_legend_handles_labels()
    if not names or axes.get_legend() is None:
        return
    while columns > 1 and _reach(names, columns) > _ROOM:
        columns -= 1
    lines_down = math.ceil(len(names) / columns)
    legend = axes.legend(
        lines, [style.plain(name, 44) for name in names], loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns,
        frameon=False, borderaxespad=0.1, fontsize=style.FONT_SIZE - 1, handlelength=1.4, columnspacing=1.1,
        handletextpad=0.5,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)
    for line in legend.get_lines():
        line.set_linewidth(min(max(line.get_linewidth(), 2.0), 2.4))
    figure = axes.figure
    if lines_down > 2 and isinstance(figure, Figure):
        figure.set_size_inches(figure.get_figwidth(), figure.get_figheight() + 15 * (lines_down - 2) / 72)


def _reach(names: Sequence[str], columns: int) -> float:
    """Return about how wide a legend of so many columns is."""
    down = math.ceil(len(names) / columns)
    widths = [_HANDLE + 0.85 * width_of(name, style.FONT_SIZE - 1) for name in names]  # not bold
    return sum(max(widths[first : first + down]) for first in range(0, len(names), down))


def _numbers(axes: Axes) -> None:
    """Write plain numbers on a scale that is logarithmic but around zero, no more of them than can be read."""
    if axes.get_xscale() != "symlog":
        return
    low, high = axes.get_xlim()
    marks = [tick for tick in axes.xaxis.get_majorticklocs() if low <= tick <= high]
    step = -(-len(marks) // 5)
    axes.xaxis.set_major_locator(FixedLocator([tick for place, tick in enumerate(marks) if place % step == 0]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _fix(axes: Axes) -> None:
    """Keep white and black on shades as they are, in every scheme: they would else follow the paper."""
    shaded = bool(axes.images)
    for text in axes.texts:
        if shaded:
            text.set_fontsize(style.FONT_SIZE - 1)
            paint = to_hex(text.get_color())
            text.set_color({"#ffffff": style.ON_DARK, "#000000": style.ON_LIGHT}.get(paint, paint))
    for line in axes.lines:
        if shaded and to_hex(line.get_color()) == "#ffffff":
            line.set_color(style.ON_DARK)


def _belongs(analysis: str, key: str, row: Mapping[str, Any]) -> bool:
    """Tell whether a row is about one kind of figure."""
    part = row["part"]
    if analysis == "rift":
        return part in (key, f"criticality, {key}")
    if analysis == "criticality":
        return part == key or row.get("source") == key
    if analysis in ("transplant", "interpolation") and key in ("kept", "re-estimated"):
        return row.get("statistics") == key
    return part == {"lines": "line", "probes": "probe"}.get(key, key)
