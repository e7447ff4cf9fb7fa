"""The plan of a study: which phases every arm needs, which of them are shared, what all of it costs in passes.

A phase result is named by the SHA-256 of all that decides it but the seed: data, model, and every phase up to this one
with all defaults filled in. Arms with an equal prefix of phases therefore name the same results and train them once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from robustlayers.attacks import PGD
from robustlayers.core.identity import digest
from robustlayers.study.begin import start_content
from robustlayers.study.definition import ArmDefinition, Study
from robustlayers.study.schema import PhaseConfig, Recipe
from robustlayers.study.semantics import (
    NamedAttack,
    attack_label,
    build_attack,
    data_of,
    load_data,
    model_options,
    phase_groups,
    training_attack,
)
from robustlayers.training import OBJECTIVES, parse_signal

__all__ = ["SCHEMA", "ArmPlan", "PhaseNode", "Plan", "make_plan"]

SCHEMA = 1
"""Version of the meaning of identities; raised when the same recipe would give other numbers."""


@dataclass(frozen=True)
class PhaseNode:
    """One phase result that some arms need, for every seed."""

    id: str
    parent: str | None
    recipe: Recipe  # of the first arm that needs it
    phase: PhaseConfig
    first_epoch: int  # epochs of earlier phases
    earlier: Mapping[str, str]  # name -> id of earlier phases, which starts may name
    arms: tuple[str, ...]
    images: int  # training images
    forward_passes: int  # of single images, whole phase, one seed
    backward_passes: int

    @property
    def adversarial(self) -> bool:
        """Whether any group learns from an adversarial pass."""
        return _needs_attack(self.phase)

    @property
    def select(self) -> str:
        """The validation accuracy that chooses the best epoch: `robust` or `clean`."""
        return _select(self.recipe, self.phase)


@dataclass(frozen=True)
class ArmPlan:
    """An arm with the phases it consists of."""

    definition: ArmDefinition
    nodes: tuple[str, ...]
    run: str

    @property
    def name(self) -> str:
        """The arm's name."""
        return self.definition.name

    @property
    def recipe(self) -> Recipe:
        """The arm's recipe."""
        return self.definition.recipe


@dataclass(frozen=True)
class Plan:
    """All phase results and arms of a study."""

    study: Study
    nodes: Mapping[str, PhaseNode]
    arms: tuple[ArmPlan, ...]

    @property
    def trainings(self) -> int:
        """Phase trainings over all seeds, shared ones once."""
        return len(self.nodes) * len(self.study.seeds)

    @property
    def trainings_unshared(self) -> int:
        """Phase trainings if every arm trained all of its own."""
        return sum(len(arm.nodes) for arm in self.arms) * len(self.study.seeds)


def make_plan(study: Study) -> Plan:
    """Return the plan of a checked study."""
    nodes: dict[str, PhaseNode] = {}
    arms: list[ArmPlan] = []
    for definition in study.arms:
        chain: list[str] = []
        parent: str | None = None
        first_epoch = 0
        earlier: dict[str, str] = {}
        for phase in definition.recipe.phases:
            if phase.epochs == 0:
                continue
            node = _node(definition, phase, parent, first_epoch, dict(earlier))
            if node.id in nodes:
                known = nodes[node.id]
                node = PhaseNode(**{**vars(known), "arms": (*known.arms, definition.name)})
            nodes[node.id] = node
            chain.append(node.id)
            earlier[phase.name] = node.id
            parent = node.id
            first_epoch += phase.epochs
        arms.append(ArmPlan(definition, tuple(chain), _run(definition.recipe, chain[-1])))
    return Plan(study, nodes, tuple(arms))


def _needs_attack(phase: PhaseConfig) -> bool:
    objectives = {name for signal in phase.train.values() for name in parse_signal(signal)}
    return any("adversarial" in OBJECTIVES[name].passes for name in objectives)


def _select(recipe: Recipe, phase: PhaseConfig) -> str:
    """Natural training is chosen by what it trains for: by robust accuracy its best epoch would be its worst one."""
    chosen = recipe.evaluate.monitor.select
    return chosen if chosen != "auto" else "robust" if _needs_attack(phase) else "clean"


def _attack(attack: NamedAttack) -> dict[str, Any]:
    """Return what decides an attack, its step as a number: another default one day must not pass for the same run."""
    resolved = {"step_size": attack.step} if isinstance(attack, PGD) else {}
    return {**asdict(attack), **resolved, "kind": type(attack).__name__}


def _settings(phase: PhaseConfig) -> dict[str, Any]:
    """Return the plain settings of a phase; options that came later count only where they are used."""
    settings = phase.model_dump(mode="json", exclude={"train", "attack", "start"})
    for key, default in (("decay", "all"), ("groups", {})):
        if settings["optimizer"][key] == default:
            del settings["optimizer"][key]
    return settings


def _node(
    definition: ArmDefinition, phase: PhaseConfig, parent: str | None, first_epoch: int, earlier: Mapping[str, str]
) -> PhaseNode:
    recipe = definition.recipe
    adversarial = _needs_attack(phase)
    attack = training_attack(phase.attack or recipe.attack, recipe.threat)
    groups = {
        group: [selector.strip(), dict(parse_signal(phase.train[group]))]
        for group, selector in phase_groups(recipe, phase).items()
    }
    monitor = recipe.evaluate.monitor
    watching = build_attack(monitor.attack, recipe.threat)
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "parent": parent,
        "phase": {
            **_settings(phase),
            "groups": groups,
            "attack": _attack(attack) if adversarial else None,
        },
        "monitor": {
            "attack": _attack(watching),
            "images": monitor.images,
            "select": _select(recipe, phase),
            "batch_size": recipe.evaluate.batch_size,
        },
    }
    starts = {group: start_content(start) for group, start in phase.start.items()}
    if any(start != "keep" for start in starts.values()):
        content["start"] = {group: start for group, start in starts.items() if start != "keep"}
    dataset, train, _, _ = data_of(recipe.data)
    if parent is None:
        content["data"] = {
            **recipe.data.model_dump(mode="json", exclude={"name", "test_images"}),
            "digest": dataset.digest,
        }
        content["model"] = {"name": recipe.model.name, "options": model_options(recipe.model, dataset)}
    objectives = {name for signal in phase.train.values() for name in parse_signal(signal)}
    forward = len({pass_name for name in objectives for pass_name in OBJECTIVES[name].passes})
    backward = len(objectives)
    if adversarial:
        forward += getattr(attack, "forward_passes", 0)
        backward += getattr(attack, "backward_passes", 0)
    images = len(train) * phase.epochs
    return PhaseNode(
        id=digest(content, 16),
        parent=parent,
        recipe=recipe,
        phase=phase,
        first_epoch=first_epoch,
        earlier=earlier,
        arms=(definition.name,),
        images=len(train),
        forward_passes=forward * images,
        backward_passes=backward * images,
    )


def _run(recipe: Recipe, last: str) -> str:
    content = {
        "schema": SCHEMA,
        "trained": last,
        "threat": recipe.threat.model_dump(mode="json"),
        "attacks": [
            _attack(build_attack(what, recipe.threat)) | {"label": attack_label(what, recipe.threat)}
            for what in recipe.evaluate.attacks
        ],
        "checkpoints": recipe.evaluate.checkpoints,
        "batch_size": recipe.evaluate.batch_size,
        "test_images": recipe.data.test_images,
        "data": load_data(recipe.data.name).digest,
    }
    return digest(content, 16)
