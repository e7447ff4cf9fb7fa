"""`robustlayers rows`: every measured number as a tidy CSV table on standard output."""

from __future__ import annotations

import csv
import sys
from typing import Annotated

import tyro

from robustlayers.cli.arguments import StudyFolder

__all__ = ["rows"]


def rows(
    folder: StudyFolder,
    layers: Annotated[
        bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="what the norm layers hold, layer by layer, instead")
    ] = False,
) -> int:
    """Print one CSV line for each (run, seed, checkpoint, metric); the columns are documented in docs/rows.md and stay."""
    from robustlayers.study.collect import collect_layers, collect_rows
    from robustlayers.study.rows import columns, layer_columns, layer_table, table
    from robustlayers.study.store import Store

    if layers:
        lines = collect_layers(Store(folder))
        names = list(lines[0]["levels"]) if lines else []
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(layer_columns(names))
        writer.writerows(layer_table(lines, names))
        sys.stdout.flush()
        return 0
    found = collect_rows(Store(folder))
    factors = list(found[0].levels) if found else []
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns(factors))
    writer.writerows(table(found, factors))
    sys.stdout.flush()
    return 0
