"""What a study costs in passes of single images: in training, after its epochs, and in measuring, part by part.

All of it is counted at most: images that are wrong already are not attacked, a cascade leaves those that fell, a phase may
stop early, and `best` and `last` may be one net.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from robustlayers.evaluation._views import branches_of
from robustlayers.study.extras import (
    SANITY_IMAGES,
    corruption_passes,
    families_of,
    sanity_passes,
    severities_text,
)
from robustlayers.study.finals import AutoAttack
from robustlayers.study.phases import input_attack
from robustlayers.study.plan import PhaseNode, Plan
from robustlayers.study.schema import Recipe
from robustlayers.study.semantics import build_attack, data_of, load_data, measured_attacks, model_for_checks

__all__ = ["Cost", "Part", "PhaseCost", "measuring_parts", "phase_cost", "plan_cost", "watching_part"]

# What `measure` looks at beside the attacks: the flags, and the norm layers under clean, adversarial and noisy images.
_FLAGGED, _FLAG_PASSES = 100, 43
_LOOKED_AT, _LOOK_PASSES = 128, 7


@dataclass(frozen=True)
class Part:
    """Something that is measured: its name, how in words, and its passes of single images."""

    name: str
    text: str
    passes: float


@dataclass(frozen=True)
class PhaseCost:
    """Passes of single images of a phase for one seed: learned from, crafted, and made by the monitor after its epochs."""

    learned: float
    crafted: float
    watched: float


@dataclass(frozen=True)
class Cost:
    """Passes of single images of a whole study, shared phases once, over all seeds."""

    training: float
    watching: float
    measuring: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.training + self.watching + self.measuring


def plan_cost(plan: Plan) -> Cost:
    """Return what a plan costs, at most."""
    phases = [phase_cost(node) for node in plan.nodes.values()]
    runs = {arm.run: arm.recipe for arm in plan.arms}.values()
    measuring = sum(len(r.evaluate.checkpoints) * sum(part.passes for part in measuring_parts(r)) for r in runs)
    seeds = len(plan.study.seeds)
    training = sum(phase.learned + phase.crafted for phase in phases)
    return Cost(seeds * training, seeds * sum(phase.watched for phase in phases), seeds * measuring)


def phase_cost(node: PhaseNode) -> PhaseCost:
    """Return what a phase costs; the share of crafting is that of an ordinary step."""
    passes, step = node.forward_passes + node.backward_passes, sum(node.step_passes)
    crafted = passes * min(1.0, _passes(input_attack(node.recipe, node.phase)) / step) if step else 0.0
    return PhaseCost(passes - crafted, crafted, node.epochs * watching_part(node.recipe).passes)


def watching_part(recipe: Recipe) -> Part:
    """Return what is measured after every epoch."""
    monitor = recipe.evaluate.monitor
    attack = build_attack(monitor.attack, recipe.threat)
    _, train, validation, _ = data_of(recipe.data)
    counts = [min(monitor.images, len(images)) for images in (train, validation)]
    held_out = f" and {counts[1]:,} validation" if counts[1] else ""
    text = f"{attack.describe()}, on {counts[0]:,} training{held_out} images"
    return Part("learning curve", text, sum(counts) * (2 + _passes(attack)))


def measuring_parts(recipe: Recipe) -> list[Part]:
    """Return what is measured of a trained net at one checkpoint, with its cost."""
    evaluate = recipe.evaluate
    _, _, validation, test = data_of(recipe.data)
    count, channels = len(test), test.shape[0]
    attacks = measured_attacks(recipe)
    parts = [Part(name, attack.describe(), count * (1 + _passes(attack))) for name, attack in attacks.items()]
    families = families_of(evaluate.corruptions, channels)
    if families:
        own = evaluate.corruptions
        shown = min(own.images or count, count)
        text = f"{_listing(families)} at {severities_text(sorted(own.severities))}, {shown:,} images each"
        parts.append(Part("corruptions", text, corruption_passes(evaluate, channels, count)))
    if evaluate.sanity:
        text = f"accuracy against eps and against steps, and every flag, {min(SANITY_IMAGES, count):,} images"
        parts.append(Part("sanity", text, sanity_passes(evaluate, count)))
    if evaluate.branches:
        parts += _branches(recipe, attacks, count)
    look = min(_LOOKED_AT, len(validation))
    looks = _LOOK_PASSES + _passes(build_attack(evaluate.monitor.attack, recipe.threat))
    text = f"clean accuracy, lowest class, calibration; flags on {min(_FLAGGED, count):,} images"
    text += f"; norm layers on {look:,} validation images" if look else ""
    return [*parts, Part("besides", text, 2 * count + _FLAG_PASSES * min(_FLAGGED, count) + looks * look)]


def _branches(recipe: Recipe, attacks: Any, count: int) -> list[Part]:
    branches = branches_of(model_for_checks(recipe.model, load_data(recipe.data.name)))
    crafting = {name: attack for name, attack in attacks.items() if not isinstance(attack, AutoAttack)}
    if not branches:
        return []
    number = len(branches)
    passes = sum(count * number * (1 + _passes(attack) + number) for attack in crafting.values())
    text = f"{', '.join(crafting)} crafted on each of {', '.join(branches)}, measured on each"
    return [Part("branches", text, passes)]


def _listing(families: Sequence[str], most: int = 4) -> str:
    return ", ".join(families) if len(families) <= most else f"{len(families)} families"


def _passes(attack: Any) -> int:
    return getattr(attack, "forward_passes", 0) + getattr(attack, "backward_passes", 0)
