"""Running a study: what is left to do becomes tasks, finished work is never redone, and the rest of a study goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from robustlayers.core.device import machine, pick_device, versions
from robustlayers.core.errors import UserError, system_text
from robustlayers.core.files import MANIFEST, read_json, write_json, write_text
from robustlayers.core.ranks import ALONE, Ranks
from robustlayers.study.cost import measuring_parts, phase_cost, plan_cost
from robustlayers.study.describe import describe_plan
from robustlayers.study.local import Event, Task, execute
from robustlayers.study.measure import measure_run
from robustlayers.study.plan import ArmPlan, PhaseNode, Plan
from robustlayers.study.store import Store
from robustlayers.study.together import Ended, check_together, follow, lead
from robustlayers.study.work import train_phase

__all__ = ["Job", "Outcome", "default_workers", "plan_size", "run_plan"]


@dataclass(frozen=True)
class Job:
    """A task as a person sees it: what it is about and how much of the study's work it is, in passes of one image."""

    key: str
    text: str
    size: float
    epochs: int = 0


@dataclass
class Outcome:
    """How a run of a study ended."""

    failed: dict[str, str] = field(default_factory=dict)  # job -> reason
    diverged: dict[str, str] = field(default_factory=dict)  # also those of earlier calls
    texts: dict[str, str] = field(default_factory=dict)  # job -> what it is about, also where nothing was left to do
    trained: int = 0
    measured: int = 0

    @property
    def complete(self) -> bool:
        """Whether every arm and seed has a result or is known to diverge."""
        return not self.failed


def default_workers(plan: Plan, device: torch.device, workers: int | None, threads: int | None) -> tuple[int, int]:
    """Return (worker processes, torch threads each).

    On a CPU small networks use cores best side by side: as many workers as there are cores or runs. An accelerator gets
    one worker. Depends on the plan only, not on what is left of it, so that a repeated command computes with the same
    number of threads.
    """
    cores = _cores()
    if workers is None:
        workers = max(1, min(cores, len(plan.arms) * len(plan.study.seeds))) if device.type == "cpu" else 1
    if threads is None:
        threads = max(1, cores // workers)
    return workers, threads


def run_plan(
    plan: Plan,
    folder: Path | str,
    *,
    command: str = "",
    device: str = "auto",
    workers: int | None = None,
    threads: int | None = None,
    ranks: Ranks = ALONE,
    on_start: Callable[[dict[str, Job], float], None] | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Outcome:
    """Train and measure all that the store in `folder` does not have yet; return how it ended.

    `on_start(jobs, finished)` gets the jobs that are left and the share of the study's passes that is done already.
    With several `ranks` all of them call this. They share the batches of every phase that trains and of the test set under
    attack; the main one does the rest, and it alone finishes results, calls back and knows the outcome.

    Raises `UserError` if another process is running a study in the same folder, `Ended` if one of several fails, or if the
    folder does not even take the note that a task failed.
    """
    store = Store(folder)
    where = pick_device(device)
    if ranks.count > 1:
        if workers not in (None, 1):
            raise UserError("--workers: processes that torchrun started do one task at a time together; leave it out")
        workers, threads = 1, threads or max(1, _cores() // int(os.environ.get("LOCAL_WORLD_SIZE", ranks.count)))
    workers, threads = default_workers(plan, where, workers, threads)
    if not ranks.main:
        tasks = [_train_task(store, node, s, where, ranks) for s in plan.study.seeds for node in plan.nodes.values()]
        tasks += [_measure_task(plan, store, arm, s, where, ranks) for s in plan.study.seeds for arm in _runs(plan)]
        follow({task.key: task for task in tasks}, ranks, threads=threads)
        return Outcome()
    if ranks.count > 1:
        check_together(plan, ranks)
    with store.locked():
        facts = describe_plan(plan)
        record = {
            **facts,
            "command": command,
            "versions": versions(),
            "machine": _machine(where, workers, threads, ranks),
        }
        write_text(store.root / "study.yaml", facts["recipe_yaml"])
        write_json(store.plan, record)
        tasks, jobs, done, outcome = _tasks(plan, store, where, ranks)
        total = done + sum(job.size for job in jobs.values())
        if on_start is not None:
            on_start(jobs, done / total if total else 1.0)

        def note(event: Event) -> None:
            if event.kind == "failed":
                outcome.failed[event.key] = event.facts["reason"]
                _note_failure(store, event, outcome.texts[event.key])
            elif event.kind == "done" and event.key.startswith("train"):
                outcome.trained += 1
            elif event.kind == "done":
                outcome.measured += 1
            if on_event is not None:
                on_event(event)

        if ranks.count > 1:
            lead(tasks, ranks, threads=threads, on_event=note)
        elif tasks:
            execute(tasks, workers=workers, threads=threads, on_event=note)
        for node in plan.nodes.values():
            for seed in plan.study.seeds:
                failure = store.failure(store.phase(node.id, seed))
                if failure and failure[0] == "diverged":
                    outcome.diverged[_train_key(node, seed)] = failure[1]
    return outcome


def _note_failure(store: Store, event: Event, text: str) -> None:
    reason = event.facts["reason"]
    try:
        store.fail(_folder(store, event.key), "failed", reason, event.facts.get("trace", ""))
    except OSError as error:  # on a full disk the others would fail in the same way, each after some work
        said = "" if str(error.strerror) in reason else f"; {system_text(error) or error}"
        raise Ended(f"{text}: {reason}{said}") from None


def _machine(device: torch.device, workers: int, threads: int, ranks: Ranks) -> str:
    many = f"{workers} worker(s)" if ranks.count == 1 else f"{ranks.count} processes that share batches"
    if device.type == "cpu":
        text = machine(device).rpartition(",")[0]
        return f"{text}, {_cores()} cores, {many} with {threads} torch thread(s) each"
    return f"{machine(device)}, {many}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _train_task(
    store: Store, node: PhaseNode, seed: int, device: torch.device, ranks: Ranks, needs: tuple[str, ...] = ()
) -> Task:
    train = train_phase if ranks.count == 1 else partial(train_phase, ranks=ranks)
    return Task(_train_key(node, seed), train, (store, node, seed, device), needs, _training_size(node))


def _train_key(node: PhaseNode, seed: int) -> str:
    return f"train {node.id} {seed}"


def _measure_task(
    plan: Plan,
    store: Store,
    arm: ArmPlan,
    seed: int,
    device: torch.device,
    ranks: Ranks,
    needs: tuple[str, ...] = (),
) -> Task:
    measure = measure_run if ranks.count == 1 else partial(measure_run, ranks=ranks)
    nodes = [plan.nodes[name] for name in arm.nodes]
    arguments = (store, arm.run, nodes, arm.recipe, seed, device)
    return Task(f"measure {arm.run} {seed}", measure, arguments, needs, _measuring_size(arm))


def _runs(plan: Plan) -> list[ArmPlan]:
    """Return one arm for each run; arms may be alike."""
    return list({arm.run: arm for arm in plan.arms}.values())


def _folder(store: Store, key: str) -> Path:
    kind, name, seed = key.split(" ")
    return store.phase(name, int(seed)) if kind == "train" else store.result(name, int(seed))


def _tasks(
    plan: Plan, store: Store, device: torch.device, ranks: Ranks
) -> tuple[list[Task], dict[str, Job], float, Outcome]:
    """Return the tasks that are left, their jobs, the size of what is done, and an outcome to fill."""
    tasks: list[Task] = []
    jobs: dict[str, Job] = {}
    done = 0.0
    outcome = Outcome()
    blocked: set[str] = set()
    pending: set[str] = set()

    def add(task: Task, job: Job) -> None:
        tasks.append(task)
        jobs[job.key] = job
        pending.add(job.key)

    for seed in plan.study.seeds:
        for node in plan.nodes.values():  # parents stand before children
            key = _train_key(node, seed)
            size = _training_size(node)
            folder = store.phase(node.id, seed)
            who = node.arms[0] if len(node.arms) == 1 else f"{len(node.arms)} arms"
            outcome.texts[key] = f"{who}, seed {seed}, {node.phase.name}"
            if store.finished(folder) and _has_kept(folder, node):
                done += size
                continue
            (folder / MANIFEST).unlink(missing_ok=True)  # it may lack an epoch that is to be kept
            failure = store.failure(folder)
            parent = f"train {node.parent} {seed}"
            if (failure and failure[0] == "diverged") or parent in blocked:
                blocked.add(key)  # it would diverge again, bit for bit
                continue
            store.forget_failure(folder)
            needs = (parent,) if parent in pending else ()
            add(
                _train_task(store, node, seed, device, ranks, needs),
                Job(key, outcome.texts[key], size, node.epochs),
            )
        for arm in _runs(plan):
            last = f"train {arm.nodes[-1]} {seed}"
            needs = (last,) if last in pending else ()
            task = _measure_task(plan, store, arm, seed, device, ranks, needs)
            key, size = task.key, task.size
            folder = store.result(arm.run, seed)
            outcome.texts[key] = f"{arm.name}, seed {seed}, measuring"
            if store.finished(folder):
                done += size
                continue
            if last in blocked:
                continue
            store.forget_failure(folder)
            add(task, Job(key, outcome.texts[key], size))
    return tasks, jobs, done, outcome


def _has_kept(folder: Path, node: PhaseNode) -> bool:
    """Tell whether every epoch that is to be kept is there; one that stopped early never came to the later ones."""
    last = read_json(folder / "curve.json")["points"][-1]["epoch"]
    return all((folder / f"epoch-{epoch}.safetensors").exists() for epoch in node.kept if epoch <= last)


def plan_size(plan: Plan) -> float:
    """Return the size of a whole study in passes of one image, measuring included."""
    return plan_cost(plan).total


def _training_size(node: PhaseNode) -> float:
    cost = phase_cost(node)
    return cost.learned + cost.crafted + cost.watched


def _measuring_size(arm: ArmPlan) -> float:
    return len(arm.recipe.evaluate.checkpoints) * sum(part.passes for part in measuring_parts(arm.recipe))
