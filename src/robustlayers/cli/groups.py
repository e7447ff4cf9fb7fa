"""`robustlayers groups`: the tensors of a model in execution order, and which group or selector picks each of them.

The model is that of a study file, arm by arm and phase by phase, or one that an importable function returns.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from robustlayers.cli.arguments import Overrides
from robustlayers.cli.console import plain_console
from robustlayers.core.errors import Fault, UserError, one_of

if TYPE_CHECKING:
    from torch import nn

    from robustlayers.selection import Entry, Inventory, Selection
    from robustlayers.study.schema import Recipe

__all__ = ["groups"]


def groups(
    study: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="STUDY.yaml|MODULE:FUNCTION",
            help="the study file, or an importable function that is called without arguments and returns an nn.Module",
        ),
    ],
    overrides: Overrides = (),
    arm: Annotated[str | None, tyro.conf.arg(help="only this arm; all of them unless given")] = None,
    select: Annotated[
        tuple[str, ...],
        tyro.conf.UseAppendAction,
        tyro.conf.arg(metavar="SELECTOR", help="show what a selector picks instead; may be given several times"),
    ] = (),
) -> int:
    """Print the tensors of the model in execution order, and the group that holds each in each phase; train nothing."""
    from robustlayers.selection import Inventory

    path = Path(study)
    if not path.is_file() and path.suffix not in (".yaml", ".yml"):
        if ":" not in study:
            raise UserError(
                Fault("no such file; give a study file, STUDY.yaml, or a function, MODULE:FUNCTION", file=study)
            )
        for option, value in (("--set", overrides), ("--arm", arm)):
            if value:
                raise UserError(Fault(f"means a study's settings; {study} is a function", path=option))
        inventory = Inventory(_made_by(study))
        if select:
            _print_selected(inventory, select)
        else:
            _print(inventory, f"{study}: {inventory.parameters:,} parameters", {})
        return 0
    from robustlayers.study.definition import load_study
    from robustlayers.study.semantics import build_model, data_of

    loaded = load_study(path, overrides)
    names = [definition.name for definition in loaded.arms]
    if arm is not None and arm not in names:
        raise UserError(Fault(one_of("arm", arm, names), path="--arm"))
    for definition in loaded.arms:
        if arm is not None and definition.name != arm:
            continue
        recipe = definition.recipe
        inventory = Inventory(build_model(recipe.model, data_of(recipe.data)[0], 0))
        if select:
            _print_selected(inventory, select)
            break
        _print(inventory, f"arm {definition.name}", _phases(inventory, recipe))
    return 0


def _phases(inventory: Inventory, recipe: Recipe) -> dict[str, Callable[[Entry], str]]:
    """Return a column for each phase: which groups hold a tensor, and what they learn from."""
    from robustlayers.selection import Partition
    from robustlayers.study.semantics import phase_groups
    from robustlayers.training import parse_signal, signal_text

    def column(partition: Partition, signals: Mapping[str, Any]) -> Callable[[Entry], str]:
        def cell(entry: Entry) -> str:
            parts = []
            for group in partition.group_of(entry.name):
                count = partition[group].count(entry.name)
                amount = "" if count == entry.size else f" ({count:,})"
                parts.append(f"{group}{amount}: {signal_text(parse_signal(signals[group]))}")
            return ", ".join(parts)

        return cell

    return {
        phase.name: column(Partition(inventory.model, phase_groups(recipe, phase)), phase.train)
        for phase in recipe.phases
        if phase.epochs
    }


def _print_selected(inventory: Inventory, selectors: Sequence[str]) -> None:
    """Print the tensors that at least one of the selectors picks, and how many of their entries each of them picks."""
    from robustlayers.selection import resolve

    selections: dict[str, Selection] = {}
    faults: list[Fault] = []
    for selector in selectors:
        try:
            selections[selector] = resolve(inventory, selector)
        except UserError as error:
            faults += [Fault(fault.message, path="--select") for fault in error.faults]
    if faults:
        raise UserError(faults)
    title = "\n".join(
        f"{selector}: {found.parameters:,} parameters ({found.share:.3%}), {found.buffers:,} buffer entries"
        for selector, found in selections.items()
    )

    def column(found: Selection) -> Callable[[Entry], str]:
        return lambda entry: f"{found.count(entry.name):,}" if entry.name in found else ""

    columns = {selector if len(selections) > 1 else "selected": column(found) for selector, found in selections.items()}
    _print(inventory, title, columns, set().union(*selections.values()))


def _print(
    inventory: Inventory,
    title: str,
    columns: Mapping[str, Callable[[Entry], str]],
    picked: Collection[str] | None = None,
) -> None:
    """Print a line for each tensor, or each `picked` one, in order of first use; what never runs comes last."""
    from rich.table import Table
    from rich.text import Text

    from robustlayers.selection import order_of

    console = plain_console()
    console.print(Text(title, style="bold"), soft_wrap=True)
    entries = list(inventory)
    places: dict[str, str] = {}
    try:
        order = order_of(inventory)
    except UserError as error:
        console.print(Text(f"in order of registration: {error}"), soft_wrap=True)
    else:
        starts = {entry.name: order.start_of(entry.name) for entry in entries}
        last = max(order.starts.values(), default=0) + 1
        entries.sort(key=lambda entry: last if (start := starts[entry.name]) is None else start)
        for place, module in enumerate(order.modules, start=1):
            places[module] = f"{place}" if order.uses[module] == 1 else f"{place} ({order.uses[module]} times)"
        places = {entry.name: places.get(order.holders.get(entry.name, ""), "never") for entry in entries}
    table = Table(box=None, pad_edge=False, header_style="bold")
    if places:
        table.add_column("runs")
    table.add_column("tensor", overflow="fold")
    for name in ("module", "kind", "shape"):
        table.add_column(name)
    for name in ("entries", "share"):
        table.add_column(name, justify="right")
    for name in columns:
        table.add_column(Text(name), justify="left" if picked is None else "right")
    for entry in entries:
        if picked is not None and entry.name not in picked:
            continue
        cells = [
            entry.name,
            type(entry.module).__name__,
            "buffer" if entry.buffer else "parameter",
            "x".join(map(str, entry.tensor.shape)) or "scalar",
            f"{entry.size:,}",
            "" if entry.buffer else f"{entry.size / max(1, inventory.parameters):.3%}",
            *(cell(entry) for cell in columns.values()),
        ]
        table.add_row(*map(Text, [places[entry.name], *cells] if places else cells))
    console.print(table)


def _made_by(text: str) -> nn.Module:
    """Import `package.module:function` with the current folder on the path, call it, and return the model."""
    from torch import nn

    match = re.fullmatch(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)", text)
    if match is None:
        raise UserError(f"{text!r} is not MODULE:FUNCTION, such as mypackage.models:resnet")
    module_name, function_name = match.groups()
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise UserError(f"{module_name} cannot be imported: {_said(error)}") from None
            raise UserError(f"there is no module {error.name!r} in {here} or on Python's path") from None
        except (Exception, SystemExit) as error:
            raise UserError(f"{module_name} cannot be imported: {_said(error)}") from None
        factory = getattr(module, function_name, None)
        if factory is None:
            known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            raise UserError(one_of(f"function of {module_name}", function_name, known))
        if isinstance(factory, nn.Module) or not callable(factory):
            raise UserError(
                f"{text} is of type {type(factory).__name__}; allowed: a function that returns an nn.Module"
            )
        try:
            model = factory()
        except (Exception, SystemExit) as error:
            raise UserError(f"{text}() failed: {_said(error)}") from None
    finally:
        if here in sys.path:
            sys.path.remove(here)
    if not isinstance(model, nn.Module):
        raise UserError(f"{text}() returned a value of type {type(model).__name__}; allowed: an nn.Module")
    return model


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
