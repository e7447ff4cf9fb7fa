"""Mistakes of the user, reported as one clear line each: where, what, what is allowed, the nearest valid name."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

__all__ = ["Fault", "UserError", "names_text", "nearest", "one_of", "system_text"]


@dataclass(frozen=True)
class Fault:
    """One mistake: the file and line it stands on, the path inside the document, and a sentence about it.

    >>> str(Fault("unknown model 'resnt'; nearest: resnet", file="study.yaml", line=4, path="model.name"))
    "study.yaml:4: model.name: unknown model 'resnt'; nearest: resnet"
    """

    message: str
    file: str | None = None
    line: int | None = None
    path: str | None = None

    def __str__(self) -> str:
        place = self.file or ""
        if place and self.line:
            place = f"{place}:{self.line}"
        parts = [part for part in (place, self.path) if part]
        return ": ".join([*parts, " ".join(self.message.split())])

    def at(self, *, file: str | None = None, line: int | None = None, path: str | None = None) -> Fault:
        """Return the same fault with the missing parts of its place filled in."""
        return replace(self, file=self.file or file, line=self.line or line, path=self.path or path)


class UserError(Exception):
    """One or several mistakes of the user; the command line prints a line for each and exits with code 2.

    >>> error = UserError("eps must be positive")
    >>> error.faults[0].message
    'eps must be positive'
    """

    def __init__(self, faults: str | Fault | Sequence[Fault]) -> None:
        if isinstance(faults, str):
            faults = Fault(faults)
        self.faults: tuple[Fault, ...] = (faults,) if isinstance(faults, Fault) else tuple(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))

    def __reduce__(self) -> tuple[type[UserError], tuple[tuple[Fault, ...]]]:
        # Exceptions cross process borders by their constructor's arguments: the joined text would lose the places.
        return (type(self), (self.faults,))


def nearest(word: str, allowed: Iterable[str], count: int = 3) -> list[str]:
    """Return up to `count` of the `allowed` names that are spelled most like `word`, best first.

    >>> nearest("layer1.0.bn", ["layer1.0.bn1", "layer1.0.conv1", "linear"])[0]
    'layer1.0.bn1'
    """
    folded: dict[str, str] = {}
    for name in allowed:
        folded.setdefault(name.lower(), name)
    return [folded[hit] for hit in difflib.get_close_matches(word.lower(), list(folded), n=count, cutoff=0.5)]


def names_text(names: Iterable[str]) -> str:
    """Return names as a list in a message; one that holds a comma, as the names of arms do, is quoted.

    >>> print(names_text(["norm", "head, rice"]))
    norm, 'head, rice'
    """
    return ", ".join(repr(name) if "," in name else name for name in names)


def one_of(kind: str, word: str, allowed: Iterable[str], most: int = 12) -> str:
    """Return the sentence for an unknown name: what it was, the nearest valid names, or all of them if few.

    >>> one_of("model", "resnt", ["resnet", "wide-resnet"])
    "unknown model 'resnt'; nearest: resnet, wide-resnet; allowed: resnet, wide-resnet"
    """
    names = sorted(allowed)
    text = f"unknown {kind} {word!r}"
    close = nearest(word, names)
    if close:
        text += f"; nearest: {names_text(close)}"
    if names and len(names) <= most:
        text += f"; allowed: {names_text(names)}"
    return text


def system_text(error: OSError) -> str | None:
    """Return in one line what the system refused: the path, if it is known, and what the system says.

    None where the system has said nothing: such an error is one of a program.

    >>> system_text(PermissionError(13, "Permission denied", "runs/study"))
    'runs/study: Permission denied'
    >>> system_text(OSError("a message without a number"))
    """
    if error.errno is None or not error.strerror:
        return None
    place = error.filename
    if isinstance(place, bytes):
        place = os.fsdecode(place)
    return str(Fault(error.strerror, file=str(place) if isinstance(place, (str, os.PathLike)) else None))
