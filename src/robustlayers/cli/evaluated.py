"""What `robustlayers evaluate` found: as rows, as files, and as tables on the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from robustlayers.cli.console import plain_console
from robustlayers.cli.plan import duration_text
from robustlayers.cli.subject import Subject
from robustlayers.core.device import versions
from robustlayers.core.files import write_json, write_manifest, write_text
from robustlayers.core.quantities import pixels_text
from robustlayers.evaluation import ClassAccuracy, Progress, SanityReport, calibration, interval, meaning, per_class
from robustlayers.evaluation.cascade import Outcome, Turn
from robustlayers.study.extras import corruption_rows
from robustlayers.study.schema import CorruptionsConfig

__all__ = ["COLUMNS", "part_of", "rows_beside", "rows_of", "show", "show_sanity", "write", "write_sanity"]

_NAMED = ("model", "weights", "arm", "run_seed", "phase", "checkpoint", "data")
_MEASURED = ("metric", "class", "value", "low", "high", "count", "total", "split", "threat", "attack", "normalization")
COLUMNS = (*_NAMED, *_MEASURED, "seed", "flags")
"""Columns of rows.csv: what was evaluated, what was measured, how; no times, so that the same evaluation has the same."""


def rows_of(
    subject: Subject,
    outcomes: Mapping[str, Outcome],
    beside: Sequence[Mapping[str, Any]],
    seed: int,
    raised: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """Yield the accuracies over all images (clean, each attack, all of them), what stands `beside`, then by class."""
    first = next(iter(outcomes.values()))
    verdicts, texts = {"clean": first.clean}, {"clean": ""}
    for name, found in outcomes.items():
        if len(found.table) > 1:
            right = first.clean.clone()
            for turn in found.table:
                right = right & torch.tensor([broken != turn.attack for broken in found.broken_by])
                verdicts[part_of(name, turn)], texts[part_of(name, turn)] = right, turn.text
        verdicts[name], texts[name] = found.robust, "; then ".join(turn.text for turn in found.table)
    verdicts["robust"] = torch.stack([found.robust for found in outcomes.values()]).all(0)
    texts["robust"] = "worst case of " + "; ".join(outcomes)
    labels = subject.test.labels

    def row(facts: Mapping[str, Any]) -> dict[str, Any]:
        every = {**dict.fromkeys(COLUMNS, ""), **{name: subject.facts.get(name, "") for name in _NAMED}}
        same = {"split": "test", "normalization": "running", "seed": seed, "flags": "; ".join(raised)}
        return {**every, **same, **facts}

    def accuracy(one: ClassAccuracy, name: str) -> dict[str, Any]:
        found = {"metric": one.metric, "class": name, "value": one.accuracy, "low": one.low, "high": one.high}
        threat = str(first.threat) if texts[one.metric] else ""
        return row({**found, "count": one.count, "total": one.total, "threat": threat, "attack": texts[one.metric]})

    yield from (accuracy(one, "") for one in per_class(verdicts, torch.zeros_like(labels)))
    yield from map(row, beside)
    yield from (accuracy(one, one.name) for one in per_class(verdicts, labels, subject.classes))


def rows_beside(
    subject: Subject, corruptions: CorruptionsConfig, batch_size: int | None, progress: Progress
) -> list[dict[str, Any]]:
    """Return what is measured beside attacks: the calibration error, and accuracies on corrupted images."""
    test, size = subject.test, batch_size or 500
    found = calibration(subject.model, test.images, test.labels, None, size)
    rows: list[dict[str, Any]] = [{"metric": "ece", "value": found.ece}]
    for row in corruption_rows(subject.model, test, corruptions, size, progress):
        if "count" in row:
            low, high = interval(row["count"], row["total"])
            row = {**row, "low": low, "high": high}
        rows.append(row)
    return rows


def part_of(name: str, turn: Turn) -> str:
    """Return the metric of one attack of several in turn: right after it and those before.

    >>> part_of("AutoAttack", Turn("apgd-t", "", 9, 1, 8, 0, 0, 0.0))
    'AutoAttack: apgd-t'
    """
    return f"{name}: {turn.attack}"


def write(
    out: Path, rows: Sequence[Mapping[str, Any]], outcomes: Mapping[str, Outcome], seed: int, raised: Sequence[str]
) -> None:
    """Write the rows as CSV, without times, and everything as JSON; the manifest last."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list[str](COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / "rows.csv", text.getvalue())
    facts = {
        "seed": seed,
        "versions": versions(),
        "flags": list(raised),
        "evaluations": [
            {
                "label": found.label,
                "threat": str(found.threat),
                "turns": [vars(turn) for turn in found.table],
                "notes": list(found.notes),
                "disagreements": found.disagreements,
                "robust": found.robust.int().tolist(),
                "broken_by": list(found.broken_by),
            }
            for found in outcomes.values()
        ],
        "rows": list(rows),
    }
    write_json(out / "result.json", facts)
    write_manifest(out, {"kind": "evaluation"})


def write_sanity(out: Path, report: SanityReport) -> None:
    """Write the rows of a check for misleading numbers, and its pictures: accuracy against eps and against steps."""
    write_json(out / "sanity.json", {"flags": list(report.flags), "rows": report.rows()})
    for name, curve in (("eps", report.by_eps), ("steps", report.by_steps)):
        if curve is not None:
            drawn, figure = io.BytesIO(), Figure(figsize=(4.5, 3.2), layout="constrained")
            curve.plot(figure.subplots())
            figure.savefig(drawn, format="svg")
            write_text(out / f"sanity-{name}.svg", drawn.getvalue().decode())


def show(
    subject: Subject, rows: Sequence[Mapping[str, Any]], outcomes: Mapping[str, Outcome], raised: Sequence[str]
) -> None:
    """Print the accuracies, those of each class, and what a reader should know."""
    console = plain_console()
    named = ", ".join(str(subject.facts[name]) for name in _NAMED if subject.facts.get(name))
    threat = next(iter(outcomes.values())).threat
    console.print(Text(f"{named}; {threat}; seed {rows[0]['seed']}", style="bold"), soft_wrap=True)
    turns = {
        (part_of(name, turn) if len(found.table) > 1 else name): turn
        for name, found in outcomes.items()
        for turn in found.table
    }
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("attack", overflow="fold")
    for column in ("accuracy", "95 % interval", "right", "broke", "of", "time"):
        table.add_column(column, justify="right")
    for row in rows:
        if not row["class"] and not _beside(row["metric"]):
            turn = turns.get(row["metric"])
            did = (str(turn.broken), str(turn.attacked), duration_text(turn.seconds)) if turn else ("", "", "")
            part = f"  {row['metric'].partition(': ')[2]}" if ": " in row["metric"] else row["metric"]
            span = f"{row['low']:.1%} to {row['high']:.1%}"
            right = f"{row['count']} of {row['total']}"
            table.add_row(*map(Text, (part, f"{row['value']:.2%}", span, right, *did)))
    console.print(table)
    classes = Table(box=None, pad_edge=False, header_style="bold")
    shown = ["clean", *outcomes, *(["robust"] if len(outcomes) > 1 else [])]
    classes.add_column("class")
    for name in ("images", *shown):
        classes.add_column(Text(name), justify="right")
    per_class = {(row["class"], row["metric"]): row for row in rows if row["class"]}
    for name in subject.classes:
        if (name, "clean") in per_class:
            cells = [f"{per_class[name, metric]['value']:.1%}" for metric in shown]
            classes.add_row(*map(Text, (name, str(per_class[name, "clean"]["total"]), *cells)))
    console.print()
    console.print(classes)
    corrupted = _corrupted(rows)
    if corrupted is not None:
        console.print()
        console.print(corrupted)
    error = next(row["value"] for row in rows if row["metric"] == "ece")
    console.print(Text(f"\ncalibration error {100 * error:.1f} points (ECE, clean images)"), soft_wrap=True)
    notes = [note for found in outcomes.values() for note in found.notes]
    for note in (*notes, *(f"flag: {flag}. {meaning(flag)}" for flag in raised)):
        console.print(Text(note), soft_wrap=True)


def show_sanity(report: SanityReport) -> None:
    """Print accuracy against eps and against steps, and what could not be tried; the flags stand above."""
    console = plain_console()
    console.print(Text(f"\nsanity on {report.total} images: {len(report.flags) or 'no'} flag(s)", style="bold"))
    for curve in (report.by_eps, report.by_steps):
        if curve is not None:
            table = Table(box=None, pad_edge=False, header_style="bold")
            table.add_column(curve.setting)
            cells = []
            for value, count in zip(curve.values, curve.counts, strict=True):
                table.add_column(pixels_text(value) if curve.setting == "eps" else str(int(value)), justify="right")
                cells.append(f"{count / curve.total:.0%}")
            table.add_row("right", *cells)
            console.print(table)
            console.print(Text(f"  {curve.attack}", style="dim"), soft_wrap=True)
    for text in report.skipped:
        console.print(Text(f"skipped: {text}"), soft_wrap=True)


def _beside(metric: str) -> bool:
    return metric == "ece" or metric.partition(":")[0] == "corrupted"


def _corrupted(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """Return accuracies on corrupted images, families down and severities across."""
    found = {row["metric"]: row for row in rows if row["metric"].startswith("corrupted")}
    if not found:
        return None
    severities = sorted({metric.rpartition(":")[2] for metric in found if metric.count(":") == 2})
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("corrupted images")
    for name in ("mean", *(f"severity {severity}" for severity in severities)):
        table.add_column(name, justify="right")
    for metric, row in found.items():
        if metric.count(":") < 2:
            cells = [found.get(f"{metric}:{severity}", {}).get("value") for severity in severities]
            name = metric.partition(":")[2] or "all, without extra ones"
            table.add_row(
                *map(Text, (name, f"{row['value']:.1%}", *("" if cell is None else f"{cell:.1%}" for cell in cells)))
            )
    return table
