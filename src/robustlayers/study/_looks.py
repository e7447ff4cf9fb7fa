"""What an analysis of a trained net gets and gives: nets, images, attack; rows, headline numbers, what a figure needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn

from robustlayers.analysis import Layer
from robustlayers.core.errors import UserError
from robustlayers.data import Augment, Images, to_float
from robustlayers.evaluation import Progress
from robustlayers.selection import Inventory, resolve
from robustlayers.selection.layout import layout_of
from robustlayers.study.semantics import NamedAttack

__all__ = [
    "REFERENCE",
    "Arrays",
    "Found",
    "Look",
    "Number",
    "Payload",
    "decoded",
    "encoded",
    "layers_from",
    "layers_of_rows",
    "number",
    "parts_of",
    "picks",
    "tidy",
]

Number = Mapping[str, Any]
"""A headline number: `label`; `value`, None where it does not exist; `unit`, "%" or "points" of a share, "nats", ""; `note`."""

Payload = Mapping[str, Any]
"""Plain data as JSON holds it, which figures are drawn from."""

Arrays = Mapping[str, np.ndarray]
"""Numbers by name beside it."""

REFERENCE = 1000
"""Training images that an analysis may use: to estimate statistics anew on, to fit probes on."""

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Look:
    """One thing to look at: the net of an arm, alone, against another arm's or with all others, on held-out images.

    `train` are all training images, `augment` how the recipe varies them; `nets` has every arm of an analysis of several.
    `sources` are earlier states of the same run by name, read when they are asked for; `curve` is its learning curve over
    all phases, `phase` the last of them. `part(name)` returns the receiver of progress of one of the parts that the
    analysis has declared.
    """

    arm: str
    model: nn.Module
    held_out: Images
    train: Images
    attack: NamedAttack
    noise: Any
    seed: int
    select: str | None = None
    against: str = ""
    other: nn.Module | None = None
    sources: Mapping[str, Callable[[], Mapping[str, Tensor]]] = field(default_factory=dict)
    curve: Sequence[Mapping[str, Any]] = ()
    phase: str = ""
    augment: Augment | None = None
    nets: Mapping[str, nn.Module] = field(default_factory=dict)
    part: Callable[[str], Progress] = lambda name: lambda what, done, total: None

    @property
    def x(self) -> Tensor:
        """The held-out images as floats in [0, 1]."""
        return to_float(self.held_out.images)

    @property
    def y(self) -> Tensor:
        """Their labels."""
        return self.held_out.labels

    @property
    def n(self) -> int:
        """How many held-out images there are."""
        return len(self.held_out)

    @property
    def crafting(self) -> float:
        """Passes of one image through the net that the attack needs."""
        return float(getattr(self.attack, "forward_passes", 1) + getattr(self.attack, "backward_passes", 1))

    @property
    def quality(self) -> float:
        """Passes of single images that one measurement of clean and robust quality takes."""
        return self.n * (3 + self.crafting)


@dataclass(frozen=True)
class Found:
    """What an analysis found.

    `rows` are tidy, `part` saying which of its measurements a row is of; `payload` and `arrays` are what its figures are
    drawn from; `scores` are files of `name,score` for the selectors `top` and `bottom`, `weights` nets that it made, each by
    the name of its file.
    """

    rows: Sequence[Mapping[str, Any]]
    numbers: Sequence[Number]
    payload: Mapping[str, Any]
    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Mapping[str, Sequence[tuple[str, tuple[str, ...], float]]] = field(default_factory=dict)
    weights: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


def number(label: str, value: float | None, unit: str = "", note: str = "") -> Number:
    """Return a headline number and what it is of, such as a group; one that is not finite does not exist."""
    return {"label": label, "value": encoded(value), "unit": unit, "note": note}


def parts_of(model: nn.Module, select: str | None, usual: str = "") -> dict[str, str] | str:
    """Return the groups that are looked at: by module of `select`, else the model's stem, stages and head.

    Where those cannot be seen, or `usual` is given, it is that selector taken apart by module.
    """
    if select is not None or usual:
        return select or usual
    inventory = Inventory(model)
    try:
        layout = layout_of(inventory)
    except UserError:
        return "conv | linear | norm"
    named = (
        {"stem": "stem"} | {f"stage {k}": f"stage({k})" for k in range(1, len(layout.stages) + 1)} | {"head": "head"}
    )
    found = {name: selector for name, selector in named.items() if picks(model, selector)}  # some have no stem
    return found if len(found) > 1 else "conv | linear | norm"


def picks(model: nn.Module, selector: str) -> bool:
    """Tell whether a selector picks any tensor of a model."""
    try:
        resolve(Inventory(model), selector)
    except UserError:
        return False
    return True


def tidy(part: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of plain cells with the name of what they measure in front; a list of names is one text."""
    return [
        {"part": part, **{k: " ".join(map(str, v)) if isinstance(v, list | tuple) else v for k, v in row.items()}}
        for row in rows
    ]


def encoded(value: Any) -> Any:
    """Return plain data for JSON: tuples are lists, numbers that are not finite are None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): encoded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encoded(item) for item in value]
    return value


def decoded(kind: type[_Row], value: Mapping[str, Any]) -> _Row:
    """Return a dataclass of plain fields from its encoded form; None where a number must be is NaN."""
    cells: dict[str, Any] = {}
    for one in fields(kind):  # type: ignore[arg-type]
        cell = value[one.name]
        # Without an attack the robust numbers do not exist; with one, a loss may have been infinite.
        lost = str(one.type) == "float" or (one.name == "robust_loss" and value.get("robust_accuracy") is not None)
        cells[one.name] = math.nan if cell is None and lost else tuple(cell) if isinstance(cell, list) else cell
    return kind(**cells)


def layers_of_rows(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Return layers as plain data."""
    return [{"name": layer.name, "kind": layer.kind, "part": layer.part} for layer in layers]


def layers_from(rows: Sequence[Mapping[str, Any]]) -> tuple[Layer, ...]:
    """Return layers from plain data."""
    return tuple(Layer(**row) for row in rows)
