"""The CSV files of a report: the measured rows, the claims, and the numbers behind every figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from robustlayers.study.summary import Summary

__all__ = ["claims_csv", "csv_text", "rows_csv"]


def csv_text(rows: Sequence[Mapping[str, object]], columns: Sequence[str] = ()) -> str:
    """Return rows as CSV with a head line; floats in full precision, None as nothing.

    >>> print(csv_text([{"arm": "a, b", "clean": 0.1, "seed": None}]), end="")
    arm,clean,seed
    "a, b",0.1,
    """
    stream = io.StringIO()
    names = list(columns or (rows[0] if rows else ()))
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def rows_csv(summary: Summary) -> str:
    """Return every measured number of the study; each factor has a column `factor.NAME`."""
    rows = [
        {
            "study": row.study,
            "arm": row.arm,
            **{f"factor.{factor}": row.levels.get(factor) for factor in summary.factors},
            "run": row.run,
            "seed": row.seed,
            "checkpoint": row.checkpoint,
            "metric": row.metric,
            "value": row.value,
            "count": row.count,
            "total": row.total,
            "split": row.split,
            "attack": row.attack,
            "normalization": row.normalization,
            "epoch": row.epoch,
            "flags": row.flags,
        }
        for row in summary.rows
    ]
    plain = ["run", "seed", "checkpoint", "metric", "value", "count", "total", "split", "attack", "normalization"]
    columns = ["study", "arm", *(f"factor.{factor}" for factor in summary.factors), *plain, "epoch", "flags"]
    return csv_text(rows, columns)


def claims_csv(summary: Summary) -> str:
    """Return the claims: one line for each claim, checkpoint and seed, with the judgment of the claim beside it."""
    columns = [
        "say", "that", "checkpoint", "verdict", "mean", "low", "high", "p", "p_adjusted", "seed", "difference",
    ]  # fmt: skip
    rows = []
    for claim in summary.claims:
        fixed = {name: getattr(claim, name) for name in columns[:9]}
        pairs = list(zip(claim.seeds, claim.differences, strict=False)) or [(None, None)]
        rows.extend({**fixed, "seed": seed, "difference": difference} for seed, difference in pairs)
    return csv_text(rows, columns)
