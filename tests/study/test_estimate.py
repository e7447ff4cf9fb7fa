"""The predicted time: every kind of work once, in the time that is allowed for it, and sums that add up."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from robustlayers.study import estimate as module
from robustlayers.study.cost import plan_cost
from robustlayers.study.estimate import Timed, Work, estimate, works
from robustlayers.study.plan import Plan
from robustlayers.study.run import default_workers

Plans = Callable[..., Plan]

RATES = {
    ("learning", "fp32"): 1.0,
    ("learning", "bf16"): 2.0,
    ("attacking", "fp32"): 4.0,
    ("attacking", "bf16"): 8.0,
    ("attacking", "auto"): 16.0,
}


class Clock:
    """A clock that stands still but for what is run: so many seconds an image, and so many for each run."""

    def __init__(self, image: float, run: float = 0.0) -> None:
        self.now, self.image, self.each, self.sizes = 0.0, image, run, []

    def run(self, size: int) -> None:
        self.sizes.append(size)
        self.now += self.each + self.image * size


@pytest.mark.parametrize(
    ("image", "run", "size", "runs"),
    [
        (1e-4, 0.0, 128, None),  # 13 ms a batch: repeated as often as a second allows
        (1e-6, 1e-3, 128, None),
        (0.02, 0.0, 32, 5),  # a batch would take 2.6 s: 2, 8 and 32 images take 0.84
        (0.3, 0.0, 2, 2),  # 8 images would take 2.4 s
        (60.0, 0.0, 2, 2),  # two minutes each; less is not possible
    ],
)
def test_as_many_images_are_timed_as_the_time_allows(
    monkeypatch: pytest.MonkeyPatch, image: float, run: float, size: int, runs: int | None
) -> None:
    clock = Clock(image, run)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    images, seconds = module._fastest(clock.run, 128, 1.0)
    assert images == size and seconds == pytest.approx(run + image * size)
    assert clock.sizes[:2] == [2, 2] and clock.sizes == sorted(clock.sizes)
    assert runs is None or len(clock.sizes) <= runs
    assert clock.now <= max(1.0, 4 * (run + 2 * image)) + run + image * size  # the first run is beside the time


def test_kinds_of_work_are_what_decides_a_pass(plan: Plans) -> None:
    made = plan(
        "factors.group.all={phases.adapt.precision: bf16, phases.adapt.crafting: auto, phases.adapt.batch_size: 20}",
    )
    found = {
        part: {(w.kind, w.precision, w.batch_size): n for w, n in some.items()} for part, some in works(made).items()
    }
    # Two seeds; 64 images, one epoch of pretraining, two of adapting with pgd-1 in each arm that is of its own.
    assert found["training"] == {
        ("learning", "fp32", 16): 2 * (64 * 2 + 2 * 64 * 2),
        ("attacking", "fp32", 16): 2 * 2 * 64 * 2,
        ("learning", "bf16", 20): 2 * 2 * 64 * 2,
        ("attacking", "auto", 20): 2 * 2 * 64 * 2,
    }
    assert list(found["watching"]) == list(found["measuring"]) == [("attacking", "fp32", 24)]
    cost = plan_cost(made)
    assert {part: sum(some.values()) for part, some in found.items()} == {
        "training": cost.training, "watching": cost.watching, "measuring": cost.measuring,
    }  # fmt: skip
    models = {work.model for some in works(plan("factors.group.all={model.width: 6}")).values() for work in some}
    assert len(models) == 2


def _rated(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """Let each kind of work have its rate, with nothing timed; return the list of what will be asked for."""
    asked: list[Work] = []

    def timed(work: Work, device: object, seconds: float) -> Timed:
        asked.append(work)
        wide = 100 if '"width":6' in work.model.replace(" ", "") else 1
        return Timed(work, work.batch_size, wide * RATES[work.kind, work.precision] * 2 * work.batch_size)

    monkeypatch.setattr(module, "_time", timed)
    return asked


def test_every_pass_takes_what_its_kind_takes(plan: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _rated(monkeypatch)
    made = plan("factors.group.all={phases.adapt.precision: bf16, phases.adapt.crafting: auto}")
    found = estimate(made, device="cpu", workers=1)
    cost = plan_cost(made)
    assert len(set(asked)) == len(asked) == found.kinds == len(found.timed) == 5 and found.share == 1
    learned, crafted = 2 * (64 * 2 + 2 * 64 * 2), 2 * 2 * 64 * 2  # pretraining and the arm norm, in fp32
    assert found.training == pytest.approx(learned * 1 + crafted * 4 + crafted * 2 + crafted * 16)
    assert found.watching == pytest.approx(4 * cost.watching) and found.measuring == pytest.approx(4 * cost.measuring)
    assert found.seconds == found.training + found.watching + found.measuring
    half = estimate(made, device="cpu", workers=2)
    assert half.seconds == pytest.approx(found.seconds / 2)
    assert (half.workers, half.threads) == default_workers(made, module.pick_device("cpu"), 2, None)


def test_what_is_not_timed_is_taken_as_what_is_nearest_and_said(plan: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    _rated(monkeypatch)
    monkeypatch.setattr(module, "_MOST", 2)
    made = plan(
        "factors.group.norm={}", "factors.group.all={model.width: 6}", "factors.group.none={phases.adapt.epochs: 0}"
    )
    spent = works(made)
    totals: dict[Work, float] = {}
    for some in spent.values():
        for work, passes in some.items():
            totals[work] = totals.get(work, 0) + passes
    found = estimate(made, device="cpu", workers=1)
    # Measuring has the most passes: that of both nets is timed, and stands for all else of the net that is.
    assert [one.work for one in found.timed] == sorted(totals, key=lambda work: -totals[work])[:2]
    assert {one.work.kind for one in found.timed} == {"attacking"} and len({one.work.model for one in found.timed}) == 2
    rates = {one.work.model: one.each for one in found.timed}
    assert found.seconds == pytest.approx(sum(rates[work.model] * passes for work, passes in totals.items()))
    assert found.lines()[-1].startswith(f"{len(totals) - 2} more kinds of work, {1 - found.share:.0%} of the passes")
    monkeypatch.setattr(module, "_MOST", 1)
    (only,) = estimate(made, device="cpu", workers=1).timed
    assert estimate(made, device="cpu", workers=1).seconds == pytest.approx(only.each * sum(totals.values()))


def test_no_other_kind_is_begun_when_the_time_is_up(plan: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes five seconds of the three that all of them have: two are timed, and one in any case."""
    asked, clock = _rated(monkeypatch), Clock(0.0, 5.0)
    rated = module._time

    def slow(work: Work, device: Any, seconds: float) -> Timed:
        clock.run(1)
        return rated(work, device, seconds)

    monkeypatch.setattr(module, "_time", slow)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    made = plan("factors.group.all={phases.adapt.precision: bf16}")
    found = estimate(made, device="cpu")
    assert len(asked) == len(found.timed) == 2 < found.kinds and found.share < 1
    assert len(estimate(made, device="cpu", seconds=1.0).timed) == 1


def test_it_is_quick_and_says_what_it_timed(plan: Plans) -> None:
    began = time.perf_counter()
    made = plan("factors.group.all={phases.adapt.precision: bf16, phases.adapt.crafting: auto}")
    found = estimate(made, workers=1, seconds=0.2)
    assert time.perf_counter() - began < 20
    assert found.timed and found.seconds > 0 and all(0 < one.seconds < 5 for one in found.timed)
    timed = found.lines()[: len(found.timed)]
    assert all(re.search(r"width=4 .*: [\d.e+-]+ ms for \d+ images", line) for line in timed)
    said = {str(work) for some in works(made).values() for work in some}
    assert {text.partition(",")[0] for text in said} == {
        "learning in fp32", "learning in bf16", "attacks in fp32", "attacks in the faster of fp32 and bf16",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["learning", "attacking"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_runner_goes_through_the_model_with_as_many_images_as_it_is_told(
    plan: Plans, monkeypatch: pytest.MonkeyPatch, kind: str, precision: str
) -> None:
    """Forward and backward, in the precision: what the last layer is given, and what of it has a gradient."""
    recipe = plan().arms[0].recipe
    seen: list[tuple[int, torch.dtype]] = []
    linear = torch.nn.functional.linear

    def note(x: torch.Tensor, *arguments: torch.Tensor) -> torch.Tensor:
        out = linear(x, *arguments)
        assert out.requires_grad
        out.register_hook(lambda gradient: seen.append((len(gradient), out.dtype)))
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", note)
    run = module._runner(Work(kind, "", 16, precision, recipe), precision, torch.device("cpu"))
    run(2)
    run(16)
    assert seen == [(size, torch.bfloat16 if precision == "bf16" else torch.float32) for size in (2, 16)]
