"""A plan as plain data: what `robustlayers plan` prints, what the store keeps, and what a summary is made from."""

from __future__ import annotations

import json
from typing import Any

import yaml

from robustlayers.attacks import label
from robustlayers.core.quantities import pixels_text
from robustlayers.selection import Partition, Selection, resolve
from robustlayers.study.begin import start_text
from robustlayers.study.plan import SCHEMA, ArmPlan, PhaseNode, Plan
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
from robustlayers.training import parse_signal, signal_text

__all__ = ["describe_plan"]


def describe_plan(plan: Plan) -> dict[str, Any]:
    """Return all facts of a plan that need no training, as JSON-ready data."""
    study = plan.study
    first = plan.arms[0].recipe
    dataset, train, validation, test = data_of(first.data)
    model = build_model(first.model, dataset, 0)
    everything = resolve(Partition(model, {"all": "rest"}).inventory, "all")
    norms = _norm_parameters(everything)
    attacks = [build_attack(what, first.threat) for what in first.evaluate.attacks]
    shape = "x".join(str(side) for side in (*train.shape[1:], train.shape[0]))
    monitor = build_attack(first.evaluate.monitor.attack, first.threat)
    return {
        "schema": SCHEMA,
        "name": study.name,
        "question": study.question,
        "file": study.file,
        "overrides": list(study.overrides),
        "data": f"{dataset.name}: {len(train)} train, {len(validation)} validation, {len(test)} test images, {shape}, "
        f"{len(dataset.classes)} classes",
        "classes": list(dataset.classes),
        "test_images": len(test),
        "model": _model_text(first),
        "model_parameters": everything.parameters,
        "norm_parameters": norms,
        "threat": f"{first.threat.norm} {pixels_text(first.threat.eps)}",
        "training_attack": training_attack(first.attack, first.threat).describe(),
        "attacks": [label(attack) for attack in attacks],
        "attack_texts": {label(attack): attack.describe() for attack in attacks},
        "checkpoints": list(first.evaluate.checkpoints),
        "selection": _selection(first.evaluate.monitor.select, monitor.describe()),
        "seeds": list(study.seeds),
        "factors": {factor: list(levels) for factor, levels in study.factors.items()},
        "claims": [{"say": say, "that": claim.text} for say, claim in study.claims],
        "recipe_yaml": yaml.safe_dump(json.loads(json.dumps(study.document)), sort_keys=False, allow_unicode=True),
        "arms": [_arm(plan, arm) for arm in plan.arms],
        "trainings": plan.trainings,
        "trainings_unshared": plan.trainings_unshared,
    }


def _selection(select: str, attack: str) -> str:
    which = {
        "auto": "robust validation accuracy (clean, where the last phase trains naturally)",
        "robust": "robust validation accuracy",
        "clean": "clean validation accuracy",
    }[select]
    return f"the epoch of the last phase with the highest {which}, under {attack}"


def _model_text(recipe: Recipe) -> str:
    options = " ".join(f"{key}={value}" for key, value in recipe.model.options.items())
    return f"{recipe.model.name} {options}".strip()


def _norm_parameters(everything: Selection) -> int:
    from robustlayers.selection import is_norm

    inventory = everything.inventory
    return sum(entry.size for entry in inventory if not entry.buffer and is_norm(entry.module))


def _arm(plan: Plan, arm: ArmPlan) -> dict[str, Any]:
    dataset = data_of(arm.recipe.data)[0]
    model = build_model(arm.recipe.model, dataset, 0)
    nodes = [plan.nodes[key] for key in arm.nodes]
    phases = [_phase(model, node) for node in nodes]
    # Of the recipe's last phase: an arm that leaves it out trains nothing there, whatever came before.
    groups = phases[-1]["groups"]
    total = sum(group["parameters"] for group in groups)
    trained = sum(group["parameters"] for group in groups if group["signal"] != "frozen")
    if arm.recipe.phases[-1].epochs == 0:
        trained = 0
    return {
        "name": arm.name,
        "levels": dict(arm.definition.levels),
        "run": arm.run,
        "nodes": list(arm.nodes),
        "trained_parameters": trained,
        "trained_share": trained / total,
        "forward_passes": sum(node.forward_passes for node in nodes),
        "backward_passes": sum(node.backward_passes for node in nodes),
        "phases": phases,
    }


def _phase(model: Any, node: PhaseNode) -> dict[str, Any]:
    phase, recipe = node.phase, node.recipe
    partition = Partition(model, phase_groups(recipe, phase))
    attack = training_attack(phase.attack or recipe.attack, recipe.threat)
    schedule = build_schedule(phase.schedule)
    return {
        "name": phase.name,
        "id": node.id,
        "epochs": phase.epochs,
        "attack": attack.describe() if node.adversarial else "",
        "optimizer": f"{build_optimizer_settings(phase.optimizer)}, {schedule.name} schedule, batch {phase.batch_size}",
        "normalization": str(build_policy(phase.normalization)),
        "forward_passes": node.forward_passes,
        "backward_passes": node.backward_passes,
        "shared_with": len(node.arms),
        "groups": [
            {
                "name": group,
                "selector": partition.selectors[group],
                "signal": signal_text(parse_signal(phase.train[group])),
                "start": start_text(phase.start.get(group, "keep")),
                "tensors": [list(line) for line in selection.describe()],
                "parameters": selection.parameters,
                "buffers": selection.buffers,
                "share": selection.share,
            }
            for group, selection in partition.groups.items()
        ],
    }
