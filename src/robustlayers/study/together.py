"""Tasks that several processes do together, one after another: the main one says which is next, the others follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch

from robustlayers.core.errors import Fault, UserError
from robustlayers.core.ranks import Ranks
from robustlayers.study.local import Event, OnEvent, Queue, Task, perform
from robustlayers.study.phases import build_trainer
from robustlayers.study.plan import Plan
from robustlayers.study.semantics import build_model, data_of

__all__ = ["Ended", "check_together", "follow", "lead"]


class Ended(Exception):
    """A task failed so that all must end, processes that share it and tasks that would fail alike; the text says why, once."""


def lead(tasks: list[Task], ranks: Ranks, *, threads: int, on_event: OnEvent) -> None:
    """Do tasks in an order that respects their needs, together with the others, which `follow`.

    Where one fails, it raises `Ended`, since the others are somewhere in the middle of the task. Of divergence all know, and
    what fails `Apart` concerns nobody else: then the rest goes on.
    """
    queue = Queue(tasks)
    with _threads(threads):
        while task := queue.next():
            on_event(Event(task.key, "started", {}))
            ranks.tell(task.key)
            end = perform(task, on_event)
            if end.kind == "failed" and not end.facts.get("apart"):
                if ranks.first():
                    on_event(end)
                raise Ended("")
            queue.finish(task.key, end.kind == "done")
            on_event(end)
        ranks.tell("")


def follow(tasks: Mapping[str, Task], ranks: Ranks, *, threads: int) -> None:
    """Do what the main process says, until it says that nothing is left."""
    with _threads(threads):
        while key := ranks.tell():
            end = perform(tasks[key], lambda event: None)
            if end.kind == "failed":
                raise Ended(f"{key}: {end.facts['reason']} (process {ranks.index} of {ranks.count})")


def check_together(plan: Plan, ranks: Ranks) -> None:
    """Raise `UserError` with all phases whose batches processes cannot share, before one of them is trained."""
    faults: list[Fault] = []
    for node in plan.nodes.values():
        if node.phase.kind == "train":
            dataset, train, _, _ = data_of(node.recipe.data)
            try:
                build_trainer(build_model(node.recipe.model, dataset, 0), node.recipe, node.phase, train, ranks=ranks)
            except UserError as error:
                faults += [replace(fault, path=f"{'; '.join(node.arms)}: {node.phase.name}") for fault in error.faults]
    if faults:
        raise UserError(faults)


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
