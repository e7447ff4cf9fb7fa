"""The reference implementation of AutoAttack as one attack, for those who would rather not take ours on trust."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from robustlayers.attacks._ascent import Forward, differentiating, prepare
from robustlayers.attacks._draws import Generators, own_generator
from robustlayers.attacks._identity import identity_of
from robustlayers.attacks.threat import Threat
from robustlayers.core.errors import UserError

__all__ = ["Reference"]

_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
_ROWS = 250  # its own default


@dataclass(frozen=True)
class Reference:
    """AutoAttack's standard version as the package `pyautoattack` runs it (extra `autoattack`; Croce & Hein 2020).

    APGD-CE, APGD-T, FAB-T and Square in turn on what is left, in batches of 250; never its own resume. Its seed is drawn
    from `generator`; it draws from torch's global state, which is put back. An image that holds comes back unchanged.
    It needs ten classes or more, since it takes nine targets. Results depend on the batch that an image is in.

    Cost: at most 1 + 101 + 909 + 1827 + 5001 forwards and 101 + 909 + 900 backwards. Too weak where gradients are masked
    and 5,000 queries do not suffice, and for networks that are random.

    Raises `UserError`, when called, where `pyautoattack` is not installed.

    >>> Reference(Threat("linf", "8/255")).describe()
    'AutoAttack of pyautoattack, standard version, linf 8/255'
    """

    threat: Threat

    @property
    def forward_passes(self) -> int:
        """Forward passes for each image, at most; one that is broken costs less."""
        return 1 + 101 + 909 + 1827 + 5001

    @property
    def backward_passes(self) -> int:
        """Backward passes for each image, at most."""
        return 101 + 909 + 900

    def describe(self) -> str:
        """Return one line with everything that decides the attack's strength."""
        return f"AutoAttack of pyautoattack, standard version, {self.threat}"

    def identity(self) -> dict[str, Any]:
        """Return what decides the attack as plain data."""
        return identity_of(self)

    def __call__(self, forward: Forward, x: Tensor, y: Tensor, *, generator: Generators | None = None) -> Tensor:
        """Return adversarial images for `x`, as `PGD` does; computed in float32."""
        kind = _package()
        x, y = prepare(x, y)
        if x.numel() == 0:
            return x.clone()
        draws = own_generator(x, generator)
        one = draws if isinstance(draws, torch.Generator) else draws[0]
        seed = int(torch.randint(2**31, (), generator=one, device=one.device))
        with differentiating(), _global_states_kept(x.device):
            own = _Function(forward)
            attack = kind(own, norm=_NORMS[self.threat.norm], eps=self.threat.eps, seed=seed, device=x.device)
            found = attack.run_standard_evaluation(x.detach().float(), y, batch_size=_ROWS)
        x_adv = found[0] if isinstance(found, tuple) else found
        moved = (x_adv != x.float()).flatten(1).any(1)  # else float64 images would come back rounded
        x_adv = torch.where(moved.view(-1, *[1] * (x.ndim - 1)), x_adv.to(x.dtype), x)
        return self.threat.project(x_adv.detach(), x)


class _Function(nn.Module):
    """A function as the module that the reference asks for."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self._forward = (forward,)  # in a tuple, so that it does not become a part of this one
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self._forward[0](x)


@contextmanager
def _global_states_kept(device: torch.device) -> Iterator[None]:
    of_python, of_numpy = random.getstate(), numpy.random.get_state(legacy=False)  # noqa: NPY002 (it is its to put back)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(of_python)
            numpy.random.set_state(of_numpy)  # noqa: NPY002


def _package() -> type[Any]:
    try:
        return importlib.import_module("pyautoattack").AutoAttack
    except ImportError:
        raise UserError(
            'autoattack-reference: needs pyautoattack; install it by: pip install "robustlayers[autoattack]"'
        ) from None
