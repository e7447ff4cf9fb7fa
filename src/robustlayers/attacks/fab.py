"""FAB-T through the reference implementation: the smallest perturbation to each of the likeliest wrong classes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustlayers.attacks._ascent import Best, Forward, count, differentiating, gradient, prepare, score
from robustlayers.attacks._draws import Generators
from robustlayers.attacks._goal import make_goal
from robustlayers.attacks._identity import identity_of
from robustlayers.attacks.losses import find_loss
from robustlayers.attacks.threat import Threat
from robustlayers.core.errors import UserError

__all__ = ["FAB"]

_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


@dataclass(frozen=True)
class FAB:
    """The targeted fast adaptive boundary attack, FAB-T (Croce & Hein 2020, "Minimally distorted").

    For each of the `targets` likeliest classes beside the label, `steps` steps look for the nearest point at which the
    model decides otherwise; it counts where it is inside the threat. The steps are those of the package `pyautoattack`
    (extra `autoattack`); the loop over the classes, the gradients and the check of the result are ours, so nothing
    global is drawn from and no parameter gets a gradient. Images that are broken take no part in what follows. One that
    is not comes back with the point of the largest margin. Nothing is random; computed in float32.

    Cost: at most 1 + targets (2 steps + 3) forwards and targets * steps backwards. Too weak where gradients are
    masked. Third attack of AutoAttack, with 9 targets and 100 steps; it seldom breaks what `TargetedAPGD` does not.

    Raises `UserError` for values that are not allowed, and, when called, where `pyautoattack` is not installed.

    >>> FAB(Threat("linf", "8/255")).describe()
    'fab-t-100, linf 8/255, 9 targets, stops when broken'
    """

    threat: Threat
    steps: int = 100
    targets: int = 9

    def __post_init__(self) -> None:
        count("steps", self.steps, 1)
        count("targets", self.targets, 1)

    @property
    def forward_passes(self) -> int:
        """Forward passes for each image, at most; one that is broken costs less."""
        return 1 + self.targets * (2 * self.steps + 3)

    @property
    def backward_passes(self) -> int:
        """Backward passes for each image, at most."""
        return self.targets * self.steps

    def describe(self) -> str:
        """Return one line with everything that decides the attack's strength."""
        targets = f"{self.targets} target{'s' if self.targets > 1 else ''}"
        return f"fab-t-{self.steps}, {self.threat}, {targets}, stops when broken"

    def identity(self) -> dict[str, Any]:
        """Return what decides the attack as plain data."""
        return identity_of(self)

    def __call__(self, forward: Forward, x: Tensor, y: Tensor, *, generator: Generators | None = None) -> Tensor:
        """Return adversarial images for `x`, as `PGD` does; `generator` is not drawn from."""
        base = _reference()
        x, y = prepare(x, y)
        if x.numel() == 0:
            return x.clone()
        goal, best = make_goal("margin", y), Best(x, stop=True)
        with differentiating():
            with torch.no_grad():
                logits = forward(x)
            best.update(goal, x, logits, find_loss("margin")(logits, y))
            for rank in range(2, 2 + min(self.targets, logits.shape[1] - 1)):
                rows = best.standing()
                if not len(rows):
                    break
                run = self._run(base, forward, x.device)
                run.target_class = rank
                nearest = run.attack_single_run(x[rows].float(), y[rows], use_rand_start=False, is_targeted=True)
                # The nearest point may be outside the ball; then its projection is as good a guess as any.
                found, part = self.threat.project(nearest.detach().to(x.dtype), x[rows]), goal.take(rows)
                best.update(part, found, *score(forward, found, part.losses), rows)
        return best.x.detach()

    def _run(self, base: type[Any], forward: Forward, device: torch.device) -> Any:
        """Return the reference's attack with our forward and our gradient, which leaves the parameters alone."""

        class Run(base):
            def _predict_fn(self, x: Tensor) -> Tensor:
                with torch.no_grad():
                    return forward(x)

            def _get_predicted_label(self, x: Tensor) -> Tensor:
                return self._predict_fn(x).argmax(1)

            def get_diff_logits_grads_batch_targeted(
                self, imgs: Tensor, la: Tensor, la_target: Tensor
            ) -> tuple[Tensor, Tensor]:
                def ahead(logits: Tensor) -> Tensor:
                    own, other = (logits.gather(1, label[:, None]).squeeze(1) for label in (la, la_target))
                    return other - own

                with differentiating():
                    _, difference, slope = gradient(forward, imgs, ahead)
                return difference.unsqueeze(1), slope.unsqueeze(1)

        return Run(norm=_NORMS[self.threat.norm], n_iter=self.steps, eps=self.threat.eps, device=device)


def _reference() -> type[Any]:
    try:
        return importlib.import_module("pyautoattack.fab_base").FABAttack
    except ImportError:
        raise UserError('fab-t: needs pyautoattack; install it by: pip install "robustlayers[autoattack]"') from None
