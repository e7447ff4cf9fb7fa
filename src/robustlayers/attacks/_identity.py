"""What decides an attack, as plain data: runs are named by it, so an option that came later must not disturb it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, field, fields
from typing import Any

__all__ = ["identity_of", "later"]


def later(default: Any) -> Any:
    """Make a field of a dataclass that came after results had been stored: at its default it is not in the identity."""
    return field(default=default, metadata={"later": True})


def identity_of(attack: Any, resolved: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the fields of an attack and its class as `kind`; `resolved` replaces what a default leaves open.

    The step of an attack is given as a number: another default one day must not pass for the same attack.
    """
    content = asdict(attack)
    for option in fields(attack):
        if option.metadata.get("later") and content[option.name] == option.default:
            del content[option.name]
    return {**content, **(resolved or {}), "kind": type(attack).__name__}
