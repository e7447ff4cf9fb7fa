"""A plan as plain data: what `robustlayers plan` prints, what the store keeps, and what a summary is made from."""

from __future__ import annotations

import json
from typing import Any

import yaml

from robustlayers.core.quantities import pixels_text
from robustlayers.selection import Partition, Selection, resolve
from robustlayers.study.begin import start_text
from robustlayers.study.phases import (
    build_ascent,
    build_average,
    build_optimizer_settings,
    build_perturbation,
    build_policy,
    build_schedule,
    group_texts,
    input_attack,
    phase_partition,
    training_attack,
)
from robustlayers.study.plan import SCHEMA, ArmPlan, PhaseNode, Plan
from robustlayers.study.schema import PhaseConfig, Recipe
from robustlayers.study.semantics import build_attack, data_of, measured_attacks, model_for_checks
from robustlayers.training import parse_signal

__all__ = ["describe_plan", "model_text"]


def describe_plan(plan: Plan) -> dict[str, Any]:
    """Return all facts of a plan that need no training, as JSON-ready data."""
    study = plan.study
    first = plan.arms[0].recipe
    dataset, train, validation, test = data_of(first.data)
    model = model_for_checks(first.model, dataset)
    everything = resolve(Partition(model, {"all": "rest"}).inventory, "all")
    norms = _norm_parameters(everything)
    attacks = measured_attacks(first)
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
        "model": model_text(first),
        "model_parameters": everything.parameters,
        "norm_parameters": norms,
        "threat": f"{first.threat.norm} {pixels_text(first.threat.eps)}",
        "training_attack": training_attack(first.attack, first.threat).describe(),
        "attacks": list(attacks),
        "attack_texts": {name: attack.describe() for name, attack in attacks.items()},
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


def model_text(recipe: Recipe) -> str:
    """Return a recipe's model with the options that were given."""
    options = " ".join(f"{key}={value}" for key, value in recipe.model.options.items())
    return f"{recipe.model.name} {options}".strip()


def _norm_parameters(everything: Selection) -> int:
    from robustlayers.selection import is_norm

    inventory = everything.inventory
    return sum(entry.size for entry in inventory if not entry.buffer and is_norm(entry.module))


def _arm(plan: Plan, arm: ArmPlan) -> dict[str, Any]:
    dataset = data_of(arm.recipe.data)[0]
    model = model_for_checks(arm.recipe.model, dataset)
    nodes = [plan.nodes[key] for key in arm.nodes]
    phases = [_phase(model, node) for node in nodes]
    # Of the recipe's last phase that trains: an arm that leaves it out trains nothing there, whatever came before.
    training = [phase for phase in arm.recipe.phases if phase.kind == "train"]
    total = trained = 0
    if training:
        last = training[-1]
        signals = {group: parse_signal(signal) for group, signal in last.train.items()}
        partition = phase_partition(model, arm.recipe, last)
        total = sum(selection.parameters for selection in partition.groups.values())
        trained = sum(partition[group].parameters for group, signal in signals.items() if signal)
        trained = 0 if last.skipped else trained
    return {
        "name": arm.name,
        "levels": dict(arm.definition.levels),
        "run": arm.run,
        "nodes": list(arm.nodes),
        "trained_parameters": trained,
        "trained_share": trained / max(1, total),
        "forward_passes": sum(node.forward_passes for node in nodes),
        "backward_passes": sum(node.backward_passes for node in nodes),
        "phases": phases,
    }


def _phase(model: Any, node: PhaseNode) -> dict[str, Any]:
    phase, recipe = node.phase, node.recipe
    partition = phase_partition(model, recipe, phase)
    attack = input_attack(recipe, phase)
    texts = group_texts(phase, partition.selectors, start_text)
    return {
        "name": phase.name,
        "id": node.id,
        "kind": phase.kind,
        "epochs": node.epochs,
        "length": f"{phase.steps} steps" if phase.steps is not None else f"{node.epochs}",
        "attack": "" if attack is None else attack.describe(),
        "optimizer": _optimizer(phase),
        "extras": _extras(recipe, phase),
        "normalization": str(build_policy(phase.normalization, recipe.groups)) if phase.kind == "train" else "",
        "forward_passes": node.forward_passes,
        "backward_passes": node.backward_passes,
        "step_passes": list(node.step_passes),
        "shared_with": len(node.arms),
        "groups": [
            {
                "name": group,
                "selector": partition.selectors[group],
                "signal": texts[group],
                "start": start_text(phase.start.get(group, "keep")),
                "tensors": [list(line) for line in selection.describe()],
                "parameters": selection.parameters,
                "buffers": selection.buffers,
                "share": selection.share,
            }
            for group, selection in partition.groups.items()
        ],
    }


def _optimizer(phase: PhaseConfig) -> str:
    if phase.kind != "train":
        return f"none, batch {phase.batch_size}" if phase.kind == "recalibrate" else "none"
    settings, schedule = build_optimizer_settings(phase.optimizer), build_schedule(phase.schedule)
    return f"{settings}, {schedule.name} schedule, batch {phase.batch_size}"


def _extras(recipe: Recipe, phase: PhaseConfig) -> list[str]:
    """Return what a phase does beyond the ordinary, each in words."""
    if phase.kind != "train":
        return []
    extras = [f"{group} learns from {begin:g} to {end:g} of the phase" for group, (begin, end) in phase.windows.items()]
    perturbation, ascent, average = (
        build_perturbation(phase.perturbation),
        build_ascent(recipe, phase),
        build_average(recipe, phase),
    )
    if perturbation.name != "constant":
        extras.append(f"eps: {perturbation}")
    if ascent is not None:
        extras.append(f"ascent: {ascent.describe()}")
    if average is not None:
        extras.append(f"average: {average}")
    if phase.stop is not None:
        metric = (
            "accuracy that chooses the best epoch" if phase.stop.metric == "auto" else f"{phase.stop.metric} accuracy"
        )
        extras.append(f"stops after {phase.stop.patience} epoch(s) without a rise of the validation {metric}")
    return extras
