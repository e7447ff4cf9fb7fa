"""How long a plan will take on this machine: a pass of each kind of work is timed in a few seconds, and multiplied.

Kinds of work are forward and backward passes that are learned from, in the precision of a phase, and those for the images'
gradient, in the precision of its crafting or of measuring, each for a model, a shape of images and a batch size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

import torch
from torch.nn import functional

from robustlayers.core.device import pick_device
from robustlayers.core.identity import canonical
from robustlayers.normalization import crafting_forward
from robustlayers.selection import Partition
from robustlayers.study.cost import measuring_parts, phase_cost
from robustlayers.study.describe import model_text
from robustlayers.study.plan import PhaseNode, Plan
from robustlayers.study.run import default_workers
from robustlayers.study.schema import Recipe
from robustlayers.study.semantics import build_model, data_of
from robustlayers.training import PartialStep

__all__ = ["Estimate", "Timed", "Work", "estimate", "works"]

_MOST = 24  # kinds of work that are timed
_SECONDS = 3.0  # for all of them, about; after twice as long no other one is begun
_START = 2  # images of the first, untimed, run: batch norm needs two


@dataclass(frozen=True)
class Work:
    """A kind of work: `learning`, from a batch in a precision, or `attacking`, the gradient for the images of a batch."""

    kind: str
    model: str  # name, options and data, which decide it
    batch_size: int
    precision: str
    recipe: Recipe = field(compare=False, repr=False)

    def __str__(self) -> str:
        what = "learning" if self.kind == "learning" else "attacks"
        precision = "the faster of fp32 and bf16" if self.precision == "auto" else self.precision
        return f"{what} in {precision}, {model_text(self.recipe)}"


@dataclass(frozen=True)
class Timed:
    """The fastest run of a kind of work: a forward and a backward pass of so many images."""

    work: Work
    images: int
    seconds: float

    @property
    def each(self) -> float:
        """Seconds of one pass of one image."""
        return self.seconds / (2 * self.images)

    def __str__(self) -> str:
        whole = "" if self.images == self.work.batch_size else f" (of a batch of {self.work.batch_size})"
        return f"{self.work}: {1000 * self.seconds:.3g} ms for {self.images} images{whole}"


@dataclass(frozen=True)
class Estimate:
    """Expected seconds of a study, by what they are spent on, and what was timed for it."""

    training: float
    watching: float
    measuring: float
    workers: int
    threads: int
    timed: tuple[Timed, ...]
    kinds: int  # of work there are
    share: float  # of the passes, whose kind of work was timed

    @property
    def seconds(self) -> float:
        """All of it, with the work shared evenly among the workers."""
        return self.training + self.watching + self.measuring

    def lines(self) -> list[str]:
        """Return in words what was timed."""
        lines = [str(timed) for timed in self.timed]
        if self.kinds > len(self.timed):
            lines.append(
                f"{self.kinds - len(self.timed)} more kinds of work, {1 - self.share:.0%} of the passes, were not timed: "
                "taken as the nearest of these (the same model and kind, the same model, or the mean)"
            )
        return lines


def estimate(plan: Plan, device: str = "auto", workers: int | None = None, seconds: float = _SECONDS) -> Estimate:
    """Return the expected time of a whole study; timing takes about so many seconds, beside building the models.

    Every kind of work is timed, those with the most passes first, no more than 24, and none after twice that time. A batch
    that would take too long is timed on fewer images. `crafting: auto` counts as the faster of both precisions. Rough:
    several workers are taken to share the work evenly, a phase that trains only late layers is faster, and passes are
    counted at most.
    """
    where = pick_device(device)
    count, threads = default_workers(plan, where, workers, None)
    spent = works(plan)
    totals: dict[Work, float] = {}
    for work, passes in (item for part in spent.values() for item in part.items()):
        totals[work] = totals.get(work, 0.0) + passes
    chosen = sorted(totals, key=lambda work: totals[work], reverse=True)[:_MOST]
    timed: list[Timed] = []
    before, began = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(threads)
    try:
        for work in chosen:
            if not timed or time.perf_counter() - began < 2 * seconds:
                timed.append(_time(work, where, seconds / len(chosen)))
    finally:
        torch.set_num_threads(before)
    parts = {
        part: sum(passes * _each(work, timed, totals) for work, passes in found.items()) / count
        for part, found in spent.items()
    }
    share = sum(totals[one.work] for one in timed) / max(1.0, sum(totals.values()))
    return Estimate(**parts, workers=count, threads=threads, timed=tuple(timed), kinds=len(totals), share=share)


def works(plan: Plan) -> dict[str, dict[Work, float]]:
    """Return the passes of single images of a study over all seeds: `training`, `watching`, `measuring` -> work -> passes."""
    spent: dict[str, dict[Work, float]] = {"training": {}, "watching": {}, "measuring": {}}

    def add(part: str, work: Work, passes: float) -> None:
        if passes:
            spent[part][work] = spent[part].get(work, 0.0) + passes * len(plan.study.seeds)

    for node in plan.nodes.values():
        cost, phase = phase_cost(node), node.phase
        if phase.kind == "train":
            add("training", _work("learning", node.recipe, phase.batch_size, phase.precision, node), cost.learned)
            add("training", _work("attacking", node.recipe, phase.batch_size, phase.crafting, node), cost.crafted)
        else:
            work = _work("attacking", node.recipe, phase.batch_size, "fp32", node)
            add("training", work, cost.learned + cost.crafted)
        add("watching", _measuring(node.recipe), cost.watched)
    for recipe in {arm.run: arm.recipe for arm in plan.arms}.values():
        passes = len(recipe.evaluate.checkpoints) * sum(part.passes for part in measuring_parts(recipe))
        add("measuring", _measuring(recipe), passes)
    return spent


def _measuring(recipe: Recipe) -> Work:
    return _work("attacking", recipe, min(recipe.evaluate.batch_size, len(data_of(recipe.data)[3])), "fp32")


def _work(kind: str, recipe: Recipe, batch_size: int, precision: str, node: PhaseNode | None = None) -> Work:
    model = canonical({"name": recipe.model.name, "options": recipe.model.options, "data": recipe.data.name})
    size = batch_size if node is None else min(batch_size, node.images)
    return Work(kind, model, size, precision, recipe)


def _each(work: Work, timed: list[Timed], totals: dict[Work, float]) -> float:
    """Return the seconds of a pass: as timed, or those of what is nearest to it."""

    def near(other: Work) -> tuple[bool, bool, bool]:
        return (other == work, other.model == work.model and other.kind == work.kind, other.model == work.model)

    best = max(timed, key=lambda one: near(one.work))
    if any(near(best.work)):
        return best.each
    return sum(one.each * totals[one.work] for one in timed) / sum(totals[one.work] for one in timed)


def _time(work: Work, device: torch.device, seconds: float) -> Timed:
    if work.precision != "auto":
        return Timed(work, *_fastest(_runner(work, work.precision, device), work.batch_size, seconds))
    both = [
        Timed(work, *_fastest(_runner(work, precision, device), work.batch_size, seconds / 2))
        for precision in ("fp32", "bf16")
    ]
    return min(both, key=lambda timed: timed.each)


def _runner(work: Work, precision: str, device: torch.device) -> Callable[[int], object]:
    """Return a function that makes a forward and a backward pass of so many images, and waits for the device."""
    dataset, train, _, _ = data_of(work.recipe.data)
    model = build_model(work.recipe.model, dataset, 0).to(device)
    x = torch.rand(work.batch_size, *train.shape, device=device)
    y = torch.arange(work.batch_size, device=device) % len(dataset.classes)
    if work.kind == "learning":
        partition = Partition(model, {"all": "rest"})
        step = PartialStep(model, partition, {"all": "natural"}, optimizer=None, precision=precision)
        return lambda size: float(step.gradients(x[:size], y[:size]).log.loss)
    forward = crafting_forward(model.eval(), precision=precision)

    def attack(size: int) -> float:
        images = x[:size].clone().requires_grad_()
        loss = functional.cross_entropy(forward(images).float(), y[:size])
        return float(torch.autograd.grad(loss, images)[0].sum())

    return attack


def _fastest(run: Callable[[int], object], most: int, seconds: float) -> tuple[int, float]:
    """Return how many images could be timed, at most a whole batch, and the seconds of the fastest run of so many."""
    size, best = min(_START, most), inf
    run(size)  # the first run sets up what later ones use again
    began = time.perf_counter()
    while True:
        start = time.perf_counter()
        run(size)
        took = time.perf_counter() - start
        best = min(best, took)
        left = seconds - (time.perf_counter() - began)
        if size < most and 4 * took <= left:
            size, best = min(most, 4 * size), inf
        elif took > left:
            return size, best
