"""Attacks by name: `pgd-20`, `pgd-50x5`, `apgd-ce`, or a mapping with every option, and the short name of an attack.

| name | attack |
|---|---|
| `noise` `noise-10` | uniform noise in the ball, the worst of 10 draws |
| `gaussian` `gaussian-10` | Gaussian noise moved into the ball |
| `fgsm` `r-fgsm` `n-fgsm` | one step: from the image, from a uniform point of the ball, from noise twice as wide |
| `pgd-20` `pgd-50x5` `pgd-margin-20` | projected gradient descent; steps x restarts; another loss |
| `mim-10` | PGD with momentum from the image |
| `apgd-ce` `apgd-dlr-50x2` | Auto-PGD |
| `apgd-t` `apgd-t-50` | Auto-PGD towards the nine likeliest wrong classes |
| `fab-t` | smallest perturbations to the nine likeliest wrong classes |
| `square-1000` | random search without gradients, 1000 queries |
| `apgd-ce+square-1000` | the worst of several |
| `autoattack-reference` | AutoAttack as the package pyautoattack runs it (extra `autoattack`) |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from robustlayers.attacks._ascent import Attack, NamedAttack
from robustlayers.attacks.apgd import APGD
from robustlayers.attacks.combine import Transfer, WorstOf
from robustlayers.attacks.fab import FAB
from robustlayers.attacks.fgsm import FGSM, NFGSM, RFGSM
from robustlayers.attacks.losses import LOSSES
from robustlayers.attacks.mim import MIM
from robustlayers.attacks.noise import Gaussian, Noise
from robustlayers.attacks.pgd import PGD
from robustlayers.attacks.reference import Reference
from robustlayers.attacks.square import Square
from robustlayers.attacks.targeted import TargetedAPGD
from robustlayers.attacks.threat import Threat
from robustlayers.core.errors import UserError, one_of

__all__ = ["ATTACKS", "Attack", "NamedAttack", "is_own", "label", "parse"]

ATTACKS: dict[str, type[Any]] = {
    "apgd": APGD,
    "apgd-t": TargetedAPGD,
    "autoattack-reference": Reference,
    "fab-t": FAB,
    "fgsm": FGSM,
    "gaussian": Gaussian,
    "mim": MIM,
    "n-fgsm": NFGSM,
    "noise": Noise,
    "pgd": PGD,
    "r-fgsm": RFGSM,
    "square": Square,
}

# Which options the parts of a short name stand for, and their defaults where the name leaves them out.
_COUNT = {
    "apgd": "steps",
    "apgd-t": "steps",
    "fab-t": "steps",
    "gaussian": "draws",
    "mim": "steps",
    "noise": "draws",
    "pgd": "steps",
    "square": "queries",
}
_COUNTED = ("mim", "pgd", "square")  # their short name always has the number
_NAMES = "|".join(sorted(ATTACKS, key=len, reverse=True))  # apgd-t before apgd
_NAME = re.compile(rf"(?P<name>{_NAMES})(?:-(?P<loss>[a-z]+))?(?:-(?P<count>[0-9]+)(?:x(?P<restarts>[0-9]+))?)?")
_KNOWN = re.compile(rf"(?P<name>{_NAMES})(?:-.*)?", re.DOTALL)
_EXAMPLES = "pgd-20, pgd-50x5, pgd-margin-20, apgd-ce, apgd-dlr-50, apgd-t, fgsm, noise, square-1000"


def parse(what: str | Mapping[str, Any], threat: Threat) -> NamedAttack:
    """Return the attack that a text or a mapping describes, within `threat`.

    A text is `name[-loss][-steps[xrestarts]]`; what it leaves out has the default of the attack's class. Several of
    them with `+` between are the worst of them. A mapping has the `name` of one attack and further options of its
    class. Raises `UserError` for an unknown name, loss or
    option, with the nearest valid ones, and for an option that is given twice.

    >>> parse("pgd-50x5", Threat("linf", "8/255")).describe()
    'pgd-50, linf 8/255, step 0.4/255, 5 restarts, best iterate'
    >>> parse({"name": "pgd", "steps": 10, "step_size": "2/255"}, Threat("linf", "8/255")).describe()
    'pgd-10, linf 8/255, step 2/255, 1 restart, best iterate'
    """
    if isinstance(what, str) and "+" in what:
        return WorstOf([parse(part, threat) for part in what.split("+")])
    if isinstance(what, str):
        options: dict[str, Any] = {}
        text = what
    elif isinstance(what, Mapping) and isinstance(what.get("name"), str):
        options = {str(key): value for key, value in what.items() if key != "name"}
        text = what["name"]
    else:
        raise UserError(f"an attack is a text such as {_EXAMPLES}, or a mapping with a name; got {what!r}")
    name, short = _short(text)
    kind = ATTACKS[name]
    allowed = [field.name for field in fields(kind) if field.name != "threat"]
    for key in options:
        if key not in allowed:
            raise UserError(one_of(f"option of {name}", key, allowed))
        if key in short:
            raise UserError(f"{key}: given twice, in the name {text!r} and as an option")
    return kind(threat=threat, **short, **options)


def is_own(attack: Any) -> bool:
    """Tell whether an attack is one of ours: it only calls its `forward`, so an equivalent function will do.

    A foreign attack may count on a module with modes and parameters.
    """
    if type(attack) is WorstOf:
        return all(is_own(part) for part in attack.attacks)
    return type(attack) in ATTACKS.values() or (type(attack) is Transfer)


def label(attack: Any) -> str:
    """Return the short name of an attack, the text from which `parse` makes it up to its other options.

    The short name of a foreign attack is its `name`, else the name of its class in lower case.

    >>> label(PGD(Threat("linf", "8/255"), steps=50, restarts=5)), label(APGD(Threat("linf", "8/255"), loss="dlr"))
    ('pgd-50x5', 'apgd-dlr')
    """
    if type(attack) is WorstOf:
        return "+".join(label(part) for part in attack.attacks)
    if type(attack) is Transfer:
        return f"{label(attack.attack)} from {attack.name}"
    names = [name for name, kind in ATTACKS.items() if type(attack) is kind]
    if not names:
        own = getattr(attack, "name", None)
        return own if isinstance(own, str) and own else type(attack).__name__.lower()
    name = names[0]
    text = name
    loss = getattr(attack, "loss", None)
    if loss is not None and (name == "apgd" or loss != _default(type(attack), "loss")):
        text += f"-{loss}"
    if name in _COUNT:
        number, restarts = getattr(attack, _COUNT[name]), getattr(attack, "restarts", 1)
        if restarts > 1:
            text += f"-{number}x{restarts}"
        elif name in _COUNTED or number != _default(type(attack), _COUNT[name]):
            text += f"-{number}"
    return text


def _short(text: str) -> tuple[str, dict[str, Any]]:
    """Take a short name apart: the attack's name and the options that the text gives."""
    text = text.strip()
    match, known = _NAME.fullmatch(text), _KNOWN.fullmatch(text)
    if known is None:
        name = re.sub(r"-[0-9].*", "", text)  # without its numbers: they would spoil the search for the nearest
        raise UserError(one_of("attack", name, ATTACKS) + f"; examples: {_EXAMPLES}")
    name = known["name"]
    options: dict[str, Any] = {}
    allowed = {field.name for field in fields(ATTACKS[name])}
    if match is None or (match["count"] and name not in _COUNT) or (match["restarts"] and "restarts" not in allowed):
        raise UserError(f"attack {text!r} is not understood; examples: {_EXAMPLES}")
    if match["loss"]:
        if "loss" not in allowed:
            raise UserError(f"attack {text!r}: {name} has no loss; examples: {_EXAMPLES}")
        if match["loss"] not in LOSSES:
            raise UserError(one_of("loss of an attack", match["loss"], LOSSES))
        options["loss"] = match["loss"]
    if match["count"]:
        options[_COUNT[name]] = int(match["count"])
    if match["restarts"]:
        options["restarts"] = int(match["restarts"])
    return name, options


def _default(kind: type[Any], option: str) -> Any:
    return next(field.default for field in fields(kind) if field.name == option and field.default is not MISSING)
