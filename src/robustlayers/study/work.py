"""Training one phase for one seed: killed at any moment, it goes on after its last finished epoch, to the same bits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from robustlayers.core.errors import UserError
from robustlayers.core.files import file_digest, read_json, read_tensors, write_json, write_tensors
from robustlayers.core.random import stream
from robustlayers.data import Augment, Images
from robustlayers.evaluation import worst_case
from robustlayers.study.begin import begin
from robustlayers.study.local import Stopped
from robustlayers.study.plan import PhaseNode
from robustlayers.study.schema import Recipe
from robustlayers.study.semantics import (
    build_attack,
    build_model,
    build_optimizer_settings,
    build_policy,
    build_schedule,
    data_of,
    phase_groups,
    training_attack,
)
from robustlayers.study.store import Store
from robustlayers.training import Diverged, PhaseTrainer

__all__ = ["Report", "train_phase"]

Report = Callable[[str, Mapping[str, Any]], None]
"""`report("batch" | "epoch" | "measured", facts)`"""

_RESUME = ".resume.json"


def train_phase(store: Store, node: PhaseNode, seed: int, device: torch.device, report: Report) -> None:
    """Train one phase for one seed into the store, going on where an earlier process was stopped.

    A run that diverges is noted in the store as such, and raises `Stopped`.
    """
    folder = store.phase(node.id, seed)
    try:
        _train(store, node, seed, device, report)
    except Diverged as error:
        store.fail(folder, "diverged", str(error))
        raise Stopped(str(error)) from None


def _train(store: Store, node: PhaseNode, seed: int, device: torch.device, report: Report) -> None:
    recipe, phase = node.recipe, node.phase
    folder = store.phase(node.id, seed)
    dataset, train, validation, _ = data_of(recipe.data)
    model = build_model(recipe.model, dataset, seed)
    ends = {name: store.phase(key, seed) / "last.safetensors" for name, key in node.earlier.items()}
    if node.parent is not None:
        model.load_state_dict(read_tensors(store.phase(node.parent, seed) / "last.safetensors"))
    begin(model, recipe, phase, seed, node.first_epoch, ends)
    model.to(device)
    augment = recipe.data.augment
    trainer = PhaseTrainer(
        model,
        phase_groups(recipe, phase),
        phase.train,
        train.to(device),
        epochs=phase.epochs,
        attack=training_attack(phase.attack or recipe.attack, recipe.threat),
        batch_size=phase.batch_size,
        optimizer=build_optimizer_settings(phase.optimizer),
        schedule=build_schedule(phase.schedule),
        policy=build_policy(phase.normalization),
        augment=Augment(augment.crop, augment.flip),
        seed=seed,
        first_epoch=node.first_epoch,
        device=device,
    )
    record = _resume(store, trainer, folder)
    monitor = _Monitor(recipe, node.select, train, validation, device)
    while trainer.done < trainer.epochs:
        log = trainer.train_epoch(lambda done, of: report("batch", {"done": done, "of": of, "epoch": trainer.done}))
        began = time.perf_counter()
        point = {"epoch": log.epoch, "phase": phase.name, **monitor(model), "train_loss": log.loss}
        record["curve"].append(point)
        record["seconds"] += log.seconds
        record["monitor_seconds"] += time.perf_counter() - began
        record["forward_passes"] += log.forward_passes
        record["backward_passes"] += log.backward_passes
        record["epoch_seconds"].append(log.seconds)
        score = monitor.score(point)
        if record["best"] is None or score > record["best"]["score"]:
            record["best"] = {"epoch": log.epoch, "score": score, "file": f".best-{log.epoch}.safetensors"}
            write_tensors(folder / record["best"]["file"], model.state_dict())
        _save(trainer, folder, record)
        report("epoch", {**point, "done": trainer.done, "of": trainer.epochs, "seconds": log.seconds})
    ledger = trainer.verify()
    write_tensors(folder / "last.safetensors", model.state_dict())
    write_tensors(folder / "best.safetensors", read_tensors(folder / record["best"]["file"]))
    write_json(folder / "curve.json", {"points": record["curve"], "best_epoch": record["best"]["epoch"]})
    write_json(
        folder / "ledger.json",
        {
            "forward_passes": record["forward_passes"],
            "backward_passes": record["backward_passes"],
            "groups": [{**vars(change), "broken": list(change.broken), "kept": change.kept} for change in ledger],
        },
    )
    times = {"seconds", "monitor_seconds", "epoch_seconds"}
    write_json(folder / "time.json", {key: record[key] for key in times} | {"threads": torch.get_num_threads()})
    store.finish(folder, kind="phase", id=node.id, seed=seed)


def _resume(store: Store, trainer: PhaseTrainer, folder: Any) -> dict[str, Any]:
    """Load the state after the last finished epoch, if there is one that is whole, and return its record."""
    path = folder / _RESUME
    if path.exists():
        with suppress(UserError, LookupError, TypeError):  # the record itself is damaged
            record = read_json(path)
            state = folder / record["state"]
            best = folder / record["best"]["file"]
            whole = state.exists() and file_digest(state) == record["state_sha256"]
            if whole and best.exists() and file_digest(best) == record["best"]["sha256"]:
                trainer.load_state(read_tensors(state), record["epochs_done"])
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


def _save(trainer: PhaseTrainer, folder: Any, record: dict[str, Any]) -> None:
    """Write the state after an epoch, then the record that points to it, then drop what no record points to."""
    state = f".state-{trainer.done}.safetensors"
    write_tensors(folder / state, trainer.state())
    record["best"]["sha256"] = file_digest(folder / record["best"]["file"])
    record.update(state=state, state_sha256=file_digest(folder / state), epochs_done=trainer.done)
    write_json(folder / _RESUME, record)
    for old in (*folder.glob(".state-*.safetensors"), *folder.glob(".best-*.safetensors")):
        if old.name not in (state, record["best"]["file"]):
            old.unlink()


class _Monitor:
    """Accuracies after an epoch on a fixed part of train and of validation, and the score that chooses the best."""

    def __init__(self, recipe: Recipe, select: str, train: Images, validation: Images, device: torch.device) -> None:
        config = recipe.evaluate.monitor
        self.attack = build_attack(config.attack, recipe.threat)
        self.select = select
        self.batch_size = recipe.evaluate.batch_size
        self.parts = {
            name: _part(images, config.images, recipe.data.validation_seed).to(device)
            for name, images in (("train", train), ("validation", validation))
            if len(images)
        }

    def __call__(self, model: nn.Module) -> dict[str, float | None]:
        values: dict[str, float | None] = {}
        for name in ("train", "validation"):
            images = self.parts.get(name)
            if images is None:
                values |= {f"{name}_clean": None, f"{name}_robust": None}
                continue
            verdicts = worst_case(model, images.images, images.labels, {"monitor": self.attack}, self.batch_size)
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
