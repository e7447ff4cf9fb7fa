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
from robustlayers.study.validate import Keys, Place
from robustlayers.study.yaml import path_text
from robustlayers.training import OptimizerSettings, PartialStep, Schedule, parse_signal

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
    return OptimizerSettings(
        config.name, config.lr, config.momentum, config.weight_decay, config.nesterov, (first, second)
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
    found = _Faults(place)
    with found.at("threat"):
        build_threat(recipe.threat)
    with found.at("attack"):
        training_attack(recipe.attack, recipe.threat)
    with found.at("evaluate", "monitor", "attack"):
        build_attack(recipe.evaluate.monitor.attack, recipe.threat)
    labels: dict[str, int] = {}
    for index, what in enumerate(recipe.evaluate.attacks):
        with found.at("evaluate", "attacks", index):
            label = attack_label(what, recipe.threat)
            if label in labels:
                raise UserError(f"{label} stands there twice; rows could not tell them apart")
            labels[label] = index
    if len(set(recipe.evaluate.checkpoints)) < len(recipe.evaluate.checkpoints):
        found.add("a checkpoint stands there twice", "evaluate", "checkpoints")
    names = [phase.name for phase in recipe.phases]
    for index, name in enumerate(names):
        if name in names[:index]:
            found.add(f"two phases are called {name!r}", "phases", index, "name")
        if name.isdigit():
            found.add("a phase's name must not be a number, which would name a position", "phases", index, "name")
    if not any(phase.epochs for phase in recipe.phases):
        found.add("no phase has an epoch: nothing would be trained", "phases")
    dataset = None
    with found.at("data", "name"):
        dataset = load_data(recipe.data.name)
    if dataset is not None:
        with found.at("data"):
            _, _, validation, _ = data_of(recipe.data)
            if "best" in recipe.evaluate.checkpoints and not len(validation):
                raise UserError("checkpoint 'best' is chosen on validation images: data.validation must be more than 0")
        given = models.check(recipe.model.name, recipe.model.options)
        for fault in given:
            found.add(fault.message, "model", *((fault.path,) if fault.path else ()))
        if not given:
            _check_fit(recipe, dataset, found)
            if not found.faults:
                _check_phases(recipe, dataset, found)
    return found.faults


def _check_fit(recipe: Recipe, dataset: Dataset, found: _Faults) -> None:
    facts = {"channels": dataset.train.images.shape[1], "classes": len(dataset.classes)}
    for option, fact in facts.items():
        own = recipe.model.options.get(option)
        if own is not None and own != fact:
            found.add(f"{own} does not fit {recipe.data.name}, which has {fact}", "model", option)


def _check_phases(recipe: Recipe, dataset: Dataset, found: _Faults) -> None:
    options = canonical(model_options(recipe.model, dataset))
    model = _model_for_checks(recipe.model.name, options)
    for index, phase in enumerate(recipe.phases):
        attack = None
        with found.at("phases", index, "attack"):
            attack = training_attack(phase.attack or recipe.attack, recipe.threat)
        broken = len(found.faults)
        for group, signal in phase.train.items():
            with found.at("phases", index, "train", group):
                parse_signal(signal)
        if len(found.faults) > broken or attack is None:
            continue
        try:
            partition = Partition(model, phase_groups(recipe, phase))
            PartialStep(
                model, partition, phase.train, optimizer=None, attack=attack, policy=build_policy(phase.normalization)
            )
        except UserError as error:
            for fault in error.faults:
                found.add(fault.message, "phases", index, "train", *((fault.path,) if fault.path else ()))


class _Faults:
    """Collects faults under the place where they were written."""

    def __init__(self, place: Place) -> None:
        self.place, self.faults = place, []

    def add(self, message: str, *path: str | int) -> None:
        """Note a fault at a path of the document."""
        at = self.place(tuple(path))
        self.faults.append(Fault(message, at.file, at.line, at.path or path_text(path)))

    def at(self, *path: str | int) -> _Collect:
        """Return a context that notes a `UserError` as faults at `path` and goes on."""
        return _Collect(self, path)


class _Collect:
    def __init__(self, faults: _Faults, path: Keys) -> None:
        self.faults, self.path = faults, path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, UserError):
            return False
        for fault in error.faults:
            place = f"{fault.file}: " if fault.file else ""
            self.faults.add(place + fault.message, *self.path)
        return True
