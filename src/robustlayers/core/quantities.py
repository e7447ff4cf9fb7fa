"""Numbers as the field writes them: pixel units of [0, 1] given as `8/255`, and their way back to text."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from robustlayers.core.errors import UserError

__all__ = ["number", "pixels_text"]

# Bounded, since exact arithmetic on 1e999999999 would take all memory.
_EXPONENT = r"(?:[eE][+-]?[0-9]{1,4})?"
_LONGEST = 100
_NUMBER = rf"[0-9]+(?:\.[0-9]*)?{_EXPONENT}|\.[0-9]+{_EXPONENT}"
_RATIO = re.compile(rf"^\s*([+-]?(?:{_NUMBER}))\s*(?:/\s*({_NUMBER})\s*)?$")


def number(value: float | int | str, what: str = "value") -> float:
    """Return a finite float from a number, `8/255` or `1e-3`; anything else is a `UserError` that says what is allowed.

    >>> number("8/255") == 8 / 255
    True
    >>> number("2/225x", "eps")
    Traceback (most recent call last):
        ...
    robustlayers.core.errors.UserError: eps: '2/225x' is not a number; write 0.03 or 8/255
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UserError(f"{what}: {value!r} is not a number; write 0.03 or 8/255")
    if isinstance(value, str):
        match = _RATIO.match(value) if len(value) <= _LONGEST else None
        if match is None:
            raise UserError(f"{what}: {value!r} is not a number; write 0.03 or 8/255")
        bottom = Fraction(match[2]) if match[2] else Fraction(1)
        if bottom == 0:
            raise UserError(f"{what}: {value!r} divides by zero")
        value = _float(Fraction(match[1]) / bottom)
    value = _float(value)
    if not math.isfinite(value):
        raise UserError(f"{what}: {value} is not finite")
    return value


def pixels_text(value: float) -> str:
    """Return a length in pixel units the way the field writes it: as k/255 where that is exact, else four digits.

    >>> pixels_text(8 / 255), pixels_text(0.5 / 255), pixels_text(0.3)
    ('8/255', '0.5/255', '0.3')
    """
    steps = value * 255
    if round(steps * 10) != 0 and abs(steps * 10 - round(steps * 10)) < 1e-6 and float(f"{value:.3g}") != value:
        return f"{round(steps * 10) / 10:g}/255"
    return f"{value:.4g}"


def _float(value: float | Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf
