"""The page: one HTML file that holds everything, loads nothing, and reads well on paper, on a phone and at night."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from functools import lru_cache
from importlib import resources

import jinja2
from markupsafe import Markup

from robustlayers.report.content import Content
from robustlayers.report.figures import Drawing, strips
from robustlayers.report.measured import primary
from robustlayers.report.style import VARIABLES
from robustlayers.report.svg import for_page
from robustlayers.report.wording import share

__all__ = ["render"]


def render(content: Content) -> str:
    """Return the whole page. All words of the user are escaped; the only script is our own, named by its hash."""
    summary = content.summary
    script = _asset("page.js")
    position = {arm.name: index for index, arm in enumerate(summary.arms)}
    scale = strips.domain(summary.claims)
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            content=content,
            summary=summary,
            answer=content.answer,
            css=Markup(_variables() + _asset("page.css")),
            script=Markup(script),
            script_hash=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            gallery=content.pictures.facts["gallery"] if content.pictures else None,
            swatches={name: strips.swatch(index) for name, index in position.items()},
            standing_strips=[strips.standing_strip(one, position[one.arm.name]) for one in content.answer.standings],
            claim_strips=[strips.claim_strip(one.claim, scale) for one in content.answer.verdicts],
            claim_scale=strips.scale_strip(scale),
            standing_scale=strips.scale_strip((0.0, 1.0), percent_sign=True),
            drawing=_drawing,
            share=share,
            trades=len(content.tradeoff),
            loupe_checkpoint=primary(summary),
        )
    )


def _drawing(one: Drawing, label: str) -> Markup:
    return Markup(for_page(one.svg, one.name, label))


def _asset(name: str) -> str:
    return (resources.files("robustlayers.report") / "templates" / name).read_text(encoding="utf-8")


def _variables() -> str:
    light = "".join(f"{name}:{value};" for name, value, _ in VARIABLES.values())
    dark = "".join(f"{name}:{value};" for name, _, value in VARIABLES.values())
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
