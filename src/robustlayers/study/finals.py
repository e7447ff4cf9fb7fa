"""AutoAttack as one of a study's attacks: a cascade in shards, under a label that says what ran."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from robustlayers.attacks import ATTACKS, PGD, NamedAttack, Threat, WorstOf, label, parse
from robustlayers.core.errors import UserError, nearest, one_of
from robustlayers.evaluation.autoattack import autoattack_label, standard

__all__ = ["NAME", "AutoAttack", "Measured", "also_nearest", "measured_attack", "name_of", "named_attack"]

NAME = "autoattack"
"""The word for it in `evaluate.attacks`."""

_OPTIONS = {"steps": 100, "targets": 9, "queries": 5000}


@dataclass(frozen=True)
class AutoAttack:
    """AutoAttack within a threat; `whole`: on every test image of the data set, without which it has another name."""

    threat: Threat
    steps: int = 100
    targets: int = 9
    queries: int = 5000
    whole: bool = True
    classes: int = 10

    @property
    def attacks(self) -> dict[str, NamedAttack]:
        """Its attacks in turn, by name."""
        return standard(self.threat, self.classes, steps=self.steps, targets=self.targets, queries=self.queries)[0]

    @property
    def name(self) -> str:
        """Its name in rows, claims and columns: `autoattack` only for the standard on a whole test set.

        >>> AutoAttack(Threat("linf", 0.1), steps=5, queries=20).name.startswith("apgd-ce-5-apgd-t-5-")
        True
        """
        said = autoattack_label(self.attacks, 0, whole=self.whole).partition(", n=")[0]
        return re.sub(r"[^a-z0-9]+", "-", said.lower()).strip("-")

    def describe(self) -> str:
        """Return every attack spelled out, in turn."""
        return "; then ".join(attack.describe() for attack in self.attacks.values())

    def identity(self) -> dict[str, Any]:
        """Return all that decides its result."""
        return {"name": NAME, "attacks": [[name, one.identity()] for name, one in self.attacks.items()]}

    @property
    def forward_passes(self) -> int:
        """The most that an image costs."""
        return sum(one.forward_passes + 1 for one in self.attacks.values())

    @property
    def backward_passes(self) -> int:
        """The most that an image costs."""
        return sum(one.backward_passes for one in self.attacks.values())


Measured = NamedAttack | AutoAttack


def name_of(attack: Measured) -> str:
    """Return the short name under which rows and claims know an attack."""
    return attack.name if isinstance(attack, AutoAttack) else label(attack)


def measured_attack(
    what: str | Mapping[str, Any], threat: Threat, *, whole: bool = True, classes: int = 10
) -> Measured:
    """Return one of `evaluate.attacks`; `whole` tells whether all test images there are will be attacked."""
    options: dict[str, Any] = {"name": what} if isinstance(what, str) else dict(what)
    name = options.pop("name", None)
    if name != NAME:
        try:
            return named_attack(what, threat)
        except UserError as error:
            raise also_nearest(error, name) from None
    for key, value in options.items():
        if key not in _OPTIONS:
            raise UserError(one_of(f"option of {NAME}", str(key), _OPTIONS))
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{key}: {value!r} is not allowed; allowed: a whole number, 1 or more")
    return AutoAttack(threat, **options, whole=whole, classes=classes)


def named_attack(what: str | Mapping[str, Any], threat: Threat) -> NamedAttack:
    """Return the attack that a person names; as `attacks.parse`, but one that takes no step is refused.

    PGD without steps is a point of the ball. It says nothing of PGD, and the attack `noise` is its plain name.
    """
    attack = parse(what, threat)
    for part in attack.attacks if isinstance(attack, WorstOf) else (attack,):
        if isinstance(part, PGD) and not part.steps:
            text = "steps: 0 is not allowed; allowed: a whole number, 1 or more; noise is a point without steps"
            raise UserError(text)
    return attack


def also_nearest(error: UserError, name: object) -> UserError:
    """Return a refusal of an attack that names `autoattack` too where that is what was meant."""
    if not isinstance(name, str) or nearest(name, [*ATTACKS, NAME], 1) != [NAME]:
        return error
    first = f"; nearest: {NAME}"
    return UserError(
        [
            replace(
                f,
                message=f.message.replace("; nearest: ", f"{first}, ", 1)
                if "; nearest: " in f.message
                else f.message + first,
            )
            for f in error.faults
        ]
    )
