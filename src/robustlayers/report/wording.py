"""Numbers and lists as a reader wants them: percent, points, counts, durations, p values, names for files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from robustlayers.report.statistics import Interval

__all__ = [
    "NONE",
    "amount",
    "compact",
    "count",
    "duration",
    "listing",
    "n_text",
    "p_text",
    "percent",
    "plural",
    "plus_minus",
    "points",
    "sentence",
    "share",
    "slugs",
    "spread",
]

NONE = "–"  # what stands where there is no number
_MINUS = "\N{MINUS SIGN}"


def _signed(text: str) -> str:
    text = text.replace("-", _MINUS)
    return text[1:] if re.fullmatch(rf"{_MINUS}[0.]+", text) else text  # no minus before a zero


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share in [0, 1] as percent.

    >>> percent(0.41234), percent(None)
    ('41.2%', '–')
    """
    return NONE if value is None or not math.isfinite(value) else f"{_signed(f'{100 * value:.{digits}f}')}%"


def share(value: float) -> str:
    """Return a share of parameters in percent, with the digits that a small one needs.

    >>> share(0.0064), share(0.5), share(1.0), share(0.00001)
    ('0.64%', '50.0%', '100%', '<0.01%')
    """
    if value == 0 or value == 1:
        return f"{value:.0%}"
    if value < 0.0001:
        return "<0.01%"
    return percent(value, 2 if value < 0.1 else 1)


def points(value: float | None, sign: bool = True) -> str:
    """Return a difference of shares in percentage points, without the unit.

    >>> points(0.1234), points(-0.02), points(0.0001), points(0.1234, sign=False)
    ('+12.3', '−2.0', '0.0', '12.3')
    """
    if value is None or not math.isfinite(value):
        return NONE
    text = _signed(f"{100 * value:.1f}")
    return f"+{text}" if sign and not text.startswith(_MINUS) and float(text) > 0 else text


def amount(value: float | None) -> str:
    """Return a difference of anything but shares, signed.

    >>> amount(-74522.0), amount(0.125), amount(None)
    ('−74,522', '+0.125', '–')
    """
    if value is None or not math.isfinite(value):
        return NONE
    return _signed(f"{value:+,.0f}" if value == round(value) else f"{value:+,.4g}") if value else "0"


def plus_minus(found: Interval) -> str:
    """Return mean and half width of the interval of a share, in percent.

    >>> plus_minus(Interval(3, 0.5, 0.25, 0.75)), plus_minus(Interval(1, 0.5)), plus_minus(Interval(0))
    ('50.0% ± 25.0', '50.0%', '–')
    """
    return percent(found.mean) if found.half is None else f"{percent(found.mean)} ± {100 * found.half:.1f}"


def spread(found: Interval) -> str:
    """Return the sentence part for a share over seeds: mean, interval, number of seeds.

    >>> spread(Interval(3, 0.5, 0.25, 0.75)).replace("\N{NO-BREAK SPACE}", " ")
    '50.0% (95% CI 25.0 to 75.0, n = 3)'
    >>> spread(Interval(1, 0.5)), spread(Interval(0))
    ('50.0% (one seed, no interval)', 'not measured')
    """
    if found.mean is None:
        return "not measured"
    if found.low is None:
        return f"{percent(found.mean)} (one seed, no interval)"
    low, high = points(found.low, sign=False), points(found.high, sign=False)
    return f"{percent(found.mean)} (95% CI {low} to {high}, {n_text(found.n)})"


def n_text(number: int) -> str:
    """Return `n = 3` so that no line breaks within it."""
    return f"n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{number}"


def count(value: int) -> str:
    """Return a whole number with separated thousands.

    >>> count(75002)
    '75,002'
    """
    return f"{value:,}"


def compact(value: int) -> str:
    """Return a large count with three significant digits and a prefix.

    >>> compact(950), compact(90_000), compact(1_234_567), compact(999_999), compact(2_000_000_000)
    ('950', '90.0 k', '1.23 M', '1.00 M', '2.00 G')
    """
    if value < 1000:
        return str(value)
    power = min(len(str(value)) - 1, 15) // 3
    if float(f"{value / 1000**power:.3g}") >= 1000:
        power += 1
    scaled = value / 1000**power
    digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:.{digits}f} {' kMGTP'[power]}"


def duration(seconds: float) -> str:
    """Return a time in the two largest units that matter.

    >>> duration(4.24), duration(65), duration(7380), duration(200_000)
    ('4.2 s', '1 min 5 s', '2 h 3 min', '2 d 7 h')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, size, small, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {small}"
    return f"{whole} s"


def p_text(value: float | None) -> str:
    """Return a p value the way it is printed: two significant digits, or below a bound.

    >>> [p_text(value).replace("\N{NO-BREAK SPACE}", " ") for value in (0.0312, 0.00001, 0.06, 0.0086, 0.5, 1.0, None)]
    ['p = 0.031', 'p < 0.001', 'p = 0.060', 'p = 0.0086', 'p = 0.50', 'p = 1.0', 'no test']
    """
    if value is None or not math.isfinite(value):
        return "no test"
    digits = 2 if value >= 0.0995 else 3 if value >= 0.00995 else 4
    text = "p < 0.001" if value < 0.001 else "p = 1.0" if value > 0.995 else f"p = {value:.{digits}f}"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def plural(number: int, one: str, many: str = "") -> str:
    """Return a count with its noun.

    >>> plural(1, "seed"), plural(2, "seed"), plural(2, "pass", "passes")
    ('1 seed', '2 seeds', '2 passes')
    """
    return f"{count(number)} {one if number == 1 else many or one + 's'}"


def listing(words: Iterable[object]) -> str:
    """Return an enumeration.

    >>> listing(["a"]), listing(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    texts = [str(word) for word in words]
    return " and ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else "".join(texts)


def sentence(text: str) -> str:
    """Return a part of a sentence as a whole one, typeset: no line breaks within `n = 3`, real minus signs.

    >>> sentence("difference -1.5 points, n = 3").replace("\N{NO-BREAK SPACE}", "_")
    'Difference −1.5 points, n_=_3.'
    """
    text = re.sub(r"\b([np]) ([=<]) (?=\d)", "\\1\N{NO-BREAK SPACE}\\2\N{NO-BREAK SPACE}", " ".join(text.split()))
    text = re.sub(r"(?<![\w-])-(?=\d)", _MINUS, text)
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def slugs(names: Sequence[str]) -> list[str]:
    """Return one distinct file name part per name: lower-case ASCII letters, digits and hyphens.

    >>> slugs(["norm, wide", "Norm wide", "<b>"])
    ['norm-wide', 'norm-wide-2', 'b']
    """
    found: list[str] = []
    for name in names:
        stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:48].strip("-") or "arm"
        slug, copy = stem, 1
        while slug in found:
            copy += 1
            slug = f"{stem}-{copy}"
        found.append(slug)
    return found
