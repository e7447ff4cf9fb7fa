"""How long a plan will take on this machine: a few passes are measured and multiplied."""

from __future__ import annotations

import time

import torch

from robustlayers.core.device import pick_device
from robustlayers.selection import Partition
from robustlayers.study.plan import Plan
from robustlayers.study.run import default_workers, plan_size
from robustlayers.study.semantics import build_model, data_of
from robustlayers.training import PartialStep

__all__ = ["estimate_seconds"]


def estimate_seconds(plan: Plan, device: str = "auto", workers: int | None = None) -> tuple[float, str]:
    """Return the expected seconds of a whole study, and in words how they were found.

    One natural step of the full model is timed (the fastest of a few), taken as one forward and one backward pass per
    image, and multiplied by the plan's passes; several workers are taken to share the work evenly. Rough: phases that
    train only late layers are faster.
    """
    where = pick_device(device)
    count, threads = default_workers(plan, where, workers, None)
    recipe = plan.arms[0].recipe
    dataset, train, _, _ = data_of(recipe.data)
    model = build_model(recipe.model, dataset, 0).to(where)
    size = min(recipe.phases[0].batch_size, len(train))
    x = torch.rand(size, *train.shape, device=where)
    y = torch.arange(size, device=where) % len(dataset.classes)
    step = PartialStep(model, Partition(model, {"all": "rest"}), {"all": "natural"}, optimizer=None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    best = float("inf")
    try:
        began = time.perf_counter()
        while time.perf_counter() - began < 1.5:
            start = time.perf_counter()
            float(step.gradients(x, y).log.loss)  # reading the loss waits for the device
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    seconds = best / (2 * size) * plan_size(plan) / count
    return seconds, f"{count} worker(s), {threads} thread(s) each; measured {best * 1000:.0f} ms for a batch of {size}"
