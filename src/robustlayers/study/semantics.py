"""What a schema cannot say: whether data, model, attacks, groups and signals of a recipe exist and fit together.

The builders here turn the parts of a recipe into the objects of the lower layers; checking a recipe is building all of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import nn

from robustlayers import attacks, models
from robustlayers.core.errors import Fault, UserError
from robustlayers.core.identity import canonical
from robustlayers.data import Dataset, Images, load, split
from robustlayers.models.factory import build_factory, check_factory, factory_digest, fit_options, is_factory
from robustlayers.normalization.policy import NormPolicy, layer_switches
from robustlayers.normalization.recalibration import Recalibration
from robustlayers.selection import Selection
from robustlayers.study.extras import families_of
from robustlayers.study.faults import Faults
from robustlayers.study.finals import NAME, AutoAttack, Measured, measured_attack, name_of, named_attack
from robustlayers.study.phases import (
    build_average,
    build_optimizer_settings,
    build_perturbation,
    build_policy,
    input_attack,
    phase_partition,
    training_attack,
    with_group,
)
from robustlayers.study.schema import DataConfig, ModelConfig, PhaseConfig, Recipe, ThreatConfig
from robustlayers.study.validate import Place
from robustlayers.training import Average, PartialStep, build_optimizer, check_windows, parse_signal

__all__ = [
    "build_attack",
    "build_model",
    "build_threat",
    "data_of",
    "load_data",
    "measured_attacks",
    "model_for_checks",
    "model_identity",
    "model_options",
    "recipe_faults",
]


def build_threat(config: ThreatConfig) -> attacks.Threat:
    """Return the threat of a recipe."""
    return attacks.Threat(config.norm, config.eps)


NamedAttack = attacks.NamedAttack


def build_attack(what: str | Mapping[str, Any], threat: ThreatConfig) -> NamedAttack:
    """Return an attack as measured with: PGD keeps the best iterate."""
    return named_attack(what, build_threat(threat))


def measured_attacks(recipe: Recipe) -> dict[str, Measured]:
    """Return the attacks of `evaluate.attacks` in their order, by the short name under which rows and claims know them.

    AutoAttack has that name only on the whole test set, so the data set is looked at where it is asked for.
    """
    found = [measured_attack(what, build_threat(recipe.threat)) for what in recipe.evaluate.attacks]
    if any(isinstance(attack, AutoAttack) for attack in found):
        dataset = load_data(recipe.data.name)
        whole = recipe.data.test_images in (None, len(dataset.test))
        found = [
            replace(attack, whole=whole, classes=len(dataset.classes)) if isinstance(attack, AutoAttack) else attack
            for attack in found
        ]
    return {name_of(attack): attack for attack in found}


@lru_cache(maxsize=2)
def load_data(name: str) -> Dataset:
    """Return a data set, kept for the next caller."""
    return load(name)


def data_of(config: DataConfig) -> tuple[Dataset, Images, Images, Images]:
    """Return (data set, train, validation, test) as the recipe cuts them."""
    dataset = load_data(config.name)
    train, validation = split(dataset.train, config.validation, config.validation_seed)
    if config.train_images is not None and config.train_images < len(train):
        _, train = split(train, config.train_images / len(train), config.validation_seed)
    test = dataset.test if config.test_images is None else dataset.test.first(config.test_images)
    return dataset, train, validation, test


def model_options(config: ModelConfig, dataset: Dataset) -> dict[str, Any]:
    """Return every option of the model; channels and classes come from the data unless they are given."""
    facts = {"channels": dataset.train.images.shape[1], "classes": len(dataset.classes)}
    if is_factory(config.name):
        return fit_options(config.name, facts, config.options)
    if "size" in models.options_of(config.name):  # a net without convolutions is made for one size of images
        facts["size"] = dataset.train.images.shape[-1]
    return models.resolve(config.name, {**facts, **config.options})


def model_identity(config: ModelConfig, dataset: Dataset) -> dict[str, Any]:
    """Return what decides a model: for a factory the content of its source file too."""
    options = model_options(config, dataset)
    extra = {"digest": factory_digest(config.name, options)} if is_factory(config.name) else {}
    return {"name": config.name, "options": options, **extra}


def build_model(config: ModelConfig, dataset: Dataset, seed: int) -> nn.Module:
    """Return the model of a recipe, initialized from a seed."""
    options = model_options(config, dataset)
    if is_factory(config.name):
        return build_factory(config.name, options, seed=seed)
    return models.build(config.name, seed=seed, **options)


def model_for_checks(config: ModelConfig, dataset: Dataset) -> nn.Module:
    """Return the model of a recipe from seed 0, made once and never trained."""
    return _model_for_checks(config.name, canonical(config.options), dataset.digest, dataset)


@lru_cache(maxsize=4)
def _model_for_checks(name: str, options: str, digest: str, dataset: Dataset) -> nn.Module:
    return build_model(ModelConfig(name=name, **json.loads(options)), dataset, 0)


def recipe_faults(recipe: Recipe, place: Place, trust: bool = False) -> list[Fault]:
    """Return what is wrong with a recipe that fits the schema: every fault at the place where it was written.

    A model that an importable function makes is a fault without `trust`, since naming it runs its code.
    """
    found = Faults(place)
    if recipe.threat.norm == "linf" and recipe.threat.eps > 1:
        text = f"{recipe.threat.eps:g} is not allowed; allowed: at most 1, in pixel units of [0, 1]; write 8/255"
        found.add(text, "threat", "eps")
    _check_attacks(recipe, found)
    _check_names(recipe, found)
    if all(phase.skipped for phase in recipe.phases):
        found.add("no phase has an epoch: nothing would be trained", "phases")
    _check_signals(recipe, found)
    dataset = None
    with found.at("data", "name"):
        dataset = load_data(recipe.data.name)
    if dataset is not None:
        _check_data(recipe, dataset, found)
    if is_factory(recipe.model.name):
        if not trust:
            text = f"{recipe.model.name} is code that would be run; add --trust if you trust it"
            found.add(text, "model", "name")
            return found.faults
        right = dataset is not None and _check_factory(recipe, dataset, found)
    else:
        right = _check_model(recipe, dataset, found)
    if right and dataset is not None:
        _check_phases(recipe, dataset, found)
    return found.faults


def _check_attacks(recipe: Recipe, found: Faults) -> None:
    with found.at_option(recipe.attack, "attack"):
        training_attack(recipe.attack, recipe.threat)
    for index, phase in enumerate(recipe.phases):
        if phase.attack is not None:
            with found.at_option(phase.attack, "phases", index, "attack"):
                training_attack(phase.attack, recipe.threat)
    monitor = recipe.evaluate.monitor
    with found.at_option(monitor.attack, "evaluate", "monitor", "attack"):
        build_attack(monitor.attack, recipe.threat)
    labels: set[str] = set()
    for index, what in enumerate(recipe.evaluate.attacks):
        with found.at_option(what, "evaluate", "attacks", index):
            label = name_of(measured_attack(what, build_threat(recipe.threat)))
            if label in labels:
                raise UserError(f"{label} stands there twice; rows could not tell them apart")
            labels.add(label)
    if recipe.evaluate.branches and recipe.evaluate.attacks and all(_is_final(a) for a in recipe.evaluate.attacks):
        found.add(
            "autoattack does not craft on single branches; add another attack, such as pgd-20", "evaluate", "branches"
        )


def _is_final(what: str | Mapping[str, Any]) -> bool:
    return (what if isinstance(what, str) else what.get("name")) == NAME


def _check_names(recipe: Recipe, found: Faults) -> None:
    if len(set(recipe.evaluate.checkpoints)) < len(recipe.evaluate.checkpoints):
        found.add("a checkpoint stands there twice", "evaluate", "checkpoints")
    names = [phase.name for phase in recipe.phases]
    for index, name in enumerate(names):
        if name in names[:index]:
            found.add(f"two phases are called {name!r}", "phases", index, "name")
        if name.isdigit():
            found.add("a phase's name must not be a number, which would name a position", "phases", index, "name")


def _check_data(recipe: Recipe, dataset: Dataset, found: Faults) -> None:
    config = recipe.data
    if "best" in recipe.evaluate.checkpoints and not config.validation:
        text = "0 leaves no validation images, which choose the checkpoint 'best'; write 0.1, or leave 'best' out"
        found.add(text, "data", "validation")
    available = len(dataset.train)
    with found.at_option({"validation": config.validation}, "data"):
        available = len(split(dataset.train, config.validation, config.validation_seed)[0])
    for key, what, wanted, most in (
        ("train_images", "training", config.train_images, available),
        ("test_images", "test", config.test_images, len(dataset.test)),
    ):
        if wanted is not None and wanted > most:
            found.add(f"{wanted} is more than the {most} {what} images of {config.name}", "data", key)
    with found.at("evaluate", "corruptions"):
        families_of(recipe.evaluate.corruptions, dataset.test.shape[0])
    height, width = dataset.train.shape[1:]
    if config.augment.crop >= min(height, width):
        text = f"{config.augment.crop} is too large for images of {height}x{width}; allowed: less than {min(height, width)}"
        found.add(text, "data", "augment", "crop")


def _check_model(recipe: Recipe, dataset: Dataset | None, found: Faults) -> bool:
    """Note what is wrong with the model, or does not fit the data; return whether it can be built."""
    own = recipe.model.options
    facts: dict[str, Any] = {}
    if dataset is not None:
        facts = {"channels": dataset.train.shape[0], "classes": len(dataset.classes)}
        if recipe.model.name in models.names() and "size" in models.options_of(recipe.model.name):
            facts["size"] = dataset.train.shape[-1]
    faults = models.check(recipe.model.name, {**facts, **own})
    for fault in faults:
        found.add(fault.message, "model", *((fault.path,) if fault.path else ()))
    for option, fact in () if faults else facts.items():
        if own.get(option, fact) != fact:
            found.add(f"{own[option]} does not fit {recipe.data.name}, which has {fact}", "model", option)
            return False
    return not faults


def _check_factory(recipe: Recipe, dataset: Dataset, found: Faults) -> bool:
    """Note what is wrong with a factory; return whether the model can be built."""
    known = len(found.faults)
    with found.at("model", "name"):
        options = model_options(recipe.model, dataset)
        for fault in check_factory(recipe.model.name, options):
            found.add(fault.message, "model", *((fault.path,) if fault.path else ("name",)))
        if len(found.faults) == known:
            model_for_checks(recipe.model, dataset)
    return len(found.faults) == known


def _check_signals(recipe: Recipe, found: Faults) -> None:
    for index, phase in enumerate(recipe.phases):
        for group, signal in phase.train.items():
            with found.at("phases", index, "train", group):
                parse_signal(signal)


def _check_phases(recipe: Recipe, dataset: Dataset, found: Faults) -> None:
    model = model_for_checks(recipe.model, dataset)
    for index, phase in enumerate(recipe.phases):
        known = len(found.faults)
        if phase.recalibrate is not None:
            with found.at("phases", index, "recalibrate"):
                _check_statistics(model, recipe, phase)
            continue
        if phase.assign:
            with found.at("phases", index, "set"):
                phase_partition(model, recipe, phase)
            continue
        with found.at("phases", index, "train"):
            partition = phase_partition(model, recipe, phase)
            if any(path[:3] == ("phases", index, "train") for path in found.paths[:known]):
                continue  # without its signals there is no step to check
            attack = build_attack("fgsm", recipe.threat)  # a stand-in: the phase's own is checked elsewhere
            policy = NormPolicy()
            with found.at("phases", index, "normalization"):
                policy = build_policy(phase.normalization, recipe.groups)
                layer_switches(policy, partition.inventory)
            if len(found.faults) > known:
                continue
            step = PartialStep(model, partition, phase.train, optimizer=None, attack=attack, policy=policy)
            with found.at("phases", index, "optimizer"):
                build_optimizer(partition, step.signals, build_optimizer_settings(phase.optimizer))
            with found.at("phases", index, "windows"):
                for group, window in phase.windows.items():
                    if len(window) != 2:
                        raise UserError(f"window of {group!r} has {len(window)} numbers; write [begin, end]")
                check_windows(step.signals, {group: (w[0], w[1]) for group, w in phase.windows.items()})
            with found.at_option(phase.perturbation or {}, "phases", index, "perturbation"):
                build_perturbation(phase.perturbation)
            with found.at_option(phase.ascent or {}, "phases", index, "ascent"):
                ascent = with_group(
                    phase.ascent, recipe.groups
                )  # as written: messages tell a default from what was asked for
                PartialStep(model, partition, phase.train, optimizer=None, attack=attack, policy=policy, ascent=ascent)
            with found.at_option(phase.average or {}, "phases", index, "average"):
                average = build_average(recipe, phase)
                if average is not None:
                    Average(partition.inventory, average)
                    if average.on == "adversarial" and input_attack(recipe, phase) is None:
                        raise UserError("recalibrating on adversarial inputs needs a group that learns from them")
            if phase.stop is not None and not recipe.data.validation:
                found.add("0 leaves no validation images, by which a phase could stop", "data", "validation")


def _check_statistics(model: nn.Module, recipe: Recipe, phase: PhaseConfig) -> Selection:
    partition = phase_partition(model, recipe, phase)
    selection = partition["statistics"]
    Recalibration(model, selection)
    return selection
