"""The plan of a study: which phases every arm needs, which of them are shared, what all of it costs in passes.

A phase result is named by the SHA-256 of all that decides it but the seed: data, model, and every phase up to this one
with all defaults filled in. Arms with an equal prefix of phases therefore name the same results and train them once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from robustlayers.core.identity import digest
from robustlayers.selection import selector_content
from robustlayers.study.begin import start_content
from robustlayers.study.definition import ArmDefinition, Study
from robustlayers.study.extras import extras_content
from robustlayers.study.phases import (
    build_trainer,
    input_attack,
    needs_attack,
    phase_content,
    phase_epochs,
    phase_groups,
)
from robustlayers.study.schema import PhaseConfig, Recipe
from robustlayers.study.semantics import (
    build_attack,
    data_of,
    load_data,
    measured_attacks,
    model_for_checks,
    model_identity,
)
from robustlayers.training import parse_signal

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
    epochs: int  # of this phase, the last of which may be cut short
    earlier: Mapping[str, str]  # name -> id of earlier phases, which starts may name
    arms: tuple[str, ...]
    images: int  # training images
    forward_passes: int  # of single images, whole phase, one seed; a phase that stops early makes fewer
    backward_passes: int
    step_passes: tuple[int, int]  # of an ordinary step
    kept: tuple[int, ...] = ()  # epochs whose state is kept: later phases rewind to it, or `keep` asks for it

    @property
    def adversarial(self) -> bool:
        """Whether any group learns from an adversarial pass."""
        return needs_attack(self.phase)

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
        chain: list[PhaseNode] = []
        for phase in definition.recipe.phases:
            if phase.skipped:
                continue
            node = _node(definition, phase, chain, nodes)
            if node.id in nodes:
                node = replace(nodes[node.id], arms=(*nodes[node.id].arms, definition.name))
            nodes[node.id] = node
            chain.append(node)
            for epoch in (*_rewinds(phase), *_kept(phase, node)):
                owner = next((n for n in chain if n.first_epoch < epoch < n.first_epoch + n.epochs), None)
                if owner is not None:
                    kept = tuple(sorted({*nodes[owner.id].kept, epoch}))
                    nodes[owner.id] = replace(nodes[owner.id], kept=kept)
        ids = tuple(node.id for node in chain)
        arms.append(ArmPlan(definition, ids, _run(definition.recipe, ids[-1])))
    return Plan(study, nodes, tuple(arms))


def _rewinds(phase: PhaseConfig) -> list[int]:
    starts = (*phase.start.values(), *phase.assign.values())
    return [start.rewind for start in starts if not isinstance(start, str) and start.rewind is not None]


def _kept(phase: PhaseConfig, node: PhaseNode) -> range:
    """Return the epochs, over all phases, that the phase keeps to be looked at; its last one is kept anyway."""
    return (
        range(0)
        if phase.keep is None
        else range(node.first_epoch + phase.keep, node.first_epoch + node.epochs, phase.keep)
    )


def _select(recipe: Recipe, phase: PhaseConfig) -> str:
    """Natural training is chosen by what it trains for: by robust accuracy its best epoch would be its worst one."""
    chosen = recipe.evaluate.monitor.select
    return chosen if chosen != "auto" else "robust" if needs_attack(phase) else "clean"


def _attack(attack: Any) -> dict[str, Any]:
    return attack.identity()


def _node(
    definition: ArmDefinition, phase: PhaseConfig, chain: list[PhaseNode], known: Mapping[str, PhaseNode]
) -> PhaseNode:
    recipe = definition.recipe
    parent = chain[-1] if chain else None
    monitor = recipe.evaluate.monitor
    watching = build_attack(monitor.attack, recipe.threat)
    groups = phase_groups(recipe, phase)
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "parent": None if parent is None else parent.id,
        "phase": {
            **phase_content(recipe, phase, _attack),
            "groups": {
                group: [selector_content(selector), dict(parse_signal(phase.train.get(group, "frozen")))]
                for group, selector in groups.items()
            },
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
    if phase.assign:
        content["set"] = {group: start_content(start) for group, start in phase.assign.items()}
    dataset, train, _, _ = data_of(recipe.data)
    if parent is None:
        content["data"] = {
            **recipe.data.model_dump(mode="json", exclude={"name", "test_images"}),
            "digest": dataset.digest,
        }
        content["model"] = model_identity(recipe.model, dataset)
    name = digest(content, 16)
    if name in known:
        return known[name]
    forward, backward, step = _passes(recipe, phase)
    return PhaseNode(
        id=name,
        parent=None if parent is None else parent.id,
        recipe=recipe,
        phase=phase,
        first_epoch=0 if parent is None else parent.first_epoch + parent.epochs,
        epochs=phase_epochs(phase, len(train)),
        earlier={node.phase.name: node.id for node in chain},
        arms=(definition.name,),
        images=len(train),
        forward_passes=forward,
        backward_passes=backward,
        step_passes=step,
    )


def _passes(recipe: Recipe, phase: PhaseConfig) -> tuple[int, int, tuple[int, int]]:
    """Return the passes of single images of a whole phase, forward and backward, and those of an ordinary step."""
    dataset, train, _, _ = data_of(recipe.data)
    if phase.kind == "set":
        return 0, 0, (0, 0)
    if phase.kind == "recalibrate":
        attack = input_attack(recipe, phase)
        one = 1 + getattr(attack, "forward_passes", 0)
        two = getattr(attack, "backward_passes", 0)
        return one * len(train), two * len(train), (one, two)
    trainer = build_trainer(model_for_checks(recipe.model, dataset), recipe, phase, train)
    return *trainer.passes(), trainer.step.passes_per_batch()


def _run(recipe: Recipe, last: str) -> str:
    dataset = load_data(recipe.data.name)
    content = {
        "schema": SCHEMA,
        "trained": last,
        "threat": recipe.threat.model_dump(mode="json"),
        "attacks": [_attack(attack) | {"label": name} for name, attack in measured_attacks(recipe).items()],
        "checkpoints": recipe.evaluate.checkpoints,
        "batch_size": recipe.evaluate.batch_size,
        "test_images": recipe.data.test_images,
        "data": dataset.digest,
        **({"branches": True} if recipe.evaluate.branches else {}),
        **extras_content(recipe.evaluate, dataset.test.shape[0]),
    }
    return digest(content, 16)
