"""What `robustlayers evaluate` found: as rows, as files, and as tables on the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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
from robustlayers.evaluation import SanityReport, per_class
from robustlayers.evaluation.cascade import Outcome, Turn

__all__ = ["COLUMNS", "part_of", "rows_of", "show", "write", "write_sanity"]

_NAMED = ("model", "weights", "arm", "run_seed", "phase", "checkpoint", "data")
_MEASURED = ("metric", "class", "value", "low", "high", "count", "total", "split", "threat", "attack", "normalization")
COLUMNS = (*_NAMED, *_MEASURED, "seed", "flags")
"""Columns of rows.csv: what was evaluated, what was measured, how; no times, so that the same evaluation has the same."""


def rows_of(
    subject: Subject, outcomes: Mapping[str, Outcome], seed: int, raised: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield the accuracies, over all images and for each class: clean, each attack, all of them together."""
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
    whole = [replace(one, name="") for one in per_class(verdicts, torch.zeros_like(labels))]
    for one in (*whole, *per_class(verdicts, labels, subject.classes)):
        yield {
            **{column: subject.facts.get(column, "") for column in _NAMED},
            "metric": one.metric,
            "class": one.name,
            "value": one.accuracy,
            "low": one.low,
            "high": one.high,
            "count": one.count,
            "total": one.total,
            "split": "test",
            "threat": str(outcomes[next(iter(outcomes))].threat) if texts[one.metric] else "",
            "attack": texts[one.metric],
            "normalization": "running",
            "seed": seed,
            "flags": "; ".join(raised),
        }


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
        if not row["class"]:
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
    notes = [note for found in outcomes.values() for note in found.notes]
    for note in (*notes, *(f"flag: {flag}" for flag in raised)):
        console.print(Text(note), soft_wrap=True)
