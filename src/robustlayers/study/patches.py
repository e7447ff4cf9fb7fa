"""Overrides of single settings: dotted paths into a plain document, as factors' levels and `--set` write them.

A path names keys from the top, with dots between: `model.width`, `phases.adapt.epochs`. An item of a list is named by
its `name` or by its position from 0. A key that holds a dot, a quote or `=` stands in double quotes, where a backslash
escapes: `phases.adapt.train."norm.weight"`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from robustlayers.core.errors import Fault, UserError, one_of
from robustlayers.study.yaml import parse_value, path_text

__all__ = ["apply", "conflicts", "parse_assignment", "split_path"]

_PART = re.compile(r'"((?:[^"\\]|\\.)*)"|([^."\\]+)', re.DOTALL)


def split_path(path: str, where: str = "path") -> tuple[str, ...]:
    r"""Return the keys that a dotted path names, outermost first; a malformed path is a `UserError` at `where`.

    >>> split_path('phases.adapt.train."norm.weight"')
    ('phases', 'adapt', 'train', 'norm.weight')
    """
    parts: list[str] = []
    position = 0
    while True:
        match = _PART.match(path, position)
        if match is None:
            what = (
                'a quote that does not close or a stray " or \\' if path[position : position + 1] in ('"', "\\") else ""
            )
            raise UserError(Fault(f"path {path!r} has {what or 'an empty part'}; write a.b.c", path=where))
        quoted, bare = match.groups()
        if bare is not None and bare != bare.strip():
            raise UserError(Fault(f"path {path!r} has spaces around {bare.strip()!r}; write a.b.c", path=where))
        if quoted == "":
            raise UserError(Fault(f"path {path!r} has an empty part; write a.b.c", path=where))
        parts.append(bare if bare is not None else re.sub(r"\\(.)", r"\1", quoted, flags=re.DOTALL))
        position = match.end()
        if position == len(path):
            return tuple(parts)
        if path[position] != ".":
            raise UserError(
                Fault(f'path {path!r}: a dot is missing before {path[position:]!r}; write a."b.c"', path=where)
            )
        position += 1


def apply(value: Any, path: str, new: Any, *, where: str) -> Any:
    """Return a copy of `value` in which the setting at `path` is `new`; `value` and `new` stay as they are.

    A mapping at the path is replaced whole. Mappings on the way that are missing or `None` are made; lists are not.
    A path that does not fit is a `UserError` whose fault stands at `where`.

    >>> study = {"phases": [{"name": "adapt", "epochs": 5}]}
    >>> apply(study, "phases.adapt.epochs", 0, where="factors.group.none")
    {'phases': [{'name': 'adapt', 'epochs': 0}]}
    >>> apply(study, "phases.adpat.epochs", 0, where="--set")
    Traceback (most recent call last):
        ...
    robustlayers.core.errors.UserError: --set: unknown item of phases 'adpat'; nearest: adapt; allowed: adapt
    """
    parts = split_path(path, where)
    root = copy.deepcopy(value)
    box: Any = root
    for depth, part in enumerate(parts):
        key = _key(box, part, parts[:depth], where)
        if depth + 1 == len(parts):
            box[key] = copy.deepcopy(new)
        elif (box.get(key) if isinstance(box, dict) else box[key]) is None:
            box[key] = {}
        box = box[key]
    return root


def _key(box: Any, part: str, above: tuple[str, ...], where: str) -> str | int:
    """Return the key or position that `part` names in `box`, which stands at the path `above`."""
    place = path_text(above) or "the document"
    if isinstance(box, dict):
        return part
    if not isinstance(box, list):
        shown = repr(box) if len(repr(box)) <= 40 else repr(box)[:37] + "..."
        raise UserError(Fault(f"{place} is {shown}, not a mapping: it has no {part!r}", path=where))
    hits = [index for index, name in enumerate(_names(box)) if name == part]
    if len(hits) == 1:
        return hits[0]
    if hits:
        positions = ", ".join(str(index) for index in hits)
        raise UserError(Fault(f"{place} has several items named {part!r}; use a position: {positions}", path=where))
    if re.fullmatch(r"[0-9]{1,9}", part):
        if int(part) < len(box):
            return int(part)
        some = f"{len(box)} item{'s' if len(box) > 1 else ''}, counted from 0" if box else "no items"
        raise UserError(Fault(f"{place} has no item {part}: it has {some}", path=where))
    names = {name for name in _names(box) if name is not None}
    if not names:
        raise UserError(
            Fault(f"{place} is a list without named items: use a position from 0, not {part!r}", path=where)
        )
    raise UserError(Fault(one_of(f"item of {place}", part, names), path=where))


def _names(items: Sequence[Any]) -> list[str | None]:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    return [None if name is None else str(name) for name in names]


def parse_assignment(text: str) -> tuple[str, Any]:
    """Return the path and the value of `path=value`; the value is read like one in a study file.

    >>> parse_assignment("threat.eps=8/255"), parse_assignment("phases.adapt.train={norm: adversarial, rest: frozen}")
    (('threat.eps', '8/255'), ('phases.adapt.train', {'norm': 'adversarial', 'rest': 'frozen'}))
    """
    match = re.match(r'((?:"(?:[^"\\]|\\.)*"|[^"=])*)=', text, re.DOTALL)
    if match is None:
        raise UserError(Fault(f"{text!r} is not path=value, such as seeds=5", path="--set"))
    path = match[1].strip()
    split_path(path, "--set")
    return path, parse_value(text[match.end() :], f"--set {path}")


def conflicts(patches: Sequence[tuple[str, Mapping[str, Any]]], document: Any = None) -> list[Fault]:
    """Return a fault for each two patches that touch one setting: equal paths, or one path inside the other.

    `patches` are (source, {path: value}), such as `("factors.group.norm", {"model.norm": "group"})`; a fault stands at
    the later source. With the `document` that is patched, `phases.0` and `phases.adapt` count as equal where they are.

    >>> print(*conflicts([("factors.net.wide", {"model.width": 32}), ("factors.norm.group", {"model": {}})]))
    factors.norm.group: sets model, but factors.net.wide sets model.width; one setting, one factor
    """
    faults: list[Fault] = []
    earlier: list[tuple[str, str, tuple[str | int, ...]]] = []
    for source, patch in patches:
        for path in patch:
            try:
                keys = _resolve(document, split_path(path, source))
            except UserError as error:
                faults.extend(error.faults)
                continue
            for other_source, other_path, other in earlier:
                short = min(len(keys), len(other))
                if keys[:short] == other[:short]:
                    if other_source == source:
                        message = f"sets {path}, and {other_path} as well; one of them overwrites the other"
                    else:
                        message = f"sets {path}, but {other_source} sets {other_path}; one setting, one factor"
                    faults.append(Fault(message, path=source))
            earlier.append((source, path, keys))
    return faults


def _resolve(document: Any, parts: tuple[str, ...]) -> tuple[str | int, ...]:
    """Return the path with positions in place of names, as far as the document has it."""
    keys: list[str | int] = list(parts)
    box = document
    for depth, part in enumerate(parts):
        if not isinstance(box, dict | list):
            break
        try:
            keys[depth] = key = _key(box, part, parts[:depth], "")
        except UserError:  # applying the patch reports it
            break
        box = box.get(key) if isinstance(box, dict) else box[int(key)]
    return tuple(keys)
