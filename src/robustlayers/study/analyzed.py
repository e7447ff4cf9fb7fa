"""What the analyses of a study found, read back from its folder: for the report, and as rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robustlayers.core.errors import Fault, UserError, one_of
from robustlayers.core.files import read_json, read_tensors
from robustlayers.study.store import Store
from robustlayers.study.summary import Analyzed

__all__ = ["analyses_folder", "collect_analyses", "csv_of", "kept_analyses", "number_text", "rows_of_analysis"]

_BEFORE = ("study", "arm")
_AFTER = (
    "against",
    "seed",
    "checkpoint",
    "epoch",
    "images",
    "split",
    "attack",
    "normalization",
    "select",
    "analysis",
)


def analyses_folder(store: Store) -> Path:
    """Return the folder in which the results of a study's analyses lie."""
    return store.root / "analyses"


def kept_analyses(store: Store, plan: Mapping[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
    """Return folder and record of every whole result that is about the nets of this plan, in the order of arms and seeds.

    Those of nets that the plan no longer has are left out: the study was changed since. So are those that a later version
    of the analysis has found anew.
    """
    arms = {arm["name"]: arm for arm in plan["arms"]}
    found = []
    for path in sorted(analyses_folder(store).glob("*/*/manifest.json")):
        folder = path.parent
        if "." in folder.name or not store.whole(folder):
            continue
        record = read_json(folder / "result.json")
        names = _arms(record)
        if [arms[name]["nodes"][-1] if name in arms else "" for name in names] == record["nodes"]:
            found.append((folder, record))
    newest: dict[tuple[Any, ...], int] = {}
    for _, record in found:
        newest[_look_of(record)] = max(newest.get(_look_of(record), 0), record.get("version", 0))
    found = [(folder, record) for folder, record in found if record.get("version", 0) == newest[_look_of(record)]]
    place = list(arms)

    def order(pair: tuple[Path, dict[str, Any]]) -> tuple[Any, ...]:
        one = pair[1]
        arm, against = (place.index(one[key]) if one[key] else -1 for key in ("arm", "against"))
        found = len(_arms(one)), one["images"] or 0
        return (arm, against, one["seed"], one["checkpoint"], *found, pair[0].name)

    return sorted(found, key=order)


def _look_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a result is of, whatever version of its analysis found it."""
    keys = ("analysis", "seed", "checkpoint", "images", "attack", "select")
    return (*(record[key] for key in keys), *record["nodes"])


def _arms(record: Mapping[str, Any]) -> list[str]:
    """Return all arms that a result is about; those of an earlier version name them one by one."""
    return record.get("arms") or [name for name in (record["arm"], record["against"]) if name]


def collect_analyses(store: Store, plan: Mapping[str, Any]) -> list[Analyzed]:
    """Return for the report what was found, for each setting once: of the most arms, with the most images."""
    best: dict[tuple[Any, ...], tuple[Path, dict[str, Any]]] = {}
    for folder, record in kept_analyses(store, plan):
        keys = ("analysis", "arm", "against", "seed", "checkpoint", "attack", "select")
        best[tuple(record[key] for key in keys)] = (folder, record)  # those of more come later
    found = []
    for folder, record in best.values():
        path = folder / "arrays.safetensors"
        arrays = {name: tensor.numpy() for name, tensor in read_tensors(path).items()} if path.exists() else {}
        read = ("identity", "arrays", "arms")
        facts = {key: record[key] for key in Analyzed.__dataclass_fields__ if key not in read}
        found.append(Analyzed(identity=folder.name, arrays=arrays, arms=_arms(record), **facts))
    return found


def csv_of(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of several results of one analysis as one CSV; a column that a row does not have is empty there."""
    factors = list(dict.fromkeys(factor for record in records for factor in record["levels"]))
    own = list(dict.fromkeys(key for record in records for row in record["rows"] for key in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_BEFORE, *(f"factor:{factor}" for factor in factors), *_AFTER, *own])
    for record in records:
        head = [*(record[key] for key in _BEFORE), *(record["levels"].get(factor, "") for factor in factors)]
        head += [record[key] for key in _AFTER]
        for row in record["rows"]:
            writer.writerow(_text(cell) for cell in [*head, *(row.get(key) for key in own)])
    return text.getvalue()


def _text(cell: object) -> str:
    return "" if cell is None else repr(cell) if isinstance(cell, float) else str(cell)


def rows_of_analysis(store: Store, name: str) -> str:
    """Return all rows of one analysis as CSV; `UserError` where there is none of that name."""
    if not store.plan.exists():
        raise UserError(Fault("no study here: it has no plan.json; run a study into it first", file=str(store.root)))
    records = [record for _, record in kept_analyses(store, read_json(store.plan))]
    known = dict.fromkeys(record["analysis"] for record in records)
    if not known:
        raise UserError(Fault("nothing was analysed here; see `robustlayers analyse`", file=str(store.root)))
    if name not in known:
        raise UserError(Fault(one_of(f"analysis of {store.root}", name, known), path="--analysis"))
    return csv_of([record for record in records if record["analysis"] == name])


def number_text(one: Mapping[str, Any]) -> str:
    """Return a headline number as a person reads it.

    >>> number_text({"label": "dead channels", "value": 0.125, "unit": "%"})
    '12.5%'
    """
    value, unit = one["value"], one["unit"]
    if value is None:
        return "–"
    if unit == "%":
        return f"{100 * value:.1f}%"
    if unit == "points":
        return f"{100 * value + 0.0:+.1f} points".replace("-", "−")
    return f"{value:.3g} {unit}".strip()
