"""Attacks made of attacks: crafted on another model, and the worst of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustlayers.attacks._ascent import Attack, Best, Forward, NamedAttack, flag, prepare, score
from robustlayers.attacks._draws import Generators, own_generator, spawn
from robustlayers.attacks._goal import make_goal
from robustlayers.attacks.guard import guard
from robustlayers.attacks.threat import Threat
from robustlayers.core.errors import UserError
from robustlayers.normalization import inference

__all__ = ["Transfer", "WorstOf"]


@dataclass(frozen=True)
class Transfer:
    """What an attack makes of a `source` model, to be judged by another one, whose forward it never calls.

    `source`: an `nn.Module`, held in evaluation mode with norm layers by running statistics and left without a trace,
    or any function from images to logits, used as it is. `name` stands for it in the attack's label and identity: two
    sources need two names.

    Cost: that of `attack`, on the source alone. Too weak to measure with: how much of an attack transfers depends on
    the source. It shows a model that masks gradients, if it breaks what attacks on the model itself do not (Papernot et
    al. 2017); attacks with momentum transfer best (Dong et al. 2018).

    Raises `UserError` for a name that is empty.
    """

    attack: NamedAttack
    source: Forward
    name: str = "source"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise UserError(f"name: {self.name!r} is not allowed; allowed: a text that stands for the source")

    @property
    def threat(self) -> Threat:
        """The perturbations the attack may use."""
        return self.attack.threat

    @property
    def forward_passes(self) -> int:
        """Forward passes of the source for each image."""
        return self.attack.forward_passes

    @property
    def backward_passes(self) -> int:
        """Backward passes of the source for each image."""
        return self.attack.backward_passes

    def describe(self) -> str:
        """Return one line with everything that decides the attack's strength."""
        return f"{self.attack.describe()}, crafted on {self.name}"

    def identity(self) -> dict[str, Any]:
        """Return what decides the attack as plain data; the source is its name."""
        return {"attack": self.attack.identity(), "source": self.name, "kind": type(self).__name__}

    def __call__(self, forward: Forward, x: Tensor, y: Tensor, *, generator: Generators | None = None) -> Tensor:
        """Return adversarial images for `x`, as `PGD` does; `forward` is not called."""
        with _held(self.source):
            return self.attack(self.source, x, y, generator=generator)


@dataclass(frozen=True, init=False)
class WorstOf:
    """The worst that several attacks in the same threat make of an image: misclassified before not, then the margin.

    They run in the order given. With `early_exit` only images that none has broken yet go on to the next; without it
    all see all of them. Each attack draws from a generator of its own for each image, so no attack's draws depend on
    the others, nor on which images are broken.

    Cost: at most the sum of theirs, and one forward for each to judge its result. As strong as its strongest part.

    Raises `UserError` for no attacks, and for attacks in different threats.
    """

    attacks: tuple[Attack, ...]
    early_exit: bool = True

    def __init__(self, attacks: Sequence[Attack], *, early_exit: bool = True) -> None:
        object.__setattr__(self, "attacks", tuple(attacks))
        object.__setattr__(self, "early_exit", early_exit)
        flag("early_exit", early_exit)
        if not self.attacks:
            raise UserError("attacks: there is none; give one or more")
        threats = {str(attack.threat): None for attack in self.attacks}
        if len({attack.threat for attack in self.attacks}) > 1:
            raise UserError(
                f"attacks: their threats differ ({'; '.join(threats)}); the worst of several needs one threat"
            )

    @property
    def threat(self) -> Threat:
        """The perturbations the attacks may use."""
        return self.attacks[0].threat

    @property
    def forward_passes(self) -> int:
        """Forward passes for each image, at most."""
        return sum(_own(attack).forward_passes for attack in self.attacks) + len(self.attacks)

    @property
    def backward_passes(self) -> int:
        """Backward passes for each image, at most."""
        return sum(_own(attack).backward_passes for attack in self.attacks)

    def describe(self) -> str:
        """Return one line with everything that decides the attack's strength."""
        parts = "; ".join(_own(attack).describe() for attack in self.attacks)
        return f"worst of ({parts})" + ("" if self.early_exit else ", all on all images")

    def identity(self) -> dict[str, Any]:
        """Return what decides the attack as plain data."""
        parts = [_own(attack).identity() for attack in self.attacks]
        return {"attacks": parts, "early_exit": self.early_exit, "kind": type(self).__name__}

    def __call__(self, forward: Forward, x: Tensor, y: Tensor, *, generator: Generators | None = None) -> Tensor:
        """Return adversarial images for `x`, as `PGD` does."""
        x, y = prepare(x, y)
        if x.numel() == 0:
            return x.clone()
        generator = own_generator(x, generator)
        goal, best = make_goal("margin", y), Best(x, stop=self.early_exit)
        for attack in self.attacks:
            draws = spawn(len(x), generator)
            rows = best.standing() if self.early_exit else torch.arange(len(x), device=x.device)
            if not len(rows):
                break
            some = [draws[row] for row in rows.tolist()]
            part = x[rows], y[rows]
            # A foreign attack knows nothing of one generator for each image.
            given = some if hasattr(attack, "identity") else some[0]
            x_adv = attack(forward, *part, generator=given).detach().to(x.dtype)  # pyright: ignore[reportArgumentType]
            found = goal.take(rows)
            best.update(found, x_adv, *score(forward, x_adv, found.losses), rows)
        return best.x


@contextmanager
def _held(source: Forward) -> Iterator[None]:
    if isinstance(source, nn.Module):
        with guard(source), inference(source):
            yield
    else:
        yield


def _own(attack: Attack) -> NamedAttack:
    """Return an attack of ours as one; a foreign attack knows neither its cost nor what decides it."""
    if not hasattr(attack, "identity"):
        raise UserError(f"attack {type(attack).__name__}: says neither its cost nor what decides it")
    return attack  # pyright: ignore[reportReturnType]
