"""Similarity of layers as a study asks for it: what is compared with what, and what is kept of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from robustlayers import analysis
from robustlayers.attacks import PGD, Gaussian, Linf
from robustlayers.core.random import stream
from robustlayers.data import Images
from robustlayers.models import build
from robustlayers.study import _inside_similarity as inside
from robustlayers.study._inside_training import norms
from robustlayers.study._looks import Found, Look, encoded
from robustlayers.training import snapshot

EPS = Linf(8 / 255)


def images(count: int, seed: int) -> Images:
    draw = stream(seed, "test-similarity")
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=draw, dtype=torch.uint8)
    return Images(pixels, torch.randint(0, 3, (count,), generator=draw))


def net(seed: int) -> nn.Module:
    return build("small-cnn", seed=seed, width=4, channels=1, classes=3)


@pytest.fixture(scope="module")
def look() -> Look:
    model = net(0)
    moved = snapshot(model)
    last = [name for name in moved if name.endswith("weight")][-1]
    moved[last] = torch.randn(moved[last].shape, generator=stream(1, "test-similarity"))
    sources: dict[str, Any] = {"initial": snapshot(net(2)).copy, "random": dict, "epoch 5": moved.copy}
    return Look(
        arm="norm",
        model=model,
        held_out=images(24, 0),
        train=images(40, 1),
        attack=PGD(EPS, steps=1),
        noise=Gaussian(EPS),
        seed=0,
        sources={**sources, "end of first": snapshot(model).copy},
    )


@pytest.fixture(scope="module")
def alone(look: Look) -> Found:
    return inside.cka(look)


def part(found: Found, name: str) -> list[Any]:
    return [row for row in found.rows if row["part"] == name]


def test_a_moment_equal_to_the_net_is_one_and_a_layer_drawn_anew_is_seen(look: Look, alone: Found) -> None:
    for name in ("course", "course, attacked"):
        rows = part(alone, name)
        assert list(dict.fromkeys(row["moment"] for row in rows)) == ["initial", "epoch 5", "end of first"]
        assert all(row["similarity"] == pytest.approx(1, abs=1e-6) for row in rows if row["moment"] == "end of first")
        (*before, last) = (row["similarity"] for row in rows if row["moment"] == "epoch 5")
        assert before == pytest.approx([1] * len(before), abs=1e-6) and last < 0.99


def test_training_images_are_compared_with_as_many_held_out_ones(look: Look, alone: Found) -> None:
    x = look.train.first(24).images.float() / 255
    plain = analysis.cka(look.model, x)
    labels = {one["label"]: one["value"] for one in alone.numbers}
    assert labels["the same, training images"] == pytest.approx(plain.long_range(), abs=1e-9)
    assert labels["block, training images"] == plain.block_structure().share
    contrast = part(alone, "contrast")
    assert all(row["difference"] == pytest.approx(row["similarity"] - row["other_similarity"]) for row in contrast)
    same = part(alone, "same layer")
    attacked = {
        row["layer"]: row["similarity"] for row in part(alone, "attacked") if row["layer"] == row["other_layer"]
    }
    assert {row["layer"]: row["similarity"] for row in same if row["views"] == "held-out images"} == attacked


def test_procrustes_is_of_every_pair_with_its_baseline(look: Look, alone: Found) -> None:
    rows = part(alone, "procrustes")
    plain = analysis.procrustes(look.model, look.x, pool=True)
    assert [row["similarity"] for row in rows] == pytest.approx(plain.values.flatten().tolist(), abs=1e-9)
    assert all(0 < row["chance_95"] <= 1 for row in rows)


def test_what_chance_reaches_stands_beside_what_was_found(look: Look, alone: Found) -> None:
    between = inside.cka(replace(look, other=net(3), against="none"))
    for found, of in ((alone, "clean"), (between, "between")):
        labels = {one["label"]: one["value"] for one in found.numbers}
        floor = max(row["chance_95"] for row in part(found, of))
        assert labels["by chance, any pair"] == pytest.approx(floor) and 0 < floor < 0.9


def test_two_nets_see_nine_kinds_of_pairs(look: Look) -> None:
    other = net(3)
    found = inside.cka(replace(look, other=other, against="none"))
    layers = len(analysis.layers_of(look.model, example=look.x))
    rows = part(found, "crossing")
    assert len({(row["seen"], row["other_seen"]) for row in rows}) == 9 and len(rows) == 9 * layers
    mine, its = (
        analysis.craft(each, look.x, look.y, look.attack, generator=stream(0, "analysis", what))
        for each, what in ((look.model, "craft"), (other, "craft other"))
    )
    seen = {"clean": look.x, "for the arm": mine, "for the other": its}
    for pair in (("for the arm", "for the other"), ("for the other", "for the arm"), ("clean", "for the arm")):
        plain = analysis.cka(look.model, seen[pair[0]], other, seen[pair[1]]).diagonal()
        kept = [row["similarity"] for row in rows if (row["seen"], row["other_seen"]) == pair]
        assert kept == pytest.approx(plain.tolist(), abs=1e-6)
    back = inside.cka_load(encoded(found.payload), {name: tensor.numpy() for name, tensor in found.arrays.items()})
    assert set(back) == {"between", "by images", "crossing", "procrustes"}
    assert np.allclose(back["by images"].values["each its own attack"], back["crossing"].values[1, 2])


def test_what_is_kept_reads_back_and_every_part_of_the_work_is_declared(look: Look, alone: Found) -> None:
    back = inside.cka_load(encoded(alone.payload), {name: tensor.numpy() for name, tensor in alone.arrays.items()})
    rows = {row["layer"]: row["similarity"] for row in part(alone, "course") if row["moment"] == "epoch 5"}
    assert np.allclose(back["course"].values[1], list(rows.values()), atol=1e-6)
    differences = [row["difference"] for row in part(alone, "contrast")]
    assert np.allclose(back["contrast"].values.flatten(), differences, atol=1e-6)
    asked: list[str] = []

    def watch(name: str) -> Any:
        asked.append(name)
        return lambda what, done, total: None

    watched = replace(look, part=watch)
    inside.cka(watched)
    assert set(asked) == set(inside.cka_cost(watched))


def test_norm_layers_drift_by_what_they_moved(look: Look) -> None:
    """Planted: the running mean of one layer was moved by 3 standard deviations between two moments."""
    model = net(0)
    before = snapshot(model)
    layer = next(name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d))
    with torch.no_grad():
        model.get_submodule(layer).running_mean.add_(3.0)  # type: ignore[union-attr,operator]
    found = norms(replace(look, model=model, sources={"initial": before.copy, "random": dict}))
    moved = {row["layer"]: row["value"] for row in part(found, "drift") if row["metric"] == "kl_mean"}
    assert moved[layer] == pytest.approx(9, rel=1e-3)  # 3^2 / 2 there and back, for variances of 1
    assert all(value == 0 for name, value in moved.items() if name not in (layer, "all"))
    assert 0 < moved["all"] < moved[layer]
    assert {row["metric"] for row in part(found, "drift") if row["layer"] == layer} >= {"mean_l2", "scale_l2"}
