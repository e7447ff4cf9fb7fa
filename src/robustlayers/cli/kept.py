"""Checking what `robustlayers evaluate --out DIR` has kept: its files, its shards, and its rows against its shards."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from robustlayers.core.errors import Fault, UserError
from robustlayers.core.files import MANIFEST, read_json, read_tensors, verify_manifest
from robustlayers.evaluation import interval

__all__ = ["is_evaluation", "verify_evaluation"]

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class _Found:
    """What the shards of one evaluation say: images right clean, and after each attack in turn, by its name."""

    clean: Tensor
    after: Mapping[str, Tensor]
    broken_by: Sequence[str]


def is_evaluation(folder: Path) -> bool:
    """Tell whether an evaluation has been kept, whole or in part, in a folder."""
    return (folder / "result.json").exists() or (folder / "shards").is_dir()


def verify_evaluation(folder: Path) -> tuple[list[Fault], str]:
    """Return what is wrong with an evaluation's folder, and in words what was looked at; nothing is changed.

    Every file that the manifest lists has its bytes; every shard the bytes that its name promises; every image that an
    attack had to get stands in one of its shards; and the verdicts, counts, accuracies and intervals of result.json and
    rows.csv are those of the shards. An evaluation that was stopped has no manifest yet, and its shards are looked at.
    """
    finished = (folder / MANIFEST).exists()
    faults = verify_manifest(folder, digests=True) if finished else []
    known = {fault.file for fault in faults}
    shards = sorted((folder / "shards").rglob(f"*{_SUFFIX}"))
    faults += [fault for fault in map(_promise, shards) if fault is not None and fault.file not in known]
    whole = f"{len(shards)} shard(s)"
    if not finished:
        if (folder / "result.json").exists():
            faults.append(Fault("results without a manifest: run the same command again", file=str(folder)))
        return faults, f"unfinished, {whole} so far; the same command goes on"
    if faults:  # what the rest is compared with may be damaged
        return faults, f"{whole}; rows not compared"
    try:
        return list(_disagreements(folder)), f"{whole}, rows compared with them"
    except UserError as error:
        return list(error.faults), whole
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        return [Fault(f"is not what an evaluation writes ({error!r})", file=str(folder))], whole


def _promise(path: Path) -> Fault | None:
    """Return a fault where a shard's bytes are not those whose SHA-256 its name carries."""
    promised = path.name.removesuffix(_SUFFIX).rpartition(".")[2]
    if hashlib.sha256(path.read_bytes()).hexdigest()[: len(promised)] == promised and promised:
        return None
    return Fault("content differs from the SHA-256 in its name", file=str(path))


def _disagreements(folder: Path) -> Iterator[Fault]:
    result = read_json(folder / "result.json")
    expected: dict[str, Tensor] = {}
    robust = None
    kept = {place.name: place for place in sorted((folder / "shards").iterdir()) if place.is_dir()}
    described = {name: read_json(place / "evaluation.json") for name, place in kept.items()}
    for evaluation in result["evaluations"]:
        label, turns = evaluation["label"], [turn["attack"] for turn in evaluation["turns"]]
        names = [name for name, one in described.items() if [attack for attack, _ in one["attacks"]] == turns]
        if not names:
            yield Fault(f"has no shards of {label}", file=str(folder / "shards"))
            continue
        place = kept[names[0]]
        found, faults = _replay(place, turns, len(evaluation["robust"]))
        yield from faults
        if found is None:
            continue
        standing = list(found.after.values())[-1]
        expected.setdefault("clean", found.clean)
        expected |= {f"{label}: {name}": right for name, right in found.after.items() if len(turns) > 1}
        expected[label] = standing
        robust = standing if robust is None else robust & standing
        if standing.int().tolist() != evaluation["robust"] or list(found.broken_by) != evaluation["broken_by"]:
            yield Fault(f"verdicts of {label} differ from its shards", file=str(folder / "result.json"))
        for turn in evaluation["turns"]:
            if turn["robust"] != int(found.after[turn["attack"]].sum()):
                yield Fault(
                    f"counts of {label}, {turn['attack']} differ from its shards", file=str(folder / "result.json")
                )
    if robust is not None:
        yield from _rows(folder / "rows.csv", {**expected, "robust": robust}, result["rows"])


def _replay(place: Path, turns: Sequence[str], images: int) -> tuple[_Found | None, list[Fault]]:
    """Return what the shards of one evaluation say together, or what is missing from them."""
    clean = [read_tensors(path)["right"] for path in sorted(place.glob(f"clean.*{_SUFFIX}"))]
    if not clean:
        return None, [Fault("has no shard of the clean images", file=str(place))]
    right = clean[0]
    if len(right) != images:
        return None, [Fault(f"its shards are of {len(right)} images, the result of {images}", file=str(place))]
    after: dict[str, Tensor] = {}
    broken_by = ["" if one else "clean" for one in right.tolist()]
    faults = []
    for number, name in enumerate(turns):
        left, group = right.clone(), place / f"{number:02d}-{name}"
        right = right.clone()
        for path in sorted(group.glob(f"[0-9]*{_SUFFIX}")):
            shard = read_tensors(path)
            places, broken = shard["places"], shard["broken"]
            if not bool(left[places].all()):
                continue  # made again after a damaged one: the first is what counted
            left[places] = False
            right[places[broken]] = False
            for image in places[broken].tolist():
                broken_by[image] = name
        missing = left.nonzero().flatten().tolist()
        if missing:
            some = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            faults.append(
                Fault(f"no shard holds {len(missing)} of the images that {name} got: {some}", file=str(group))
            )
        after[name] = right
    return (None, faults) if faults else (_Found(clean[0], after, broken_by), [])


def _rows(path: Path, expected: Mapping[str, Tensor], written: Sequence[Mapping[str, Any]]) -> Iterator[Fault]:
    """Yield what in rows.csv is not so by the shards; those by class have to add up, since shards know no classes."""
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    if rows != [{key: "" if value is None else str(value) for key, value in row.items()} for row in written]:
        yield Fault("differs from the rows in result.json", file=str(path))
    for metric, right in expected.items():
        every = [row for row in rows if row["metric"] == metric]
        whole = [row for row in every if not row["class"]]
        count, total = int(right.sum()), len(right)
        low, high = interval(count, total)
        wanted = [str(count), str(total), str(count / total), str(low), str(high)]
        if len(whole) != 1 or [whole[0][key] for key in ("count", "total", "value", "low", "high")] != wanted:
            yield Fault(f"{metric}: by the shards {count} of {total} images are right", file=str(path))
        elif [sum(int(row[key]) for row in every if row["class"]) for key in ("count", "total")] != [count, total]:
            yield Fault(f"{metric}: its classes do not add up to {count} of {total} images", file=str(path))
    known = {*expected, "ece"}
    for metric in dict.fromkeys(row["metric"] for row in rows):
        if metric not in known and not metric.startswith("corrupted"):
            yield Fault(f"{metric}: no shard speaks of it", file=str(path))
