"""The Markdown twin: well-formed tables, the same cells as the page, nothing of the user's that becomes markup."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt

from robustlayers.report import markdown, tables
from robustlayers.report.content import gather

HOSTILE = "a|b\n# c <script>x</script> *d* [e](http://f) `g` _h_ ~~i~~ &amp; \\"


def parse(text):
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)


def grids(tokens):
    """Tables as lists of rows of plain text."""
    found, row = [], []
    for token, after in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            row = []
        elif token.type in ("th_open", "td_open"):
            row.append("".join(part.content for part in after.children or []))
        elif token.type == "tr_close":
            found[-1].append(row)
    return found


@pytest.fixture(scope="module")
def text(folder):
    return (folder / "report.md").read_text(encoding="utf-8")


def test_tables_are_well_formed_and_hold_the_cells_of_the_page(summary, text):
    found = grids(parse(text))
    phases = sum(len(arm.phases) for arm in summary.arms)
    assert len(found) == 1 + len(summary.arms) * 2 + phases + 2
    for grid in found:
        assert len({len(row) for row in grid}) == 1
    results = tables.results(summary)
    flat = [row for block in results.blocks for row in block]
    for row, line in zip(flat, found[0][1:], strict=True):
        for cell, shown in zip(row, line, strict=True):
            assert shown == ("" if cell is None else f"{cell.text} ({cell.note})" if cell.note else cell.text)


def test_figures_exist_and_nothing_is_loaded_from_elsewhere(folder, text):
    targets = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(targets) == 2 + 6 + 1
    assert all((folder / target).is_file() for target in targets)
    assert "http" not in text
    assert not any(token.type == "html_block" for token in parse(text))


def test_the_answer_is_the_same(summary, text):
    said = gather(summary).answer
    assert said.lead in text
    for one in said.verdicts:
        assert f"**{one.claim.verdict.capitalize()}**: {markdown.inline(one.claim.say)}." in text
    for caution in said.cautions:
        assert markdown.inline(caution) in text


def test_words_of_the_user_stay_words(fake):
    plain = fake.make_summary(arms=("norm",), with_claims=False, with_curves=False)
    arm = replace(plain.arms[0], name=HOSTILE, reasons={0: HOSTILE}, status={0: "failed", 1: "finished", 2: "finished"})
    summary = replace(
        plain, arms=[arm], name=HOSTILE, question=HOSTILE, notes=[HOSTILE], pictures=None, recipe_yaml="a\n````\nb"
    )
    tokens = parse(markdown.render(gather(summary)))
    flat = " ".join(HOSTILE.split())
    shown = ["".join(part.content for part in token.children) for token in tokens if token.children]
    assert sum(flat in words for words in shown) >= 6
    kinds = {part.type for token in tokens for part in token.children or []}
    assert not kinds & {"html_inline", "link_open", "s_open"}
    assert {len({len(row) for row in grid}) for grid in grids(tokens)} == {1}
    fences = [token.content for token in tokens if token.type == "fence"]
    assert "a\n````\nb\n" in fences


@pytest.mark.parametrize(
    "start", ["# a", "- a", "1. a", "> a", "+ a", "    a", "```", "---", "===", "| a", "-5", "1.5"]
)
def test_no_text_becomes_a_block(start):
    tokens = parse(markdown.inline(start))
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    assert "".join(part.content for part in tokens[1].children or []) == start.strip()
