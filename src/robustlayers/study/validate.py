"""From a plain document to the schema's types, with every fault as one line: where, what, what is allowed, the nearest name."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from robustlayers.core.errors import Fault, UserError, nearest, one_of
from robustlayers.study.yaml import path_text

__all__ = ["Place", "validate"]

Keys = tuple[str | int, ...]
Place = Callable[[Keys], Fault]
"""`place(path in the document) -> a fault without a message that stands there`"""

Model = TypeVar("Model", bound=BaseModel)


def validate(kind: type[Model], value: Any, place: Place) -> Model:
    """Return `value` as a `kind`; all faults together are one `UserError`."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise UserError(_faults(kind, value, error.errors(include_url=False), place)) from None


def _faults(kind: type[BaseModel], value: Any, errors: Sequence[Any], place: Place) -> list[Fault]:
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
    faults = []
    for path, group in by_path.items():
        if path in explained:
            continue
        found = place(path)
        faults.append(Fault(_message(kind, path, value, group), found.file, found.line, found.path or path_text(path)))
    return faults


def _real(error: Any, value: Any) -> Keys:
    """Return the error's path without the tags that pydantic adds for the members of a union."""
    path: list[str | int] = []
    parts = error["loc"]
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        if (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        ):
            value = value[part]
        elif isinstance(value, dict) and last and error["type"] == "missing":
            value = None
        else:
            continue  # the name of a union's member
        path.append(part)
    return tuple(path)


def _message(kind: type[BaseModel], path: Keys, value: Any, errors: Sequence[Any]) -> str:
    error = errors[0]
    given = error["input"]
    what, context = error["type"], error.get("ctx", {})
    if len(errors) > 1:
        deeper = [e for e in errors if e["type"] not in ("string_type", "dict_type", "int_type", "list_type")]
        if deeper:
            error = deeper[0]
            what, context = error["type"], error.get("ctx", {})
        else:
            wanted = " or ".join(dict.fromkeys(str(_TYPES.get(e["type"], e["msg"])) for e in errors))
            return f"{_shown(given)} is not allowed; allowed: {wanted}"
    if what == "extra_forbidden":
        return one_of("key", str(path[-1]), _fields(kind, path[:-1]), most=16)
    if what == "missing":
        return f"key {path[-1]!r} is missing"
    if what in ("literal_error", "enum"):
        allowed = [
            part.strip().strip("'") for part in str(context.get("expected", "")).replace(" or ", ", ").split(",")
        ]
        return (
            one_of("value", given, allowed)
            if isinstance(given, str)
            else f"{_shown(given)} is not allowed; allowed: {', '.join(allowed)}"
        )
    if what in _TYPES:
        return f"{_shown(given)} is not allowed; allowed: {_TYPES[what]}"
    if what == "value_error":
        return str(context.get("error", error["msg"])).removeprefix("Value error, ")
    if what in _BOUNDS:
        word, key = _BOUNDS[what]
        return f"{_shown(given)} is not allowed; allowed: {word} {context[key]:g}"
    if what in ("too_short", "string_too_short"):
        return "must not be empty" if context.get("min_length", 1) == 1 else f"needs {context['min_length']} items"
    if what == "too_long":
        return f"takes at most {context['max_length']} items"
    return error["msg"]


_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def _shown(value: Any) -> str:
    text = {True: "true", False: "false", None: "nothing"}.get(value) if isinstance(value, bool | None) else repr(value)
    text = str(text)
    return text if len(text) <= 40 else f"{text[:37]}..."


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
        for name in member.model_fields
    ]


def _members(kind: Any) -> list[Any]:
    if get_origin(kind) in (Union, types.UnionType):
        return [inner for member in get_args(kind) for inner in _members(member)]
    if hasattr(kind, "__metadata__"):  # Annotated
        return _members(kind.__origin__)
    return [kind]
