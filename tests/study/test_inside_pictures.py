"""Pictures of the nets of a study: the same images in every arm, and what the plain functions make of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robustlayers import analysis
from robustlayers.core.files import read_json
from robustlayers.study._inside_pictures import SHOWN, shown
from robustlayers.study._nets import Trained, images_of
from robustlayers.study.analyses import ANALYSES
from robustlayers.study.analyze import Asked, plan_analyses, run_analyses
from robustlayers.study.analyzed import collect_analyses
from robustlayers.study.store import Store
from robustlayers.study.summary import Analyzed

ASKED = Asked(what=["pictures"])


@pytest.fixture(scope="module")
def seen(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Trained]]:
    """The finished study with the pictures of all arms."""
    place = tmp_path_factory.mktemp("pictures") / "out"
    shutil.copytree(finished, place)
    jobs = plan_analyses(Store(place), ASKED).left
    run_analyses(Store(place), jobs, lambda job, share, what: None, device="cpu")
    return Store(place), {job.subject.arm: job.subject for job in jobs}


def _found(store: Store) -> dict[str, tuple[Analyzed, Any]]:
    load = ANALYSES["pictures"].load
    return {one.arm: (one, load(one.payload, one.arrays)) for one in collect_analyses(store, read_json(store.plan))}


def test_pictures_are_those_of_the_plain_functions(seen: Any) -> None:
    store, nets = seen
    for arm, (one, found) in _found(store).items():
        model = nets[arm].build()
        validation = images_of(nets[arm].recipe)[2]
        some = validation.take(shown(validation.labels))
        assert len(some) == SHOWN and set(some.labels.tolist()) == {0, 1, 2, 3}
        plain = analysis.first_filters(model)
        assert found["filters"].layer == plain.layer and np.array_equal(found["filters"].weights, plain.weights)
        gradients = analysis.input_gradients(model, some.images, some.labels)
        assert np.array_equal(found["gradients"].images, gradients.images)
        assert np.allclose(found["gradients"].gradients, gradients.gradients, atol=1e-7)
        assert found["perturbations"].reach <= 8 / 255 + 1e-6
        for place in range(SHOWN):
            surface = found[f"surface {place}"]
            middle = len(surface.offsets) // 2
            assert surface.losses[middle, middle] == pytest.approx(gradients.losses[place], abs=1e-5)
            assert surface.offsets[-1] == pytest.approx(16 / 255)  # twice the threat of the study
        assert one.images is None
        assert {row["part"] for row in one.rows} == {"filters", "gradients", "perturbations", "surface"}


def test_all_arms_look_at_the_same_images_and_directions(seen: Any) -> None:
    found = _found(seen[0])
    first = found["none"][0].arrays["images"]
    assert all(np.array_equal(one.arrays["images"], first) for one, _ in found.values())
    places = {
        tuple(dict.fromkeys(row["image"] for row in one.rows if row["part"] == "surface")) for one, _ in found.values()
    }
    assert len(places) == 1


def test_the_number_of_images_does_not_repeat_them(seen: Any) -> None:
    for asked in (ASKED, Asked(what=["pictures"], images=12), Asked(what=["pictures"], select="conv")):
        assert not plan_analyses(seen[0], asked).left
    assert len(plan_analyses(seen[0], Asked(what=["pictures"], attack="fgsm")).left) == 3


def test_a_net_without_convolutions_has_all_but_filters(run: Callable[..., Any], tmp_path: Path) -> None:
    edits = ["model={name: mlp, width: 8}", "seeds=1", "factors.group={a: {}}", "claims=[]"]
    edits += ["phases.adapt.train={all: adversarial}"]
    run(*edits, out=tmp_path / "flat")
    store = Store(tmp_path / "flat")
    run_analyses(store, plan_analyses(store, ASKED).left, lambda job, share, what: None, device="cpu")
    ((one, found),) = _found(store).values()
    assert "filters" not in found and "gradients" in found and "surface 0" in found
    assert all(np.isfinite(values).all() for values in one.arrays.values())


def test_images_are_the_first_of_each_class_then_the_first_left() -> None:
    labels = torch.tensor([1, 1, 1, 0, 1, 2, 0])
    assert shown(labels, 3).tolist() == [0, 3, 5]
    assert shown(labels, 5).tolist() == [0, 1, 2, 3, 5]
    assert shown(labels, 2).tolist() == [0, 3]
    assert shown(labels, 99).tolist() == list(range(7))
