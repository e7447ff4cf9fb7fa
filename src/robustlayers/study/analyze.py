"""Looking inside the runs of a study: which analyses of which arms are asked for, and which of them are still to be done.

FOLDER/analyses/<analysis>/<identity>/     result.json  rows.csv  arrays.safetensors  scores-*.csv  tuned.safetensors
                                           time.json  manifest.json

An identity is the hash of all that decides a result: the bytes of the checkpoints, the images, the attack, the selector.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustlayers.analysis import fresh_state, write_scores
from robustlayers.attacks import Gaussian
from robustlayers.core.device import machine, pick_device, versions
from robustlayers.core.errors import Fault, UserError, names_text, one_of
from robustlayers.core.files import file_digest, read_json, read_tensors, write_json, write_tensors, write_text
from robustlayers.core.identity import digest
from robustlayers.core.random import stream_seed
from robustlayers.data import Augment, Images
from robustlayers.study._looks import Found, Look
from robustlayers.study._nets import Trained, alike, held_out, images_of, trained
from robustlayers.study.analyses import ANALYSES, Analysis, analysis_named
from robustlayers.study.analyzed import analyses_folder, csv_of
from robustlayers.study.definition import load_study
from robustlayers.study.semantics import (
    NamedAttack,
    build_attack,
    build_model,
    build_threat,
    load_data,
    model_for_checks,
)
from robustlayers.study.store import Store

__all__ = ["Asked", "Job", "Planned", "Watch", "plan_analyses", "run_analyses"]

_SCHEMA = 1
"""Version of the meaning of identities; see also `Analysis.version`."""

_USUAL, _FEWEST = 500, 10  # images: what is said about fewer is chance
CHECKPOINTS = ("best", "last")

Watch = Callable[["Job", float, str], None]
"""`watch(job, share of it that is done, what is being done)`"""


@dataclass(frozen=True)
class Asked:
    """What to look at: empty is all analyses that apply and train nothing, all arms, the first seed, the monitor's attack."""

    what: Sequence[str] = ()
    arms: Sequence[str] = ()
    seeds: Sequence[int] = ()
    against: str | None = None
    images: int = _USUAL
    select: str | None = None
    checkpoint: str = "best"
    attack: str | None = None
    trust: bool = False
    device: str = "auto"


@dataclass(frozen=True)
class Job:
    """One analysis of one net, of one against another, or of several together: of `subject` and the `others`.

    `cost` is empty where its result is there already.
    """

    analysis: Analysis
    subject: Trained
    against: Trained | None
    identity: str
    folder: Path
    images: int
    select: str | None
    attack: NamedAttack
    cost: Mapping[str, float] = field(default_factory=dict)
    others: Sequence[Trained] = ()

    @property
    def nets(self) -> list[Trained]:
        """All nets that it looks at."""
        return [self.subject, *([] if self.against is None else [self.against]), *self.others]

    @property
    def text(self) -> str:
        """What it is about, for people."""
        if self.others:
            return f"{self.analysis.name}: {len(self.nets)} arms, seed {self.subject.seed}"
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

    Without names, analyses that do not apply are left out with a note, and those that train nets without one; one that is
    named and does not apply is a `UserError`, as are an unknown analysis, arm, seed, attack or selector, results that are
    missing, and a study without validation images.
    """
    if not store.plan.exists():
        raise UserError(Fault("no study here: it has no plan.json; run a study into it first", file=str(store.root)))
    plan = read_json(store.plan)
    names = list(dict.fromkeys(asked.what)) or [name for name, one in ANALYSES.items() if not one.trains]
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
            found = trained(store, arms[arm], recipes[arm], seed, asked.checkpoint)
            nets[arm, seed] = None if isinstance(found, str) else found
            if isinstance(found, str):
                if asked_for:
                    raise UserError(Fault(found, file=str(store.root)))
                notes.append(f"{found}: left out")
        return nets[arm, seed]

    for one in analyses:
        for seed in seeds:
            subjects = [net(arm, seed, bool(asked.arms)) for arm in dict.fromkeys(asked.arms or arms)]
            against = net(asked.against, seed, True) if one.between and asked.against is not None else None
            for subject, other, others in _casts(
                one, [net for net in subjects if net is not None], against, list(arms)
            ):
                found = _job(store, one, subject, other, others, asked)
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


_Cast = tuple[Trained, Trained | None, Sequence[Trained]]


def _casts(one: Analysis, subjects: Sequence[Trained], against: Trained | None, arms: Sequence[str]) -> list[_Cast]:
    """Return which nets each job of an analysis looks at; several together stand in the order of the study's arms."""
    if one.together:
        ordered = sorted(subjects, key=lambda net: arms.index(net.arm))
        return [(ordered[0], None, ordered[1:])] if ordered else []
    found: list[_Cast] = []
    for subject in subjects:
        found += [(subject, None, ())] if one.alone else []
        found += [(subject, against, ())] if against is not None and against.arm != subject.arm else []
    return found


def _keep(store: Store, job: Job, found: Found, seconds: float, device: torch.device) -> None:
    plan = read_json(store.plan)
    levels = next(arm["levels"] for arm in plan["arms"] if arm["name"] == job.subject.arm)
    uses, together = job.analysis.uses, job.analysis.together
    facts = {
        "analysis": job.analysis.name,
        "study": plan["name"],
        "arm": "" if together else job.subject.arm,  # the rows name their arms then
        "levels": {} if together else levels,
        "against": "" if job.against is None else job.against.arm,
        "seed": job.subject.seed,
        "checkpoint": job.subject.checkpoint,
        "epoch": None if together else job.subject.epoch,
        "images": job.images if "images" in uses else None,
        "split": "validation",
        "attack": job.attack.describe(),
        "normalization": "running",
        "select": (job.select or "") if "select" in uses else "",
    }
    rows = [dict(row) for row in found.rows]
    about = {"arms": [net.arm for net in job.nets], "nodes": [net.node for net in job.nets]}
    nets = {
        f"{name}.safetensors": write_tensors(job.folder / f"{name}.safetensors", state)
        for name, state in found.weights.items()
    }
    record = {
        **facts,
        **about,
        "version": job.analysis.version,
        "weights": {name: file_digest(path) for name, path in nets.items()},
        "numbers": list(found.numbers),
        "payload": found.payload,
        "rows": rows,
    }
    write_json(job.folder / "result.json", record)
    write_text(job.folder / "rows.csv", csv_of([facts | {"rows": rows}]))
    if found.arrays:
        write_tensors(job.folder / "arrays.safetensors", found.arrays)
    for name, scores in found.scores.items():
        write_scores(job.folder / f"{name}.csv", scores)
    write_json(job.folder / "time.json", {"seconds": seconds, "machine": machine(device), "versions": versions()})


def _check_pairs(analyses: Sequence[Analysis], asked: Asked, arms: Mapping[str, Any]) -> None:
    """Raise where an analysis of two nets is asked for by name and there is only one."""
    pairs = [one.name for one in analyses if one.between and not one.alone]
    wanted = list(asked.arms) or list(arms)
    if asked.against is not None and set(wanted) == {asked.against} and len(pairs) == len(analyses):
        raise UserError(Fault(f"{asked.against} is the only arm looked at; name another one", path="--against"))
    if asked.what and pairs and asked.against is None:
        raise UserError(Fault(f"is missing: {pairs[0]} is of two nets; allowed: {names_text(arms)}", path="--against"))


def _job(
    store: Store, one: Analysis, subject: Trained, other: Trained | None, others: Sequence[Trained], asked: Asked
) -> Job | str:
    """Return the job, or why it cannot be."""
    if one.together and not others:
        return f"{one.name}: is of two arms or more, and there is only {subject.arm}"
    recipe = subject.recipe
    validation = images_of(recipe)[2]
    if not len(validation):
        raise UserError(Fault("data.validation is 0: there are no held-out images to look at", file=str(store.root)))
    images = min(asked.images if "images" in one.uses else _USUAL, len(validation))
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
            [net.arm, net.seed, net.checkpoint, net.node, net.digest]
            for net in (subject, *((other,) if other else ()), *others)
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
    job = Job(one, subject, other, identity, folder, images, select, attack, others=others)
    if store.whole(folder):
        return job
    for net in others:
        if held_out(net) != held_out(subject):
            return f"{one.name}: arms {subject.arm} and {net.arm} hold out other images"
    if other is not None and one.alike and not alike(subject, other):
        return f"{one.name}: arms {subject.arm} and {other.arm} have tensors of different names or shapes"
    draft = _look(job, None, None)
    cost = one.cost(draft) if select is None else _checked("--select", one.cost, draft)
    if not cost:
        return f"{one.name}: the net of arm {subject.arm} has {one.lacks}"
    return Job(one, subject, other, identity, folder, images, select, attack, cost, others)


def _checked(option: str, make: Callable[[Any], Any], value: Any) -> Any:
    """Return `make(value)`; what is wrong with it is said to be the option's."""
    try:
        return make(value)
    except UserError as error:
        raise UserError([fault.at(path=option) for fault in error.faults]) from None


def _look(job: Job, device: torch.device | None, part: Any) -> Look:
    """Return what the analysis gets; without a device, nets that are not trained, to tell the cost from."""
    subject, other, recipe = job.subject, job.against, job.subject.recipe
    dataset, train, validation, _ = images_of(recipe)
    looked: Images = validation.first(job.images)

    def net(trained: Trained) -> nn.Module:
        if device is None:
            return model_for_checks(trained.recipe.model, images_of(trained.recipe)[0])
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
    nets = {one.arm: net(one) for one in (subject, *job.others)}
    return Look(
        arm=subject.arm,
        model=nets[subject.arm],
        held_out=looked if device is None else looked.to(device),
        train=train if device is None else train.to(device),
        attack=job.attack,
        noise=Gaussian(build_threat(recipe.threat)),
        seed=subject.seed,
        select=job.select,
        against="" if other is None else other.arm,
        other=None if other is None else net(other),
        sources=sources,
        curve=curve,
        phase=list(subject.folders)[-1],
        augment=Augment(recipe.data.augment.crop, recipe.data.augment.flip),
        nets=nets if job.others else {},
        **({} if part is None else {"part": part}),
    )
