"""A console for tables: as wide as the terminal, and as wide as the table needs where there is none."""

from __future__ import annotations

import sys

from rich.console import Console

__all__ = ["plain_console"]


def plain_console() -> Console:
    """Return a console that does not fold tables that go to a file or a pipe."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=320)
