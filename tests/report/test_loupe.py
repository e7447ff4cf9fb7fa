"""Under the loupe: what is drawn is what the rows say, nothing is drawn twice, and the figure follows the page."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

from robustlayers import models
from robustlayers.normalization import convert
from robustlayers.normalization.report import norm_report
from robustlayers.report import loupe, style
from robustlayers.report.svg import for_file, for_page

SVG = "{http://www.w3.org/2000/svg}"
HEADS = {"Scale γ", "Shift β", "Dead channels in %", "Distance from the running statistics", "Stretch |γ| / σ"}
RATE = "Gradient by weight ‖g‖ / ‖γ‖"


def row(layer, pass_, metric, value):
    return {"layer": layer, "pass": pass_, "metric": metric, "value": value}


def made(layers=4, passes=("clean", "adversarial", "noise")):
    """Rows of a net with everything, all values different."""
    draw = np.random.default_rng(0)
    rows = []
    for place in range(layers):
        name = f"layer{1 + place // 4}.{place % 4}.bn"
        for what in ("scale", "shift"):
            spread = sorted(draw.normal(0.3, 1, 5).tolist())
            rows += [row(name, "", f"{what}_{one}", value) for one, value in zip(loupe._SPREAD, spread, strict=True)]
        rows.append(row(name, "", "dead_share", float(draw.uniform())))
        rows += [row(name, "", "lipschitz_median", 1.0 + place), row(name, "", "lipschitz_max", 9.0 + place)]
        for one in passes:
            rows.append(row(name, one, "kl_mean", float(draw.lognormal(0, 2))))
            rows.append(row(name, one, "scale_rate", float(draw.lognormal(-4, 1))))
    return [*rows, row("all", "", "dead_share", 0.375), row("all", "", "dead_threshold", 0.02)]


def texts(svg):
    return [found.text for found in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def file_of(drawing):
    return for_file(drawing.svg, drawing.title)


def marks(drawing, fill):
    """Where the markers of one color stand, in the order in which they are drawn."""
    return [
        (float(use.get("x", 0)), float(use.get("y", 0)))
        for use in ElementTree.fromstring(file_of(drawing)).iter(f"{SVG}use")
        if f"fill: {fill}" in (use.get("style") or "")
    ]


def test_marks_lie_where_the_rows_say():
    rows = made()
    drawing = loupe.draw(rows)
    assert drawing is not None
    names = list(dict.fromkeys(one["layer"] for one in rows))[:-1]
    columns = None
    for position, name in enumerate(("clean", "adversarial", "noise")):
        known = marks(drawing, style.color(position))
        legend, lines = known[:1], known[1:]
        assert len(legend) == 1 and len(lines) == 2 * len(names)
        for half, metric in ((lines[: len(names)], "kl_mean"), (lines[len(names) :], "scale_rate")):
            values = [one["value"] for one in rows if (one["pass"], one["metric"]) == (name, metric)]
            xs, ys = np.array(half).T
            columns = xs if columns is None else columns
            assert np.allclose(xs, columns, atol=0.01)
            slope, offset = np.polyfit(np.log10(values), ys, 1)
            assert slope < 0 and np.abs(slope * np.log10(values) + offset - ys).max() < 0.02
    assert columns is not None and np.ptp(np.diff(columns)) < 0.01


def test_bars_are_as_high_as_the_shares():
    rows = [row(f"bn{place}", "", "dead_share", share) for place, share in enumerate((0.1, 0.4, 0.0, 0.2))]
    drawing = loupe.draw(rows)
    assert drawing is not None
    heights = []
    for path in ElementTree.fromstring(file_of(drawing)).iter(f"{SVG}path"):
        if f"fill: {style.CLEAN}" in (path.get("style") or "") and path.get("clip-path"):
            ys = [float(y) for _, y in re.findall(r"([-\d.]+) ([-\d.]+)", path.get("d") or "")]
            heights.append(max(ys) - min(ys))
    assert np.array(heights) / heights[1] == pytest.approx([0.25, 1, 0, 0.5], abs=1e-3)


def test_what_is_said():
    drawing = loupe.draw(made(), name="loupe-x", title="An arm <b>")
    assert drawing is not None and drawing.name == "loupe-x"
    said = texts(file_of(drawing))
    assert HEADS | {RATE} <= set(said)
    assert {"clean", "adversarial", "noise", "An arm <b>", "all layers 37.5%"} <= set(said)
    assert sum(one == "clean" for one in said) == 1
    assert "|γ| under 0.02" in drawing.caption and drawing.caption.startswith("4 norm layers")
    assert [dict(one) for one in drawing.data] == made()


def test_panels_without_rows_are_left_out():
    rows = [one for one in made() if one["metric"].startswith(("scale_m", "scale_q"))]
    drawing = loupe.draw(rows)
    assert drawing is not None
    assert set(texts(file_of(drawing))) & (HEADS | {RATE}) == {"Scale γ"}
    assert "Distance" not in drawing.caption and "logarithmic" not in drawing.caption


@pytest.mark.parametrize("rows", [[], [row("all", "", "dead_share", 0.5)], [row("bn", "", "dead_share", None)]])
def test_without_layers_there_is_no_figure(rows):
    assert loupe.draw(rows) is None


def test_seeds_are_drawn_as_their_mean():
    one = made()
    other = [{**each, "value": 3 * each["value"]} for each in one]
    both, mean = loupe.draw([*one, *other]), loupe.draw([{**each, "value": 2 * each["value"]} for each in one])
    assert both is not None and mean is not None
    for position in range(3):
        assert np.allclose(marks(both, style.color(position)), marks(mean, style.color(position)), atol=0.01)


def test_passes_have_their_colors_whatever_the_order():
    rows = made(passes=("noise", "shifted", "clean"))
    drawing = loupe.draw(rows)
    assert drawing is not None
    said = [one for one in texts(file_of(drawing)) if one in ("clean", "noise", "shifted")]
    assert said == ["clean", "noise", "shifted"]


@pytest.mark.parametrize("values", [(0.0, 0.0), (0.0, 1.0), (1e-30, 1e-29), (1e-12, 1e6), (3.0, 3.0), (1e300, 1e-300)])
def test_logarithmic_axes_hold_everything(values):
    rows = [row(f"bn{place}", "clean", "kl_mean", value) for place, value in enumerate(values)]
    drawing = loupe.draw(rows)
    assert drawing is not None
    height = float(re.search(r'height="([\d.]+)"', file_of(drawing))[1])  # pyright: ignore[reportOptionalSubscript]
    points = marks(drawing, style.color(0))
    assert len(points) == 3 and all(0 < y < height for _, y in points)


@pytest.mark.parametrize(("low", "high"), [(-3.1, 1.2), (0.2, 0.9), (-12.0, 6.0), (2.05, 3.3), (-0.5, 0.5)])
def test_ticks_of_logarithmic_axes(low, high):
    found = loupe._decades(low, high)
    assert 2 <= len(found) <= 5
    assert all(low <= math.log10(factor) + exponent <= high for factor, exponent in found)


@pytest.mark.parametrize("layers", [1, 2, 16, 17, 53, 110])
def test_names_stand_apart(layers):
    names = [f"layer{1 + place // 20}.{place}.bn" for place in range(layers)]
    places = [place for place, _ in loupe._labels(names)]
    column = (loupe.WIDTH - loupe._LEFT - loupe._RIGHT) / layers
    assert all(after - before >= 0.99 * 11 / column for before, after in pairwise(places))
    assert 1 <= len(places) <= 20


def test_the_page_recolors_all_of_it():
    drawing = loupe.draw(made(20))
    assert drawing is not None
    page = for_page(drawing.svg, drawing.name, drawing.title)
    assert not re.search(r"#[0-9a-f]{6}", page)
    assert drawing.svg == loupe.draw(made(20)).svg  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("kind", ["batch", "dual", "group", "batch-at-test"])
def test_a_real_report(kind):
    model = convert(models.build("small-cnn", seed=0, width=4, channels=1, classes=3), kind)
    x, y = torch.rand(8, 1, 16, 16), torch.arange(8) % 3
    report = norm_report(model, [(x, y)])
    drawing = loupe.draw(report.rows())
    assert drawing is not None
    said = texts(file_of(drawing))
    assert {layer.name for layer in report.layers} <= set(said)
    assert ("Stretch |γ| / σ" in said) == (kind in ("batch", "dual"))


def test_a_model_that_is_a_norm_layer():
    drawing = loupe.draw(norm_report(nn.BatchNorm1d(2), [torch.rand(4, 2)]).rows())
    assert drawing is not None
    assert "the model" in texts(file_of(drawing))
