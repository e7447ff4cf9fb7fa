"""What `robustlayers evaluate MODEL` names: a study's folder, a result inside one, an architecture, or a function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from robustlayers import models
from robustlayers.attacks import Threat
from robustlayers.core.errors import Fault, UserError, names_text, one_of
from robustlayers.core.files import read_json
from robustlayers.data import Images, load
from robustlayers.evaluation.checkpoints import load_checkpoint
from robustlayers.models import build_factory, fit_options, is_factory
from robustlayers.study.definition import load_study
from robustlayers.study.semantics import build_model, build_threat, data_of
from robustlayers.study.store import Store

__all__ = ["Asked", "Subject", "subject_of"]

_CHECKPOINTS = ("best", "last")


@dataclass(frozen=True)
class Asked:
    """What the command line says about the model and its data; None where it says nothing."""

    model: str
    weights: Path | None = None
    data: str | None = None
    images: int | None = None
    arm: str | None = None
    phase: str | None = None
    checkpoint: str | None = None
    run_seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    rename: Mapping[str, str] = field(default_factory=dict)
    trust: bool = False


@dataclass(frozen=True)
class Subject:
    """A model with weights, and the test images to evaluate it on; `whole` if these are all test images there are.

    `facts` name it in rows; `threat` is that of its study, None where there is none; `notes` are lines for the person who
    asked.
    """

    model: nn.Module
    test: Images
    classes: tuple[str, ...]
    whole: bool
    threat: Threat | None
    facts: Mapping[str, str]
    notes: tuple[str, ...] = ()


def subject_of(asked: Asked) -> Subject:
    """Return what the command line asks for; every mistake in it is a `UserError`."""
    path = Path(asked.model)
    if path.exists() and not is_factory(asked.model):
        return _stored(asked, path)
    if is_factory(asked.model) or asked.model in models.names():
        return _named(asked)
    known = (*models.names(), "MODULE:FUNCTION", "a study's folder")
    raise UserError(Fault(one_of("model", asked.model, known), path="MODEL"))


def _named(asked: Asked) -> Subject:
    """Return an architecture or a function's model with the weights of a file."""
    for name, value in (("--arm", asked.arm), ("--phase", asked.phase), ("--checkpoint", asked.checkpoint)):
        if value is not None:
            raise UserError(Fault(f"means a part of a study; {asked.model} is a model's name", path=name))
    if asked.run_seed is not None:
        raise UserError(Fault(f"means a part of a study; {asked.model} is a model's name", path="--run-seed"))
    if asked.data is None:
        raise UserError(Fault("is missing: name the data set to evaluate on, as in fashion-mnist-mini", path="--data"))
    if asked.weights is None and not is_factory(asked.model):
        raise UserError(Fault(f"is missing: {asked.model} has no weights without a file", path="--weights"))
    dataset = load(asked.data)
    facts = {"channels": dataset.test.shape[0], "classes": len(dataset.classes)}
    if is_factory(asked.model):
        model = build_factory(asked.model, fit_options(asked.model, facts, asked.options), seed=0)
    else:
        if "size" in models.options_of(asked.model):
            facts["size"] = dataset.test.shape[-1]
        model = models.build(asked.model, seed=0, **models.resolve(asked.model, {**facts, **asked.options}))
    kept = () if asked.weights is None else load_checkpoint(model, asked.weights, asked.rename)
    test, whole = _first(dataset.test, asked.images)
    named = {"model": asked.model, "weights": "" if asked.weights is None else str(asked.weights), "data": asked.data}
    return Subject(model, test, dataset.classes, whole, None, named, _notes(asked, kept))


def _notes(asked: Asked, kept: Sequence[str]) -> tuple[str, ...]:
    """Return a line about tensors that the file of weights lacks and nobody gave: those of the input normalization.

    Counters of batches that others leave out change nothing here, and are not told.
    """
    last = {name: name.rpartition(".")[2] for name in kept if not name.endswith("num_batches_tracked")}
    names = [name for name in last if last[name] not in asked.options]
    if not names:
        return ()
    has = () if is_factory(asked.model) else models.options_of(asked.model)
    options = [f"{option}=[...]" for option in dict.fromkeys(last[name] for name in names) if option in has]
    advice = "".join(f" --option {option}" for option in options)
    text = f"{asked.weights}: has no {', '.join(names)}; the model's own are used"
    return (text + (f"; give{advice}" if advice else ""),)


def _stored(asked: Asked, path: Path) -> Subject:
    """Return a checkpoint of a study, named by its folder, by a phase's or run's folder, or by the file itself."""
    for name, value in (("--option", asked.options), ("--rename", asked.rename), ("--weights", asked.weights)):
        if value:
            raise UserError(Fault(f"means a model without a study; {path} is a result of one", path=name))
    checkpoint, folder = asked.checkpoint, path
    if path.is_file():
        if path.suffix != ".safetensors" or path.stem not in _CHECKPOINTS:
            text = "weights alone make no model; name an architecture or MODULE:FUNCTION, and the file by --weights"
            raise UserError(Fault(text, file=str(path)))
        checkpoint, folder = path.stem, path.parent
    root = next((place for place in (folder, *folder.absolute().parents[:3]) if (place / "plan.json").exists()), None)
    if root is None:
        raise UserError(Fault("no study here: it has no plan.json", file=str(path)))
    store, plan = Store(root), read_json(root / "plan.json")
    arm, node, seed = _place(asked, plan, folder)
    checkpoint = checkpoint or _CHECKPOINTS[0]
    if checkpoint not in _CHECKPOINTS:
        raise UserError(Fault(one_of("checkpoint", checkpoint, _CHECKPOINTS), path="--checkpoint"))
    trained = store.phase(node, seed)
    if not store.whole(trained):
        raise UserError(Fault(f"has no whole result of arm {arm} for seed {seed}", file=str(root)))
    study = load_study(root / "study.yaml", trust=asked.trust)
    recipe = next(definition.recipe for definition in study.arms if definition.name == arm)
    dataset, _, _, test = data_of(recipe.data)
    name = recipe.data.name
    if asked.data is not None:
        dataset, name = load(asked.data), asked.data
        test = dataset.test
    model = build_model(recipe.model, dataset, seed)
    load_checkpoint(model, trained / f"{checkpoint}.safetensors")
    test, whole = _first(test, asked.images)
    facts = {
        "model": plan["name"],
        "arm": arm,
        "run_seed": str(seed),
        "checkpoint": checkpoint,
        "phase": node,
        "data": name,
    }
    return Subject(
        model, test, dataset.classes, whole and len(test) == len(dataset.test), build_threat(recipe.threat), facts
    )


def _place(asked: Asked, plan: Mapping[str, Any], folder: Path) -> tuple[str, str, int]:
    """Return (arm, phase result, seed) that a folder and the options name."""
    arms = {arm["name"]: arm for arm in plan["arms"]}
    seeds = list(plan["seeds"])
    kind, identity = folder.absolute().parts[-3:-1]
    inside = folder.name.startswith("seed-") and kind in ("phases", "results")
    if inside:
        seeds = [int(folder.name.removeprefix("seed-"))]
        arms = {
            name: arm for name, arm in arms.items() if identity in (arm["nodes"] if kind == "phases" else [arm["run"]])
        }
    if not arms:
        raise UserError(Fault("belongs to no arm of its study", file=str(folder)))
    if asked.arm is not None and asked.arm not in arms:
        raise UserError(Fault(one_of("arm", asked.arm, arms), path="--arm"))
    if asked.arm is None and len(arms) > 1 and not inside:
        raise UserError(Fault(f"is missing: there are {len(arms)} arms; name one: {names_text(arms)}", path="--arm"))
    name = asked.arm or next(iter(arms))
    phases = {phase["name"]: phase["id"] for phase in arms[name]["phases"]}
    if asked.phase is not None and asked.phase not in phases:
        raise UserError(Fault(one_of(f"phase of arm {name}", asked.phase, phases), path="--phase"))
    node = phases[asked.phase] if asked.phase is not None else arms[name]["nodes"][-1]
    if inside and kind == "phases":
        node = identity
    seed = asked.run_seed if asked.run_seed is not None else seeds[0]
    if seed not in seeds:
        raise UserError(Fault(f"{seed} is not there; allowed: {', '.join(map(str, seeds))}", path="--run-seed"))
    return name, node, seed


def _first(test: Images, images: int | None) -> tuple[Images, bool]:
    if images is None or images == len(test):
        return test, True
    if not 1 <= images <= len(test):
        raise UserError(Fault(f"{images} is not allowed; allowed: 1 to {len(test)}", path="--images"))
    return test.first(images), False
