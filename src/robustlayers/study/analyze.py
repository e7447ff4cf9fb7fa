"""Looking inside the runs of a study: which analyses of which arms are asked for, and which of them are still to be done.

FOLDER/analyses/<analysis>/<identity>/     result.json  rows.csv  arrays.safetensors  scores-*.csv  time.json  manifest.json

An identity is the hash of all that decides a result: the bytes of the checkpoints, the images, the attack, the selector.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustlayers.analysis import fresh_state, write_scores
from robustlayers.attacks import Gaussian
from robustlayers.core.device import machine, pick_device, versions
from robustlayers.core.errors import Fault, UserError, one_of
from robustlayers.core.files import MANIFEST, read_json, read_tensors, write_json, write_tensors, write_text
from robustlayers.core.identity import digest
from robustlayers.core.random import stream_seed
from robustlayers.data import Dataset, Images
from robustlayers.study._looks import REFERENCE, Found, Look
from robustlayers.study.analyses import ANALYSES, Analysis, analysis_named
from robustlayers.study.analyzed import analyses_folder, csv_of
from robustlayers.study.definition import load_study
from robustlayers.study.schema import DataConfig, Recipe
from robustlayers.study.semantics import (
    NamedAttack,
    build_attack,
    build_model,
    build_threat,
    data_of,
    load_data,
    model_for_checks,
)
from robustlayers.study.store import Store

__all__ = ["Asked", "Job", "Planned", "Watch", "plan_analyses", "run_analyses"]

_SCHEMA = 1
"""Version of the meaning of identities; see also `Analysis.version`."""

_FEWEST = 10  # images: what is said about fewer is chance
CHECKPOINTS = ("best", "last")

Watch = Callable[["Job", float, str], None]
"""`watch(job, share of it that is done, what is being done)`"""


@dataclass(frozen=True)
class Asked:
    """What to look at: empty means all analyses that apply, all arms, the first seed, the monitor's attack."""

    what: Sequence[str] = ()
    arms: Sequence[str] = ()
    seeds: Sequence[int] = ()
    against: str | None = None
    images: int = 500
    select: str | None = None
    checkpoint: str = "best"
    attack: str | None = None
    trust: bool = False
    device: str = "auto"


@dataclass(frozen=True)
class Trained:
    """A trained net of the study: where its checkpoint lies, and what it is made from."""

    arm: str
    seed: int
    checkpoint: str
    node: str
    recipe: Recipe
    folders: Mapping[str, Path]  # phase -> folder of its result, in order
    epoch: int
    digest: str  # SHA-256 of the checkpoint

    def build(self) -> nn.Module:
        """Return the net with its weights."""
        model = build_model(self.recipe.model, _data(self.recipe)[0], self.seed)
        model.load_state_dict(read_tensors(list(self.folders.values())[-1] / f"{self.checkpoint}.safetensors"))
        return model

    def earlier(self) -> dict[str, tuple[Path, str]]:
        """Return the states of the same run that were kept: name -> file and its SHA-256."""
        found = {}
        for place, (phase, folder) in enumerate(self.folders.items()):
            kept = sorted(folder.glob("epoch-*.safetensors"), key=lambda path: int(path.stem.removeprefix("epoch-")))
            found |= {f"epoch {path.stem.removeprefix('epoch-')}": path for path in kept}
            if place < len(self.folders) - 1:
                found[f"end of {phase}"] = folder / "last.safetensors"
        return {name: (path, _digest(path)) for name, path in found.items()}


@dataclass(frozen=True)
class Job:
    """One analysis of one net, or of one against another; `cost` is empty where its result is there already."""

    analysis: Analysis
    subject: Trained
    against: Trained | None
    identity: str
    folder: Path
    images: int
    select: str | None
    attack: NamedAttack
    cost: Mapping[str, float] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What it is about, for people."""
        other = "" if self.against is None else f" against {self.against.arm}"
        return f"{self.analysis.name}: {self.subject.arm}{other}, seed {self.subject.seed}"

    @property
    def size(self) -> float:
        """Passes of single images that it takes."""
        return sum(self.cost.values())


@dataclass(frozen=True)
class Planned:
    """What is to be done: the jobs that are left, those that are done, and why some that could be meant are neither."""

    left: Sequence[Job]
    done: Sequence[Job]
    notes: Sequence[str]


def plan_analyses(store: Store, asked: Asked) -> Planned:
    """Return the jobs that were asked for; nothing is written.

    Without names, analyses that do not apply are left out with a note; one that is named is a `UserError` then, as are an
    unknown analysis, arm, seed, attack or selector, results that are missing, and a study without validation images.
    """
    if not store.plan.exists():
        raise UserError(Fault("no study here: it has no plan.json; run a study into it first", file=str(store.root)))
    plan = read_json(store.plan)
    names = list(dict.fromkeys(asked.what)) or list(ANALYSES)
    analyses = [_checked("--what", analysis_named, name) for name in names]
    arms = {arm["name"]: arm for arm in plan["arms"]}
    for option, wanted in (("--arm", asked.arms), ("--against", [asked.against] if asked.against else [])):
        for name in wanted:
            if name not in arms:
                raise UserError(Fault(one_of("arm", name, arms), path=option))
    seeds = tuple(dict.fromkeys(asked.seeds)) or tuple(plan["seeds"][:1])
    for seed in seeds:
        if seed not in plan["seeds"]:
            allowed = ", ".join(map(str, plan["seeds"]))
            raise UserError(Fault(f"{seed} is not there; allowed: {allowed}", path="--seeds"))
    if asked.checkpoint not in CHECKPOINTS:
        raise UserError(Fault(one_of("checkpoint", asked.checkpoint, CHECKPOINTS), path="--checkpoint"))
    if asked.images < _FEWEST:
        raise UserError(Fault(f"{asked.images} is not allowed; allowed: {_FEWEST} or more", path="--images"))
    _check_pairs(analyses, asked, arms)
    recipes = {arm.name: arm.recipe for arm in load_study(store.root / "study.yaml", trust=asked.trust).arms}
    notes: list[str] = []
    jobs: list[Job] = []
    nets: dict[tuple[str, int], Trained | None] = {}

    def net(arm: str, seed: int, asked_for: bool) -> Trained | None:
        if (arm, seed) not in nets:
            found = _trained(store, arms[arm], recipes[arm], seed, asked.checkpoint)
            nets[arm, seed] = None if isinstance(found, str) else found
            if isinstance(found, str):
                if asked_for:
                    raise UserError(Fault(found, file=str(store.root)))
                notes.append(f"{found}: left out")
        return nets[arm, seed]

    for one in analyses:
        for seed in seeds:
            for arm in asked.arms or arms:
                subject = net(arm, seed, bool(asked.arms))
                if subject is None:
                    continue
                others: list[Trained | None] = [None] if one.alone else []
                if one.between and asked.against is not None and asked.against != arm:
                    others.append(net(asked.against, seed, True))
                for other in others:
                    found = _job(store, one, subject, other, asked)
                    if isinstance(found, str):
                        if asked.what:
                            raise UserError(Fault(found, path="--what"))
                        notes.append(f"{found}: left out")
                    else:
                        jobs.append(found)
    if not jobs:
        raise UserError(Fault("there is nothing to look at: no arm has a whole result", file=str(store.root)))
    if not asked.what and asked.against is None and len(arms) > 1:
        pairs = ", ".join(one.name for one in analyses if one.between)
        notes.append(f"two nets are compared with --against ARM only ({pairs})")
    left = [job for job in jobs if job.cost]
    return Planned(left, [job for job in jobs if not job.cost], list(dict.fromkeys(notes)))


def run_analyses(store: Store, jobs: Sequence[Job], watch: Watch, *, device: str = "auto") -> None:
    """Do the jobs one by one and keep each result as soon as it is there; what was killed is done anew."""
    where = pick_device(device)
    place = Store(analyses_folder(store))
    with place.locked():
        for job in jobs:
            if place.finished(job.folder):  # another process was faster
                watch(job, 1.0, "done")
                continue
            began = time.perf_counter()
            done = dict.fromkeys(job.cost, 0.0)

            def part(name: str, job: Job = job, done: dict[str, float] = done) -> Callable[[str, int, int], None]:
                def progress(what: str, reached: int, total: int) -> None:
                    done[name] = job.cost[name] * min(1.0, reached / max(1, total))
                    watch(job, sum(done.values()) / job.size, what)

                return progress

            watch(job, 0.0, "loading")
            look = _look(job, where, part)
            try:
                found = job.analysis.run(look)
            except UserError as error:
                raise UserError([fault.at(path=job.text) for fault in error.faults]) from None
            _keep(store, job, found, time.perf_counter() - began, where)
            place.finish(job.folder, kind="analysis", id=job.identity)
            watch(job, 1.0, "done")


def _keep(store: Store, job: Job, found: Found, seconds: float, device: torch.device) -> None:
    plan = read_json(store.plan)
    arm = next(arm for arm in plan["arms"] if arm["name"] == job.subject.arm)
    uses = job.analysis.uses
    facts = {
        "analysis": job.analysis.name,
        "study": plan["name"],
        "arm": job.subject.arm,
        "levels": arm["levels"],
        "against": "" if job.against is None else job.against.arm,
        "seed": job.subject.seed,
        "checkpoint": job.subject.checkpoint,
        "epoch": job.subject.epoch,
        "images": job.images if "images" in uses else None,
        "split": "validation",
        "attack": job.attack.describe(),
        "normalization": "running",
        "select": (job.select or "") if "select" in uses else "",
    }
    rows = [dict(row) for row in found.rows]
    nodes = [job.subject.node] + ([] if job.against is None else [job.against.node])
    record = {**facts, "nodes": nodes, "numbers": list(found.numbers), "payload": found.payload, "rows": rows}
    write_json(job.folder / "result.json", record)
    write_text(job.folder / "rows.csv", csv_of([facts | {"rows": rows}]))
    if found.arrays:
        write_tensors(job.folder / "arrays.safetensors", found.arrays)
    for name, scores in found.scores.items():
        write_scores(job.folder / f"{name}.csv", scores)
    write_json(job.folder / "time.json", {"seconds": seconds, "machine": machine(device), "versions": versions()})


def _check_pairs(analyses: Sequence[Analysis], asked: Asked, arms: Mapping[str, Any]) -> None:
    """Raise where an analysis of two nets is asked for by name and there is only one."""
    pairs = [one.name for one in analyses if not one.alone]
    wanted = list(asked.arms) or list(arms)
    if asked.against is not None and set(wanted) == {asked.against} and all(not one.alone for one in analyses):
        raise UserError(Fault(f"{asked.against} is the only arm looked at; name another one", path="--against"))
    if asked.what and pairs and asked.against is None:
        raise UserError(Fault(f"is missing: {pairs[0]} is of two nets; allowed: {', '.join(arms)}", path="--against"))


def _trained(store: Store, arm: Mapping[str, Any], recipe: Recipe, seed: int, checkpoint: str) -> Trained | str:
    """Return the net of an arm for a seed, or why there is none."""
    folders = {phase["name"]: store.phase(phase["id"], seed) for phase in arm["phases"]}
    for phase, folder in folders.items():
        if not store.whole(folder):
            failure = store.failure(folder)
            why = f" ({failure[0]})" if failure else "; run the study first"
            return f"arm {arm['name']} has no whole result of phase {phase} for seed {seed}{why}"
    last = list(folders.values())[-1]
    curve = read_json(last / "curve.json")
    epoch = curve["best_epoch"] if checkpoint == "best" else curve["points"][-1]["epoch"]
    weights = last / f"{checkpoint}.safetensors"
    return Trained(arm["name"], seed, checkpoint, arm["nodes"][-1], recipe, folders, epoch, _digest(weights))


def _digest(path: Path) -> str:
    return read_json(path.parent / MANIFEST)["files"][path.name]["sha256"]


def _job(store: Store, one: Analysis, subject: Trained, other: Trained | None, asked: Asked) -> Job | str:
    """Return the job, or why it cannot be."""
    recipe = subject.recipe
    validation = _data(recipe)[2]
    if not len(validation):
        raise UserError(Fault("data.validation is 0: there are no held-out images to look at", file=str(store.root)))
    images = min(asked.images, len(validation))
    monitor = recipe.evaluate.monitor.attack
    if asked.attack is None or "attack" not in one.uses:  # the learning curve was measured with the monitor's
        attack = build_attack(monitor, recipe.threat)
    else:
        attack = _checked("--attack", partial(build_attack, threat=recipe.threat), asked.attack)
    select = asked.select if "select" in one.uses else None
    content: dict[str, Any] = {
        "schema": _SCHEMA,
        "analysis": [one.name, one.version],
        "nets": [
            [net.arm, net.seed, net.checkpoint, net.node, net.digest] for net in (subject, *((other,) if other else ()))
        ],
        "data": load_data(recipe.data.name).digest,
        "attack": attack.identity(),
        **(
            {"sources": {name: found for name, (_, found) in subject.earlier().items()}}
            if "sources" in one.uses
            else {}
        ),
        **({"images": images} if "images" in one.uses else {}),
        **({"select": select} if select is not None else {}),
    }
    identity = digest(content, 16)
    folder = analyses_folder(store) / one.name / identity
    job = Job(one, subject, other, identity, folder, images, select, attack)
    if store.whole(folder):
        return job
    if other is not None and one.alike and not _alike(subject, other):
        return f"{one.name}: arms {subject.arm} and {other.arm} have tensors of different names or shapes"
    draft = _look(job, None, None)
    cost = one.cost(draft) if select is None else _checked("--select", one.cost, draft)
    if not cost:
        return f"{one.name}: the net of arm {subject.arm} has {one.lacks}"
    return Job(one, subject, other, identity, folder, images, select, attack, cost)


def _checked(option: str, make: Callable[[Any], Any], value: Any) -> Any:
    """Return `make(value)`; what is wrong with it is said to be the option's."""
    try:
        return make(value)
    except UserError as error:
        raise UserError([fault.at(path=option) for fault in error.faults]) from None


def _alike(one: Trained, other: Trained) -> bool:
    shapes = []
    for net in (one, other):
        model = model_for_checks(net.recipe.model, _data(net.recipe)[0])
        shapes.append({name: tensor.shape for name, tensor in model.state_dict().items()})
    return shapes[0] == shapes[1]


def _data(recipe: Recipe) -> tuple[Dataset, Images, Images, Images]:
    return _cut(recipe.data.model_dump_json())


@lru_cache(maxsize=2)
def _cut(config: str) -> tuple[Dataset, Images, Images, Images]:
    """Return the data as a recipe cuts them, which copies all images: once for all jobs."""
    return data_of(DataConfig.model_validate_json(config))


def _look(job: Job, device: torch.device | None, part: Any) -> Look:
    """Return what the analysis gets; without a device, nets that are not trained, to tell the cost from."""
    subject, other, recipe = job.subject, job.against, job.subject.recipe
    dataset, train, validation, _ = _data(recipe)
    held_out: Images = validation.first(job.images)

    def net(trained: Trained) -> nn.Module:
        if device is None:
            return model_for_checks(trained.recipe.model, _data(trained.recipe)[0])
        return trained.build().to(device)

    def drawn(seed: int) -> Mapping[str, Any]:
        return build_model(recipe.model, dataset, seed).state_dict()

    def random() -> Mapping[str, Any]:
        seed = stream_seed(subject.seed, "analysis", "random")
        return fresh_state(
            build_model(recipe.model, dataset, subject.seed), seed, lambda s: build_model(recipe.model, dataset, s)
        )

    sources: dict[str, Callable[[], Mapping[str, Any]]] = {"initial": partial(drawn, subject.seed), "random": random}
    sources |= {name: partial(read_tensors, path) for name, (path, _) in subject.earlier().items()}
    curve = [point for folder in subject.folders.values() for point in read_json(folder / "curve.json")["points"]]
    return Look(
        arm=subject.arm,
        model=net(subject),
        held_out=held_out if device is None else held_out.to(device),
        train=train if device is None else train.first(min(REFERENCE, len(train))).to(device),
        attack=job.attack,
        noise=Gaussian(build_threat(recipe.threat)),
        seed=subject.seed,
        select=job.select,
        against="" if other is None else other.arm,
        other=None if other is None else net(other),
        sources=sources,
        curve=curve,
        phase=list(subject.folders)[-1],
        **({} if part is None else {"part": part}),
    )
