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

from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from robustlayers.report import _analysis_features as features
from robustlayers.report import _analysis_norms as norms
from robustlayers.report import _analysis_overfitting as overfitting
from robustlayers.report import _analysis_pictures as pictures
from robustlayers.report import _analysis_transfer as transfer
from robustlayers.report import style
from robustlayers.report._analysis_axes import Panel, empty, slim
from robustlayers.report.figures import Drawing
from robustlayers.report.svg import to_svg
from robustlayers.report.tables import Cell, Column, Table
from robustlayers.report.wording import listing, plural, sentence, slugs
from robustlayers.study.analyses import ANALYSES, Analysis
from robustlayers.study.analyzed import number_text
from robustlayers.study.summary import Analyzed, Summary

__all__ = ["Inside", "Panel", "gather", "how_to_read"]

_LIGHT, _DARK = "#fefefe", "#010101"  # on shades that do not change with the reader's scheme

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
    parts += [f"checkpoint {first.checkpoint}", f"seed {listing(seeds)}"]
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
    labels = list(dict.fromkeys(_general(n["label"], r) for r in results for n in r.numbers))
    # A number of an analysis of several arms says which of them it is about.
    found = [(str(n.get("arm", r.arm)), r.against, _general(n["label"], r), n) for r in results for n in r.numbers]
    nets = list(dict.fromkeys((arm, against) for arm, against, *_ in found))
    blocks = []
    for net in nets:
        arm, against = net
        numbers = [(label, number) for *of, label, number in found if tuple(of) == net]
        cells: list[Cell | None] = [Cell(arm, kind="arm"), *([Cell(against)] if pairs else [])]
        cells += [_cell([number for of, number in numbers if of == label]) for label in labels]
        blocks.append([cells])
    heads = [Column("Arm"), *([Column("Against")] if pairs else [])]
    caption = "Means over seeds, with the smallest and the largest." if len({r.seed for r in results}) > 1 else ""
    return Table("inside", caption, [*heads, *(Column(label, True) for label in labels)], blocks, len(nets) > 1)


def _general(label: Any, result: Analyzed) -> str:
    """Return a label without the names of the arms, so that pairs share their columns."""
    if not result.against:
        return str(label)
    text = str(label).replace(f"in {result.arm} from {result.against}", "in the arm, from the other")
    return text.replace(f"in {result.against} from {result.arm}", "in the other, from the arm")


def _cell(numbers: Sequence[Mapping[str, Any]]) -> Cell:
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
    return Cell(texts[0], "; ".join([f"{texts[1]} to {texts[2]}, n = {len(known)}", *notes]), mean)


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
        for result, found in pairs:
            title = f"{result.arm} against {result.against}" if result.against else result.arm
            name = "-".join(
                ["inside", one.name, slugs([key])[0], slug.get(result.arm, "arm")]
                + (["against", slug.get(result.against, "arm")] if result.against else [])
            )
            drawings.append(_drawn(one.name, key, found, result, name + suffix, title))
        some = pairs[0][1]
        title, caption = _KINDS[one.name].get(key) or (f"With values from: {key}", _REWOUND)
        read = how_to_read(type(some).plot) or how_to_read(type(some))
        panels.append(Panel(title, caption or read, drawings))
    return panels


_REWOUND = (
    "Read as above, with the values that the group had at that moment; groups that have not moved since are left out. A "
    "group at zero was by then as good as it got."
)
_UNTRAINED = (
    "How to read it: a group far to the right is critical, since the model needs the values that it learned; one at zero "
    "could have kept those that training began with."
)
_FRESH = "Read as above, with a fresh draw of initial values: a group at zero could hold anything."
_FITTING = (
    "Read as above, with all running statistics estimated anew after each transplant: what fails here fails for other "
    "reasons than statistics that do not fit."
)
_PARTS = "Read as above, for whole parts of the net and all norm layers; parts overlap."
_ANEW = "Read as above, with all running statistics estimated anew at each position."

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
        "lines": ("From initial to trained, part by part", ""),
        "sharpness": ("Sharpness of each part", ""),
        "kept": ("Between two arms, statistics on the line", ""),
        "re-estimated": ("Between two arms, statistics estimated anew", _ANEW),
    },
    "probes": {"probes": ("Accuracy of probes", "")},
    "rift": {
        "line": ("From the net to the fine-tuned one", ""),
        "modules": ("The worst weights nearby, by module", ""),
        "groups": ("The worst weights nearby, by part of the net", _PARTS),
    },
}


def _drawn(analysis: str, key: str, found: Any, result: Analyzed, name: str, title: str) -> Drawing:
    with style.drawing():
        figure = empty(_height(analysis, key, found), title)
        axes = figure.add_subplot()
        found.plot(axes)
        _settle(analysis, key, axes, result)
        for one in figure.axes:
            _fix(one)
        text = slim(to_svg(figure))
    rows = [row for row in result.rows if _belongs(analysis, key, row)] or list(result.rows)
    return Drawing(name=name, title=title, caption="", data=rows, svg=text)


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
    return 300.0


def _settle(analysis: str, key: str, axes: Axes, result: Analyzed) -> None:
    """Say on the axes what the plot alone cannot know, and keep what fits a narrow figure."""
    if analysis == "cka":
        features.settle(key, axes, result)
        _legend_above(axes, 2)
    elif analysis == "transplant":
        axes.grid(visible=False)
        axes.set_title("")
        pairs = [label.get_text().partition("\nin ") for label in axes.get_xticklabels()]
        texts = [f"{kind.rstrip(',')}, %\nin {style.plain(host, 12)}" for kind, _, host in pairs]
        axes.set_xticks(axes.get_xticks(), texts, parse_math=False)
    elif analysis == "criticality" or key in ("sharpness", "amplification", "modules", "groups"):
        axes.grid(axis="y", visible=False)
        _numbers(axes)
    elif key in ("ratio", "channels", "excess", "probes") or analysis == "rift":
        _legend_above(axes, 3 if analysis == "signal" else 2)
    elif key in ("kept", "re-estimated", "lines"):
        _legend_above(axes, 3)
        end = f"0 {result.against or 'initial'}, 1 {result.arm}"
        axes.set_xlabel(f"position: {style.plain(end, 44)}", parse_math=False)


def _legend_above(axes: Axes, columns: int) -> None:
    """Put the legend above the lines, where it covers none of them; one of many lines stays where it is."""
    lines, names = axes.get_legend_handles_labels()
    if 1 < len(names) <= 2 * columns:
        legend = axes.legend(
            lines, names, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, frameon=False, borderaxespad=0.1,
            fontsize=style.FONT_SIZE - 1, handlelength=1.4, columnspacing=1.1, handletextpad=0.5,
        )  # fmt: skip
        for text in legend.get_texts():
            text.set_parse_math(False)


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
            text.set_color(_LIGHT if to_hex(text.get_color()) == "#ffffff" else _DARK)
    for line in axes.lines:
        if shaded and to_hex(line.get_color()) == "#ffffff":
            line.set_color(_LIGHT)


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
