"""Figures across arms of what changes in training: gaps, the best epoch against the last, drift, effective rates."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest

from robustlayers.analysis import gaps
from robustlayers.report import _analysis_changes as changes
from robustlayers.report import _analysis_norms as norms
from robustlayers.report import _analysis_overfitting as overfitting
from robustlayers.report import style
from robustlayers.report.svg import to_svg
from robustlayers.study._inside_training import overfitting as found_overfitting
from robustlayers.study._looks import Look, encoded
from robustlayers.study.summary import Analyzed, LedgerLine, Summary


def curve(*robust: float, last: float = 0.9) -> list[dict[str, Any]]:
    """Return a curve whose robust accuracy on training images rises to `last`, in two phases."""
    count = len(robust)
    return [
        {
            "epoch": k + 1,
            "phase": "first" if k < 2 else "main",
            "train_clean": 0.9,
            "train_robust": 0.4 + (last - 0.4) * k / (count - 1),
            "validation_clean": 0.7 + 0.01 * k,
            "validation_robust": value,
        }
        for k, value in enumerate(robust)
    ]


def analyzed(arm: str, points: list[dict[str, Any]]) -> Analyzed:
    look = Look(arm, None, None, None, None, None, 0, curve=points, phase="main")  # type: ignore[arg-type]
    found = found_overfitting(look)
    payload, rows = encoded(found.payload), found.rows
    return Analyzed("overfitting", "0" * 16, arm, "", 0, "last", 5, None, "pgd-1", "", found.numbers, payload, rows)


def test_a_planted_overfitting_is_found_and_drawn_for_its_arm_alone(summary: Summary) -> None:
    one, two = (arm.name for arm in summary.arms[:2])
    bad, good = curve(0.3, 0.4, 0.5, 0.45, 0.4), curve(0.3, 0.4, 0.45, 0.48, 0.5, last=0.6)
    assert gaps(bad, phase="main").robust_overfitting == pytest.approx(0.1)
    shown = [analyzed(one, bad), analyzed(two, good)]
    labels = [{number["label"]: number["value"] for number in result.numbers} for result in shown]
    assert labels[0]["robust overfitting"] == pytest.approx(0.1) and labels[1]["robust overfitting"] == 0
    assert labels[0]["robust gap, last"] == pytest.approx(0.5) and labels[1]["robust gap, last"] == pytest.approx(0.1)
    panels = overfitting.draw(summary, shown, "")
    assert [panel.title for panel in panels] == ["Train minus validation", "Best against last"]
    gap_rows = panels[0].drawings[0].data
    assert [row["robust_gap"] for row in gap_rows if row["arm"] == one][-1] == pytest.approx(0.5)
    assert {row["arm"] for row in gap_rows} == {one, two}
    with style.drawing():
        figure = overfitting._gaps(shown, {one: 0, two: 1})
    lines = {line.get_label(): line for line in figure.axes[0].lines if line.get_label() in (one, two)}
    assert list(lines[one].get_ydata()) == pytest.approx([30, 40, 50, 45, 40])  # type: ignore[arg-type]
    (begin,) = {line.get_xdata()[0] for line in figure.axes[0].lines if line.get_label().startswith("_")}  # type: ignore[index,union-attr]
    assert begin == 2.5  # where the second phase begins
    with style.drawing():
        (axes,) = overfitting._ends(shown, {one: 0, two: 1}).axes
    pairs = [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]  # type: ignore[arg-type]
    assert any(pair == pytest.approx([50, 40]) for pair in pairs) and any(
        pair == pytest.approx([50, 50]) for pair in pairs
    )


def drift_rows(arm: str, values: dict[str, float]) -> list[dict[str, Any]]:
    moments = ["initial", *values]
    rows = []
    for before, moment in itertools.pairwise(moments):
        for layer in ("bn", "all"):
            for since in dict.fromkeys((before, "initial")):
                row = {"arm": arm, "part": "drift", "moment": moment, "since": since, "layer": layer}
                rows.append({**row, "metric": "kl_mean", "value": values[moment]})
    return rows


def test_drift_is_drawn_over_moments_and_by_layer_and_what_is_frozen_lies_at_the_lower_edge() -> None:
    rows = drift_rows("moves", {"epoch 5": 0.5, "now": 2.0}) + drift_rows("frozen", {"epoch 5": 0.0, "now": 0.0})
    moments = {arm: ["initial", "epoch 5", "now"] for arm in ("moves", "frozen")}
    with style.drawing():
        figure = changes.drift(["moves", "frozen"], {"moves": 0, "frozen": 1}, moments, ["bn"], rows)
        text = to_svg(figure)
    since, step, layers = figure.axes
    found = {line.get_label(): list(line.get_ydata()) for line in since.lines}  # type: ignore[arg-type]
    assert found == {"moves": [0.5, 2.0], "frozen": [2e-6, 2e-6]}
    assert [list(line.get_ydata()) for line in layers.lines] == [[2.0], [2e-6]]  # type: ignore[arg-type]
    assert step.get_xticklabels()[-1].get_text() == "now"
    width = float(re.search(r'viewBox="[\d.]+ [\d.]+ ([\d.]+)', text)[1])  # type: ignore[index]
    assert width <= 360


def test_effective_rates_are_means_over_seeds_of_what_was_updated(summary: Summary) -> None:
    arm = summary.arms[0]

    def line(seed: int, group: str, rate: float | None) -> LedgerLine:
        return LedgerLine(seed, "main", group, "adversarial", 1, 0, 1, 0, 0.1, 0.1, True, effective_lr=rate)

    ledger = [line(0, "norm", 0.01), line(1, "norm", 0.03), line(0, "rest", None), line(1, "rest", float("nan"))]
    made = replace(summary, arms=[replace(arm, ledger=ledger), *summary.arms[1:]])
    rows = changes.rates_of(made, [arm.name])
    assert rows == [
        {"arm": arm.name, "phase": "main", "group": "norm", "seeds": 2, "effective_lr": pytest.approx(0.02)}
    ]
    with style.drawing():
        (axes,) = changes.rates([arm.name], {arm.name: 0}, rows).axes
    assert axes.lines[0].get_xdata()[0] == pytest.approx(0.02) and axes.get_xscale() == "log"  # type: ignore[index]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["main: norm"]
    assert changes.rates_of(replace(summary, arms=[replace(arm, ledger=[])]), [arm.name]) == []


def test_the_other_figures_of_norm_layers_do_not_take_drift_for_a_pass(summary: Summary) -> None:
    arm = summary.arms[0].name
    values = [
        {"part": "norm layers", "moment": moment, "layer": layer, "pass": "clean", "metric": "kl_mean", "value": 0.1}
        for moment in ("initial", "now")
        for layer in ("bn", "all")
    ]
    rows = values + [{k: v for k, v in row.items() if k != "arm"} for row in drift_rows(arm, {"now": 0.5})]
    result = Analyzed("norms", "0" * 16, arm, "", 0, "last", 5, 10, "pgd-1", "", [], {}, rows)
    panels = norms.draw(summary, [result], "")
    assert [panel.title for panel in panels][:3] == ["Layer by layer", "Over time", "Drift of the statistics"]
    for panel in panels:
        assert all(len({tuple(row) for row in one.data}) == 1 for one in panel.drawings)
