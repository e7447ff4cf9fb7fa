"""Collecting the faults of a recipe: each under the place where it was written, and the check goes on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from robustlayers.core.errors import Fault, UserError
from robustlayers.study.validate import Keys, Place
from robustlayers.study.yaml import path_text

__all__ = ["Faults"]


class Faults:
    """Collects faults under the place where they were written."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.faults: list[Fault] = []
        self.paths: list[Keys] = []  # where each of them is in the document

    def add(self, message: str, *path: str | int) -> None:
        """Note a fault at a path of the document."""
        at = self.place(tuple(path))
        self.paths.append(tuple(path))
        self.faults.append(Fault(message, at.file, at.line, at.path or path_text(path)))

    def at(self, *path: str | int) -> _Collect:
        """Return a context that notes a `UserError` as faults at `path`, or what they name below it, and goes on."""
        return _Collect(self, path, {})

    def at_option(self, what: str | Mapping[str, Any], *path: str | int) -> _Collect:
        """Return the same for something made from the options `what`: a fault of an option stands at the option."""
        return _Collect(self, path, what if isinstance(what, Mapping) else {})


class _Collect:
    def __init__(self, faults: Faults, path: Keys, options: Mapping[str, Any]) -> None:
        self.faults, self.path, self.options = faults, path, options

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, UserError):
            return False
        for fault in error.faults:
            message, path = fault.message, (*self.path, *((fault.path,) if fault.path else ()))
            message = message.removeprefix(f"{path[-1]}: ")  # which the path says already
            option, colon, rest = message.partition(": ")
            if colon and option in self.options:
                message, path = rest, (*path, option)
            elif (unknown := _UNKNOWN_OPTION.match(message)) and unknown[1] in self.options:
                path = (*path, unknown[1])
            where = f"{fault.file}:{fault.line}" if fault.line else fault.file
            self.faults.add(f"{where}: {message}" if where else message, *path)
        return True


_UNKNOWN_OPTION = re.compile(r"unknown (?:option|setting) of [\w ]+ '(\w+)'")
