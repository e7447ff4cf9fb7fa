"""Presets: published experiments by name, expanded to plain phases before a study is checked.

In a study file `phases` is then a mapping of one preset to its options, so that a factor can patch
`phases.bakiskan.code`:

    phases: {bakiskan: {code: A1N2, cut: layer2.1.bn1, epochs: [3, 2]}}

Every preset takes, beside its own options, `epochs` (a number for every phase or a list with one for each), `all` (settings
of every phase, such as attack and optimizer), and each of its phases' names with settings of that phase alone.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml as pyyaml

from robustlayers.core.errors import Fault, UserError, one_of
from robustlayers.selection.grammar import parse
from robustlayers.study.published import PRESETS, Made, Selector
from robustlayers.study.schema import PhaseConfig
from robustlayers.study.validate import Keys, shown
from robustlayers.study.yaml import path_text

__all__ = ["EPOCHS", "expand", "preset_lines", "preset_text", "written"]

EPOCHS = 10
"""Epochs of each phase where a preset's options name neither epochs nor steps."""

_DECIDED = ("name", "train", "start", "recalibrate", "set")  # of a phase, by the preset
_SHARED = ("epochs", "all")  # options that every preset has


def expand(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a study's document with plain phases: a preset's are written out, and its groups are added.

    A document whose `phases` is a list, or is missing, comes back equal.

    >>> expand({"phases": {"walter-b": {"epochs": 5}}})
    {'phases': [{'name': 'adapt', 'epochs': 5, 'train': {'norm': 'adversarial', 'rest': 'frozen'}}]}

    Raises `UserError` with every fault of the preset's name and options; their paths are those of the document as it was
    given, such as `phases.bakiskan.code`.
    """
    plain = copy.deepcopy(dict(document))
    phases = plain.get("phases")
    if not isinstance(phases, Mapping):
        return plain
    allowed = f"one preset, {', '.join(PRESETS)}, or a list of phases"
    if len(phases) != 1:
        what = f"{len(phases)} names: {', '.join(map(str, phases))}" if phases else "no name"
        raise UserError(Fault(f"a mapping with {what}; allowed: {allowed}", path="phases"))
    ((name, options),) = phases.items()
    if name not in PRESETS:
        raise UserError(
            Fault(f"{one_of('preset', str(name), PRESETS)}; or a list of phases", path=path_text(("phases", str(name))))
        )
    if options is None:
        options = {}
    if not isinstance(options, Mapping):
        raise UserError(
            Fault(f"{shown(options)} is not allowed; allowed: a mapping of options", path=path_text(("phases", name)))
        )
    faults: list[Fault] = []
    made, expanded = _expanded(name, options, faults)
    groups = plain.get("groups")
    if isinstance(groups, Mapping):
        used = {group for phase in made.phases.values() for group in phase["train"]} if made else ()
        for group in (group for group in used if group in groups):
            meant = made.groups.get(group, group) if made else group
            if str(groups[group]).strip() != meant:
                text = f"preset {name} calls {meant!r} so; give your group another name"
                faults.append(Fault(text, path=path_text(("groups", group))))
    if faults or made is None:
        raise UserError(sorted(faults, key=lambda fault: fault.path or ""))
    plain["phases"] = expanded
    if made.groups and (groups is None or isinstance(groups, Mapping)):
        plain["groups"] = {**(groups or {}), **made.groups}
    return plain


def _expanded(name: str, options: Mapping[str, Any], faults: list[Fault]) -> tuple[Made | None, list[dict[str, Any]]]:
    """Return what a preset makes of its options, and the phases with all settings; add what is wrong to `faults`."""

    def fault(message: str, *keys: str | int) -> None:
        faults.append(Fault(message, path=path_text(("phases", name, *keys))))

    make = PRESETS[name].make
    hints, given = get_type_hints(make), {}
    parameters = inspect.signature(make).parameters
    wrong = False
    for key, parameter in parameters.items():
        if options.get(key) is None and (key not in options or parameter.default is None):
            if parameter.default is parameter.empty:
                wrong = True
                fault(f"is missing; allowed: {_allowed(hints[key])}", key)
            continue
        problem = _problem(hints[key], options[key])
        if problem is None:
            given[key] = options[key]
        else:
            wrong = True
            fault(problem, key)
    known = [*parameters, *_SHARED, *PRESETS[name].phases]
    for key in options:
        if key not in known:
            fault(one_of(f"option of preset {name}", str(key), known), str(key))
    made: Made | None = None
    if not wrong:
        try:
            made = make(**given)
        except UserError as error:
            for found in error.faults:
                fault(found.message, *filter(None, [found.path]))
    if made is None:
        return None, []
    phases = list(made.phases)
    for key in PRESETS[name].phases:
        if key in options and key not in phases:
            fault(f"there is no such phase with these options; there is: {', '.join(phases)}", key)
    epochs = _epochs(options.get("epochs", EPOCHS), phases, fault)
    expanded = []
    shared = _settings(options, "all", fault)
    for phase, length in zip(phases, epochs, strict=True):
        settings = _merged(shared, _settings(options, phase, fault))
        time = {"epochs": length} if settings.get("steps") is None or "epochs" in options else {}
        expanded.append({"name": phase, **time, **copy.deepcopy(dict(made.phases[phase])), **settings})
    return made, expanded


def _epochs(value: Any, phases: list[str], fault: Callable[..., None]) -> list[int]:
    values = value if isinstance(value, list) else [value] * len(phases)
    allowed = f"a whole number, or a list of {len(phases)}: {', '.join(phases)}"
    if len(values) != len(phases):
        fault(f"{len(values)} number{'s' if len(values) != 1 else ''}; allowed: {allowed}", "epochs")
        return [EPOCHS] * len(phases)
    for index, number in enumerate(values):
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            keys = ("epochs", index) if isinstance(value, list) else ("epochs",)
            fault(f"{shown(number)} is not allowed; allowed: {allowed}", *keys)
            if not isinstance(value, list):
                break
    return values


def _settings(options: Mapping[str, Any], key: str, fault: Callable[..., None]) -> Mapping[str, Any]:
    """Return the settings of all phases or of one, with unknown keys told; the schema judges the values."""
    settings = options.get(key)
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        fault(f"{shown(settings)} is not allowed; allowed: a mapping of settings", key)
        return {}
    known = [field.alias or name for name, field in PhaseConfig.model_fields.items()]
    known = [name for name in known if name not in (*_DECIDED, "epochs")]
    for name in settings:
        if name in _DECIDED:
            fault("is for the preset to say; write the phases out as a list to change it", key, str(name))
        elif name == "epochs":
            fault("stands beside, for all phases: epochs: [3, 2]", key, "epochs")
        elif name not in known:
            fault(one_of("setting of a phase", str(name), known), key, str(name))
    return settings


def _merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return both settings, the phase's own first: mappings key by key unless they name different kinds."""
    merged = copy.deepcopy({**shared, **own})
    for key in shared.keys() & own.keys():
        base, mine = shared[key], own[key]
        if isinstance(base, Mapping) and isinstance(mine, Mapping) and mine.get("name") in (None, base.get("name")):
            merged[key] = copy.deepcopy({**base, **mine})
    return merged


def _problem(hint: Any, value: Any) -> str | None:
    """Return what is wrong with an option of this type, or None."""
    if get_origin(hint) is Literal:
        if value in get_args(hint) and isinstance(value, str):
            return None
        if isinstance(value, str):
            return one_of("value", value, get_args(hint))
        return f"{'empty' if value is None else f'{shown(value)} is not allowed'}; allowed: {_allowed(hint)}"
    if not isinstance(value, str) or not value.strip():
        return f"{shown(value)} is not allowed; allowed: {_allowed(hint)}"
    if Selector in _members(hint):
        try:
            parse(value)
        except UserError as error:
            return error.faults[0].message
    return None


def _allowed(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(get_args(hint))
    return "a module, a tensor or a selector" if Selector in _members(hint) else "the name of a file"


def _members(hint: Any) -> tuple[Any, ...]:
    return (hint, *get_args(hint))


def written(document: Mapping[str, Any], path: Keys) -> Keys:
    """Return where the setting at `path` of the expanded document is written in the document with a preset.

    What the preset itself decides is written at its name; paths that no preset touches are returned as they are.

    >>> document = {"phases": {"bakiskan": {"code": "A1N2", "cut": "conv1", "epochs": [3, 2], "part": {"attack": "pgd-7"}}}}
    >>> written(document, ("phases", 1, "attack")), written(document, ("phases", 1, "epochs"))
    (('phases', 'bakiskan', 'part', 'attack'), ('phases', 'bakiskan', 'epochs', 1))
    >>> written(document, ("phases", 1, "train", "late")), written(document, ("groups", "early"))
    (('phases', 'bakiskan', 'cut'), ('phases', 'bakiskan', 'cut'))
    """
    phases = document.get("phases")
    if not isinstance(phases, Mapping) or len(phases) != 1:
        return path
    ((name, options),) = phases.items()
    options = options if isinstance(options, Mapping) else {}
    top: Keys = ("phases", str(name))
    divided = (*top, *[key for key in ("cut", "single") if options.get(key) is not None][:1])
    if path[:1] == ("groups",) and len(path) > 1 and path[1] not in (document.get("groups") or {}):
        return divided
    if path[:1] != ("phases",) or len(path) < 2 or not isinstance(path[1], int):
        return top if path[:1] == ("phases",) else path
    index, rest = path[1], path[2:]
    try:
        expanded = expand(document)
        phase = expanded["phases"][index]["name"]
    except (UserError, IndexError):
        return top
    if rest[:1] == ("train",) and rest[1:2] and rest[1] in expanded.get("groups", {}):
        return divided
    if rest[:1] == ("epochs",) and "epochs" in options:
        return (*top, "epochs", index) if isinstance(options["epochs"], list) else (*top, "epochs")
    for length in range(len(rest), 0, -1):  # the nearest part of the path that is there, the phase's own first
        for key in (phase, "all"):
            if _holds(options.get(key), rest[:length]):
                return (*top, key, *rest)
    if rest[:1] == ("start",) and "load" in options:
        return (*top, "load")
    return top


def _holds(box: Any, keys: Keys) -> bool:
    for key in keys:
        try:
            box = box[key]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def preset_lines() -> dict[str, str]:
    """Return each preset's name with one sentence about it, and the names of its own options.

    >>> preset_lines()["norm-first"]
    'Train the norm layers first, then everything else while their scales and shifts stay. (first, second, statistics)'
    """
    lines = {}
    for name, preset in PRESETS.items():
        own = ", ".join(inspect.signature(preset.make).parameters)
        lines[name] = inspect.cleandoc(preset.make.__doc__ or "").split("\n")[0] + (f" ({own})" if own else "")
    return lines


class _Dumper(pyyaml.SafeDumper):
    """Writes plain values for the strict reader: no anchors, and quotes around text that would be read as a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: pyyaml.SafeDumper, value: str) -> pyyaml.ScalarNode:
    try:
        float(value)
    except ValueError:
        return dumper.represent_str(value)
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="'")


_Dumper.add_representer(str, _text)


def preset_text(document: Mapping[str, Any]) -> str:
    """Return the groups and phases of an expanded document as they would stand in a study file, a line for each.

    >>> print(preset_text(expand({"phases": {"bakiskan": {"code": "A1N2", "cut": "conv1"}}})), end="")
    groups: {early: before(conv1), late: after(conv1)}
    phases:
      - {name: whole, epochs: 10, train: {all: adversarial}}
      - {name: part, epochs: 10, train: {early: frozen, late: natural}, start: {late: reinitialize}}
    """

    def flow(value: Any) -> str:
        return pyyaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=10**6).strip()

    lines = [f"groups: {flow(document['groups'])}"] if document.get("groups") else []
    return "\n".join([*lines, "phases:", *(f"  - {flow(phase)}" for phase in document["phases"])]) + "\n"
