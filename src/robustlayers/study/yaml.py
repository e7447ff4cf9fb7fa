"""A strict reader for study files: plain YAML with line numbers, nothing guessed, every mistake reported at once.

It reads maps, lists and scalars, and nothing else: no tags, anchors, aliases or merge keys, one document, no key twice.
Plain scalars follow the YAML 1.2 core schema, so `off`, `no`, `12:30`, dates and `8/255` stay text. The tree is built
from PyYAML's events without constructors and without recursion.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from robustlayers.core.errors import Fault, UserError, nearest

__all__ = ["Document", "parse", "parse_value", "path_text", "read"]

LARGEST = 1_000_000  # bytes of a file
DEEPEST = 50  # maps and lists inside each other

_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_CONSTANTS = {"": None, "~": None, "null": None, "Null": None, "NULL": None} | {
    word: value for name, value in (("true", True), ("false", False)) for word in (name, name.title(), name.upper())
}
# Control characters, line breaks that only YAML 1.1 knows, byte order marks, half surrogates, non-characters.
_UNPRINTABLE = re.compile(r"[^\t\n\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")

Keys = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """A document of plain `dict`, `list`, `str`, `int`, `float`, `bool`, `None`, and the line of every key and item."""

    value: dict[str, Any]
    file: str
    lines: Mapping[Keys, int] = field(repr=False)  # path -> line of its key or item, from 1

    def line(self, path: Keys) -> int | None:
        r"""Return the line (from 1) of the key or item at `path`, or of the nearest part of the path that is there.

        >>> document = parse("model:\n  name: resnet\n", "study.yaml")
        >>> document.line(("model", "name")), document.line(("model", "width"))
        (2, 1)
        """
        for length in range(len(path), -1, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return None


def path_text(path: Keys) -> str:
    """Return a path as text with dots, with double quotes around the parts that hold dots, `=`, quotes or outer spaces.

    >>> path_text(("phases", 0, "train", "norm.weight"))
    'phases.0.train."norm.weight"'
    """
    return ".".join(_part_text(str(part)) for part in path)


def _part_text(part: str) -> str:
    if part and part == part.strip() and not set(part) & set('."=\\'):
        return part
    return '"' + part.replace("\\", "\\\\").replace('"', '\\"') + '"'


def read(path: Path) -> Document:
    """Read the UTF-8 file at `path`; a `UserError` carries every mistake in it with file and line."""
    name = str(path)
    try:
        if path.is_dir():
            raise UserError(Fault("is a folder, not a YAML file", file=name))
        if not path.exists():
            raise UserError(Fault(_missing(path), file=name))
        if not path.is_file():
            raise UserError(Fault("is not a regular file", file=name))
        if path.stat().st_size > LARGEST:
            raise UserError(Fault(_TOO_LARGE, file=name))
        data = path.read_bytes()
    except OSError as error:
        raise UserError(Fault(f"cannot be read: {error.strerror or error}", file=name)) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(Fault(f"is not UTF-8 text: byte 0x{data[error.start]:02x}", file=name, line=line)) from None
    return parse(text, name)


_TOO_LARGE = f"is larger than {LARGEST // 1_000_000} MB; a study file is a page of text"


def _missing(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml")]
    except (OSError, ValueError):  # the folder is missing as well, or the name cannot be a path
        names = []
    close = nearest(path.name, names)
    return "no such file" + (f"; nearest: {', '.join(close)}" if close else "")


def parse(text: str, file: str) -> Document:
    r"""Return the document in `text`; a `UserError` carries every mistake in it with `file` and line.

    >>> parse("threat: {norm: linf, eps: 8/255}\nseeds: 3\n", "study.yaml").value
    {'threat': {'norm': 'linf', 'eps': '8/255'}, 'seeds': 3}
    >>> parse("seeds: 3\nseeds: 4\n", "study.yaml")
    Traceback (most recent call last):
        ...
    robustlayers.core.errors.UserError: study.yaml:2: seeds: duplicate key, first on line 1
    """
    tree = _Tree(text, file)
    if not tree.faults and tree.value is None:
        tree.fault("is empty", None, ())
    elif not tree.faults and not isinstance(tree.value, dict):
        what = "a list" if isinstance(tree.value, list) else "a single value"
        tree.fault(f"the top level must be a mapping (key: value), not {what}", tree.first, ())
    return Document(tree.finish(), file, tree.lines)


def parse_value(text: str, what: str) -> Any:
    """Return one value as it is written after a colon: a scalar, `[a, b]` or `{a: b}`; faults carry `what` as path.

    >>> parse_value("{norm: adversarial, rest: frozen}", "--set")
    {'norm': 'adversarial', 'rest': 'frozen'}
    >>> parse_value("1e-3", "--set"), parse_value("8/255", "--set"), parse_value("'5'", "--set")
    (0.001, '8/255', '5')
    """
    tree = _Tree(text, None, what)
    rest = tree.text[tree.end :].strip()
    if not tree.faults and (tree.block or tree.marked):
        tree.fault(
            f"{_short(text)!r} is not one value; write {{a: b}} for a mapping, [a, b] for a list, or quote it", None, ()
        )
    elif not tree.faults and rest.startswith("#"):
        tree.fault(f"{rest!r} would be a comment; quote text that holds ' #'", None, ())
    return tree.finish()


@dataclass
class _Frame:
    """An open map or list while events come in."""

    box: dict[str, Any] | list[Any]
    path: Keys
    flow: bool
    is_key: bool = False  # the collection stands where a key should: read for its faults, then dropped
    key: str | None = None  # of a map: the key that waits for its value
    waiting: bool = False  # of a map: whether a key (a dropped one has key None) waits for its value
    seen: dict[str, int] = field(default_factory=dict)  # of a map: key -> its first line


class _Stop(Exception):
    """Ends the reading: what follows cannot be judged."""


class _Tree:
    """The value in a text, the line of each path, and every fault on the way."""

    def __init__(self, text: str, file: str | None, what: str | None = None) -> None:
        self.text = text.removeprefix("\ufeff")
        self.file, self.what = file, what
        self.value: Any = None
        self.lines: dict[Keys, int] = {}
        self.faults: list[Fault] = []
        self.first: int | None = None  # line of the root
        self.end = 0  # where the root ends in the text
        self.block = False  # whether the root is a map or list without braces
        self.marked = False  # whether the document begins with ---
        self._stack: list[_Frame] = []
        self._documents = 0
        if len(text) > LARGEST:
            self.fault(_TOO_LARGE, None, ())
            return
        strange = list(_UNPRINTABLE.finditer(self.text.replace("\r", " ")))
        if strange:
            more = f", and {len(strange) - 1} more" if len(strange) > 1 else ""
            message = f"unprintable character U+{ord(strange[0][0]):04X}{more}; remove it"
            self.fault(message, self._line_at(strange[0].start()), ())
            return
        try:
            for event in yaml.parse(self.text, Loader=yaml.SafeLoader):
                self._take(event)
        except _Stop:
            pass
        except yaml.MarkedYAMLError as error:
            message, mark = _explain(error, self.text)
            self.fault(f"not valid YAML: {message}", None if mark is None else mark.line + 1, ())
        except (ValueError, OverflowError):  # PyYAML hands the number of "\UFFFFFFFF" to chr()
            escape = re.search(r"\\U(?!00(?:0|10))[0-9a-fA-F]{8}", self.text)
            line = self._line_at(escape.start()) if escape else None
            self.fault(f"the escape {escape[0] if escape else ''} is no character", line, ())

    def fault(self, message: str, line: int | None, path: Keys) -> None:
        place = path_text(path) or None
        if self.what is not None:
            line, place = None, f"{self.what}: {place}" if place else self.what
        self.faults.append(Fault(message, file=self.file, line=line, path=place))

    def _line_at(self, index: int) -> int:
        return len(re.findall(r"\r\n|\n|\r", self.text[:index])) + 1

    def finish(self) -> Any:
        """Return the value, or raise every fault, in the order of their lines."""
        if self.faults:
            raise UserError(sorted(self.faults, key=lambda fault: fault.line or 0))
        return self.value

    def _take(self, event: Any) -> None:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            self.marked = event.explicit
            if self._documents > 1:
                self.fault("a second document begins here; a file holds one", line, ())
                raise _Stop
            if event.version or event.tags:
                self.fault("directives (%YAML, %TAG) are not read; remove them", line, ())
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            frame = self._stack.pop()
            if not self._stack:
                self.end = event.end_mark.index
            if frame.is_key:
                self._stack[-1].key, self._stack[-1].waiting = None, True
        elif isinstance(event, yaml.NodeEvent):
            self._node(event, line)

    def _node(self, event: Any, line: int) -> None:
        frame = self._stack[-1] if self._stack else None
        as_key = frame is not None and isinstance(frame.box, dict) and not frame.waiting
        path = self._path(frame, as_key)
        if frame is not None and isinstance(frame.box, list):
            self.lines.setdefault(path, line)
        self._refuse(event, line, path)
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            box: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
            if as_key:
                what = "mapping" if isinstance(box, dict) else "list"
                self.fault(f"a key must be text, not a {what}; quote it", line, path)
            else:
                self._put(frame, box, event, line)
            self._stack.append(_Frame(box, path, bool(event.flow_style), is_key=as_key))
            if len(self._stack) > DEEPEST:
                self.fault(f"nested deeper than {DEEPEST} levels", line, ())
                raise _Stop
        elif frame is not None and as_key:
            self._key(frame, event, line)
        else:
            self._put(frame, self._scalar(event, line, path, frame), event, line)

    def _path(self, frame: _Frame | None, as_key: bool) -> Keys:
        if frame is None:
            return ()
        if isinstance(frame.box, list):
            return (*frame.path, len(frame.box))
        return frame.path if as_key or frame.key is None else (*frame.path, frame.key)

    def _put(self, frame: _Frame | None, value: Any, event: Any, line: int) -> None:
        if frame is None:
            self.value, self.first, self.end = value, line, event.end_mark.index
            self.block = isinstance(value, dict | list) and not event.flow_style
            self.lines[()] = line
        elif isinstance(frame.box, list):
            frame.box.append(value)
        else:
            if frame.key is not None:
                frame.box.setdefault(frame.key, value)
            frame.key, frame.waiting = None, False

    def _key(self, frame: _Frame, event: Any, line: int) -> None:
        frame.waiting = True
        if isinstance(event, yaml.AliasEvent):
            return
        plain, key = event.style is None, event.value
        if not key:
            self.fault("a key is empty", line, frame.path)
        elif plain and key == "<<":
            self.fault("merge keys (<<) are not read; share settings by a factor's patch", line, frame.path)
        elif "\n" in key or "\t" in key:
            self.fault(f"key {key!r} holds a line break or a tab", line, frame.path)
        else:
            self._check_text(event, line, frame.path, frame)
            frame.key = key
            if key in frame.seen:
                self.fault(f"duplicate key, first on line {frame.seen[key]}", line, (*frame.path, key))
            else:
                frame.seen[key] = line
                self.lines.setdefault((*frame.path, key), line)

    def _scalar(self, event: Any, line: int, path: Keys, frame: _Frame | None) -> Any:
        if isinstance(event, yaml.AliasEvent):
            return None
        text = event.value
        self._check_text(event, line, path, frame)
        if event.style is not None:
            return text
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if _INTEGER.fullmatch(text):
            return self._integer(text, line, path)
        if _NOT_FINITE.fullmatch(text) or (_FLOAT.fullmatch(text) and not math.isfinite(float(text))):
            self.fault(f"{text} is not finite", line, path)
            return None
        return float(text) if _FLOAT.fullmatch(text) else text

    def _integer(self, text: str, line: int, path: Keys) -> int | None:
        digits = text.lstrip("+-")
        if len(digits) > 1 and digits[0] == "0":
            bare = text[: -len(digits)] + (digits.lstrip("0") or "0")
            self.fault(f"{_short(text)} has a leading zero; write {_short(bare)}, or quote it as text", line, path)
        elif len(digits) > 20 or not -(2**63) <= int(text) < 2**64:
            self.fault(f"{_short(text)} does not fit into 64 bits", line, path)
        else:
            return int(text)
        return None

    def _check_text(self, event: Any, line: int, path: Keys, frame: _Frame | None) -> None:
        text = event.value
        strange = _UNPRINTABLE.search(text)
        if strange:  # only an escape such as "\x1b" comes this far
            self.fault(f"the text holds the unprintable character U+{ord(strange[0]):04X}", line, path)
        elif event.style is None and frame is not None and frame.flow and text.count("(") > text.count(")"):
            self.fault(f"{_short(text)!r} ends inside a parenthesis; quote text that holds a comma", line, path)

    def _refuse(self, event: Any, line: int, path: Keys) -> None:
        if isinstance(event, yaml.AliasEvent):
            self.fault(
                f"alias *{event.anchor}: aliases are not read; share settings by a factor's patch, "
                "or quote text that begins with *",
                line,
                path,
            )
            return
        if event.anchor is not None:
            self.fault(
                f"anchor &{event.anchor}: anchors are not read; share settings by a factor's patch, "
                "or quote text that begins with &",
                line,
                path,
            )
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self.fault(f"tag {tag}: tags are not read; quote a text that begins with !", line, path)


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


def _explain(error: yaml.MarkedYAMLError, text: str) -> tuple[str, Any]:
    """Return one line for a syntax error, in words of the person who wrote the file, and the mark where it stands."""
    problem, context = error.problem or "", error.context or ""
    here, start = error.problem_mark or error.context_mark, error.context_mark or error.problem_mark
    if "character '\\t'" in problem:
        return "a tab where only spaces may stand", here
    if "cannot start any token" in problem:
        return f"{problem}; quote the text", here
    if problem == "mapping values are not allowed here":
        return "a ': ' where none may stand; quote text that holds a colon, or look for a missing colon above", here
    if problem == "could not find expected ':'":
        return "a key without a colon", start
    if "scanning a quoted scalar" in context and "end of stream" in problem:
        return "a quote is opened and never closed", start
    if "parsing a flow" in context and "<stream end>" in problem:
        return "a bracket is opened and never closed", start
    if problem.startswith("expected ',' or"):
        return f"{problem}; quote text that holds , [ ] {{ or }}", here
    if context in ("while scanning an alias", "while scanning an anchor"):
        return "quote text that begins with * or &", here
    if "<block end>" in problem or "<document start>" in problem:
        before = "" if here is None else re.split(r"[\r\n]", text[: here.index])[-1]
        if before.strip():
            return "text after the end of a value; quote the whole text", here
        return "the indentation does not match the lines above", here
    return " ".join(part for part in (context, problem) if part), here
