"""From a plain document to the schema's types, with every fault as one line: where, what, what is allowed, the nearest name."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from robustlayers.core.errors import Fault, nearest, one_of
from robustlayers.study.yaml import path_text

__all__ = ["Keys", "Place", "check", "shown"]

Keys = tuple[str | int, ...]
Place = Callable[[Keys], Fault]
"""`place(path in the document) -> a fault without a message that stands there`"""

Model = TypeVar("Model", bound=BaseModel)


def check(kind: type[Model], value: Any, place: Place) -> tuple[Model | None, Mapping[Keys, Fault]]:
    """Return `value` as a `kind`, or None and what is wrong with it by path."""
    try:
        return kind.model_validate(value), {}
    except ValidationError as error:
        return None, _faults(kind, value, error.errors(include_url=False), place)


def _faults(kind: type[BaseModel], value: Any, errors: Sequence[Any], place: Place) -> dict[Keys, Fault]:
    by_path: dict[Keys, list[Any]] = {}
    for error in errors:
        by_path.setdefault(_real(error, value), []).append(error)
    # A misspelt key is two errors for pydantic, an unknown one and a missing one: tell it once.
    unknown = {path: e for path, e in by_path.items() if e[0]["type"] == "extra_forbidden"}
    explained = set()
    for path in unknown:
        missing = [p[-1] for p, e in by_path.items() if p[:-1] == path[:-1] and e[0]["type"] == "missing"]
        close = nearest(str(path[-1]), [str(name) for name in missing], 1)
        explained.update((*path[:-1], name) for name in close)
    # So is a fault inside one member of a union: the other members complain about the whole.
    explained.update(path for path in by_path if any(len(p) > len(path) and p[: len(path)] == path for p in by_path))
    faults: dict[Keys, Fault] = {}
    for path, group in by_path.items():
        if path not in explained:
            at = place(path)
            faults[path] = Fault(_message(kind, path, value, group), at.file, at.line, at.path or path_text(path))
    return faults


def _real(error: Any, value: Any) -> Keys:
    """Return the error's path without the tags that pydantic adds for the members of a union."""
    path: list[str | int] = []
    parts = error["loc"]
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        in_list = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if in_list or (isinstance(value, dict) and part in value):
            value = value[part]
        elif isinstance(value, dict) and last and error["type"] == "missing":
            value = None
        else:
            continue  # the name of a union's member
        path.append(part)
    return tuple(path)


def _message(kind: type[BaseModel], path: Keys, value: Any, errors: Sequence[Any]) -> str:
    error = errors[0]
    if error["type"] == "extra_forbidden":
        return one_of("key", str(path[-1]), _fields(kind, path[:-1]), most=24)
    if error["type"] == "missing":
        return f"key {path[-1]!r} is missing"
    given = _written(value, path, error["input"])
    if len(errors) > 1:  # of a union's members: the one that got furthest, else all that is allowed
        further = [e for e in errors if e["type"] not in _TYPES and e["type"] not in _CHOICES]
        if not further:
            return _refused(given, [word for e in errors for word in _wanted(e)])
        error = further[0]
    what, context = error["type"], error.get("ctx", {})
    if what in _CHOICES and isinstance(given, str):
        return one_of("value", given, _choices(error))
    if what in _CHOICES or what in _TYPES:
        return _refused(given, _wanted(error))
    if what == "value_error":
        return str(context.get("error", error["msg"])).removeprefix("Value error, ")
    if what in _BOUNDS:
        word, key = _BOUNDS[what]
        return _refused(given, [f"{word} {context[key]:g}"])
    if what in ("too_short", "string_too_short"):
        return "must not be empty" if context.get("min_length", 1) == 1 else f"needs {context['min_length']} items"
    if what == "too_long":
        return f"takes at most {context['max_length']} items"
    return error["msg"]


_TYPES = {
    "int_type": ["a whole number"],
    "int_from_float": ["a whole number"],
    "float_type": ["a number"],
    "bool_type": ["true", "false"],
    "string_type": ["text"],
    "list_type": ["a list"],
    "dict_type": ["a mapping"],
    "model_type": ["a mapping"],
    "model_attributes_type": ["a mapping"],
}
_CHOICES = ("literal_error", "enum")
_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def _wanted(error: Any) -> list[str]:
    return _choices(error) if error["type"] in _CHOICES else _TYPES[error["type"]]


def _choices(error: Any) -> list[str]:
    expected = str(error.get("ctx", {}).get("expected", ""))
    return [part.strip().strip("'") for part in expected.replace(" or ", ", ").split(",")]


def _refused(given: Any, allowed: Sequence[str]) -> str:
    *some, last = dict.fromkeys(allowed)
    text = f"{', '.join(some)} or {last}" if some else last
    return f"{'empty' if given is None else f'{shown(given)} is not allowed'}; allowed: {text}"


def shown(value: Any) -> str:
    """Return a value as a person would know it again from the file, in at most 40 characters.

    >>> shown(True), shown("8/255x"), shown({"a": 1})
    ('true', "'8/255x'", 'a mapping')
    """
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = {True: "true", False: "false", None: "nothing"}.get(value) if isinstance(value, bool | None) else None
    text = text or repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _written(value: Any, path: Keys, default: Any) -> Any:
    """Return what stands in the document at `path`: pydantic tells bounds about the value as converted."""
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return default
    return value


def _fields(kind: Any, path: Keys) -> list[str]:
    """Return the fields that the schema allows at `path`."""
    for part in path:
        members = _members(kind)
        step = None
        for member in members:
            if isinstance(member, type) and issubclass(member, BaseModel) and part in member.model_fields:
                step = member.model_fields[str(part)].annotation
            elif get_origin(member) in (list, dict):
                step = get_args(member)[-1]
        if step is None:
            return []
        kind = step
    return [
        name
        for member in _members(kind)
        if isinstance(member, type) and issubclass(member, BaseModel)
        for name in (field.alias or key for key, field in member.model_fields.items())
    ]


def _members(kind: Any) -> list[Any]:
    if get_origin(kind) in (Union, types.UnionType):
        return [inner for member in get_args(kind) for inner in _members(member)]
    if hasattr(kind, "__metadata__"):  # Annotated
        return _members(kind.__origin__)
    return [kind]
