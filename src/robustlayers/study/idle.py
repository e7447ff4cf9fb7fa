"""Settings that a phase of its kind never looks at: a fault where the phase itself has them, not where it inherits them.

A phase that sets tensors shows the model no image. One that recalibrates shows it the training images in batches, under an
attack if that is asked for, in single precision and without a step, so neither optimizer nor norm policy has a part in it.
What only some options of such a phase look at is no fault, as in a phase that trains: `attack`, where `on` is `clean`.

An optimizer never looks at the constants of another kind, of which the same holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robustlayers.core.errors import Fault
from robustlayers.study.schema import OptimizerConfig, PhaseConfig
from robustlayers.study.validate import Keys, Place
from robustlayers.study.yaml import path_text

__all__ = ["idle_faults", "optimizer_faults"]

_TAKES = {
    "recalibrate": ("name", "epochs", "recalibrate", "batch_size", "attack"),
    "set": ("name", "epochs", "set"),
}
_KNOWN = tuple(field.alias or name for name, field in PhaseConfig.model_fields.items())

_CONSTANTS = {"sgd": ("momentum", "nesterov"), "adam": ("betas",), "adamw": ("betas",)}  # that another kind ignores


def optimizer_faults(recipe: Mapping[str, Any], place: Place) -> list[Fault]:
    """Return a fault for every constant of an optimizer that stands beside the name of a kind that ignores it.

    `recipe`: as it is written, patches applied and nothing inherited. Beside the name means: in the file as the name is, or
    in the same patch. A momentum in the file is no fault in the arm whose patch alone makes Adam of it, since other arms
    use it, nor in a phase that only inherits it.
    """
    shared = _settings(recipe.get("training"))
    path = ("training", "optimizer")
    faults = _ignored(shared, path, shared, path, place)
    for index, phase in enumerate(recipe["phases"]):
        if _kind(phase):
            continue
        own, path = _settings(phase), ("phases", index, "optimizer")
        named, where = (own, path) if "name" in own else (shared, ("training", "optimizer"))
        faults += _ignored(own, path, named, where, place)
    return faults


def _settings(of: Any) -> Mapping[str, Any]:
    """Return the optimizer's settings in those of a phase or of all of them; what is not fit the schema tells."""
    found = of.get("optimizer") if isinstance(of, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _ignored(own: Mapping[str, Any], path: Keys, named: Mapping[str, Any], where: Keys, place: Place) -> list[Fault]:
    name = named.get("name")
    if name not in _CONSTANTS:
        return []
    ignored = {key for keys in _CONSTANTS.values() for key in keys} - set(_CONSTANTS[name])
    allowed = ", ".join(key for key in OptimizerConfig.model_fields if key not in ignored)
    said = place((*where, "name"))
    faults = []
    for key in own:
        at = place((*path, key))
        if key in ignored and _patch(at) == _patch(said):
            text = f"does nothing in an optimizer {name}; allowed: {allowed}"
            faults.append(Fault(text, at.file, at.line, at.path or path_text((*path, key))))
    return faults


def _patch(at: Fault) -> str | None:
    """Return what wrote a setting: a patch or an override, by the path up to the setting's own name, or the file."""
    return at.path and at.path.rpartition(".")[0]


def idle_faults(phases: Sequence[Any], place: Place) -> list[Fault]:
    """Return a fault for every place where a phase without training gets a setting of which nothing would come.

    `phases`: as they are written, patches applied and nothing inherited. A setting that was written at several places,
    such as a mapping in the file of which a factor changes a key, is a fault at each of them.
    """
    faults = []
    for index, phase in enumerate(phases):
        kind = _kind(phase)
        for key in _KNOWN if kind else ():
            if key in _TAKES[kind] or phase.get(key) in (None, {}):
                continue
            text = f"does nothing in a phase with {kind}; allowed: {', '.join(_TAKES[kind])}"
            path = ("phases", index, key)
            faults += [
                Fault(text, at.file, at.line, at.path or path_text(path)) for at in _written(phase[key], path, place)
            ]
    return faults


def _kind(phase: Any) -> str:
    """Return what a phase does if it is one of those that do not train and does nothing else; the schema tells the rest."""
    given = [key for key in ("train", *_TAKES) if isinstance(phase, Mapping) and phase.get(key) is not None]
    return given[0] if len(given) == 1 and given[0] in _TAKES else ""


def _written(value: Any, path: Keys, place: Place) -> list[Fault]:
    """Return every place that wrote a part of the value: the file once, and each patch."""
    at = place(path)
    if at.path or not isinstance(value, Mapping) or not value:
        return [at]
    below = [found for key, item in value.items() for found in _written(item, (*path, key), place)]
    patched = [found for found in below if found.path]
    return [at, *patched] if len(patched) < len(below) else patched
