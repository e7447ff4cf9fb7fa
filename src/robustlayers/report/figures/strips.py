"""Small strips for lists: where an arm stands between 0 and 100%, and where a difference lies around zero.

They are SVG whose positions are percentages of the width, so they stretch with the page while their marks stay round.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from robustlayers.report import style
from robustlayers.report.answer import Standing, in_points
from robustlayers.report.statistics import Interval, reach
from robustlayers.report.wording import percent, points
from robustlayers.study.summary import ClaimResult

__all__ = ["claim_strip", "domain", "scale_strip", "standing_strip", "swatch"]

_MIDDLE = 11  # of a strip 22 units high


def swatch(position: int, size: float = 11) -> Markup:
    """Return the mark of the arm at `position`, to stand before its name."""
    return Markup(
        f'<svg class="swatch" width="{size:g}" height="{size:g}" viewBox="0 0 11 11" aria-hidden="true">'
        f'<path d="{style.marker_path(style.marker(position), 11)}" fill="{_paint(position)}"/></svg>'
    )


def _paint(position: int) -> str:
    return f"var({style.VARIABLES[style.color(position)][0]})"


def _line(x0: float, x1: float, paint: str, width: float, more: str = "") -> str:
    return (
        f'<line x1="{100 * x0:.2f}%" x2="{100 * x1:.2f}%" y1="{_MIDDLE}" y2="{_MIDDLE}" stroke="{paint}" '
        f'stroke-width="{width:g}"{more}/>'
    )


def _tick(x: float, reach: float, paint: str = "var(--rule)") -> str:
    return (
        f'<line x1="{100 * x:.2f}%" x2="{100 * x:.2f}%" y1="{_MIDDLE - reach:g}" y2="{_MIDDLE + reach:g}" '
        f'stroke="{paint}" stroke-width="1"/>'
    )


def _strip(inside: Sequence[str], label: str) -> Markup:
    return Markup(f'<svg class="strip" role="img" aria-label="{{}}">{"".join(inside)}</svg>').format(label)


def _bar(found: Interval, paint: str) -> str:
    if found.low is None or found.high is None:
        return ""
    return _line(max(found.low, 0), min(found.high, 1), paint, 7, ' opacity="0.35"')


def standing_strip(one: Standing, position: int) -> Markup:
    """Return robust (the arm's mark) and clean accuracy (a ring) of an arm on a scale from 0 to 100%."""
    inside = [_line(0, 1, "var(--rule)", 1), *(_tick(x, 4) for x in (0, 0.25, 0.5, 0.75, 1))]
    clean, robust = one.clean, one.robust
    if clean.mean is not None and robust.mean is not None:
        inside.append(_line(robust.mean, clean.mean, "var(--muted)", 1.5))
    inside += [_bar(clean, "var(--clean)"), _bar(robust, _paint(position))]
    if clean.mean is not None:
        inside.append(
            f'<circle cx="{100 * clean.mean:.2f}%" cy="{_MIDDLE}" r="4.5" fill="var(--paper)" '
            'stroke="var(--clean)" stroke-width="2"/>'
        )
    if robust.mean is not None:
        path = style.marker_path(style.marker(position), 14)
        inside.append(
            f'<svg x="{100 * robust.mean:.2f}%" y="{_MIDDLE}" width="1" height="1" overflow="visible"><path d="{path}" '
            f'transform="translate(-7 -7)" fill="{_paint(position)}" stroke="var(--ink)" stroke-width="1"/></svg>'
        )
    return _strip(inside, f"robust {percent(robust.mean)}, clean {percent(clean.mean)}, on a scale from 0 to 100%")


def domain(claims: Sequence[ClaimResult]) -> tuple[float, float]:
    """Return the common scale of all claim strips: it holds zero, every difference, and the intervals near them."""
    told = [claim for claim in claims if in_points(claim)]
    low, high = reach(
        [0.0, *(value for claim in told for value in claim.differences)],
        [end for claim in told for end in (claim.low, claim.high) if end is not None],
    )
    pad = 0.04 * (high - low) or 0.01
    return low - pad, high + pad


def scale_strip(scale: tuple[float, float], percent_sign: bool = False) -> Markup:
    """Return the round numbers of a scale, in percent or percentage points, at their places above the strips."""
    low, high = scale
    inside = []
    for tick in style.ticks(100 * low, 100 * high, 5):
        text = f"{tick:g}%" if percent_sign else points(tick / 100).removesuffix(".0")
        place = (tick / 100 - low) / (high - low)
        side = "start" if place < 0.03 else "end" if place > 0.97 else "middle"
        inside.append(f'<text x="{100 * place:.2f}%" y="15" text-anchor="{side}" fill="currentColor">{text}</text>')
    return Markup(f'<svg class="strip">{"".join(inside)}</svg>')


def claim_strip(claim: ClaimResult, scale: tuple[float, float]) -> Markup:
    """Return the difference of a claim: zero line, 95% interval, a ring per seed, the mean; nothing if not in points."""
    low, high = scale
    if not in_points(claim):
        return Markup("")

    def at(value: float) -> float:
        return (value - low) / (high - low)

    inside = [_line(0, 1, "var(--rule)", 1), _tick(at(0.0), 9, "var(--muted)")]
    if claim.low is not None and claim.high is not None:
        inside.append(_line(max(at(claim.low), 0), min(at(claim.high), 1), "var(--ink)", 7, ' opacity="0.25"'))
    inside += [
        f'<circle cx="{100 * at(value):.2f}%" cy="{_MIDDLE}" r="2.2" fill="var(--paper)" stroke="var(--ink)"/>'
        for value in claim.differences
    ]
    if claim.mean is not None:
        inside.append(
            f'<rect x="{100 * at(claim.mean):.2f}%" y="{_MIDDLE - 7}" width="3" height="14" fill="var(--ink)" '
            'transform="translate(-1.5 0)"/>'
        )
    said = f"mean difference {points(claim.mean)} points"
    if claim.low is not None:
        said += f", interval {points(claim.low)} to {points(claim.high)}"
    return _strip(inside, said)
