"""Rows as a table: the columns of `robustlayers rows` and of the report's rows.csv."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from robustlayers.study.summary import Row

__all__ = ["columns", "layer_columns", "layer_table", "table"]

_BEFORE = ("study", "arm")
_AFTER = (
    "run",
    "seed",
    "checkpoint",
    "metric",
    "value",
    "count",
    "total",
    "split",
    "attack",
    "normalization",
    "epoch",
    "flags",
    "phase",
    "group",
    "hash_before",
    "hash_after",
)


_LAYER = ("run", "seed", "checkpoint", "epoch", "layer", "pass", "metric", "value", "split", "attack", "normalization")


def columns(factors: Sequence[str]) -> list[str]:
    """Return the names of the columns; each factor has one of its own, called `factor:NAME`.

    >>> columns(["group"])[:4]
    ['study', 'arm', 'factor:group', 'run']
    """
    return [*_BEFORE, *(f"factor:{factor}" for factor in factors), *_AFTER]


def table(rows: Sequence[Row], factors: Sequence[str]) -> Iterator[list[str]]:
    """Yield the cells of each row as text; numbers round-trip, what does not apply is empty."""
    for row in rows:
        cells = [*(getattr(row, name) for name in _BEFORE), *(row.levels[factor] for factor in factors)]
        cells += [getattr(row, name) for name in _AFTER]
        yield _texts(cells)


def layer_columns(factors: Sequence[str]) -> list[str]:
    """Return the columns of the rows about norm layers."""
    return [*_BEFORE, *(f"factor:{factor}" for factor in factors), *_LAYER]


def layer_table(rows: Sequence[Mapping[str, Any]], factors: Sequence[str]) -> Iterator[list[str]]:
    """Yield the cells of each row about a norm layer."""
    for row in rows:
        levels = [row["levels"][factor] for factor in factors]
        yield _texts([*(row[name] for name in _BEFORE), *levels, *(row[name] for name in _LAYER)])


def _texts(cells: Sequence[object]) -> list[str]:
    return ["" if cell is None else repr(cell) if isinstance(cell, float) else str(cell) for cell in cells]
