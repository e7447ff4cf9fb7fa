"""What is asked about weights of a net: which of them it needs, what another net makes of them, what lies between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from torch import Tensor

from robustlayers import analysis
from robustlayers.analysis._ground import Group, Quality, bind_groups
from robustlayers.study._looks import (
    REFERENCE,
    Arrays,
    Found,
    Look,
    Number,
    Payload,
    decoded,
    encoded,
    number,
    parts_of,
    picks,
    tidy,
)

__all__ = [
    "criticality",
    "criticality_cost",
    "criticality_load",
    "interpolation",
    "interpolation_cost",
    "interpolation_load",
    "transplant",
    "transplant_cost",
    "transplant_load",
]

_MODULES = "conv | linear | norm"
_ALONE_POSITIONS, _BETWEEN_POSITIONS = 6, 11


def criticality_cost(look: Look) -> Mapping[str, float]:
    groups = _groups(look, _MODULES)
    moved = [group for group in groups.values() if group.selection.parameters]
    worst = look.n * (look.crafting + 1 + 31 * len(moved)) if moved else 0.0
    return {
        "other values": look.quality * (1 + len(groups) * len(look.sources)),
        **({"worst case": worst} if moved else {}),
    }


def criticality(look: Look) -> Found:
    groups = _groups(look, _MODULES)
    sources = {name: read() for name, read in look.sources.items()}
    about: dict[str, Any] = {"attack": look.attack, "seed": look.seed}
    progress, results = look.part("other values"), []
    whole: Mapping[str, Quality] = {}
    for place, (name, state) in enumerate(sources.items()):
        moved = {group: one.selector for group, one in groups.items() if _moved(one, state)}

        def advance(what: str, done: int, total: int, place: int = place) -> None:
            progress(what, place * total + done, len(sources) * total)

        if moved:
            one = analysis.criticality(look.model, moved, look.x, look.y, {name: state}, **about, progress=advance)
            named = (replace(row, names=groups[row.group].names) for row in one.results)
            results, whole = [*results, *named], one.whole
    found = analysis.Criticality(whole, tuple(results))
    rows = tidy("replaced", found.rows())
    payload: dict[str, Any] = {
        "whole": encoded({kind: asdict(quality) for kind, quality in found.whole.items()}),
        "results": encoded([asdict(row) for row in found.results]),
    }
    numbers: list[Number] = []
    scores = {}
    for source in dict.fromkeys(row.source for row in results):
        most = max(found.of(source), key=lambda row: row.robust_accuracy_drop or 0.0)
        numbers.append(number(f"most lost, values from {source}", most.robust_accuracy_drop, "points", most.group))
        if _named(groups.values()):
            drops = [(row.group, row.names, row.robust_accuracy_drop or 0.0) for row in found.of(source)]
            scores[f"scores-{source.replace(' ', '-')}"] = drops
    moved = {name: group.selector for name, group in groups.items() if group.selection.parameters}
    if moved:
        worst = analysis.robust_criticality(
            look.model, moved, look.x, look.y, look.attack, seed=look.seed, progress=look.part("worst case")
        )
        rows += tidy("worst case", worst.rows())
        payload["worst"] = _worst_payload(worst)
        numbers += [
            number("worst weights nearby, most critical", worst.most.rise, "nats", worst.most.group),
            number("least critical", worst.least.rise, "nats", worst.least.group),
        ]
        if _named([groups[name] for name in moved]) and all(np.isfinite(row.rise) for row in worst.results):
            # With the names of the whole groups: these were bound by selector.
            scores["scores-worst-case"] = [(row.group, groups[row.group].names, row.rise) for row in worst.results]
    return Found(rows, numbers, payload, scores=scores)


def criticality_load(payload: Payload, arrays: Arrays) -> Mapping[str, Any]:
    whole = {kind: decoded(Quality, quality) for kind, quality in payload["whole"].items()}
    rows = tuple(decoded(analysis.CriticalityRow, row) for row in payload["results"])
    found: dict[str, Any] = {"worst case": _worst(payload["worst"])} if "worst" in payload else {}
    for source in dict.fromkeys(row.source for row in rows):
        found[source] = analysis.Criticality(whole, tuple(row for row in rows if row.source == source))
    return found


def _transplanted(look: Look) -> dict[str, str] | str:
    """Return the parts of the net, and its weights, its scales and shifts, and its running statistics as a whole."""
    parts = parts_of(look.model, look.select)
    if isinstance(parts, str):
        return parts
    words = {"affine": "scales, shifts"}
    named = {f"all {words.get(name, name)}": selector for name, selector in analysis.PARTS.items()}
    return parts | {name: selector for name, selector in named.items() if picks(look.model, selector)}


def transplant_cost(look: Look) -> Mapping[str, float]:
    groups = bind_groups(look.model, _transplanted(look), look.x[:2])
    return {"transplants": 4 * (look.quality + REFERENCE) * (len(groups) + 1)}


def transplant(look: Look) -> Found:
    assert look.other is not None
    found = analysis.transplant(
        look.model,
        look.other,
        _transplanted(look),
        look.x,
        look.y,
        names=(look.arm, look.against),
        attack=look.attack,
        recalibrate_on=look.train.images[:REFERENCE],
        seed=look.seed,
        progress=look.part("transplants"),
    )
    numbers: list[Number] = []
    for host, donor in ((look.arm, look.against), (look.against, look.arm)):
        inside = [row for row in found.results if row.host == host and row.statistics == "re-estimated"]
        base = next(row for row in inside if row.group == "nothing")
        kept = [row for row in inside if row.group not in ("nothing", "everything")]
        most = max(kept, key=lambda row: row.robust_accuracy or 0.0)
        won = _less(most.robust_accuracy, base.robust_accuracy)
        numbers.append(number(f"most robust accuracy won in {host} from {donor}", won, "points", most.group))
    payload = {"names": list(found.names), "results": encoded([asdict(row) for row in found.results])}
    return Found(tidy("transplant", found.rows()), numbers, payload)


def transplant_load(payload: Payload, arrays: Arrays) -> Mapping[str, Any]:
    rows = tuple(decoded(analysis.TransplantRow, row) for row in payload["results"])
    one, other = payload["names"]
    kinds = dict.fromkeys(row.statistics for row in rows)
    return {
        kind: analysis.Transplants(
            (one, other), tuple(replace(row, statistics="kept") for row in rows if row.statistics == kind)
        )
        for kind in kinds
    }


def interpolation_cost(look: Look) -> Mapping[str, float]:
    if look.other is not None:
        return {"line": 2 * look.quality * _BETWEEN_POSITIONS + 2 * REFERENCE * _BETWEEN_POSITIONS}
    groups = len(_groups(look))
    return {
        "lines": look.quality * (1 + groups * (_ALONE_POSITIONS - 1)),
        "sharpness": look.n * (look.crafting + 1 + 4 * groups),
    }


def interpolation(look: Look) -> Found:
    about: dict[str, Any] = {"attack": look.attack, "seed": look.seed}
    if look.other is not None:
        line = analysis.interpolation(
            look.model,
            look.other,
            {"all": "all"},
            look.x,
            look.y,
            **about,
            recalibrate_on=look.train.images[:REFERENCE],
            progress=look.part("line"),
        )
        numbers = [
            number(f"barrier, {metric.removesuffix('_loss')} loss, statistics {kind}", round(height, 9), "nats")
            for kind in ("kept", "re-estimated")
            for metric in ("clean_loss", "robust_loss")
            for height in line.barriers(metric, kind).values()
        ]
        return Found(tidy("line", line.rows()), numbers, {"line": encoded([asdict(p) for p in line.points])})
    groups = parts_of(look.model, look.select)
    places = [k / (_ALONE_POSITIONS - 1) for k in range(_ALONE_POSITIONS)]
    lines = analysis.interpolation(
        look.model,
        look.sources["initial"](),
        groups,
        look.x,
        look.y,
        **about,
        positions=places,
        progress=look.part("lines"),
    )
    rows = tidy("line", lines.rows())
    payload: dict[str, Any] = {"lines": encoded([asdict(point) for point in lines.points])}
    height = max(lines.barriers().items(), key=lambda pair: pair[1])
    numbers = [number("highest barrier", height[1], "nats", height[0])]
    moved = {name: group.selector for name, group in _groups(look).items() if group.selection.parameters}
    if moved:
        sharp = analysis.sharpness(look.model, moved, look.x, look.y, **about, progress=look.part("sharpness"))
        rows += tidy("sharpness", sharp.rows())
        payload["sharpness"] = _worst_payload(sharp)
        numbers.append(number("sharpest", sharp.most.rise, "nats", sharp.most.group))
    return Found(rows, numbers, payload)


def interpolation_load(payload: Payload, arrays: Arrays) -> Mapping[str, Any]:
    def line(kind: str, points: Sequence[Any]) -> analysis.Line:
        rows = (decoded(analysis.LinePoint, point) for point in points if point["statistics"] == kind)
        return analysis.Line(tuple(replace(row, statistics="kept", group=row.group) for row in rows))

    if "line" in payload:
        return {kind: line(kind, payload["line"]) for kind in ("kept", "re-estimated")}
    found: dict[str, Any] = {"lines": line("kept", payload["lines"])}
    return found | ({"sharpness": _worst(payload["sharpness"])} if "sharpness" in payload else {})


def _groups(look: Look, usual: str = "") -> dict[str, Group]:
    return bind_groups(look.model, parts_of(look.model, look.select, usual), look.x[:2])


def _moved(group: Group, state: Mapping[str, Tensor]) -> bool:
    """Tell whether a group differs in any entry from another state; one that was frozen since needs no measurement."""
    entries = group.selection.inventory.entries
    for name, mask in group.selection.parts.items():
        differs = entries[name].tensor.detach().cpu() != state[name].cpu()
        if bool((differs if mask is None else differs & mask.cpu()).any()):
            return True
    return False


def _named(groups: Any) -> bool:
    """Tell whether every group can be named in a file of scores: it holds no part of a tensor."""
    return all(group.names for group in groups)


def _less(one: float | None, two: float | None) -> float | None:
    return None if one is None or two is None else one - two


def _worst_payload(found: analysis.WorstCase) -> dict[str, Any]:
    return encoded(asdict(found))


def _worst(payload: Payload) -> analysis.WorstCase:
    rows = tuple(decoded(analysis.WorstCaseRow, row) for row in payload["results"])
    return decoded(analysis.WorstCase, {**payload, "results": rows})
