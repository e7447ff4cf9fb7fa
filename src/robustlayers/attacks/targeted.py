"""APGD-T: Auto-PGD towards each of the likeliest wrong classes in turn, the second attack of AutoAttack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustlayers.attacks._ascent import Best, Forward, count, differentiating, prepare
from robustlayers.attacks._draws import Generators, own_generator
from robustlayers.attacks._goal import Goal
from robustlayers.attacks._identity import identity_of
from robustlayers.attacks.apgd import climb_by_itself, forwards
from robustlayers.attacks.losses import find_loss
from robustlayers.attacks.threat import Threat
from robustlayers.core.errors import UserError

__all__ = ["TargetedAPGD", "likeliest_targets"]


@dataclass(frozen=True)
class TargetedAPGD:
    """Auto-PGD on a targeted loss, once for each of the `targets` likeliest classes beside the label (APGD-T).

    The classes are those of the largest logits of the clean image; a model with fewer classes has fewer targets. Each
    run is that of `APGD`, from its own uniform point of the ball, on the targeted DLR loss -(z_y - z_t) / (z_(1) -
    (z_(3) + z_(4)) / 2) (Croce & Hein 2020, section 4; standard: 9 targets, 100 steps). `loss` is `dlr`, which needs
    four classes, `margin` or `ce`. An image is broken as soon as it is misclassified, as whatever class; then it takes
    no part in what follows and its first misclassified iterate is returned, otherwise the one of the highest loss.

    Cost: at most 1 + targets (steps + 1) forwards and targets * steps backwards. The strongest of the gradient attacks
    here; too weak only where gradients are masked, which a black-box attack such as `Square` shows.

    Raises `UserError` for values that are not allowed.

    >>> attack = TargetedAPGD(Threat("linf", "8/255"))
    >>> attack.describe(), attack.forward_passes, attack.backward_passes
    ('apgd-t-100, linf 8/255, 9 targets, 1 restart, loss dlr, stops when broken', 910, 900)
    """

    threat: Threat
    steps: int = 100
    targets: int = 9
    loss: str = "dlr"
    restarts: int = 1

    def __post_init__(self) -> None:
        count("steps", self.steps, 1)
        count("targets", self.targets, 1)
        count("restarts", self.restarts, 1)
        if find_loss(self.loss).toward is None:
            raise UserError(f"loss {self.loss}: not offered for apgd-t; allowed: ce, dlr, margin")

    @property
    def forward_passes(self) -> int:
        """Forward passes for each image, at most; one that is broken costs less."""
        return 1 + self.targets * self.restarts * forwards(self.threat, self.steps)

    @property
    def backward_passes(self) -> int:
        """Backward passes for each image, at most."""
        return self.targets * self.restarts * self.steps

    def describe(self) -> str:
        """Return one line with everything that decides the attack's strength."""
        targets = f"{self.targets} target{'s' if self.targets > 1 else ''}"
        restarts = f"{self.restarts} restart{'s' if self.restarts > 1 else ''}"
        return f"apgd-t-{self.steps}, {self.threat}, {targets}, {restarts}, loss {self.loss}, stops when broken"

    def identity(self) -> dict[str, Any]:
        """Return what decides the attack as plain data."""
        return identity_of(self)

    def __call__(self, forward: Forward, x: Tensor, y: Tensor, *, generator: Generators | None = None) -> Tensor:
        """Return adversarial images for `x`, as `PGD` does; an image that is misclassified already is returned."""
        x, y = prepare(x, y)
        if x.numel() == 0:
            return x.clone()
        generator = own_generator(x, generator)
        with differentiating():
            with torch.no_grad():
                logits = forward(x)
            find_loss("margin")(logits, y)  # for its check of the logits
            loss = find_loss(self.loss)
            targets = likeliest_targets(logits, y, self.targets)
            goals = [Goal(loss, y, target=target) for target in targets.unbind(1)]
            best = Best(x, stop=True)
            best.update(goals[0], x, logits, torch.full_like(logits[:, 0], -torch.inf))
            for goal in goals:
                for _ in range(self.restarts):
                    start = self.threat.random_start(x, generator)  # of all images: no draw depends on who is broken
                    if len(rows := best.standing()):
                        part = goal.take(rows), x[rows], start[rows]
                        climb_by_itself(forward, self.threat, *part, self.steps, best, rows)
        return best.x.detach()


def likeliest_targets(logits: Tensor, y: Tensor, most: int) -> Tensor:
    """Return, for each image, the classes beside its label by falling logit: [n, classes], [n] -> [n, <= most].

    >>> likeliest_targets(torch.tensor([[0.0, 3.0, 2.0, 1.0]]), torch.tensor([1]), 2)
    tensor([[2, 3]])
    """
    others = logits.nan_to_num().scatter(1, y[:, None], -torch.inf)
    return others.topk(min(most, logits.shape[1] - 1), dim=1).indices
