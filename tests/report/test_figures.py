"""Figures: the numbers beside them are the numbers in them."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from robustlayers.report import style, svg
from robustlayers.report.figures import curves, labels, pictures, strips, tradeoff
from robustlayers.report.statistics import pareto

SVG = "{http://www.w3.org/2000/svg}"


def read(folder, name):
    return list(csv.DictReader(io.StringIO((folder / "figures" / f"{name}.csv").read_text(encoding="utf-8"))))


def marks(path):
    """Points of all markers in a figure: fill -> [(x, y)], large ones apart from small ones."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for use in ElementTree.parse(path).iter(f"{SVG}use"):
        look = use.get("style") or ""
        fill = re.search(r"fill: (#\w+)", look)
        edge = re.search(r"stroke: (#\w+)", look)
        key = (fill[1] if fill else "", edge[1] if edge else "")
        found.setdefault(key, []).append((float(use.get("x", 0)), float(use.get("y", 0))))
    return found


@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_tradeoff_marks_lie_where_the_csv_says(summary, folder, checkpoint):
    rows = read(folder, f"tradeoff-{checkpoint}")
    drawn = marks(folder / "figures" / f"tradeoff-{checkpoint}.svg")
    data, pixels = [], []
    for position, arm in enumerate(summary.arms):
        seeds = [row for row in rows if row["arm"] == arm.name and row["seed"] != "mean"]
        mean = next(row for row in rows if row["arm"] == arm.name and row["seed"] == "mean")
        assert len(seeds) == (2 if arm.name == "random" else 3)
        for row in seeds:
            assert float(row["clean"]) == arm.results[checkpoint]["clean"][int(row["seed"])]
            assert float(row["robust"]) == arm.results[checkpoint]["robust"][int(row["seed"])]
        large = drawn[style.color(position), style.INK]
        assert len(large) == 1
        data += [(float(row["clean"]), float(row["robust"])) for row in [*seeds, mean]]
        pixels += [*drawn[style.color(position), style.PAPER], *large]
    # Pixels must be a linear function of the data, with one scale for each axis.
    table, places = np.array(data), np.array(pixels)
    for axis in (0, 1):
        slope, offset = np.polyfit(table[:, axis], places[:, axis], 1)
        assert np.abs(slope * table[:, axis] + offset - places[:, axis]).max() < 0.01
        assert slope * (1, -1)[axis] > 0


def test_tradeoff_axes_are_the_same_for_all_checkpoints(summary):
    best, last = tradeoff.draw(summary)
    ticks = [re.findall(r">(\d+)</text>", one.svg) for one in (best, last)]
    assert ticks[0] == ticks[1]


def test_pareto_against_brute_force():
    draw = np.random.default_rng(0)
    for _ in range(50):
        known = [tuple(point) for point in draw.integers(0, 6, (8, 2)).tolist()]
        best = {one for one in known if not any(u >= one[0] and v >= one[1] and (u, v) != tuple(one) for u, v in known)}
        assert {known[position] for position in pareto(known)} == best


def test_arms_that_no_other_beats_are_marked(summary, folder):
    rows = [row for row in read(folder, "tradeoff-best") if row["seed"] == "mean"]
    for row in rows:
        beaten = any(
            float(o["clean"]) > float(row["clean"]) and float(o["robust"]) > float(row["robust"]) for o in rows
        )
        assert (row["pareto"] == "False") == beaten


def test_wide_intervals_do_not_dwarf_the_marks(fake):
    summary = fake.make_summary(arms=("none", "all"), seeds=(0, 1), with_claims=False, with_pictures=False)
    arm = summary.arms[0]
    wild = replace(arm, results={"best": {"clean": {0: 0.8, 1: 0.9}, "robust": {0: 0.1, 1: 0.3}}})
    drawing = tradeoff.draw(replace(summary, arms=[wild, summary.arms[1]], checkpoints=["best"]))[0]
    ends = [float(row[name]) for row in drawing.data for name in ("clean_low", "clean_high") if row[name] is not None]
    assert min(ends) < 0.3
    assert max(ends) > 1
    ticks = [int(tick) for tick in re.findall(r">(\d+)</text>", drawing.svg)]
    assert min(tick for tick in ticks if tick > 60) >= 65
    assert 100 in ticks or 95 in ticks


def test_no_two_arms_look_alike():
    looks = {(style.color(k), style.marker(k)) for k in range(40)}
    assert len(looks) == 40
    assert len({style.marker(k) for k in range(11)}) == 11


def test_labels_keep_off_each_other():
    draw = np.random.default_rng(1)
    for _ in range(20):
        points = [(float(x), float(y)) for x, y in draw.uniform(60, 380, (6, 2))]
        if min(np.hypot(*(np.array(points)[:, None] - np.array(points)[None]).T)[~np.eye(6, dtype=bool)]) < 25:
            continue
        bounds = labels.Box(0, 0, 440, 440)
        dots = [labels.Box(x - 5, y - 5, x + 5, y + 5) for x, y in points]
        boxes = labels.place(points, [(70, 12)] * 6, dots, bounds)
        for position, box in enumerate(boxes):
            assert bounds.x0 <= box.x0 and box.x1 <= bounds.x1 and bounds.y0 <= box.y0 and box.y1 <= bounds.y1
            for other in [*boxes[:position], *dots]:
                wide = min(box.x1, other.x1) - max(box.x0, other.x0)
                high = min(box.y1, other.y1) - max(box.y0, other.y0)
                assert wide <= 0 or high <= 0


def test_curves_csv_holds_every_point_and_the_mean_of_the_finished(summary, folder):
    for arm in summary.arms:
        rows = read(folder, f"curves-{arm.name}")
        points = [(seed, point) for seed, line in sorted(arm.curves.items()) for point in line]
        single = [row for row in rows if row["seed"] != "mean"]
        assert len(single) == len(points)
        for row, (seed, point) in zip(single, points, strict=True):
            assert (int(row["seed"]), int(row["epoch"]), row["phase"]) == (seed, point.epoch, point.phase)
            assert [float(row[name]) for name in curves.SERIES] == [getattr(point, name) for name in curves.SERIES]
        for row in rows[len(points) :]:
            whole = [
                point.validation_robust
                for seed, point in points
                if point.epoch == int(row["epoch"]) and arm.status[seed] == "finished"
            ]
            assert len(whole) == (2 if arm.name == "random" else 3)
            assert float(row["validation_robust"]) == pytest.approx(sum(whole) / len(whole), rel=1e-12)


def test_a_seed_that_stops_does_not_bend_the_mean(fake):
    arm = fake.make_summary(arms=("norm",), diverged=("norm", 0), with_pictures=False).arms[0]
    epochs = list(curves.mean_curve(arm, "validation_clean"))
    assert epochs == list(range(1, 16))
    alone = replace(arm, curves={seed: line for seed, line in arm.curves.items() if seed != 0})
    assert curves.mean_curve(arm, "train_robust") == curves.mean_curve(alone, "train_robust")


def test_epochs_without_a_measurement_are_left_out(fake):
    summary = fake.make_summary(arms=("norm",), seeds=(0, 1), with_pictures=False, with_claims=False)
    arm = summary.arms[0]
    gap = {
        seed: [replace(p, train_robust=float("nan"), validation_robust=p.validation_robust if p.epoch % 2 else float("nan"))
               for p in line]
        for seed, line in arm.curves.items()
    }  # fmt: skip
    holed = replace(arm, curves=gap)
    assert curves.mean_curve(holed, "train_robust") == {}
    assert list(curves.mean_curve(holed, "validation_robust")) == [1, 3, 5, 7, 9, 11, 13, 15]
    drawing = curves.draw(replace(summary, arms=[holed]))[0]
    assert "nan" not in drawing.svg.lower()
    assert all(row["train_robust"] is None for row in drawing.data)


def test_phases_stand_where_they_begin(summary):
    by_arm = {one.title: one for one in curves.draw(summary)}
    assert by_arm["none"].caption == "pretrain: epochs 1 to 10, shared by 6 arms"
    assert by_arm["norm"].caption == "pretrain: epochs 1 to 10, shared by 6 arms; adapt: epochs 11 to 15"
    assert ">adapt</text>" in by_arm["norm"].svg
    assert ">adapt</text>" not in by_arm["none"].svg


@pytest.mark.parametrize("channels", [1, 3])
def test_perturbation_keeps_its_sign(channels):
    natural = np.full((channels, 2, 2), 0.5, dtype=np.float32)
    moved = natural.copy()
    moved[:, 0, 0] += 0.1
    moved[:, 0, 1] -= 0.1
    moved[:, 1, 0] += 0.05
    shown = pictures.perturbation(natural, moved, 0.1)
    assert shown.shape == (2, 2, 3)
    gray = shown[1, 1]
    assert np.ptp(gray) < 1e-9
    if channels == 3:
        assert shown[0, 0] == pytest.approx(1, abs=1e-6)
        assert shown[0, 1] == pytest.approx(0, abs=1e-6)
        assert shown[1, 0] == pytest.approx(0.75, abs=1e-6)
    else:
        assert shown[0, 0] * 255 == pytest.approx([255, 176, 30], abs=1e-3)  # brighter: orange
        assert shown[0, 1] * 255 == pytest.approx([0, 78, 160], abs=1e-3)  # darker: blue
        assert shown[1, 0] == pytest.approx((shown[0, 0] + gray) / 2, abs=1e-6)


def test_pictures_csv_and_sheet(summary, folder):
    rows = read(folder, "pictures")
    shown = summary.pictures
    assert len(rows) == 6 * 8
    for row in rows:
        index, arm = int(row["image"]), row["arm"]
        change = shown.adversarial[arm][index].astype(float) - shown.natural[index]
        assert float(row["linf"]) == pytest.approx(np.abs(change).max(), abs=1e-6)
        assert row["predicted_adversarial"] == shown.predicted_adversarial[arm][index]
        assert row["right_adversarial"] == str(row["predicted_adversarial"] == row["label"])
    gallery = pictures.gallery(shown)
    assert gallery.reach == "12/255"
    assert gallery.amplification == pytest.approx(0.5 * 255 / 12, rel=1e-4)
    assert Image.open(folder / "figures" / "pictures.png").size[0] > 600


def test_pictures_that_did_not_change(fake):
    summary = fake.make_summary(arms=("norm",), with_claims=False)
    still = replace(summary.pictures, adversarial={"norm": summary.pictures.natural.copy()})
    drawing = pictures.draw(replace(summary, pictures=still))
    assert drawing is not None
    assert all(row["linf"] == 0 for row in drawing.data)


def test_claim_strips_share_a_scale_with_zero_on_it(summary):
    scale = strips.domain(summary.claims)
    ends = [end for claim in summary.claims if "parameters" not in claim.that for end in (claim.low, claim.high)]
    assert scale[0] < min(0, *ends)
    assert max(0, *ends) < scale[1] < 1
    zero = 100 * -scale[0] / (scale[1] - scale[0])
    for claim in summary.claims:
        strip = strips.claim_strip(claim, scale)
        if "parameters" in claim.that:
            assert strip == ""
            continue
        assert f'x1="{zero:.2f}%"' in strip
        middle = re.search(r'<rect x="([\d.]+)%"', strip)
        assert middle is not None
        assert float(middle[1]) == pytest.approx(100 * (claim.mean - scale[0]) / (scale[1] - scale[0]), abs=0.01)


def test_files_stand_alone(folder):
    for path in sorted((folder / "figures").glob("*.svg")):
        root = ElementTree.parse(path).getroot()
        assert root.tag == f"{SVG}svg"
        text = path.read_text(encoding="utf-8")
        assert "var(" not in text
        ids = re.findall(r'\bid="([^"]+)"', text)
        assert len(ids) == len(set(ids))
        assert set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", text)) == set(ids)
        assert not re.search(r"\d{4}-\d\d-\d\d", text)  # no date


def test_drawing_leaves_matplotlib_as_it_was(summary):
    import matplotlib

    with matplotlib.rc_context({"font.size": 31.0, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        first = tradeoff.draw(summary)[0].svg
        assert dict(matplotlib.rcParams) == before
    assert first == tradeoff.draw(summary)[0].svg


def test_words_in_a_figure_are_not_rewritten():
    with style.drawing():
        figure = style.figure(100, 50)
        figure.text(0.1, 0.5, '#0072b2 id="x" url(#y)', parse_math=False, color=style.SERIES[0])
        bare = svg.to_svg(figure)
    inside = svg.for_page(bare, "name", 'a "label" <b>')
    assert '>#0072b2 id="x" url(#y)</text>' in inside
    assert "fill: var(--series-1)" in inside
    assert 'aria-label="a &quot;label&quot; &lt;b&gt;"' in inside
