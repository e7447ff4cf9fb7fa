"""What a schema cannot say: whether data, model, attacks, groups and signals of a recipe exist and fit together.

The builders here turn the parts of a recipe into the objects of the lower layers; checking a recipe is building all of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

from robustlayers import attacks, models
from robustlayers.core.errors import Fault, UserError
from robustlayers.core.identity import canonical
from robustlayers.data import Dataset, Images, load, split
from robustlayers.models import Network
from robustlayers.normalization import NormPolicy, Switch
from robustlayers.selection import Partition
from robustlayers.study.faults import Faults
from robustlayers.study.schema import (
    DataConfig,
    ModelConfig,
    NormalizationConfig,
    OptimizerConfig,
    PhaseConfig,
    Recipe,
    ScheduleConfig,
    ThreatConfig,
)
from robustlayers.study.validate import Place
from robustlayers.training import (
    GroupSettings,
    OptimizerSettings,
    PartialStep,
    Schedule,
    build_optimizer,
    parse_signal,
)

__all__ = [
    "attack_label",
    "build_attack",
    "build_model",
    "build_optimizer_settings",
    "build_policy",
    "build_schedule",
    "build_threat",
    "data_of",
    "load_data",
    "model_options",
    "phase_groups",
    "recipe_faults",
    "training_attack",
]


def build_threat(config: ThreatConfig) -> attacks.Threat:
    """Return the threat of a recipe."""
    return attacks.Threat(config.norm, config.eps)


NamedAttack = attacks.APGD | attacks.FGSM | attacks.Noise | attacks.PGD


def build_attack(what: str | Mapping[str, Any], threat: ThreatConfig) -> NamedAttack:
    """Return an attack as measured with: PGD keeps the best iterate."""
    return cast(NamedAttack, attacks.parse(what, build_threat(threat)))


def training_attack(what: str | Mapping[str, Any], threat: ThreatConfig) -> NamedAttack:
    """Return an attack as trained with: PGD keeps the last iterate unless told otherwise, which saves a forward."""
    options: dict[str, Any] = {"name": what} if isinstance(what, str) else dict(what)
    attack = build_attack(options, threat)
    if isinstance(attack, attacks.PGD) and attack.restarts == 1 and "keep" not in options:
        attack = build_attack({**options, "keep": "last"}, threat)
    return attack


def attack_label(what: str | Mapping[str, Any], threat: ThreatConfig) -> str:
    """Return the short name under which rows and claims know an attack."""
    return attacks.label(build_attack(what, threat))


def build_policy(config: NormalizationConfig) -> NormPolicy:
    """Return the norm policy of a phase."""
    return NormPolicy(
        craft=Switch(config.craft.by, config.craft.update),
        clean=Switch(config.clean.by, config.clean.update),
        adversarial=Switch(config.adversarial.by, config.adversarial.update),
    )


def build_optimizer_settings(config: OptimizerConfig) -> OptimizerSettings:
    """Return the optimizer's settings of a phase."""
    first, second = config.betas
    groups = {name: GroupSettings(own.lr, own.momentum, own.weight_decay) for name, own in config.groups.items()}
    return OptimizerSettings(
        config.name,
        config.lr,
        config.momentum,
        config.weight_decay,
        config.nesterov,
        (first, second),
        config.decay,
        groups,
    )


def build_schedule(config: ScheduleConfig) -> Schedule:
    """Return the schedule of a phase."""
    return Schedule(config.name, tuple(config.milestones), config.factor, config.peak, config.warmup)


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
    fitted = {"channels": dataset.train.images.shape[1], "classes": len(dataset.classes), **config.options}
    return models.resolve(config.name, fitted)


def build_model(config: ModelConfig, dataset: Dataset, seed: int) -> Network:
    """Return the model of a recipe, initialized from a seed."""
    return models.build(config.name, seed=seed, **model_options(config, dataset))


@lru_cache(maxsize=4)
def _model_for_checks(name: str, options: str) -> Network:
    return models.build(name, seed=0, **json.loads(options))


def phase_groups(recipe: Recipe, phase: PhaseConfig) -> dict[str, str]:
    """Return group -> selector of a phase: names from `groups` are looked up, other keys are selectors themselves."""
    return {group: recipe.groups.get(group, group) for group in phase.train}


def recipe_faults(recipe: Recipe, place: Place) -> list[Fault]:
    """Return what is wrong with a recipe that fits the schema: every fault at the place where it was written."""
    found = Faults(place)
    if recipe.threat.norm == "linf" and recipe.threat.eps > 1:
        text = f"{recipe.threat.eps:g} is not allowed; allowed: at most 1, in pixel units of [0, 1]; write 8/255"
        found.add(text, "threat", "eps")
    _check_attacks(recipe, found)
    _check_names(recipe, found)
    if not any(phase.epochs for phase in recipe.phases):
        found.add("no phase has an epoch: nothing would be trained", "phases")
    _check_signals(recipe, found)
    dataset = None
    with found.at("data", "name"):
        dataset = load_data(recipe.data.name)
    if dataset is not None:
        _check_data(recipe, dataset, found)
    if _check_model(recipe, dataset, found) and dataset is not None:
        _check_groups(recipe, dataset, found)
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
            label = attack_label(what, recipe.threat)
            if label in labels:
                raise UserError(f"{label} stands there twice; rows could not tell them apart")
            labels.add(label)


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
    faults = models.check(recipe.model.name, {**facts, **own})
    for fault in faults:
        found.add(fault.message, "model", *((fault.path,) if fault.path else ()))
    for option, fact in () if faults else facts.items():
        if own.get(option, fact) != fact:
            found.add(f"{own[option]} does not fit {recipe.data.name}, which has {fact}", "model", option)
            return False
    return not faults


def _check_signals(recipe: Recipe, found: Faults) -> None:
    for index, phase in enumerate(recipe.phases):
        for group, signal in phase.train.items():
            with found.at("phases", index, "train", group):
                parse_signal(signal)


def _check_groups(recipe: Recipe, dataset: Dataset, found: Faults) -> None:
    model = _model_for_checks(recipe.model.name, canonical(model_options(recipe.model, dataset)))
    attack = build_attack("fgsm", recipe.threat)  # a stand-in: the phase's own is checked elsewhere
    for index, phase in enumerate(recipe.phases):
        known = len(found.faults)
        with found.at("phases", index, "train"):
            partition = Partition(model, phase_groups(recipe, phase))
            if any(path[:3] == ("phases", index, "train") for path in found.paths[:known]):
                continue  # without its signals there is no step to check
            policy = build_policy(phase.normalization)
            step = PartialStep(model, partition, phase.train, optimizer=None, attack=attack, policy=policy)
            with found.at("phases", index, "optimizer"):
                build_optimizer(partition, step.signals, build_optimizer_settings(phase.optimizer))
