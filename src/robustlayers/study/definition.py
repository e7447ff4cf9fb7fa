"""From a study file to its arms: overrides and factor patches applied, every fault of every arm found before anything runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustlayers.core.errors import Fault, UserError
from robustlayers.study import patches, yaml
from robustlayers.study.claims import Claim
from robustlayers.study.claims import parse as parse_claim
from robustlayers.study.schema import Recipe, StudyConfig
from robustlayers.study.semantics import attack_label, recipe_faults
from robustlayers.study.validate import Keys, Place, validate

__all__ = ["FACTS", "ArmDefinition", "Study", "load_study"]

FACTS = ("trained_share", "trained_parameters", "forward_passes", "backward_passes")
"""Metrics of a whole run, beside the accuracies, that claims may use."""

_RECIPE = tuple(Recipe.model_fields)
_MERGED = ("optimizer", "schedule", "normalization")


@dataclass(frozen=True)
class ArmDefinition:
    """One setting of all factors and the recipe it makes."""

    name: str
    levels: Mapping[str, str]
    recipe: Recipe


@dataclass(frozen=True)
class Study:
    """A study as it will be run: arms, seeds, claims."""

    name: str
    file: str
    config: StudyConfig
    overrides: tuple[str, ...]
    arms: tuple[ArmDefinition, ...]
    claims: tuple[tuple[str, Claim], ...]
    document: Mapping[str, Any]  # the file's content with the overrides applied

    @property
    def question(self) -> str:
        """What the study asks."""
        return self.config.question

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, in order."""
        seeds = self.config.seeds
        return tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)

    @property
    def factors(self) -> dict[str, tuple[str, ...]]:
        """Factor -> its levels."""
        return {factor: tuple(levels) for factor, levels in self.config.factors.items()}


def load_study(path: Path | str, overrides: Sequence[str] = ()) -> Study:
    """Read a study file, apply `path=value` overrides, and check all of it: schema, models, data, groups, claims.

    Raises `UserError` with every fault, each with the line of the file (or the override) that it comes from.
    """
    document = yaml.read(Path(path))
    value: Any = document.value
    changed: list[tuple[Keys, str]] = []
    faults: list[Fault] = []
    for override in overrides:
        try:
            where, new = patches.parse_assignment(override)
            value = patches.apply(value, where, new, where=f"--set {where}")
            changed.append((_keys(value, where), f"--set {where}"))
        except UserError as error:
            faults += error.faults
    if faults:
        raise UserError(faults)

    place = _place(document, changed)
    config = validate(StudyConfig, value, place)
    name = config.name or Path(path).stem
    arms = _arms(config, value, document, changed)
    claims = _claims(config, arms[0].recipe, place)
    _seeds(config, place)
    return Study(name, str(path), config, tuple(overrides), arms, claims, value)


def _keys(value: Any, path: str) -> Keys:
    """Return the keys of a dotted path with positions in place of names."""
    keys: list[str | int] = []
    for part in patches.split_path(path):
        if isinstance(value, list):
            names = [item.get("name") if isinstance(item, dict) else None for item in value]
            index = names.index(part) if part in names else int(part)
            keys.append(index)
            value = value[index]
        else:
            keys.append(part)
            value = value.get(part) if isinstance(value, dict) else None
    return tuple(keys)


def _place(document: yaml.Document, changed: Sequence[tuple[Keys, str]]) -> Place:
    """Return where a path of the patched document comes from: the file's line, an override, or a factor's patch."""

    def place(path: Keys) -> Fault:
        # The latest change that covers the path, or lies below it, is where the value was written.
        for keys, source in reversed(changed):
            short = min(len(keys), len(path))
            if path[:short] == keys[:short] and (len(path) >= len(keys)):
                if source.startswith("--set"):
                    return Fault("", path=_below(source, path[len(keys) :]))
                file_path = tuple(source.split("\0"))
                return Fault(
                    "", document.file, document.line(file_path), _below(yaml.path_text(file_path), path[len(keys) :])
                )
        return Fault("", document.file, document.line(path))

    return place


def _below(source: str, rest: Keys) -> str:
    return f"{source}.{yaml.path_text(rest)}" if rest else source


def _arms(
    config: StudyConfig, value: Any, document: yaml.Document, changed: Sequence[tuple[Keys, str]]
) -> tuple[ArmDefinition, ...]:
    faults: dict[Fault, None] = {}
    arms: list[ArmDefinition] = []
    factors = list(config.factors)
    for factor, levels in config.factors.items():
        if not levels:
            faults[
                Fault(
                    "needs at least one level", document.file, document.line(("factors", factor)), f"factors.{factor}"
                )
            ] = None
    for combination in itertools.product(*(config.factors[factor] for factor in factors)):
        levels = dict(zip(factors, combination, strict=True))
        chosen = [(f"factors.{f}.{level}", config.factors[f][level]) for f, level in levels.items()]
        try:
            recipe = _recipe(value, levels, chosen, document, changed)
        except UserError as error:
            faults.update(dict.fromkeys(error.faults))
            continue
        arms.append(ArmDefinition(", ".join(levels.values()) or config.name or "default", levels, recipe))
    if faults:
        raise UserError(list(faults))
    return tuple(arms)


def _recipe(
    value: Any,
    levels: Mapping[str, str],
    chosen: Sequence[tuple[str, Mapping[str, Any]]],
    document: yaml.Document,
    changed: Sequence[tuple[Keys, str]],
) -> Recipe:
    changed = list(changed)
    clashes = patches.conflicts(chosen, value)
    if clashes:
        raise UserError(
            [fault.at(file=document.file, line=document.line(_factor_path(fault, levels))) for fault in clashes]
        )
    for (factor, level), (source, patch) in zip(levels.items(), chosen, strict=True):
        for path, new in patch.items():
            file_path = ("factors", factor, level, path)
            if str(path).split(".")[0] not in _RECIPE:
                fault = Fault(
                    f"a factor cannot change {path!r}; it can change {', '.join(_RECIPE)}",
                    document.file,
                    document.line(file_path),
                    source,
                )
                raise UserError(fault)
            try:
                value = patches.apply(value, path, new, where=f"{source}.{path}")
            except UserError as error:
                raise UserError(
                    [f.at(file=document.file, line=document.line(file_path)) for f in error.faults]
                ) from None
            changed.append((_keys(value, path), "\0".join(file_path)))
    place = _place(document, changed)
    plain = {key: item for key, item in value.items() if key in _RECIPE}
    validate(Recipe, plain, place)  # as written, so that a fault names the place where it was written
    recipe = validate(Recipe, _inherit(plain), place)
    faults = recipe_faults(recipe, place)
    if faults:
        raise UserError(faults)
    return recipe


def _factor_path(fault: Fault, levels: Mapping[str, str]) -> Keys:
    for factor, level in levels.items():
        if fault.path == f"factors.{factor}.{level}":
            return ("factors", factor, level)
    return ("factors",)


def _inherit(recipe: dict[str, Any]) -> dict[str, Any]:
    """Fill the settings that phases leave out from `training`; mappings key by key unless a phase names another kind."""
    shared = recipe.get("training") or {}
    phases = []
    for phase in recipe["phases"]:
        filled = {**{key: item for key, item in shared.items() if key not in _MERGED}, **phase}
        for key in _MERGED:
            base, own = shared.get(key), phase.get(key)
            if base is None or own is None:
                merged = own if own is not None else base
            else:
                same = "name" not in own or own["name"] == base.get("name", own["name"])
                merged = {**base, **own} if same else own
            if merged is not None:
                filled[key] = merged
        phases.append(filled)
    return {**recipe, "phases": phases}


def _claims(config: StudyConfig, recipe: Recipe, place: Place) -> tuple[tuple[str, Claim], ...]:
    metrics = ["clean", "robust", *(attack_label(a, recipe.threat) for a in recipe.evaluate.attacks), *FACTS]
    claims: list[tuple[str, Claim]] = []
    faults: list[Fault] = []
    for index, claim in enumerate(config.claims):
        try:
            bound = parse_claim(claim.that).bind(
                {factor: tuple(levels) for factor, levels in config.factors.items()},
                metrics,
                recipe.evaluate.checkpoints,
            )
            claims.append((claim.say, bound))
        except UserError as error:
            at = place(("claims", index, "that"))
            faults += [Fault(f.message, at.file, at.line, at.path or f"claims.{index}.that") for f in error.faults]
    if faults:
        raise UserError(faults)
    return tuple(claims)


def _seeds(config: StudyConfig, place: Place) -> None:
    seeds = config.seeds
    if isinstance(seeds, list) and (not seeds or len(set(seeds)) < len(seeds)):
        at = place(("seeds",))
        message = "a seed stands there twice" if seeds else "needs at least one seed"
        raise UserError(Fault(message, at.file, at.line, at.path or "seeds"))
