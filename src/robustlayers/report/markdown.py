"""The Markdown twin of the page: the same sentences and tables, with the figures as files beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from robustlayers.report.content import ArmContent, Content
from robustlayers.report.figures import Drawing
from robustlayers.report.tables import Cell, Table

__all__ = ["inline", "render", "table"]

_SPECIAL = re.compile(r"([\\`*_\[\]|~$#!])")


def inline(text: str) -> str:
    """Return a text of the user so that Markdown shows it as it is, on one line, also inside a table.

    >>> inline("a|b <script>\\n*c*")
    'a\\\\|b &lt;script&gt; \\\\*c\\\\*'
    """
    text = _SPECIAL.sub(r"\\\1", " ".join(text.split()))
    text = re.sub(r"^(?=[-+=])", r"\\", text)  # no list, no rule, no underlined heading
    text = re.sub(r"^(\d+)(?=[.)](?:\s|$))", r"\1\\", text)  # no numbered list
    return escape(text, quote=False)


def _fenced(text: str, language: str = "") -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    text = inline(cell.text)
    if cell.kind in ("arm", "verdict", "bad") and text:
        text = f"**{text}**"
    return f"{text} ({inline(cell.note)})" if cell.note else text


def table(one: Table) -> str:
    """Return a table in GitHub's Markdown; a place covered by a taller cell is empty."""
    heads = [inline(column.title) for column in one.columns]
    rules = ["---:" if column.numeric else "---" for column in one.columns]
    lines = [heads, rules, *([_cell(cell) for cell in row] for block in one.blocks for row in block)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n{inline(one.caption)}" if one.caption else text


def _terms(pairs: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"- {inline(term)}: {inline(text)}" for term, text in pairs)


def _image(one: Drawing) -> str:
    kind = "png" if one.png else "svg"
    return f"![{inline(one.title)}](figures/{one.name}.{kind})\n\nData: `figures/{one.name}.csv`"


def _bullets(texts: Sequence[str]) -> str:
    return "\n".join(f"- {inline(text)}" for text in texts)


def render(content: Content) -> str:
    """Return the whole report as Markdown."""
    summary, said = content.summary, content.answer
    parts = [f"# {inline(summary.name)}", f"*{inline(summary.question)}*", "## The answer", inline(said.lead)]
    if said.verdicts:
        parts.append(
            "\n".join(
                f"{number}. **{inline(one.claim.verdict.capitalize())}**: {inline(one.claim.say)}. {inline(one.text)}"
                + (f" {inline(one.elsewhere[:1].upper() + one.elsewhere[1:])}." if one.elsewhere else "")
                for number, one in enumerate(said.verdicts, start=1)
            )
        )
    if said.cautions:
        parts += ["### Read with care", _bullets(said.cautions)]
    if said.standings:
        parts += ["### Where the arms stand", inline(said.setting)]
        parts.append("\n".join(f"- **{inline(one.arm.name)}**: {inline(one.text)}" for one in said.standings))
    parts += [_terms(content.facts), "## Results", table(content.results)]
    if content.beside:
        parts += ["### Beside attacks", table(content.beside)]
    if content.tradeoff:
        parts += ["## Trade-off", *map(_image, content.tradeoff), inline(content.tradeoff[0].caption)]
    if content.curves:
        parts += ["## Learning curves", inline(content.curves_caption)]
        for one in content.curves:
            parts += [f"### {inline(one.title)}", _image(one), f"{inline(one.caption)}."]
    if content.pictures:
        parts += ["## What the attack does", inline(content.pictures.caption), _image(content.pictures)]
    if content.strength:
        parts += ["## Stronger attacks", inline(content.strength[0].caption)]
        for one in content.strength:
            parts += [f"### {inline(one.title)}", _image(one)]
    if content.loupe:
        parts += ["## Norm layers under the loupe", inline(content.loupe[0].caption)]
        for one in content.loupe:
            parts += [f"### {inline(one.title)}", _image(one)]
    if content.inside:
        parts += ["## Looking inside", *_inside(content)]
    parts.append("## Arm by arm")
    for arm in content.arms:
        parts += _arm(arm)
    if content.claims:
        parts += ["## Claims", table(content.claims), "Data: `claims.csv`"]
    parts.append("## Threats to validity")
    parts.append(_bullets(summary.notes) if summary.notes else "The study has no notes.")
    parts += ["### How it was measured", table(content.measuring), "## How to repeat it", _fenced(summary.command)]
    parts += [_terms(content.provenance[:-1]), "### The recipe as resolved", _fenced(summary.recipe_yaml, "yaml")]
    parts += ["### Files", "\n".join(f"- `{name}`: {inline(text)}" for name, text in content.files)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _inside(content: Content) -> list[str]:
    parts = []
    for part in content.inside:
        parts += [f"### {inline(part.title)}", inline(part.text), inline(part.setting), *map(table, part.tables)]
        for panel in part.panels:
            parts += [f"#### {inline(panel.title)}", inline(panel.caption)]
            parts += [text for one in panel.drawings for text in (_image(one), inline(one.caption))]
    return parts


def _arm(one: ArmContent) -> list[str]:
    parts = [f"### {inline(one.arm.name)}", inline(one.line), _terms(one.terms), table(one.seeds)]
    parts += [table(one.branches)] if one.branches else []
    for number, phase in enumerate(one.phases, start=1):
        parts += [f"#### Phase {number}: {inline(phase.phase.name)}", _terms(phase.terms), table(phase.table)]
        for group, heading in phase.groups:
            tensors = "; ".join(
                f"{name} {shape}" + (f" ({part:.2%} of its entries)" if part < 1 else "")
                for name, shape, part in group.tensors
            )
            parts.append(f"{inline(heading)}: {inline(tensors)}.")
    if one.ledger:
        parts += ["#### Ledger", table(one.ledger)]
    return parts
