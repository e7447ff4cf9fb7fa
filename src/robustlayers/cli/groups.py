"""`robustlayers groups`: the tensors of a study's model and which group each belongs to, phase by phase."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from robustlayers.cli.arguments import Overrides, StudyFile
from robustlayers.cli.console import plain_console

__all__ = ["groups"]


def groups(
    study: StudyFile,
    overrides: Overrides = (),
    arm: Annotated[str | None, tyro.conf.arg(help="only this arm; all of them unless given")] = None,
    select: Annotated[str | None, tyro.conf.arg(metavar="SELECTOR", help="show what a selector picks instead")] = None,
) -> int:
    """Print every tensor of the model with its shape, and the group that holds it in each phase; train nothing."""
    from rich.table import Table

    from robustlayers.core.errors import UserError, one_of
    from robustlayers.selection import Inventory, Partition, resolve
    from robustlayers.study.definition import load_study
    from robustlayers.study.semantics import build_model, data_of, phase_groups
    from robustlayers.training import parse_signal, signal_text

    loaded = load_study(Path(study), overrides)
    names = [definition.name for definition in loaded.arms]
    if arm is not None and arm not in names:
        raise UserError(one_of("arm", arm, names))
    console = plain_console()
    for definition in loaded.arms:
        if arm is not None and definition.name != arm:
            continue
        recipe = definition.recipe
        model = build_model(recipe.model, data_of(recipe.data)[0], 0)
        inventory = Inventory(model)
        table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
        table.add_column("tensor", overflow="fold")
        for column in ("module", "shape"):
            table.add_column(column)
        table.add_column("entries", justify="right")
        if select is not None:
            selection = resolve(inventory, select)
            counts = (
                f"{selection.parameters:,} parameters ({selection.share:.3%}), {selection.buffers:,} buffer entries"
            )
            table.title = f"{select}: {counts}"
            table.add_column("selected", justify="right")
            for name, shape, _ in selection.describe():
                table.add_row(
                    name,
                    type(inventory[name].module).__name__,
                    shape,
                    f"{inventory[name].size:,}",
                    f"{selection.count(name):,}",
                )
            console.print(table)
            return 0
        phases = [phase for phase in recipe.phases if phase.epochs]
        partitions = []
        for phase in phases:
            table.add_column(phase.name)
            partitions.append(Partition(model, phase_groups(recipe, phase)))
        table.title = f"arm {definition.name}"
        for entry in inventory:
            cells = []
            for phase, partition in zip(phases, partitions, strict=True):
                parts = []
                for group in partition.group_of(entry.name):
                    count = partition[group].count(entry.name)
                    amount = "" if count == entry.size else f" ({count:,})"
                    parts.append(f"{group}{amount}: {signal_text(parse_signal(phase.train[group]))}")
                cells.append(", ".join(parts))
            shape = "x".join(map(str, entry.tensor.shape)) or "scalar"
            table.add_row(entry.name, type(entry.module).__name__, shape, f"{entry.size:,}", *cells)
        console.print(table)
    return 0
