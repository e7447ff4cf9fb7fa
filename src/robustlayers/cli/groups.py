"""`robustlayers groups`: the tensors of a model in execution order, and which group or selector picks each of them.

The model is that of a study file, arm by arm and phase by phase, or one that an importable function returns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from robustlayers.cli.arguments import Overrides, Trust
from robustlayers.cli.console import plain_console
from robustlayers.core.errors import Fault, UserError, one_of

if TYPE_CHECKING:
    from robustlayers.selection import Entry, Inventory, Partition, Selection
    from robustlayers.study.schema import Recipe

__all__ = ["groups"]


def groups(
    study: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="STUDY.yaml|MODULE:FUNCTION",
            help="the study file, or an importable function that returns an nn.Module",
        ),
    ],
    overrides: Overrides = (),
    trust: Trust = False,
    arm: Annotated[str | None, tyro.conf.arg(help="only this arm; all of them unless given")] = None,
    select: Annotated[
        tuple[str, ...],
        tyro.conf.UseAppendAction,
        tyro.conf.arg(metavar="SELECTOR", help="show what a selector picks instead; may be given several times"),
    ] = (),
    option: Annotated[
        tuple[str, ...],
        tyro.conf.UseAppendAction,
        tyro.conf.arg(metavar="NAME=VALUE", help="an argument of MODULE:FUNCTION; may be given several times"),
    ] = (),
) -> int:
    """Print the tensors of the model in execution order, and the group that holds each in each phase; train nothing."""
    from robustlayers.models import build_factory
    from robustlayers.selection import Inventory

    path = Path(study)
    if not path.is_file() and path.suffix not in (".yaml", ".yml"):
        if ":" not in study:
            raise UserError(
                Fault("no such file; give a study file, STUDY.yaml, or a function, MODULE:FUNCTION", file=study)
            )
        for name, value in (("--set", overrides), ("--arm", arm)):
            if value:
                raise UserError(Fault(f"means a study's settings; {study} is a function", path=name))
        inventory = Inventory(build_factory(study, _options(option), seed=0))
        if select:
            _print_selected(inventory, select)
        else:
            _print(inventory, f"{study}: {inventory.parameters:,} parameters", {})
        return 0
    if option:
        raise UserError(
            Fault(f"means an argument of a function; {study} is a study, which takes --set", path="--option")
        )
    from robustlayers.study.definition import load_study
    from robustlayers.study.semantics import build_model, data_of

    loaded = load_study(path, overrides, trust=trust)
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


def _options(assignments: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a function as `name=value` gives them, each value read like one in a study file."""
    from robustlayers.study.yaml import parse_value

    options: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name.isidentifier():
            raise UserError(Fault(f"{text!r} is not NAME=VALUE, such as width=16", path="--option"))
        if name in options:
            raise UserError(Fault(f"{name!r} is given twice", path="--option"))
        options[name] = parse_value(value, f"--option {name}")
    return options


def _phases(inventory: Inventory, recipe: Recipe) -> dict[str, Callable[[Entry], str]]:
    """Return a column for each phase: which groups hold a tensor, and what they learn from."""
    from robustlayers.study.begin import start_text
    from robustlayers.study.phases import group_texts, phase_partition

    def column(partition: Partition, texts: Mapping[str, str]) -> Callable[[Entry], str]:
        def cell(entry: Entry) -> str:
            parts = []
            for group in partition.group_of(entry.name):
                count = partition[group].count(entry.name)
                amount = "" if count == entry.size else f" ({count:,})"
                parts.append(f"{group}{amount}: {texts[group]}")
            return ", ".join(parts)

        return cell

    columns = {}
    for phase in recipe.phases:
        if not phase.skipped:
            partition = phase_partition(inventory.model, recipe, phase)
            columns[phase.name] = column(partition, group_texts(phase, partition.selectors, start_text))
    return columns


def _print_selected(inventory: Inventory, selectors: Sequence[str]) -> None:
    """Print the tensors that at least one of the selectors picks, and how many of their entries each of them picks."""
    from robustlayers.selection import resolve

    selections: dict[str, Selection] = {}
    faults: list[Fault] = []
    for selector in selectors:
        try:
            selections[selector] = resolve(inventory, selector)
        except UserError as error:
            faults += [fault.at(path="--select") for fault in error.faults]
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
