"""The part of the report that looks inside: every analysis has its table and figures, in every scheme, whatever the names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from robustlayers import report
from robustlayers.analysis import CKA, ChannelSpread, Contrast, Layer
from robustlayers.attacks import PGD, Gaussian, Linf
from robustlayers.core.random import stream
from robustlayers.data import Images
from robustlayers.report import analysis as inside
from robustlayers.report import content
from robustlayers.report.style import VARIABLES
from robustlayers.report.svg import for_page
from robustlayers.study._looks import Look, encoded
from robustlayers.study.analyses import ANALYSES
from robustlayers.study.summary import Analyzed, Summary
from robustlayers.training import snapshot

EPS = Linf(8 / 255)


def _images(count: int, seed: int) -> Images:
    draw = stream(seed, "test-inside")
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=draw, dtype=torch.uint8)
    return Images(pixels, torch.randint(0, 3, (count,), generator=draw))


_FEW = {"cka": "stem | head", "signal": "stem | stage(1)", "criticality": "stem | head", "probes": "stem | head"}
"""Layers to look at, where all of them take long and draw nothing else."""


def _look(net: Callable[..., nn.Module], one: str, other: bool, arm: str, against: str) -> Look:
    model, second = net("resnet"), net("resnet")
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.1)
    start = {name: 0.9 * value if value.is_floating_point() else value for name, value in snapshot(model).items()}
    points = [
        {
            "epoch": k,
            "phase": "main",
            "train_clean": 0.5,
            "train_robust": k / 9,
            "validation_clean": 0.5,
            "validation_robust": 0.3,
        }
        for k in (1, 2, 3)
    ]
    return Look(
        arm=arm,
        model=model,
        held_out=_images(12, 0),
        train=_images(24, 1),
        attack=PGD(EPS, steps=1),
        noise=Gaussian(EPS),
        seed=0,
        select=_FEW.get(one),
        against=against if other else "",
        other=second if other else None,
        sources={"initial": lambda: start, "random": lambda: start},
        curve=points,
        phase="main",
        nets={arm: model, against: second},
    )


@pytest.fixture(scope="module")
def found(net: Callable[..., nn.Module]) -> Callable[[str, str], list[Analyzed]]:
    """Run every analysis on a small net, as of the arms that are named."""
    cache: dict[tuple[str, bool], Any] = {}

    def make(arm: str, against: str) -> list[Analyzed]:
        made = []
        for one in ANALYSES.values():
            for pair in (False, True):
                if not (one.between if pair else one.alone or one.together):
                    continue
                if (one.name, pair) not in cache:
                    cache[one.name, pair] = one.run(_look(net, one.name, pair, "norm", "none"))
                some = cache[one.name, pair]
                made.append(
                    Analyzed(
                        analysis=one.name,
                        identity="0" * 16,
                        arm="" if one.together else arm,
                        against=against if pair else "",
                        seed=0,
                        checkpoint="best",
                        epoch=3,
                        images=12,
                        attack="pgd-1",
                        select="",
                        numbers=some.numbers,
                        payload=encoded(some.payload),
                        rows=some.rows,
                        arrays={name: tensor.numpy() for name, tensor in some.arrays.items()},
                        arms=[arm, against] if pair or one.together else [arm],
                    )
                )
        return made

    return make


@pytest.fixture(scope="module")
def parts(summary: Summary, found: Any) -> list[inside.Inside]:
    """What the report says of all of it, drawn once."""
    return inside.gather(replace(summary, analyses=found("norm", "none")))


def test_a_study_without_analyses_says_nothing_of_them(summary: Summary, page: str) -> None:
    assert content.gather(summary).inside == [] and 'id="inside"' not in page


def test_every_analysis_has_a_table_and_figures_with_how_to_read_them(parts: list[inside.Inside]) -> None:
    assert [part.name for part in parts] == list(ANALYSES)
    for part in parts:
        assert part.tables and all(len(row) == len(one.columns) for one in part.tables for b in one.blocks for row in b)
        assert part.setting.startswith("12 validation images") and part.setting.endswith("seed 0.")
        for panel in part.panels:
            assert re.match("How to read it: |Read as above", panel.caption), (part.name, panel.title)
            assert panel.drawings and all(
                one.data and len({tuple(row) for row in one.data}) == 1 for one in panel.drawings
            )
    names = [one.name for part in parts for panel in part.panels for one in panel.drawings]
    assert len(set(names)) == len(names) > 15


def test_figures_fit_a_phone_and_take_the_colors_of_the_scheme(parts: list[inside.Inside]) -> None:
    variables = {name for name, _, _ in VARIABLES.values()}
    for part in parts:
        for panel in part.panels:
            for one in panel.drawings:
                width = float(re.search(r'viewBox="[\d.]+ [\d.]+ ([\d.]+)', one.svg)[1])  # type: ignore[index]
                assert width <= 360, one.name
                shown = for_page(one.svg, one.name, "label")
                assert "var(--ink)" in shown or "var(--muted)" in shown
                assert set(re.findall(r"var\((--[\w-]+)\)", shown)) <= variables
                sizes = [float(size) for size in re.findall(r"font-size: ?([\d.]+)px", shown)]
                assert min(sizes, default=12) >= 9.5, one.name
                assert not re.search(r"(?:fill|stroke): #(?:000000|ffffff)\b", shown), (
                    f"{one.name} is lost on dark paper"
                )


def test_the_heat_map_keeps_its_marks_in_every_scheme(parts: list[inside.Inside]) -> None:
    """White lines on cividis must not become the paper's color, which is black at night."""
    named = {part.name: part for part in parts}
    assert "#fefefe" in named["cka"].panels[0].drawings[0].svg
    table = named["transplant"].panels[0].drawings[0].svg
    assert "#fefefe" in table or "#010101" in table


def test_the_line_has_both_losses_and_a_rift_says_where_its_net_lies(parts: list[inside.Inside]) -> None:
    named = {part.name: part for part in parts}
    lines = named["interpolation"].panels[0].drawings[0].svg
    assert "clean loss, nats" in lines and "robust loss, nats" in lines
    drawings = {drawing.name: drawing.caption for panel in named["rift"].panels for drawing in panel.drawings}
    place = f"analyses/rift/{'0' * 16}/tuned.safetensors"
    assert {name for name, caption in drawings.items() if place in caption} == {"inside-rift-line-norm"}


def test_the_nets_of_a_panel_share_their_scale() -> None:
    layers = (Layer("a", "conv"),)

    def contrast(value: float) -> Contrast:
        return Contrast(*(CKA(layers, layers, np.array([[one]]), None, 4, 4, "CKA") for one in (value, 0.0)))

    assert inside._shared([contrast(0.1), contrast(-0.4)]) == {"reach": 0.4}
    spreads = [ChannelSpread(layers, {"x": (np.array([low, 10 * low]),)}) for low in (0.1, 0.5)]
    low, high = inside._shared(spreads)["limits"]
    assert low == pytest.approx(0.1, rel=0.05) and high == pytest.approx(5, rel=0.05)
    axes = [one.plot(limits=(low, high)) for one in spreads]
    assert axes[0].get_xlim() == axes[1].get_xlim()
    assert inside._shared([object()]) == {}


def test_a_legend_has_as_many_columns_as_fit() -> None:
    assert inside._reach(["clean", "robust"], 2) < inside._ROOM < inside._reach(["adversarial to adversarial"] * 4, 2)


def test_names_of_the_user_are_text(summary: Summary, found: Any, tmp_path: Path) -> None:
    """Arms may be called anything: no mark-up, no formulas."""
    odd, other = '<b>$x_1$</b> & "quoted"', "a" * 80
    arms = [replace(summary.arms[0], name=odd, levels={}), replace(summary.arms[1], name=other, levels={})]
    # One of each way in which names get into figures.
    some = ("transplant", "interpolation", "norms", "overfitting", "pictures", "transfer")
    shown = [one for one in found(odd, other) if one.analysis in some or (one.analysis == "cka" and one.against)]
    made = replace(summary, arms=arms, claims=[], rows=[], factors={}, analyses=shown, pictures=None)
    page = report.write(made, tmp_path).read_text(encoding="utf-8")
    assert "<b>$x_1$</b>" not in page and "&lt;b&gt;$x_1$&lt;/b&gt;" in page
    assert "Looking inside" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_the_page_is_the_same_bytes_again(summary: Summary, found: Any, tmp_path: Path) -> None:
    some = [one for one in found("norm", "none") if one.analysis in ("interpolation", "norms", "overfitting")]
    made = replace(summary, arms=summary.arms[:2], claims=[], rows=[], factors={}, pictures=None, analyses=some)
    one, two = (report.write(made, tmp_path / name).read_bytes() for name in ("a", "b"))
    assert one == two
    text = (tmp_path / "b" / "report.md").read_text(encoding="utf-8")
    for part in inside.gather(made):
        assert part.title in text
        for panel in part.panels:
            for drawing in panel.drawings:
                assert (
                    f"(figures/{drawing.name}.svg)" in text
                    and (tmp_path / "a" / "figures" / f"{drawing.name}.csv").exists()
                )


def test_means_over_seeds_and_figures_of_the_first(summary: Summary, found: Any) -> None:
    (first,) = (one for one in found("norm", "none") if one.analysis == "overfitting")
    second = replace(first, seed=1, numbers=[{**n, "value": (n["value"] or 0) + 0.1} for n in first.numbers])
    (part,) = inside.gather(replace(summary, analyses=[first, second]))
    cells = part.tables[0].blocks[0][0]
    low = next(n for n in first.numbers if n["label"] == "last robust, validation")["value"]
    place = [column.title for column in part.tables[0].columns].index("last robust, validation")
    assert cells[place].value == pytest.approx(low + 0.05)  # type: ignore[union-attr]
    assert " to " in cells[place].note and "n = " not in cells[place].note  # type: ignore[union-attr]
    assert part.tables[0].caption == "Means over 2 seeds, with the smallest and the largest."
    lost = replace(
        second, numbers=[{**n, "value": None if n["label"] == "robust overfitting" else 0.5} for n in second.numbers]
    )
    third = replace(first, seed=2)
    (part,) = inside.gather(replace(summary, analyses=[first, lost, third]))
    place = [column.title for column in part.tables[0].columns].index("robust overfitting")
    assert part.tables[0].blocks[0][0][place].note.endswith("n = 2")  # type: ignore[union-attr]
    assert len(part.panels[0].drawings) == 1 and "figures of seed 0" in part.setting


def test_settings_stand_apart(summary: Summary, found: Any) -> None:
    (first,) = (one for one in found("norm", "none") if one.analysis == "overfitting")
    parts = inside.gather(replace(summary, analyses=[first, replace(first, checkpoint="last")]))
    assert [("checkpoint last" in part.setting) for part in parts] == [False, True]
    names = [one.name for part in parts for panel in part.panels for one in panel.drawings]
    assert len(set(names)) == len(names) == 4


def test_a_sentence_comes_from_the_docstring() -> None:
    from robustlayers.analysis import Gaps

    assert inside.how_to_read(CKA.plot).startswith("How to read it: layers in execution order")
    assert "robust overfitting is its price" in inside.how_to_read(Gaps)
    assert inside.how_to_read(int) == ""
