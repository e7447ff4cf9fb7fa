"""From a study file to its arms: overrides and factor patches applied, every fault of every arm found before anything runs."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from robustlayers.core.errors import Fault, UserError, one_of
from robustlayers.study import patches, presets, yaml
from robustlayers.study.begin import start_faults
from robustlayers.study.claims import Claim
from robustlayers.study.claims import parse as parse_claim
from robustlayers.study.idle import idle_faults, optimizer_faults
from robustlayers.study.metrics import FACTS, measured_metrics, unmeasured
from robustlayers.study.schema import Recipe, StudyConfig
from robustlayers.study.semantics import recipe_faults
from robustlayers.study.validate import Keys, Place, check

__all__ = ["FACTS", "ArmDefinition", "Study", "load_study"]

Change = tuple[Keys, str | tuple[str, ...]]
"""A changed path of the document, and where its value was written: `--set PATH`, or the path of a factor's patch."""

_RECIPE = tuple(Recipe.model_fields)
_MERGED = ("optimizer", "schedule", "normalization")
_ALIKE = (
    *(("evaluate", key) for key in ("attacks", "branches", "checkpoints", "corruptions", "sanity")),
    ("data", "test_images"),
)


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
        return _seed_list(self.config)

    @property
    def factors(self) -> dict[str, tuple[str, ...]]:
        """Factor -> its levels."""
        return {factor: tuple(levels) for factor, levels in self.config.factors.items()}


def load_study(path: Path | str, overrides: Sequence[str] = (), *, trust: bool = False) -> Study:
    """Read a study file, apply `path=value` overrides, and check all of it: schema, models, data, groups, claims.

    With `trust` the file may name a function of one's own as its model, which runs that code.

    Raises `UserError` with every fault, each with the line of the file (or the override) that it comes from.
    """
    document = yaml.read(Path(path))
    value: Any = document.value
    changed: list[Change] = []
    faults: list[Fault] = []
    for override in overrides:
        try:
            where, new = patches.parse_assignment(override)
            after = patches.apply(value, where, new, where=f"--set {where}")
        except UserError as error:
            faults += error.faults
            continue
        changed.append((_keys(value, where), f"--set {where}"))
        value = after

    place = _place(document, changed)
    plain, unknown = _expanded(value, place)
    if unknown:
        raise UserError(_in_order([*faults, *unknown]))
    config, wrong = check(StudyConfig, plain, _within_preset(place, value))
    faults += wrong.values()
    if config is None:  # what is wrong is left out, so that the rest is checked too
        value = _without(plain, wrong)
        config, _ = check(StudyConfig, value, place)
        if config is None:
            raise UserError(_in_order(faults))
    name = config.name or Path(path).stem
    arms, found = _arms(config, name, value, document, changed, trust)
    faults += found
    claims: list[tuple[str, Claim]] = []
    if not any(keys[0] in ("evaluate", "factors") for keys in wrong) and all(config.factors.values()):
        claims, found = _claims(config, [] if faults else arms, place)
        faults += found
    faults += _seeds(config, place)
    if faults:
        raise UserError(_in_order(faults))
    return Study(name, str(path), config, tuple(overrides), tuple(arms), tuple(claims), value)


def _seed_list(config: StudyConfig) -> tuple[int, ...]:
    return tuple(range(config.seeds)) if isinstance(config.seeds, int) else tuple(config.seeds)


def _in_order(faults: Iterable[Fault]) -> list[Fault]:
    return sorted(dict.fromkeys(faults), key=lambda fault: fault.line or 0)


def _without(value: Any, wrong: Iterable[Keys]) -> Any:
    """Return the document without what is wrong at these paths, so that the rest of it can be judged.

    What a recipe cannot do without gets a value that causes no fault of its own; where there is none, nothing is left.
    """
    value = copy.deepcopy(value)
    for path in sorted(wrong, key=len, reverse=True):
        if path[0] == "groups":
            return {}  # whatever uses the group would be at fault
        keys = list(path)
        while keys[0] != "phases" and any(isinstance(key, int) for key in keys):
            keys.pop()  # the whole list goes, since positions in it stand in other messages
        if keys[0] == "phases" and keys[2:3] in (["train"], ["start"], ["set"]):
            keys = keys[:4]
        box: Any = value
        for key in keys[:-1]:
            box = box.get(key) if isinstance(box, dict) else box[int(key)] if isinstance(box, list) else None
        if isinstance(box, dict):
            box.pop(keys[-1], None)
            if len(keys) == 4 and keys[2] == "train":
                box[keys[-1]] = "natural"  # a group less, and the phase would leave out its tensors
            elif len(keys) == 4 and keys[2] == "set":
                box[keys[-1]] = "keep"
    value.setdefault("question", "?")
    if isinstance(value.get("threat"), dict):
        value["threat"] = {"norm": "linf", "eps": "8/255", **value["threat"]}
    for phase in value.get("phases") or ():
        if isinstance(phase, dict) and not phase.keys() & {"recalibrate", "set"}:
            phase.setdefault("epochs", 1)
            phase.setdefault("train", {"all": "natural"})
    return value


def _keys(value: Any, path: str) -> Keys:
    """Return the keys of a dotted path with positions in place of names."""
    keys: list[str | int] = []
    for part in patches.split_path(path):
        if isinstance(value, list):
            names = [str(item["name"]) if isinstance(item, dict) and "name" in item else None for item in value]
            index = names.index(part) if part in names else int(part)
            keys.append(index)
            value = value[index]
        else:
            keys.append(part)
            value = value.get(part) if isinstance(value, dict) else None
    return tuple(keys)


def _place(document: yaml.Document, changed: Sequence[Change]) -> Place:
    """Return where a path of the patched document comes from: the file's line, an override, or a factor's patch.

    The fault that comes back has a path of its own only where it is not the one that was asked for.
    """

    def place(path: Keys) -> Fault:
        # The latest change that covers the path is where the value was written.
        for keys, source in reversed(changed):
            if path[: len(keys)] != keys:
                continue
            rest = path[len(keys) :]
            if isinstance(source, str):
                return Fault("", path=_below(source, rest))
            at = place((*source, *rest))  # the patch may stand in the file or in an override
            return at if at.path else replace(at, path=_below(yaml.path_text(source), rest))
        return Fault("", document.file, document.line(path))

    return place


def _standing(fault: Fault, at: Fault) -> Fault:
    return Fault(fault.message, at.file, at.line, at.path or fault.path)


def _below(source: str, rest: Keys) -> str:
    return f"{source}.{yaml.path_text(rest)}" if rest else source


def _arms(
    config: StudyConfig, study: str, value: Any, document: yaml.Document, changed: Sequence[Change], trust: bool
) -> tuple[list[ArmDefinition], list[Fault]]:
    """Return the arms, and what is wrong with them: a fault that not every arm has names those that have it."""
    faults: list[Fault] = []
    for factor, levels in config.factors.items():
        if not levels:
            line = document.line(("factors", factor))
            faults.append(Fault("needs at least one level", document.file, line, f"factors.{factor}"))
    names = [phase.name for phase in config.phases]
    if len(set(names)) < len(names) or any(name.isdigit() for name in names):  # patches could not name a phase
        return [], faults + _recipe(config, value, {}, document, changed, trust)[1]
    arms: dict[str, ArmDefinition] = {}
    owners: dict[Fault, list[str]] = {}
    for combination in itertools.product(*config.factors.values()):
        levels = dict(zip(config.factors, combination, strict=True))
        name = ", ".join(levels.values()) or study
        if name in arms:
            text = f"two arms would be called {name!r}; rename a level"
            faults.append(Fault(text, document.file, document.line(("factors",)), "factors"))
        recipe, found = _recipe(config, value, levels, document, changed, trust)
        for fault in dict.fromkeys(found):  # two phases may have it
            owners.setdefault(fault, []).append(name)
        if recipe is not None:
            arms[name] = ArmDefinition(name, levels, recipe)
    if owners:
        everywhere = set(_recipe(config, value, {}, document, changed, trust)[1])
        for fault, names in owners.items():
            if (
                config.factors
                and fault not in everywhere
                and not (fault.path or "").startswith(("factors", "--set factors"))
            ):
                some = ", ".join(repr(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
                fault = replace(fault, message=f"{fault.message} (in arm{'s' if len(names) > 1 else ''} {some})")
            faults.append(fault)
    return list(arms.values()), faults or _twins(list(arms.values()), document)


def _twins(arms: Sequence[ArmDefinition], document: yaml.Document) -> list[Fault]:
    """Return a fault for each level that makes an arm the same as an earlier one."""
    faults: dict[tuple[str, str], Fault] = {}
    for index, arm in enumerate(arms):
        for other in arms[:index]:
            differing = [factor for factor, level in arm.levels.items() if other.levels[factor] != level]
            if len(differing) == 1 and arm.recipe == other.recipe:
                key = (differing[0], arm.levels[differing[0]])
                text = f"makes arm {arm.name!r} the same recipe as {other.name!r}; change something, or leave it out"
                path = ("factors", *key)
                faults.setdefault(key, Fault(text, document.file, document.line(path), yaml.path_text(path)))
    return list(faults.values())


def _recipe(
    config: StudyConfig,
    value: Any,
    levels: Mapping[str, str],
    document: yaml.Document,
    changed: Sequence[Change],
    trust: bool,
) -> tuple[Recipe | None, list[Fault]]:
    """Return the recipe of an arm, and what is wrong with it; None if it does not even fit the schema."""
    place, changed = _place(document, changed), list(changed)
    chosen = [(f"factors.{factor}.{level}", config.factors[factor][level]) for factor, level in levels.items()]
    places = {source: place(("factors", *pair)) for (source, _), pair in zip(chosen, levels.items(), strict=True)}
    faults = [_standing(fault, places[fault.path or chosen[0][0]]) for fault in patches.conflicts(chosen, value)]
    if faults:
        return None, faults
    for (factor, level), (_, patch) in zip(levels.items(), chosen, strict=True):
        for path, new in patch.items():
            written = ("factors", factor, level, path)
            source = yaml.path_text(written)
            try:
                _check_patch(path, source)
                after = patches.apply(value, path, new, where=source)
            except UserError as error:
                faults += [_standing(fault, place(written)) for fault in error.faults]
                continue
            changed.append((_keys(value, path), written))
            value = after
    written = _place(document, changed)
    expanded, found = _expanded(value, written)
    if found:
        return None, [*faults, *found]
    place = _within_preset(written, value)
    plain = {key: item for key, item in expanded.items() if key in _RECIPE}
    recipe, wrong = check(Recipe, plain, place)  # as written, so that a fault names the place where it was written
    if recipe is not None:
        faults += idle_faults(plain["phases"], place) + optimizer_faults(plain, place)
        recipe, wrong = check(Recipe, _inherit(plain), place)
    faults += recipe_faults(recipe, place, trust) if recipe is not None else wrong.values()
    if recipe is not None and not faults:
        faults += start_faults(recipe, place, _seed_list(config))
    return recipe, faults


def _expanded(value: Any, place: Place) -> tuple[Any, list[Fault]]:
    """Return the document with plain phases in the place of a preset, and what is wrong with the preset."""
    try:
        return presets.expand(value), []
    except UserError as error:
        return value, [_standing(fault, place(_split(fault.path or "phases"))) for fault in error.faults]


def _split(path: str) -> Keys:
    return tuple(int(part) if part.isdigit() else part for part in patches.split_path(path))


def _within_preset(place: Place, value: Any) -> Place:
    """Return where a path of the expanded document comes from: what a preset made was written at the preset."""

    def within(path: Keys) -> Fault:
        source = presets.written(value, path)
        at = place(source)
        return at if source == path or at.path else replace(at, path=yaml.path_text(source))

    return within if isinstance(value, dict) and isinstance(value.get("phases"), dict) else place


def _check_patch(path: str, source: str) -> None:
    """Refuse paths that arms of one study cannot differ in."""
    keys = patches.split_path(path, source)
    if keys[0] not in _RECIPE:
        known = keys[0] in StudyConfig.model_fields
        what = f"{keys[0]!r} is the same for all arms" if known else one_of("key", keys[0], _RECIPE)
        allowed = f"; allowed: {', '.join(_RECIPE)}" if known else ""
        raise UserError(Fault(what + allowed, path=source))
    for alike in _ALIKE:
        if keys[: len(alike)] == alike[: len(keys)]:
            raise UserError(Fault(f"all arms are measured alike: no factor can change {'.'.join(alike)}", path=source))


def _inherit(recipe: dict[str, Any]) -> dict[str, Any]:
    """Fill the settings that phases leave out from `training`; mappings key by key unless a phase names another kind."""
    shared = recipe.get("training") or {}
    phases = []
    for phase in recipe["phases"]:
        filled = {**{key: item for key, item in shared.items() if key not in _MERGED}, **phase}
        for key in _MERGED:
            base, own = _mapping(key, shared.get(key)), _mapping(key, phase.get(key))
            if isinstance(base, dict) and isinstance(own, dict):
                word = "habit" if key == "normalization" else "name"
                same = word not in own or own[word] == base.get(word, own[word] if word == "name" else "standard")
                merged = {**base, **own} if same else own
            else:
                merged = own if own is not None else base
            if merged is not None:
                filled[key] = merged
        phases.append(filled)
    return {**recipe, "phases": phases}


def _mapping(key: str, value: Any) -> Any:
    """Return settings as a mapping where one word stands for them: the name of a habit."""
    return {"habit": value} if key == "normalization" and isinstance(value, str) else value


def _claims(
    config: StudyConfig, arms: Sequence[ArmDefinition], place: Place
) -> tuple[list[tuple[str, Claim]], list[Fault]]:
    """Return the claims, and what is wrong with them; without arms, which have faults, nothing of a model is known."""
    faults: list[Fault] = []
    claims: list[tuple[str, Claim]] = []
    factors = {factor: tuple(levels) for factor, levels in config.factors.items()}
    try:
        measured = _measured(arms) if config.claims else {}
        names = set().union(*measured.values()) if measured else set(measured_metrics(config, model=False))
    except UserError:  # reported where they stand; without their names, no claim can be judged
        return [], []
    for index, claim in enumerate(config.claims):
        found: list[Fault] = []
        try:
            stated = parse_claim(claim.that)
            assumed = {name for name in stated.metrics if "@" in name and config.evaluate.branches and not arms}
            bound = stated.bind(
                factors, names | assumed, config.evaluate.checkpoints, lambda name: unmeasured(name, config, names)
            )
            claims.append((claim.say, bound))
            for _, term in bound.difference.terms if arms else ():
                (arm,) = (arm for arm in arms if arm.levels == term.levels)
                if term.metric not in measured[arm.name]:
                    text = unmeasured(term.metric, arm.recipe, measured[arm.name])
                    found.append(Fault(f"column {term.column}: {text} (in arm {arm.name!r})"))
        except UserError as error:
            found += error.faults
        at = place(("claims", index, "that"))
        faults += [_standing(fault.at(path=f"claims.{index}.that"), at) for fault in found]
    return claims, faults


def _measured(arms: Sequence[ArmDefinition]) -> dict[str, tuple[str, ...]]:
    """Return the metrics of each arm; of those that are measured alike they are found once."""
    known: dict[str, tuple[str, ...]] = {}
    found = {}
    for arm in arms:
        content = arm.recipe.model_dump_json(include={"data", "model", "threat", "evaluate"})
        if content not in known:
            known[content] = measured_metrics(arm.recipe)
        found[arm.name] = known[content]
    return found


def _seeds(config: StudyConfig, place: Place) -> list[Fault]:
    seeds = config.seeds
    if isinstance(seeds, int) or (seeds and len(set(seeds)) == len(seeds)):
        return []
    at = place(("seeds",))
    message = "a seed stands there twice" if seeds else "needs at least one seed"
    return [Fault(message, at.file, at.line, at.path or "seeds")]
