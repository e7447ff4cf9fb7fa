"""One phase for one seed: killed at any moment, it goes on from where it was last saved, to the same bits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import isnan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustlayers.core.errors import UserError
from robustlayers.core.files import file_digest, read_json, read_tensors, write_json, write_tensors
from robustlayers.core.random import stream
from robustlayers.core.ranks import ALONE, Ranks
from robustlayers.data import Images
from robustlayers.evaluation import worst_case
from robustlayers.study.begin import Ends, begin
from robustlayers.study.changes import Changed, Recalibrated
from robustlayers.study.local import Stopped
from robustlayers.study.phases import build_trainer
from robustlayers.study.plan import PhaseNode
from robustlayers.study.schema import PhaseConfig, Recipe
from robustlayers.study.semantics import build_attack, build_model, data_of
from robustlayers.study.steering import measured_as, policy_of
from robustlayers.study.store import Store
from robustlayers.training import Diverged, EpochLog, PhaseTrainer, snapshot

__all__ = ["Report", "stops", "train_phase"]

Report = Callable[[str, Mapping[str, Any]], None]
"""`report("batch" | "epoch" | "measured", facts)`"""

_RESUME = ".resume.json"
_STRIDE = 50  # steps between looks at the clock
_SAVE_SECONDS = 60.0  # a long epoch is saved so often

_Work = PhaseTrainer | Recalibrated | Changed


def train_phase(
    store: Store, node: PhaseNode, seed: int, device: torch.device, report: Report, *, ranks: Ranks = ALONE
) -> None:
    """Train one phase for one seed into the store, going on where an earlier process was stopped.

    A run that diverges is noted in the store as such, and raises `Stopped`. Of several processes, which call this with the
    same arguments, only the main one writes, and changes of tensors without training are its business alone.
    """
    if node.phase.kind != "train":
        if not ranks.main:
            return
        ranks = ALONE
    folder = store.phase(node.id, seed)
    try:
        _train(store, node, seed, device, report, ranks)
    except Diverged as error:
        if ranks.main:
            store.fail(folder, "diverged", str(error))
        raise Stopped(str(error)) from None


def _train(store: Store, node: PhaseNode, seed: int, device: torch.device, report: Report, ranks: Ranks) -> None:
    phase, folder = node.phase, store.phase(node.id, seed)
    dataset, train, validation, _ = data_of(node.recipe.data)
    work = _begun(store, node, seed, build_model(node.recipe.model, dataset, seed), train, device, ranks)
    record = _resume_together(store, work, folder, ranks)
    _check_count(record, phase, ranks, folder)
    monitor = _Monitor(node.recipe, node, train, validation, device, ranks)
    write = write_tensors if ranks.main else _nothing
    saved = time.monotonic()
    told = ""

    def progress(done: int, of: int) -> None:
        report("batch", {"done": done, "of": of, "epoch": work.done})

    while work.done < work.epochs and not stops(phase, node.select, record["curve"]):
        log = work.run(steps=_STRIDE, progress=progress)
        if told != (told := _chosen(work)):
            report("chosen", {"text": told})
        if log is None:
            if ranks.main and time.monotonic() - saved > _SAVE_SECONDS:
                _save(work, folder, record)
                saved = time.monotonic()
            continue
        point = _end_of_epoch(work, node, log, monitor, record, folder, write)
        if ranks.main:
            _save(work, folder, record)
        saved = time.monotonic()
        report("epoch", {**point, "done": work.done, "of": work.epochs, "seconds": log.seconds})
    if ranks.main:
        _finish(work, folder, record)
        store.finish(folder, kind="phase", id=node.id, seed=seed)


def _chosen(work: _Work) -> str:
    """Return what `crafting: auto` stands for in this phase and why; empty without it, and before the first batch."""
    return work.step.choice.reason if isinstance(work, PhaseTrainer) and work.step.choice else ""


def _begun(
    store: Store,
    node: PhaseNode,
    seed: int,
    model: nn.Module,
    train: Images,
    device: torch.device,
    ranks: Ranks,
) -> _Work:
    """Return the phase before its first step: the model goes on from the phase before, and groups start as they are to."""
    recipe, phase = node.recipe, node.phase
    if node.parent is not None:
        model.load_state_dict(read_tensors(store.phase(node.parent, seed) / "last.safetensors"))
    before = snapshot(model) if phase.kind == "set" else {}
    begin(model, recipe, phase, seed, node.first_epoch, _ends(store, node, seed))
    model.to(device)
    if phase.kind == "set":
        return Changed(node, model, before)
    images = train.to(device)
    if phase.kind == "recalibrate":
        return Recalibrated(node, model, images, seed)
    return build_trainer(
        model, recipe, phase, images, seed=seed, first_epoch=node.first_epoch, device=device, ranks=ranks
    )


def _end_of_epoch(
    work: _Work,
    node: PhaseNode,
    log: EpochLog,
    monitor: _Monitor,
    record: dict[str, Any],
    folder: Path,
    write: Callable[[Path, Mapping[str, Tensor]], object],
) -> dict[str, Any]:
    """Measure the model that an epoch ended with, note it, write it where it is to be kept; return its point of the curve."""
    began = time.perf_counter()
    with work.result() as result:
        point = {
            "epoch": log.epoch,
            "phase": node.phase.name,
            **monitor(result),
            "train_loss": None if isnan(log.loss) else log.loss,
        }
        record["curve"].append(point)
        record["seconds"] += log.seconds
        record["monitor_seconds"] += time.perf_counter() - began
        record["forward_passes"] += log.forward_passes
        record["backward_passes"] += log.backward_passes
        record["epoch_seconds"].append(log.seconds)
        score = monitor.score(point)
        if record["best"] is None or score > record["best"]["score"]:
            record["best"] = {"epoch": log.epoch, "score": score, "file": f".best-{log.epoch}.safetensors"}
            write(folder / record["best"]["file"], result.state_dict())
        if log.epoch in node.kept:
            write(folder / f"epoch-{log.epoch}.safetensors", result.state_dict())
    return point


def _finish(work: _Work, folder: Path, record: Mapping[str, Any]) -> None:
    """Write the results of a phase whose last epoch is over; a broken promise raises `UserError`."""
    ledger = work.verify()
    with work.result() as result:
        write_tensors(folder / "last.safetensors", result.state_dict())
    write_tensors(folder / "best.safetensors", read_tensors(folder / record["best"]["file"]))
    write_json(folder / "curve.json", {"points": record["curve"], "best_epoch": record["best"]["epoch"]})
    write_json(
        folder / "ledger.json",
        {
            "forward_passes": record["forward_passes"],
            "backward_passes": record["backward_passes"],
            **({"crafting": _chosen(work)} if _chosen(work) else {}),
            **({"processes": record["processes"]} if "processes" in record else {}),
            "groups": [{**vars(change), "broken": list(change.broken), "kept": change.kept} for change in ledger],
        },
    )
    times = {"seconds", "monitor_seconds", "epoch_seconds"}
    write_json(folder / "time.json", {key: record[key] for key in times} | {"threads": torch.get_num_threads()})


def _ends(store: Store, node: PhaseNode, seed: int) -> Ends:
    """Return where the states that the phase may start from lie."""
    folders = {name: store.phase(key, seed) for name, key in node.earlier.items()}

    def epoch(number: int) -> Path:
        begun = [f for f in folders.values() if read_json(f / "curve.json")["points"][0]["epoch"] <= number]
        found = begun[-1]
        kept = found / f"epoch-{number}.safetensors"
        return kept if kept.exists() else found / "last.safetensors"  # its last epoch, or it stopped before

    return Ends(
        {name: (folder / "best.safetensors", folder / "last.safetensors") for name, folder in folders.items()}, epoch
    )


def _resume_together(store: Store, work: _Work, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Load the state that was saved last in all processes, and return its record; the main one judges whether it is whole."""
    record = ranks.tell(_resume(store, work, folder) if ranks.main else None)
    if not ranks.main and "state" in record:
        work.load_state(read_tensors(folder / record["state"]))
    ranks.wait()  # before the main process replaces the state
    return record


def _check_count(record: dict[str, Any], phase: PhaseConfig, ranks: Ranks, folder: Path) -> None:
    """Note how many processes share the batches; where that decides the result, another number cannot go on."""
    before = record.get("processes", 1) if "state" in record else ranks.count
    if before != ranks.count and phase.kind == "train" and phase.statistics != "sync":
        raise UserError(
            f"statistics: {phase.statistics}: this phase was begun by {before} process(es), each of which normalizes by its "
            f"own images, and cannot be gone on with by {ranks.count}; use as many, or delete {folder}"
        )
    if ranks.count > 1:
        record["processes"] = ranks.count


def _nothing(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write nothing, as every process but the main one does."""


def _resume(store: Store, work: _Work, folder: Path) -> dict[str, Any]:
    """Load the state that was saved last, if there is one that is whole, and return its record."""
    path = folder / _RESUME
    if path.exists():
        with suppress(UserError, LookupError, TypeError):  # the record itself is damaged
            record = read_json(path)
            state = folder / record["state"]
            best = record["best"]
            whole = state.exists() and file_digest(state) == record["state_sha256"]
            if best is not None:
                file = folder / best["file"]
                whole = whole and file.exists() and file_digest(file) == best["sha256"]
            if whole:
                work.load_state(read_tensors(state))
                return record
        store.set_aside(folder)  # a damaged state is never trained on; the phase starts anew
    return {
        "curve": [],
        "best": None,
        "seconds": 0.0,
        "monitor_seconds": 0.0,
        "epoch_seconds": [],
        "forward_passes": 0,
        "backward_passes": 0,
    }


def _save(work: _Work, folder: Path, record: dict[str, Any]) -> None:
    """Write the present state, then the record that points to it, then drop what no record points to."""
    state = f".state-{work.place}.safetensors"
    write_tensors(folder / state, work.state())
    kept = {state}
    if record["best"] is not None:
        record["best"]["sha256"] = file_digest(folder / record["best"]["file"])
        kept.add(record["best"]["file"])
    record.update(state=state, state_sha256=file_digest(folder / state))
    write_json(folder / _RESUME, record)
    for old in (*folder.glob(".state-*.safetensors"), *folder.glob(".best-*.safetensors")):
        if old.name not in kept:
            old.unlink()


def stops(phase: PhaseConfig, select: str, curve: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a phase with these points ends early: no rise of its metric in the last `patience` epochs."""
    if phase.stop is None or len(curve) <= phase.stop.patience:
        return False
    metric = select if phase.stop.metric == "auto" else phase.stop.metric
    values = [float(point[f"validation_{metric}"] or 0.0) for point in curve]
    best, since = values[0], 0
    for value in values[1:]:
        rose = value > best + phase.stop.least
        best, since = (value, 0) if rose else (best, since + 1)
    return since >= phase.stop.patience


class _Monitor:
    """Accuracies after an epoch on a fixed part of train and of validation, and the score that chooses the best."""

    def __init__(
        self,
        recipe: Recipe,
        node: PhaseNode,
        train: Images,
        validation: Images,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        config = recipe.evaluate.monitor
        self.attack = build_attack(config.attack, recipe.threat)
        self.select, self.switch = node.select, policy_of([node])
        self.batch_size = recipe.evaluate.batch_size
        self.parts = {
            name: _part(images, config.images, recipe.data.validation_seed).to(device)
            for name, images in (("train", train), ("validation", validation))
            if len(images)
        }

    def __call__(self, model: nn.Module) -> dict[str, float | None]:
        values: dict[str, float | None] = {}
        forward, _ = measured_as(model, self.switch)
        for name in ("train", "validation"):
            images = self.parts.get(name)
            if images is None:
                values |= {f"{name}_clean": None, f"{name}_robust": None}
                continue
            verdicts = worst_case(
                forward, images.images, images.labels, {"monitor": self.attack}, self.batch_size, ranks=self.ranks
            )
            values[f"{name}_clean"] = float(verdicts["clean"].double().mean())
            values[f"{name}_robust"] = float(verdicts["robust"].double().mean())
        return values

    def score(self, point: Mapping[str, Any]) -> list[float]:
        """Return what is compared between epochs, the other accuracy deciding ties; a later epoch must be better."""
        clean, robust = (point[f"validation_{key}"] or 0.0 for key in ("clean", "robust"))
        if not self.parts.get("validation"):
            return [float(point["epoch"])]
        return [robust, clean] if self.select == "robust" else [clean, robust]


def _part(images: Images, count: int, seed: int) -> Images:
    if len(images) <= count:
        return images
    order = torch.randperm(len(images), generator=stream(seed, "monitor", len(images)))
    return images.take(order[:count].sort().values)
