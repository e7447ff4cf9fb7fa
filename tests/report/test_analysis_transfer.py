"""Transfer in the report: one heat map of all arms, means over seeds, readable with many arms, whatever their names."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from robustlayers.evaluation import CrossTable
from robustlayers.report import _analysis_transfer as transfer
from robustlayers.report import analysis as inside
from robustlayers.report.svg import for_page
from robustlayers.study.summary import Analyzed, Summary


def _result(names: list[str], seed: int = 0, right: int = 40) -> Analyzed:
    counts = {a: {b: right + (a == b) for b in names} for a in names}
    table = CrossTable(tuple(names), dict.fromkeys(names, 90), counts, 100, "pgd-1")
    rows = [{"part": "transfer", **{k: v for k, v in row.items() if k != "attack"}} for row in table.rows()]
    numbers = [{"label": "crafted on itself", "value": right / 100, "unit": "%", "note": "", "arm": a} for a in names]
    payload = {
        "names": names,
        "clean": dict(table.clean),
        "counts": {a: dict(line) for a, line in table.counts.items()},
        "total": 100,
        "attack": "pgd-1",
    }
    return Analyzed(
        "transfer", "0" * 16, "", "", seed, "best", None, 100, "pgd-1", "", numbers, payload, rows, {}, names
    )


def _texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_seeds_are_averaged_and_arms_have_a_line_each(summary: Summary) -> None:
    results = [_result(["none", "norm"], seed, right) for seed, right in ((0, 40), (1, 50))]
    (part,) = inside.gather(replace(summary, analyses=results))
    assert "seeds 0 and 1" in part.setting and "figures of" not in part.setting
    (table,) = part.tables
    assert [block[0][0].text for block in table.blocks] == ["none", "norm"]  # type: ignore[union-attr]
    assert [block[0][1].value for block in table.blocks] == [pytest.approx(0.45)] * 2  # type: ignore[union-attr]
    ((drawing,),) = (panel.drawings for panel in part.panels)
    assert "mean of 2 seeds" in part.panels[0].caption
    numbers = [text for text in _texts(drawing.svg) if re.fullmatch(r"[\d.]+", text)]
    assert sorted(numbers) == ["45.0", "45.0", "46.0", "46.0", "90.0", "90.0"]
    assert {row["seed"] for row in drawing.data} == {0, 1} and len(drawing.data) == 12


def test_sets_of_arms_stand_apart(summary: Summary) -> None:
    results = [_result(["none", "norm"], 0), _result(["none", "norm", "all"], 1)]
    (panel,) = transfer.draw(results, "")
    assert [one.name for one in panel.drawings] == ["inside-transfer-set-1", "inside-transfer-set-2"]
    assert [one.title for one in panel.drawings] == ["2 arms", "3 arms"]


@pytest.mark.parametrize(("count", "example"), [(2, "41.0"), (6, "41.0"), (7, "41"), (12, "41"), (13, ""), (24, "")])
def test_numbers_are_as_long_as_there_is_room(count: int, example: str) -> None:
    names = [f"a rather long name of arm {place}" for place in range(count)]
    (panel,) = transfer.draw([_result(names)], "")
    svg = panel.drawings[0].svg
    found = {text for text in _texts(svg) if re.fullmatch(r"[\d.]+", text)}
    if not example:
        assert {"0", "50", "100"} == found and "accuracy, %" in svg
        return
    assert found == {example, "90" + example[2:], "40" + example[2:]}
    assert float(re.search(r'viewBox="[\d.]+ [\d.]+ ([\d.]+)', svg)[1]) <= 360  # type: ignore[index]


def test_marks_stay_in_every_scheme_and_names_are_text() -> None:
    (panel,) = transfer.draw([_result(["<b>$x_1$</b>", "b"])], "")
    shown = for_page(panel.drawings[0].svg, "name", "label")
    assert "&lt;b&gt;$x_1$&lt;/b&gt;" in shown
    assert not re.search(r"(?:fill|stroke): #(?:000000|ffffff)\b", shown)
    assert "#fefefe" in shown and "#010101" in shown


def test_pooled_counts_are_means(summary: Summary) -> None:
    tables: list[Any] = [CrossTable(("a",), {"a": n}, {"a": {"a": n}}, 10, "x") for n in (2, 6)]
    found = transfer.pooled(tables)
    assert (found.accuracy("a", "a"), found.clean["a"] / found.total) == (0.4, 0.4)
