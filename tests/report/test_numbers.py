"""Every number in the tables of the page is derived anew from the rows, by other means than the report's own."""

from __future__ import annotations

import csv
import io
import statistics
from dataclasses import replace

import pytest

from robustlayers import report
from robustlayers.report import tables
from robustlayers.report.measured import accuracy

T = {1: 12.706205, 2: 4.302653, 3: 3.182446}  # 97.5% quantiles of Student's t, from a printed table
METRICS = ("clean", "robust", "pgd-20", "apgd-ce")


def expected(values, planned):
    """Mean ± half width in percent, as the page prints it."""
    if not values:
        return "–"
    mean = statistics.fmean(values)
    text = f"{100 * mean:.1f}%"
    if len(values) > 1:
        half = T[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
        text += f" ± {100 * half:.1f}"
    return text if len(values) == planned else f"{text} n = {len(values)} of {planned}"


def values(summary, arm, checkpoint, metric):
    return [
        row.value for row in summary.rows if (row.arm, row.checkpoint, row.metric) == (arm.name, checkpoint, metric)
    ]


@pytest.fixture(scope="module")
def grids(html, page):
    return html.Page(page).grids


def one(grids, kind, section):
    found = [grid for grid in grids if (grid.kind, grid.section) == (kind, section)]
    assert len(found) == 1
    return found[0].rows


def test_results(summary, grids):
    head, *rows = one(grids, "results", "results")
    assert head == ["Arm", "Checkpoint", "Clean", "Robust", "pgd-20", "apgd-ce", "Trained", "Passes", "Time"]
    wanted = [(arm, checkpoint) for arm in summary.arms for checkpoint in ("best", "last")]
    assert len(rows) == len(wanted)
    for (arm, checkpoint), row in zip(wanted, rows, strict=True):
        lost = " seed 1 diverged" if arm.name == "random" else ""
        numbers = [expected(values(summary, arm, checkpoint, metric), 3) for metric in METRICS]
        assert row[:6] == [arm.name + lost, checkpoint, *numbers]
        share = {
            "none": "0%",
            "norm": "0.64%",
            "head": "0.87%",
            "random": "0.64%",
            "all": "100%",
            "all-but-norm": "99.4%",
        }
        assert row[6] == f"{arm.trained_parameters:,} {share[arm.name]}"
        assert row[7] == ("90.0 k / 90.0 k" if arm.name == "none" else "450 k / 450 k")
        seconds = statistics.fmean(arm.seconds.values())
        assert row[8] == f"{round(seconds) // 60} min {round(seconds) % 60} s"


def test_sort_keys_are_the_means(summary, grids):
    grid = next(grid for grid in grids if grid.kind == "results")
    for arm, marks in zip(summary.arms, grid.marks[1::2], strict=True):
        means = [statistics.fmean(values(summary, arm, "best", metric)) for metric in METRICS]
        assert [float(mark) for mark in marks[2:6]] == pytest.approx(means, rel=1e-12)


def test_seeds(summary, grids):
    for arm in summary.arms:
        rows = one(grids, "seeds", f"arm-{arm.name}")[1:]
        assert [row[0] for row in rows] == ["0", "0", "1", "1", "2", "2"]
        for row in rows:
            seed, checkpoint = int(row[0]), row[2]
            found = {
                line.metric: line
                for line in summary.rows
                if (line.arm, line.seed, line.checkpoint) == (arm.name, seed, checkpoint)
            }
            if arm.name == "random" and seed == 1:
                assert row[1] == "diverged loss is NaN in phase adapt, epoch 12, step 31"
                assert row[3:] == ["–"] * 6
            else:
                assert row[1] == "finished"
                assert row[3] == str(found["clean"].epoch)
                assert row[4:8] == [f"{100 * found[metric].count / 2000:.2f}%" for metric in METRICS]


def test_groups_and_ledger(summary, grids):
    for arm in summary.arms:
        shown = [grid.rows[1:] for grid in grids if (grid.kind, grid.section) == ("groups", f"arm-{arm.name}")]
        assert len(shown) == len(arm.phases)
        for rows, phase in zip(shown, arm.phases, strict=True):
            for row, group in zip(rows, phase.groups, strict=True):
                assert row[:4] == [group.name, group.signal, group.start, str(len(group.tensors))]
                assert row[4].split()[0] == f"{group.parameters:,}"
                assert row[5] == f"{group.buffers:,}"
        for row in one(grids, "ledger", f"arm-{arm.name}")[1:]:
            lines = [line for line in arm.ledger if (line.phase, line.group) == (row[0], row[1])]
            assert row[2] == lines[0].signal
            assert row[3] == f"kept in {len(lines)} of {len(lines)}"
            assert row[4] == f"{lines[0].moved_parameters:,} of {lines[0].parameters:,}"
            low, high = (pick(line.relative_l2 for line in lines) for pick in (min, max))
            assert row[6] == (f"{low:#.3g} to {high:#.3g}" if high else "0")


def test_claims(summary, grids):
    rows = one(grids, "claims", "claims")[1:]
    assert len(rows) == len(summary.claims) == 10

    def signed(value):
        return f"{100 * value:+.1f}".replace("-", "−")

    for row, claim in zip(rows, summary.claims, strict=True):
        assert row[0] == f"{claim.say} {claim.that}"
        assert row[1:3] == [claim.checkpoint, claim.verdict]
        if "parameters" in claim.that:
            assert row[3] == "+74,522 not in points"
            continue
        assert row[3] == signed(statistics.fmean(claim.differences))
        assert row[4] == f"{signed(claim.low)} to {signed(claim.high)}"
        for seed, value in zip(claim.seeds, claim.differences, strict=True):
            assert f"seed {seed}: {signed(value)}" in row[6]
        if claim.verdict == "contradicted":
            assert "for the opposite" in row[6]


def test_strips_and_sentences_of_the_answer(summary, html, page):
    words = " ".join(" ".join(html.Page(page).words).split())
    for arm in summary.arms:
        robust, clean = (accuracy(arm, "best", metric) for metric in ("robust", "clean"))
        for found, metric in ((robust, "robust"), (clean, "clean")):
            some = values(summary, arm, "best", metric)
            mean, half = statistics.fmean(some), T[len(some) - 1] * statistics.stdev(some) / len(some) ** 0.5
            assert (found.low, found.high) == pytest.approx((mean - half, mean + half), rel=1e-5)
            low, high = (f"{100 * end:.1f}".replace("-", "−") for end in (mean - half, mean + half))
            assert f"{metric} {100 * mean:.1f}% (95% CI {low} to {high}, n = {len(some)})" in words
        assert f'cx="{100 * clean.mean:.2f}%"' in page
        assert f'<svg x="{100 * robust.mean:.2f}%"' in page


def test_rows_csv_is_the_rows(summary, folder):
    rows = list(csv.DictReader(io.StringIO((folder / "rows.csv").read_text(encoding="utf-8"))))
    assert len(rows) == len(summary.rows)
    for line, row in zip(rows, summary.rows, strict=True):
        assert (line["arm"], int(line["seed"]), line["metric"]) == (row.arm, row.seed, row.metric)
        assert float(line["value"]) == row.value
        assert line["factor:group"] == row.levels["group"]


def test_claims_csv_is_the_claims(summary, folder):
    rows = list(csv.DictReader(io.StringIO((folder / "claims.csv").read_text(encoding="utf-8"))))
    flat = [(c, s, d) for c in summary.claims for s, d in zip(c.seeds, c.differences, strict=True)]
    assert len(rows) == len(flat)
    for row, (claim, seed, value) in zip(rows, flat, strict=True):
        assert (row["say"], row["checkpoint"], int(row["seed"])) == (claim.say, claim.checkpoint, seed)
        assert float(row["difference"]) == value
        assert row["p"] == ("" if claim.p is None else repr(claim.p))


def test_a_diverged_seed_with_values_enters_no_mean(fake):
    # Planted: a seed that diverged after its checkpoint was measured must be shown, not averaged.
    plain = fake.make_summary(arms=("norm",), with_pictures=False, with_claims=False, with_curves=False)
    arm = plain.arms[0]
    planted = replace(arm, status={0: "finished", 1: "diverged", 2: "finished"}, reasons={1: "loss is NaN"})
    summary = replace(plain, arms=[planted])
    kept = [arm.results["best"]["robust"][seed] for seed in (0, 2)]
    cell = tables.results(summary).blocks[0][0][3]
    assert cell is not None
    assert f"{cell.text} {cell.note}" == expected(kept, 3)
    row = tables.seeds(summary, planted).blocks[1][0]
    assert [cell.note for cell in row[4:8] if cell] == ["in no mean"] * 4
    assert row[5] is not None
    assert row[5].text == f"{100 * arm.results['best']['robust'][1]:.2f}%"


def test_times_of_an_unfinished_seed_are_not_averaged(fake):
    plain = fake.make_summary(arms=("norm",), with_pictures=False, with_claims=False)
    arm = replace(plain.arms[0], status={0: "finished", 1: "missing", 2: "missing"}, seconds={0: 42.0, 1: 1e6, 2: 0.0})
    row = tables.results(replace(plain, arms=[arm])).blocks[0][0]
    assert row[-1] is not None
    assert row[-1].text == "42.0 s"
    assert row[0] is not None
    assert row[0].note == "seed 1 and 2 missing"


def test_values_that_are_not_numbers_are_named(fake, tmp_path):
    plain = fake.make_summary(arms=("norm",), with_pictures=False, with_claims=False, with_curves=False)
    arm = plain.arms[0]
    results = {**arm.results, "best": {**arm.results["best"], "robust": {0: 0.4, 1: float("nan"), 2: 0.5}}}
    written = report.write(replace(plain, arms=[replace(arm, results=results)]), tmp_path).read_text(encoding="utf-8")
    assert "checkpoint best, seed 1: a value is not a number" in written
    assert "45.0% ± 63.5" in written
    assert 'data-value="nan"' not in written
