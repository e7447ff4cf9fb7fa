"""Identity by content: the SHA-256 of a canonical text, so that equal descriptions have equal names everywhere."""

from __future__ import annotations

import hashlib
import json
from typing import Any

__all__ = ["canonical", "digest"]


def canonical(value: Any) -> str:
    """Return the one JSON text of `value`: keys sorted, no white space, shortest round-trip numbers, no NaN.

    >>> canonical({"b": 1, "a": [0.1, None]})
    '{"a":[0.1,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: Any, length: int = 64) -> str:
    """Return the first `length` hexadecimal digits of the SHA-256 of the canonical text of `value`.

    >>> digest({"a": 1, "b": 2}, 12) == digest({"b": 2, "a": 1}, 12)
    True
    """
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:length]
