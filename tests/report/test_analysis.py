"""The part of the report that looks inside: every analysis has its table and figures, in every scheme, whatever the names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robustlayers import report
from robustlayers.attacks import PGD, Gaussian, Linf
from robustlayers.core.random import stream
from robustlayers.data import Images
from robustlayers.report import analysis as inside
from robustlayers.report import content, markdown
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


def _look(net: Callable[..., nn.Module], other: bool, arm: str, against: str) -> Look:
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
                    cache[one.name, pair] = one.run(_look(net, pair, "norm", "none"))
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


def test_a_study_without_analyses_says_nothing_of_them(summary: Summary, page: str) -> None:
    assert content.gather(summary).inside == [] and 'id="inside"' not in page


def test_every_analysis_has_a_table_and_figures_with_how_to_read_them(summary: Summary, found: Any) -> None:
    parts = content.gather(replace(summary, analyses=found("norm", "none"))).inside
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


def test_figures_fit_a_phone_and_take_the_colors_of_the_scheme(summary: Summary, found: Any) -> None:
    variables = {name for name, _, _ in VARIABLES.values()}
    for part in inside.gather(replace(summary, analyses=found("norm", "none"))):
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


def test_the_heat_map_keeps_its_marks_in_every_scheme(summary: Summary, found: Any) -> None:
    """White lines on cividis must not become the paper's color, which is black at night."""
    parts = {part.name: part for part in inside.gather(replace(summary, analyses=found("norm", "none")))}
    assert "#fefefe" in parts["cka"].panels[0].drawings[0].svg
    table = parts["transplant"].panels[0].drawings[0].svg
    assert "#fefefe" in table or "#010101" in table


def test_names_of_the_user_are_text(summary: Summary, found: Any, tmp_path: Path) -> None:
    """Arms may be called anything: no mark-up, no formulas."""
    odd, other = '<b>$x_1$</b> & "quoted"', "a" * 80
    arms = [replace(summary.arms[0], name=odd, levels={}), replace(summary.arms[1], name=other, levels={})]
    made = replace(summary, arms=arms, claims=[], rows=[], factors={}, analyses=found(odd, other), pictures=None)
    page = report.write(made, tmp_path).read_text(encoding="utf-8")
    assert "<b>$x_1$</b>" not in page and "&lt;b&gt;$x_1$&lt;/b&gt;" in page
    assert "Looking inside" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_the_page_is_the_same_bytes_again(summary: Summary, found: Any, tmp_path: Path) -> None:
    some = [one for one in found("norm", "none") if one.analysis in ("cka", "norms", "overfitting")]
    made = replace(summary, analyses=some)
    one, two = (report.write(made, tmp_path / name).read_bytes() for name in ("a", "b"))
    assert one == two
    text = markdown.render(content.gather(made))
    for part in content.gather(made).inside:
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
    assert "n = 2" in cells[place].note  # type: ignore[union-attr]
    assert len(part.panels[0].drawings) == 1 and "figures of seed 0" in part.setting


def test_settings_stand_apart(summary: Summary, found: Any) -> None:
    (first,) = (one for one in found("norm", "none") if one.analysis == "overfitting")
    parts = inside.gather(replace(summary, analyses=[first, replace(first, checkpoint="last")]))
    assert [("checkpoint last" in part.setting) for part in parts] == [False, True]
    names = [one.name for part in parts for panel in part.panels for one in panel.drawings]
    assert len(set(names)) == len(names) == 4


def test_a_sentence_comes_from_the_docstring() -> None:
    from robustlayers.analysis import CKA, Gaps

    assert inside.how_to_read(CKA.plot).startswith("How to read it: layers in execution order")
    assert "robust overfitting is its price" in inside.how_to_read(Gaps)
    assert inside.how_to_read(int) == ""
