"""From a phase of a study file to the objects of the lower layers: settings, groups, and the trainer that runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from math import ceil
from typing import Any, TypeVar

import torch
from torch import nn

from robustlayers import attacks
from robustlayers.core.errors import UserError, one_of
from robustlayers.core.quantities import number
from robustlayers.core.ranks import ALONE, Ranks
from robustlayers.data import Augment, Images, batch_count
from robustlayers.normalization import PASSES, NormPolicy, Switch, habit
from robustlayers.normalization.policy import policy_content
from robustlayers.selection import Inventory, Partition, resolve, selector_content
from robustlayers.study.finals import named_attack
from robustlayers.study.schema import (
    GroupOptimizerConfig,
    NormalizationConfig,
    OptimizerConfig,
    PassesConfig,
    PhaseConfig,
    Recipe,
    ScheduleConfig,
    ThreatConfig,
)
from robustlayers.training import (
    OBJECTIVES,
    Ascent,
    AverageSettings,
    GroupSettings,
    OptimizerSettings,
    Perturbation,
    PhaseTrainer,
    Schedule,
    parse_ascent,
    parse_signal,
)

__all__ = [
    "build_ascent",
    "build_average",
    "build_optimizer_settings",
    "build_perturbation",
    "build_policy",
    "build_schedule",
    "build_trainer",
    "group_texts",
    "input_attack",
    "needs_attack",
    "phase_epochs",
    "phase_groups",
    "phase_partition",
    "training_attack",
    "with_group",
]

Made = TypeVar("Made")


def training_attack(what: str | Mapping[str, Any], threat: ThreatConfig) -> Any:
    """Return an attack as trained with: as published, and without what only a measurement needs, unless told otherwise.

    PGD keeps the last iterate, which saves a forward; N-FGSM leaves the ball by its noise (de Jorge et al. 2022).
    """
    options: dict[str, Any] = {"name": what} if isinstance(what, str) else dict(what)
    bound = attacks.Threat(threat.norm, threat.eps)
    attack = named_attack(options, bound)
    if isinstance(attack, attacks.PGD) and attack.restarts == 1 and "keep" not in options:
        attack = attacks.parse({**options, "keep": "last"}, bound)
    if isinstance(attack, attacks.NFGSM) and "project" not in options:
        attack = attacks.parse({**options, "project": False}, bound)
    return attack


def needs_attack(phase: PhaseConfig) -> bool:
    """Tell whether a phase crafts adversarial images."""
    if phase.recalibrate is not None:
        return phase.recalibrate.on == "adversarial"
    objectives = {name for signal in phase.train.values() for name in parse_signal(signal)}
    return any("adversarial" in OBJECTIVES[name].passes for name in objectives)


def input_attack(recipe: Recipe, phase: PhaseConfig) -> Any | None:
    """Return what makes the inputs of a phase from images: its training attack, noise, or None for clean inputs."""
    if phase.recalibrate is not None and phase.recalibrate.on == "noise":
        return attacks.parse("noise", attacks.Threat(recipe.threat.norm, recipe.threat.eps))
    return training_attack(phase.attack or recipe.attack, recipe.threat) if needs_attack(phase) else None


def build_policy(config: NormalizationConfig, groups: Mapping[str, str] | None = None) -> NormPolicy:
    """Return the norm policy of a phase; `groups` are the recipe's names for selectors."""
    base = habit(config.habit or "standard")
    own = _switches(config)
    layers: dict[str, Mapping[str, Switch]] = {}
    for selector, passes in config.layers.items():
        inherited = {} if passes.habit is None else habit(passes.habit).switches
        made = {**base.switches, **own}
        switches = {**{name: switch for name, switch in inherited.items() if name in made}, **_switches(passes)}
        layers[(groups or {}).get(selector, selector)] = switches
    return base.changed(**own, layers=layers) if own or layers else base


def _switches(config: PassesConfig) -> dict[str, Switch]:
    given = {name: getattr(config, name) for name in PASSES}
    faults = []
    found = {}
    for name, switch in given.items():
        if switch is not None:
            try:
                found[name] = Switch(**{key: getattr(switch, key) for key in type(switch).model_fields})
            except UserError as error:
                faults += [fault.at(path=name) for fault in error.faults]
    if faults:
        raise UserError(faults)
    return found


def build_optimizer_settings(config: OptimizerConfig) -> OptimizerSettings:
    """Return the optimizer's settings of a phase."""
    first, second = config.betas
    return OptimizerSettings(
        name=config.name,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        betas=(first, second),
        decay=config.decay,
        groups={name: _group_settings(own) for name, own in config.groups.items()},
        clip=config.clip,
        rates=config.rates,
        rates_batches=config.rates_batches,
    )


def _group_settings(own: GroupOptimizerConfig) -> GroupSettings:
    plain = {name: getattr(own, name) for name in type(own).model_fields if name != "schedule"}
    return GroupSettings(**plain, schedule=None if own.schedule is None else build_schedule(own.schedule))


def build_schedule(config: ScheduleConfig) -> Schedule:
    """Return the schedule of a phase."""
    return Schedule(
        config.name, tuple(config.milestones), config.factor, config.peak, config.warmup, cycles=config.cycles
    )


def with_group(value: str | Mapping[str, Any] | None, groups: Mapping[str, str]) -> str | Mapping[str, Any] | None:
    """Return settings whose `select` is a selector where it was a name from `groups`."""
    if isinstance(value, Mapping) and isinstance(value.get("select"), str):
        return {**value, "select": groups.get(value["select"], value["select"])}
    return value


def build_ascent(recipe: Recipe, phase: PhaseConfig) -> Ascent | None:
    """Return the ascent of a phase with every default filled in."""
    value = with_group(phase.ascent, recipe.groups)
    return None if value is None else parse_ascent(value).resolved()


def build_perturbation(value: str | Mapping[str, Any] | None) -> Perturbation:
    """Return the schedule of a phase's eps."""
    if isinstance(value, Mapping):
        numbers = ("low", "since", "until")
        value = {key: number(item, key) if key in numbers else item for key, item in value.items()}
    return Perturbation() if value is None else _settings(Perturbation, value, "perturbation schedule")


def build_average(recipe: Recipe, phase: PhaseConfig) -> AverageSettings | None:
    """Return the average of a phase's weights."""
    value = with_group(phase.average, recipe.groups)
    if isinstance(value, Mapping) and not isinstance(value.get("select", ""), str):
        raise UserError(f"select: {value['select']!r} is not a selector; write all, norm or stage(1)")
    return None if value is None else _settings(AverageSettings, value, "average")


def _settings(kind: Callable[..., Made], value: str | Mapping[str, Any], what: str) -> Made:
    """Return settings from a name, or from a mapping with a name."""
    options = {"name": value} if isinstance(value, str) else dict(value)
    allowed = [field.name for field in fields(kind)]  # pyright: ignore[reportArgumentType]
    for key in options:
        if key not in allowed:
            raise UserError(one_of(f"setting of the {what}", str(key), allowed))
    if not isinstance(options.get("name"), str):
        raise UserError(f"the {what} needs a name")
    return kind(**options)


def phase_epochs(phase: PhaseConfig, images: int) -> int:
    """Return the number of epochs of a phase, the last of which may be cut short; a change of tensors counts as one."""
    if phase.kind != "train":
        return 1 if phase.epochs is None else phase.epochs
    return phase.epochs if phase.steps is None else ceil(phase.steps / batch_count(images, phase.batch_size))  # pyright: ignore[reportReturnType]


def phase_groups(recipe: Recipe, phase: PhaseConfig) -> dict[str, str]:
    """Return group -> selector of a phase: names from `groups` are looked up, other keys are selectors themselves.

    A phase that recalibrates or sets tensors has a group for them; what is left is added by `phase_partition`.
    """
    if phase.recalibrate is not None:
        select = recipe.groups.get(phase.recalibrate.select, phase.recalibrate.select)
        return {"statistics": f"({select}) & norm.statistics"}
    return {group: recipe.groups.get(group, group) for group in phase.train or phase.assign}


def phase_partition(model: nn.Module, recipe: Recipe, phase: PhaseConfig) -> Partition:
    """Return the phase's groups bound to a model."""
    groups = phase_groups(recipe, phase)
    if phase.kind != "train" and "rest" not in groups.values():
        inventory = Inventory(model)
        held = 0
        for group, selector in groups.items():
            try:
                selection = resolve(inventory, selector)
            except UserError as error:
                if phase.kind == "recalibrate":  # its group has a name of ours
                    raise
                raise UserError([fault.at(path=group) for fault in error.faults]) from None
            held += selection.parameters + selection.buffers
        if held < sum(entry.size for entry in inventory):
            groups["rest"] = "rest"
    return Partition(model, groups)


def group_texts(phase: PhaseConfig, groups: Mapping[str, str], start_text: Callable[[Any], str]) -> dict[str, str]:
    """Return what a phase does with each group, in words."""
    from robustlayers.training import signal_text

    if phase.kind == "train":
        return {group: signal_text(parse_signal(signal)) for group, signal in phase.train.items()}
    if phase.recalibrate is not None:
        own = phase.recalibrate
        how = "" if own.momentum is None else f", momentum {own.momentum:g}"
        return {group: f"recalibrated on {own.on}{how}" if group == "statistics" else "frozen" for group in groups}
    return {group: f"set: {start_text(phase.assign[group])}" if group in phase.assign else "frozen" for group in groups}


def build_trainer(
    model: nn.Module,
    recipe: Recipe,
    phase: PhaseConfig,
    images: Images,
    *,
    seed: int = 0,
    first_epoch: int = 0,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
) -> PhaseTrainer:
    """Return the trainer of a phase that trains; `ranks` are processes that share its batches."""
    augment = recipe.data.augment
    return PhaseTrainer(
        model,
        phase_groups(recipe, phase),
        phase.train,
        images,
        epochs=phase.epochs,
        steps=phase.steps,
        attack=input_attack(recipe, phase),
        batch_size=phase.batch_size,
        optimizer=build_optimizer_settings(phase.optimizer),
        schedule=build_schedule(phase.schedule),
        policy=build_policy(phase.normalization, recipe.groups),
        crafting=phase.crafting,
        precision=phase.precision,
        augment=Augment(augment.crop, augment.flip),
        windows={group: (begin, end) for group, (begin, end) in phase.windows.items()},
        perturbation=build_perturbation(phase.perturbation),
        ascent=build_ascent(recipe, phase),
        average=build_average(recipe, phase),
        seed=seed,
        first_epoch=first_epoch,
        device=device,
        ranks=ranks,
        statistics=phase.statistics,
    )


def phase_content(recipe: Recipe, phase: PhaseConfig, attack: Callable[[Any], Any]) -> dict[str, Any]:
    """Return what decides a phase's result beside its groups and starts; options of a later version count where used."""
    if phase.kind != "train":
        return {**_change_content(phase), "attack": _attack_content(recipe, phase, attack)}
    content = phase.model_dump(
        mode="json",
        include={"name", "epochs", "batch_size", "optimizer", "schedule"},
    )
    content["normalization"] = policy_content(build_policy(phase.normalization, recipe.groups))
    optimizer, schedule = content["optimizer"], content["schedule"]
    for key, default in (("decay", "all"), ("groups", {}), ("clip", None), ("rates", "fixed")):
        if optimizer[key] == default:
            del optimizer[key]
    if "rates" not in optimizer:
        del optimizer["rates_batches"]
    for own in optimizer.get("groups", {}).values():
        for key in ("scale", "nesterov", "clip", "every", "drift", "schedule"):
            if own[key] is None:
                del own[key]
            elif key == "schedule":
                _without_cycles(own[key])
    _without_cycles(schedule)
    if phase.crafting != "fp32":
        content["crafting"] = phase.crafting
    if phase.precision != "fp32":
        content["precision"] = phase.precision
    if phase.statistics != "sync":
        content["statistics"] = phase.statistics
    if phase.steps is not None:
        content["steps"] = phase.steps
    if phase.windows:
        content["windows"] = {group: list(window) for group, window in phase.windows.items()}
    perturbation = build_perturbation(phase.perturbation)
    if perturbation.name != "constant":
        content["perturbation"] = asdict(perturbation)
    ascent, average = build_ascent(recipe, phase), build_average(recipe, phase)
    if ascent is not None:
        content["ascent"] = {**asdict(ascent), "select": selector_content(ascent.select)}
    if average is not None:
        content["average"] = {**asdict(average), "select": selector_content(average.select)}
    if phase.stop is not None:
        content["stop"] = phase.stop.model_dump(mode="json")
    return {**content, "attack": _attack_content(recipe, phase, attack)}


def _change_content(phase: PhaseConfig) -> dict[str, Any]:
    """Return what decides a phase that does not train: settings of training that it only inherits are no part of it."""
    if phase.recalibrate is None:
        return {"name": phase.name}
    return {
        "name": phase.name,
        "batch_size": phase.batch_size,
        "recalibrate": phase.recalibrate.model_dump(mode="json"),
    }


def _attack_content(recipe: Recipe, phase: PhaseConfig, attack: Callable[[Any], Any]) -> Any:
    made = input_attack(recipe, phase)
    return None if made is None else attack(made)


def _without_cycles(schedule: dict[str, Any]) -> None:
    if schedule["name"] != "cyclic":
        del schedule["cycles"]
