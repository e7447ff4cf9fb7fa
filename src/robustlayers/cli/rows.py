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
    analysis: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help="what `analyse` found, as cka or criticality, instead")
    ] = None,
) -> int:
    """Print one CSV line for each (run, seed, checkpoint, metric); the columns are documented in docs/rows.md and stay."""
    from robustlayers.study.collect import collect_layers, collect_rows
    from robustlayers.study.rows import columns, layer_columns, layer_table, table
    from robustlayers.study.store import Store

    if analysis is not None:
        from robustlayers.study.analyzed import rows_of_analysis

        sys.stdout.write(rows_of_analysis(Store(folder), analysis))
        sys.stdout.flush()
        return 0
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
