"""Pictures in the report: arms side by side on the same images, one scale where they are compared, readable on a phone."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from robustlayers.attacks import PGD, Gaussian, Linf
from robustlayers.core.random import stream
from robustlayers.data import Images
from robustlayers.report import analysis as inside
from robustlayers.report.svg import for_page
from robustlayers.study._inside_pictures import pictures
from robustlayers.study._looks import Look, encoded
from robustlayers.study.summary import Analyzed, Summary


def _images(channels: int, seed: int = 0) -> Images:
    draw = stream(seed, "test-pictures")
    pixels = torch.randint(0, 256, (12, channels, 8, 8), generator=draw, dtype=torch.uint8)
    return Images(pixels, torch.randint(0, 3, (12,), generator=draw))


def _analyzed(model: nn.Module, arm: str, images: Images, eps: float = 8 / 255) -> Analyzed:
    threat = Linf(eps)
    found = pictures(Look(arm, model, images, images, PGD(threat, steps=1), Gaussian(threat), 0))
    arrays = {name: tensor.numpy() for name, tensor in found.arrays.items()}
    payload = encoded(found.payload)
    return Analyzed(
        "pictures",
        "0" * 16,
        arm,
        "",
        0,
        "best",
        3,
        None,
        "pgd-1",
        "",
        found.numbers,
        payload,
        found.rows,
        arrays,
        [arm],
    )


@pytest.fixture(scope="module")
def results(net: Callable[..., nn.Module]) -> list[Analyzed]:
    model = net("resnet")
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).mul_(-1)
    return [_analyzed(model, "none", _images(1)), _analyzed(other, "norm", _images(1))]


def _panels(summary: Summary, results: list[Analyzed]) -> dict[str, Any]:
    (part,) = inside.gather(replace(summary, analyses=results))
    return {panel.title: panel for panel in part.panels}


def _shown(svg: str) -> int:
    return svg.count("<image ")


def test_every_kind_has_all_arms_on_the_same_images(summary: Summary, results: list[Analyzed]) -> None:
    panels = _panels(summary, results)
    assert list(panels) == ["First filters", "Input gradients", "Perturbations", "Loss around an image"]
    assert all(panel.caption.startswith("How to read it: ") for panel in panels.values())
    filters = results[0].arrays["filters"]
    assert [one.title for one in panels["First filters"].drawings] == ["none", "norm"]
    assert [_shown(one.svg) for one in panels["First filters"].drawings] == [len(filters)] * 2
    for title in ("Input gradients", "Perturbations"):
        (drawing,) = panels[title].drawings
        assert _shown(drawing.svg) == 6 * (1 + 2)  # images, and a line for each arm
        assert {row["arm"] for row in drawing.data} == {"none", "norm"}
    assert [one.title for one in panels["Loss around an image"].drawings] == ["none", "norm"]
    for panel in panels.values():
        for one in panel.drawings:
            assert len({tuple(row) for row in one.data}) == 1, one.name


def test_pictures_fit_a_phone_in_every_scheme(summary: Summary, results: list[Analyzed]) -> None:
    for panel in _panels(summary, results).values():
        for one in panel.drawings:
            assert float(re.search(r'viewBox="[\d.]+ [\d.]+ ([\d.]+)', one.svg)[1]) <= 360  # type: ignore[index]
            shown = for_page(one.svg, one.name, "label")
            assert "var(--ink)" in shown
            assert not re.search(r"(?:fill|stroke): #(?:000000|ffffff)\b", shown), one.name
            if panel.title != "Loss around an image":
                assert "pixelated" in shown  # each pixel as it is, also where the page is enlarged


def test_the_surface_is_of_the_image_that_most_arms_get_right(summary: Summary, results: list[Analyzed]) -> None:
    right = np.zeros((2, 6), dtype=bool)
    right[0, 1] = right[:, 4] = True
    changed = [replace(one, arrays={**one.arrays, "right": row}) for one, row in zip(results, right, strict=True)]
    panel = _panels(summary, changed)["Loss around an image"]
    assert "image 5 of those above" in panel.caption and "(8/255)" in panel.caption
    image = list(dict.fromkeys(row["image"] for row in results[0].rows if row["part"] == "surface"))[4]
    assert all({row["image"] for row in one.data} == {image} for one in panel.drawings)


def test_surfaces_have_one_scale(summary: Summary, results: list[Analyzed]) -> None:
    high = {**results[1].arrays, "surfaces": results[1].arrays["surfaces"] * 0 + 400.0}
    drawings = _panels(summary, [results[0], replace(results[1], arrays=high)])["Loss around an image"].drawings
    assert all(">400</text>" in one.svg for one in drawings)


def test_marks_tell_right_from_wrong(summary: Summary, results: list[Analyzed]) -> None:
    def lines(before: bool, after: bool) -> str:
        arrays = {**results[0].arrays, "right": np.full(6, before), "right attacked": np.full(6, after)}
        return _panels(summary, [replace(results[0], arrays=arrays)])["Perturbations"].drawings[0].svg

    assert len({lines(True, True), lines(True, False), lines(False, False)}) == 3


def test_arms_with_other_images_stand_apart(summary: Summary, net: Callable[..., nn.Module]) -> None:
    model = net("resnet")
    two = [_analyzed(model, "none", _images(1)), _analyzed(model, "norm", _images(1, seed=1))]
    (part,) = inside.gather(replace(summary, analyses=two))
    names = [one.name for panel in part.panels for one in panel.drawings]
    assert len(set(names)) == len(names) == 8
    gradients = [panel for panel in part.panels if panel.title == "Input gradients"]
    assert [_shown(panel.drawings[0].svg) for panel in gradients] == [12, 12]


def test_names_of_the_user_are_text(summary: Summary, results: list[Analyzed]) -> None:
    for panel in _panels(summary, [replace(results[0], arm="<b>$x_1$</b>")]).values():
        for one in panel.drawings:
            assert "<b>$x_1$</b>" not in one.svg and "&lt;b&gt;$x_1$&lt;/b&gt;" in one.svg
