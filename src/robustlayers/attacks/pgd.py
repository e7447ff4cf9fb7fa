"""Projected gradient descent, the field's standard attack, with per-image best iterate and nested restarts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from robustlayers.attacks._ascent import (
    Best,
    Forward,
    Objective,
    count,
    differentiating,
    flag,
    gradient,
    own_generator,
    prepare,
    score,
    usable,
)
from robustlayers.attacks.losses import find_loss
from robustlayers.attacks.threat import Threat
from robustlayers.core.errors import UserError, one_of
from robustlayers.core.quantities import number, pixels_text

__all__ = ["PGD"]

KEEPS = ("best", "last")


@dataclass(frozen=True)
class PGD:
    """Steepest ascent on a loss in ball and box: x' <- P(x' + step * direction), `steps` times, from a random start.

    The direction is the sign of the gradient (linf) or the normalized gradient (l2); P is `threat.project`
    (Madry et al. 2018, section 2.1).

    `step_size` is in pixel units and may be written `2/255`; None means 2.5 eps / steps in linf, which reaches the ball's
    boundary from any start (Madry et al. 2018), and 4 eps / steps in l2: there a random start lies near the boundary and
    has to be turned along it, and a path of 2.5 eps ends 2 to 5 % short of a linear model's optimum.

    `loss` is `ce`, `margin`, `dlr` or `kl`. `keep="best"` returns, for each image, the best of all iterates of all
    restarts, the last one included: misclassified before not, then the higher loss; this costs one more forward for each
    restart. `keep="last"` returns the last iterate. Restarts are nested: the first r of r + 1 restarts see the draws of a
    run with r, so accuracy never rises with restarts.

    Raises `UserError` for values that are not allowed, and for settings in which the attack could do nothing.

    >>> attack = PGD(Threat("linf", "8/255"), steps=20, step_size="1/255")
    >>> print(attack.describe())
    pgd-20, linf 8/255, step 1/255, 1 restart, best iterate
    >>> attack.forward_passes, attack.backward_passes
    (21, 20)
    """

    threat: Threat
    steps: int = 10
    step_size: float | str | None = None
    restarts: int = 1
    random_start: bool = True
    loss: str = "ce"
    keep: str = "best"

    def __post_init__(self) -> None:
        count("steps", self.steps, 0)
        count("restarts", self.restarts, 1)
        flag("random_start", self.random_start)
        if self.step_size is not None:
            object.__setattr__(self, "step_size", number(self.step_size, "step_size"))
            if self.step <= 0:
                raise UserError(f"step_size: {self.step_size} is not allowed; allowed: more than 0, in pixel units")
        if self.keep not in KEEPS:
            raise UserError(one_of("iterate to keep", str(self.keep), KEEPS))
        if self.restarts > 1 and not self.random_start:
            raise UserError("restarts: several restarts without random_start are all the same; use restarts=1")
        if self.restarts > 1 and self.keep == "last":
            raise UserError('restarts: several restarts need keep="best"; keep="last" would throw all but one away')
        if find_loss(self.loss).against_clean and not self.random_start:
            raise UserError(f"loss {self.loss}: its gradient is zero at the clean image; use random_start")

    @property
    def step(self) -> float:
        """Length of a step in pixel units."""
        if self.step_size is None:
            path = 2.5 if self.threat.norm == "linf" else 4.0
            return path * self.threat.eps / max(1, self.steps)
        return float(self.step_size)

    @property
    def forward_passes(self) -> int:
        """Forward passes for each image; with the loss `kl` one less where the caller gives the clean logits."""
        last = self.restarts if self.keep == "best" else 0
        return self.steps * self.restarts + last + find_loss(self.loss).against_clean

    @property
    def backward_passes(self) -> int:
        """Backward passes for each image."""
        return self.steps * self.restarts

    def describe(self) -> str:
        """Return one line with everything that decides the attack's strength."""
        parts = [
            f"pgd-{self.steps}",
            str(self.threat),
            f"step {pixels_text(self.step)}",
            f"{self.restarts} restart{'s' if self.restarts > 1 else ''}",
            f"{self.keep} iterate",
        ]
        if self.loss != "ce":
            parts.append(f"loss {self.loss}")
        if not self.random_start:
            parts.append("from the clean image")
        return ", ".join(parts)

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        clean: Tensor | None = None,
    ) -> Tensor:
        """Return adversarial images for `x`.

        `forward`: images -> logits [n, classes]; its modes are the caller's business, and no parameter's gradient is
        computed. `x`: float32 or float64 [n, ...] in [0, 1], not normalized; `y`: integer labels [n]. Returns the
        shape, dtype and memory format of `x`, inside ball and box. `generator` makes the random starts; None stands
        for a fresh one that is the same on every call, so repeated calls draw the same starts. `clean` are the logits
        at `x` for the loss `kl`, computed here if absent. Works under `torch.no_grad()` and `torch.inference_mode()`;
        inside the loop nothing waits for the device.

        Raises `UserError` for images outside [0, 1] and for a forward without a gradient.
        """
        x, y = prepare(x, y)
        if x.numel() == 0:
            return x.clone()
        generator = own_generator(x, generator)
        loss = find_loss(self.loss)
        with differentiating():
            if loss.against_clean and clean is None:
                with torch.no_grad():
                    clean = forward(x)
            if clean is not None:
                clean = usable(clean.detach())
            objective = partial(loss, y=y, clean=clean)
            best = Best(x, y)
            last = x
            for _ in range(self.restarts):
                start = self.threat.random_start(x, generator) if self.random_start else x.clone()
                last = self._climb(forward, x, start, objective, best)
        return (best.x if self.keep == "best" else last).detach()

    def _climb(self, forward: Forward, x: Tensor, x_adv: Tensor, objective: Objective, best: Best) -> Tensor:
        """Take all steps from one start; tell `best` about every iterate; return the last."""
        project = self.threat.projector(x)
        for _ in range(self.steps):
            logits, losses, slope = gradient(forward, x_adv, objective)
            if self.keep == "best":
                best.update(x_adv, logits, losses)
            x_adv = project(self.threat.ascend(x_adv, slope, self.step))
        if self.keep == "best":
            best.update(x_adv, *score(forward, x_adv, objective))
        return x_adv
