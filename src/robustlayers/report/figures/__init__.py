"""The figures of a report, one module each; every figure comes with the numbers that it is drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Drawing"]


@dataclass(frozen=True)
class Drawing:
    """A figure that is ready to be shown and written."""

    name: str  # of the files: figures/NAME.svg (or .png) and figures/NAME.csv
    title: str
    caption: str  # how to read it
    data: Sequence[Mapping[str, object]]  # rows of the CSV, all with the same keys
    svg: str = ""  # bare, see `robustlayers.report.svg`
    png: bytes = b""
    facts: Mapping[str, object] = field(default_factory=dict)  # what the page needs beside the drawing
