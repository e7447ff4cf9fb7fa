"""The CSV files of a report: the measured rows, the claims, and the numbers behind every figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from robustlayers.study.rows import columns, table
from robustlayers.study.summary import Summary

__all__ = ["claims_csv", "csv_text", "rows_csv"]


def csv_text(rows: Sequence[Mapping[str, object]], names: Sequence[str] = ()) -> str:
    """Return rows as CSV with a head line; floats in full precision, None as nothing.

    >>> print(csv_text([{"arm": "a, b", "clean": 0.1, "seed": None}]), end="")
    arm,clean,seed
    "a, b",0.1,
    """
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(names or (rows[0] if rows else ())), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def rows_csv(summary: Summary) -> str:
    """Return every measured number of the study, in the columns of `robustlayers rows`."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns(list(summary.factors)))
    writer.writerows(table(summary.rows, list(summary.factors)))
    return stream.getvalue()


def claims_csv(summary: Summary) -> str:
    """Return the claims: one line for each claim, checkpoint and seed, with the judgment of the claim beside it."""
    names = [
        "say", "that", "checkpoint", "verdict", "mean", "low", "high", "p", "p_adjusted", "seed", "difference",
    ]  # fmt: skip
    rows = []
    for claim in summary.claims:
        fixed = {name: getattr(claim, name) for name in names[:9]}
        pairs = list(zip(claim.seeds, claim.differences, strict=True)) or [(None, None)]
        rows.extend({**fixed, "seed": seed, "difference": difference} for seed, difference in pairs)
    return csv_text(rows, names)
