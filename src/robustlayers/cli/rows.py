"""`robustlayers rows`: every measured number as a tidy CSV table on standard output."""

from __future__ import annotations

import csv
import sys

from robustlayers.cli.arguments import StudyFolder

__all__ = ["rows"]


def rows(folder: StudyFolder) -> int:
    """Print one CSV line for each (run, seed, checkpoint, metric); the columns are documented in docs/rows.md and stay."""
    from robustlayers.study.collect import collect_rows
    from robustlayers.study.rows import columns, table
    from robustlayers.study.store import Store

    found = collect_rows(Store(folder))
    factors = list(found[0].levels) if found else []
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns(factors))
    writer.writerows(table(found, factors))
    sys.stdout.flush()
    return 0
