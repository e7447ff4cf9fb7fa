"""What stands beside attacks: corruptions and calibration as a table, accuracy against eps and steps as figures."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from types import ModuleType

import pytest

from robustlayers import report
from robustlayers.report.figures import strength
from robustlayers.report.measured import accuracy
from robustlayers.report.tables import beside
from robustlayers.report.wording import plus_minus
from robustlayers.study.summary import Summary

EPS, STEPS = ("0", "6/255", "12/255", "0.5"), ("1", "4", "16")
METRICS = ["ece", "corrupted", *(f"corrupted:{name}" for name in ("fog", "spatter")), "corrupted:fog:3"]
METRICS += [f"sanity:eps={value}" for value in EPS] + [f"sanity:steps={value}" for value in STEPS] + ["sanity:fgsm"]


@pytest.fixture(scope="module")
def measured(summary: Summary) -> Summary:
    """The made-up study with numbers of its own in every arm, metric and seed."""

    def value(arm: int, metric: int, seed: int) -> float:
        return ((37 * arm + 11 * metric + 5 * seed) % 97) / 100

    arms = []
    for position, arm in enumerate(summary.arms):
        more = {m: {seed: value(position, k, seed) for seed in summary.seeds} for k, m in enumerate(METRICS)}
        results = {one: {**known, **more} for one, known in arm.results.items()}
        arms.append(replace(arm, results=results))
    return replace(summary, arms=arms)


def test_a_table_of_what_was_measured_beside_attacks(measured: Summary) -> None:
    table = beside(measured)
    assert table is not None
    assert [column.title for column in table.columns] == ["Measure", *(arm.name for arm in measured.arms)]
    heads = {"corrupted images, mean": "corrupted", "fog": "corrupted:fog", "spatter": "corrupted:spatter"}
    heads["calibration error"] = "ece"
    assert [block[0][0].text for block in table.blocks if block[0][0]] == list(
        heads
    )  # single severities are in rows.csv
    for block, metric in zip(table.blocks, heads.values(), strict=True):
        for cell, arm in zip(block[0][1:], measured.arms, strict=True):
            found = accuracy(arm, "best", metric)
            assert cell is not None and cell.text == plus_minus(found)
            # A seed that diverged is in no mean, and the cell says so.
            assert cell.note == ("" if found.n == len(measured.seeds) else f"n = {found.n} of {len(measured.seeds)}")
    assert any(cell and cell.note for block in table.blocks for cell in block[0])


def test_nothing_is_said_about_what_nobody_measured(summary: Summary, page: str) -> None:
    assert beside(summary) is None and strength.draw(summary) == []
    assert "Beside attacks" not in page and "Stronger attacks" not in page
    arm = summary.arms[0]
    only = replace(arm, results={"best": {**arm.results["best"], "ece": {0: 0.1, 1: 0.2}}})
    table = beside(replace(summary, arms=[only, *summary.arms[1:]]))
    assert table is not None and [len(block) for block in table.blocks] == [1]
    assert "orrupted" not in table.caption


def test_page_and_markdown_have_the_same_and_the_figures_their_numbers(
    measured: Summary, tmp_path_factory: pytest.TempPathFactory, html: ModuleType
) -> None:
    folder = report.write(measured, tmp_path_factory.mktemp("beside")).parent
    page, text = ((folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    grid = next(grid for grid in html.Page(page).grids if grid.kind == "beside")
    for row in grid.rows[1:]:
        assert f"| {row[0]} |" in text
        for cell in row[1:]:
            assert cell.replace(" n = ", " (n = ").split(" (")[0] in text
    drawn = strength.draw(measured)
    assert [one.title for one in drawn] == [arm.name for arm in measured.arms]
    for arm, one in zip(measured.arms, drawn, strict=True):
        assert f"figures/{one.name}.csv" in page and f"figures/{one.name}.svg" in text
        rows = list(csv.DictReader(io.StringIO((folder / "figures" / f"{one.name}.csv").read_text())))
        kept = [seed for seed in measured.seeds if arm.status[seed] == "finished"]
        expected = {
            (setting, value, str(seed)): arm.results["best"][f"sanity:{setting}={value}"][seed]
            for setting, some in (("eps", EPS), ("steps", STEPS))
            for value in some
            for seed in kept
        }
        assert {(r["setting"], r["value"], r["seed"]): float(r["right"]) for r in rows} == expected
        for value in (*EPS, *STEPS):
            assert f">{value}</text>" in one.svg


def test_two_drawings_are_the_same_to_the_byte_and_one_seed_or_setting_is_enough(measured: Summary) -> None:
    assert [one.svg for one in strength.draw(measured)] == [one.svg for one in strength.draw(measured)]
    arm = measured.arms[0]
    results = {"best": {"sanity:steps=1": {0: 0.5}, "sanity:eps=0.1": {0: 0.5}}}
    (one,) = strength.draw(replace(measured, arms=[replace(arm, results=results)]))
    assert len(one.data) == 2
