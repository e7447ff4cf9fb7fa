"""How far measuring is: it never goes back, ends at all of it, and each part counts by its passes."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

from robustlayers.evaluation import sanity
from robustlayers.study import measure
from robustlayers.study.course import Course
from robustlayers.study.definition import load_study
from robustlayers.study.plan import make_plan
from robustlayers.study.run import run_plan

STUDY = """\
question: How far?
data: {name: fashion-mnist-mini, validation: 0.1, train_images: 200, test_images: 24}
model: {name: small-cnn, width: 4, norm: dual}
threat: {norm: linf, eps: 20/255}
attack: pgd-1
phases:
  - name: train
    epochs: 2
    train: {all: {natural: 0.5, adversarial: 0.5}}
    batch_size: 16
    normalization: {clean: {branch: main}, adversarial: {branch: auxiliary}, craft: {branch: auxiliary}}
seeds: 1
evaluate:
  attacks: [pgd-2, {name: autoattack, steps: 3, targets: 2, queries: 10}, square-20]
  checkpoints: [last]
  corruptions: {families: [fog, shot-noise], severities: [2, 4], images: 20}
  sanity: true
  branches: true
  batch_size: 10
  monitor: {attack: fgsm, images: 30}
"""


def test_parts_count_by_their_passes_in_their_order() -> None:
    told: list[tuple[str, float]] = []
    course = Course(
        lambda what, done, of, share: told.append((what, share)), {("a", "x"): 60, ("a", "y"): 0, ("a", "z"): 40}
    )
    progress = course.part("a", "x", {"one": 20.0, "two": 40.0}.__getitem__)
    for what, done in (("one", 5), ("one", 10), ("two", 5), ("two", 10)):
        progress(what, done, 10)
    course.part("a", "y")("y", 1, 0)
    course.part("a", "z", prefix="z: ")("rest", 1, 4)
    assert told == [
        ("a, one", 0.1),
        ("a, one", 0.2),
        ("a, two", 0.4),
        ("a, two", 0.6),
        ("a, y", 0.6),
        ("a, z: rest", pytest.approx(0.7)),
    ]


def test_it_never_goes_back_nor_beyond_its_part_whatever_is_told() -> None:
    course = Course(lambda *_: None, {("a", "x"): 50, ("a", "y"): 50})
    first = course.part("a", "x", lambda what: 30.0)
    seen = []
    for what, done in (("one", 10), ("one", 3), ("two", 20), ("three", 10), ("four", 10)):
        first(what, done, 10)
        seen.append(course.share)
    assert seen == [0.3, 0.3, 0.5, 0.5, 0.5]
    course.part("a", "y")("y", 1, 1)
    course.part("a", "x")("x", 0, 1)
    assert course.share == 1.0


def test_a_measurement_advances_in_small_steps_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "sanity", partial(sanity, steps=10, queries=20))
    (tmp_path / "s.yaml").write_text(STUDY)
    plan = make_plan(load_study(tmp_path / "s.yaml"))
    events = []
    run_plan(plan, tmp_path / "out", workers=1, threads=1, on_event=events.append)
    told = [event.facts for event in events if event.kind == "batch" and event.key.startswith("measure")]
    shares = [facts["share"] for facts in told]
    assert shares == sorted(shares) and 0.9 < shares[-1] <= 1
    steps = [after - before for before, after in zip([0.0, *shares], shares, strict=False)]
    others = [step for step, facts in zip(steps, told, strict=True) if not re.search("sanity|branches", facts["what"])]
    assert max(others) < 0.1  # the short check for sanity leaves a rest to what is after it
    texts = list(dict.fromkeys(facts["what"] for facts in told))
    order = ["clean", "pgd-2", "square-20", "apgd-ce-3", "fab-t-3", "flags", "fog 2", "sanity: fgsm"]
    order += ["branches: pgd-2 on main", "branches: square-20 on auxiliary", "calibration", "norm layers"]
    places = [texts.index(f"last, {what}") for what in order]
    assert places == sorted(places)
