"""Projected gradient descent, the field's standard attack, with per-image best iterate and nested restarts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustlayers.attacks._ascent import Best, Forward, count, differentiating, flag, prepare, step_length, usable
from robustlayers.attacks._climb import climb
from robustlayers.attacks._draws import Generators, normal, own_generator
from robustlayers.attacks._goal import make_goal
from robustlayers.attacks._identity import identity_of, later
from robustlayers.attacks.losses import find_loss
from robustlayers.attacks.threat import Threat
from robustlayers.core.errors import UserError, one_of
from robustlayers.core.quantities import number, pixels_text

__all__ = ["PGD"]

KEEPS = ("best", "last")
STARTS = ("uniform", "gaussian")

GAUSSIAN = 0.001  # standard deviation of the start of Zhang et al. 2019


@dataclass(frozen=True)
class PGD:
    """Steepest ascent on a loss in ball and box: x' <- P(x' + step * direction), `steps` times, from a random start.

    The direction is the sign of the gradient (linf), the normalized gradient (l2), or as in `threat.ascend` (l1); P is
    `threat.project` (Madry et al. 2018, section 2.1).

    `step_size` is in pixel units and may be written `2/255`; None means 2.5 eps / steps in linf and l1, which reaches
    the ball's boundary from any start (Madry et al. 2018), and 4 eps / steps in l2: there a random start lies near the
    boundary and has to be turned along it, and a path of 2.5 eps ends 2 to 5 % short of a linear model's optimum.

    `loss` is `ce`, `margin`, `dlr` or `kl`. `keep="best"` returns, for each image, the best of all iterates of all
    restarts, the last one included: misclassified before not, then the higher loss; this costs one more forward for
    each restart. `keep="last"` returns the last iterate. Restarts are nested: the first r of r + 1 restarts see the
    draws of a run with r, so accuracy never rises with restarts.

    `start` is where a random start comes from: `uniform` in the ball, or `gaussian`, the image with noise of standard
    deviation 0.001 (Zhang et al. 2019, for the loss `kl`). With `momentum` m, the direction is that of v <- m v +
    gradient / mean |gradient|; see `MIM`. With `early_exit`, an image takes no part in further steps and restarts once
    it is clearly broken, and that iterate is returned: as many images are broken, at a lower cost on a weak model.

    Cost: `steps` forwards and backwards for each restart, and one forward more with `keep="best"`. Too weak to measure
    with where its steps are few (below 20) or its only restart is unlucky, and where gradients are masked: then its
    accuracy is above that of a black-box attack such as `Square`, or does not fall to 0 at a large eps.

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
    start: str = later("uniform")
    momentum: float = later(0.0)
    early_exit: bool = later(False)

    def __post_init__(self) -> None:
        count("steps", self.steps, 0)
        count("restarts", self.restarts, 1)
        flag("random_start", self.random_start)
        if self.step_size is not None:
            object.__setattr__(self, "step_size", step_length(self.step_size, self.threat))
        if self.keep not in KEEPS:
            raise UserError(one_of("iterate to keep", str(self.keep), KEEPS))
        if self.restarts > 1 and not self.random_start:
            raise UserError("restarts: several restarts without random_start are all the same; use restarts=1")
        if self.restarts > 1 and self.keep == "last":
            raise UserError('restarts: several restarts need keep="best"; keep="last" would throw all but one away')
        if find_loss(self.loss).against_clean and not self.random_start:
            raise UserError(f"loss {self.loss}: its gradient is zero at the clean image; use random_start")
        if self.start not in STARTS:
            raise UserError(one_of("start of an attack", str(self.start), STARTS))
        if self.start != "uniform" and not self.random_start:
            raise UserError(f"start: {self.start} is a random start; it needs random_start")
        object.__setattr__(self, "momentum", number(self.momentum, "momentum"))
        if self.momentum < 0:
            raise UserError(f"momentum: {self.momentum} is not allowed; allowed: 0 or more")
        flag("early_exit", self.early_exit)
        if self.early_exit and self.keep == "last":
            raise UserError('early_exit: needs keep="best"; with keep="last" no iterate is looked at')

    @property
    def step(self) -> float:
        """Length of a step in pixel units."""
        if self.step_size is None:
            path = 4.0 if self.threat.norm == "l2" else 2.5
            return path * self.threat.eps / max(1, self.steps)
        return float(self.step_size)

    @property
    def forward_passes(self) -> int:
        """Forward passes for each image; with the loss `kl` one less where the caller gives the clean logits.

        With `early_exit` the most that an image can cost; one that is broken costs less.
        """
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
        if self.start != "uniform":
            parts.append(f"{self.start} start")
        if self.momentum:
            parts.append(f"momentum {self.momentum:g}")
        if self.early_exit:
            parts.append("stops when broken")
        return ", ".join(parts)

    def identity(self) -> dict[str, Any]:
        """Return what decides the attack as plain data, the step as a number; later options only where used."""
        return identity_of(self, {"step_size": self.step})

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        *,
        generator: Generators | None = None,
        clean: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """Return adversarial images for `x`.

        `forward`: images -> logits [n, classes]; its modes are the caller's business (a net in train mode moves its running
        statistics; `with guard(net), inference(net):` around the call leaves no trace), and no parameter's gradient is
        computed. `x`: float32 or float64 [n, ...] in [0, 1], not normalized; `y`: integer labels [n]. Returns the
        shape, dtype and memory format of `x`, inside ball and box. `generator` makes the random starts, one for the
        batch or a sequence with one for each image; None stands for a fresh one that is the same on every call, so
        repeated calls draw the same starts. `clean` are the logits at `x` for the loss `kl`, computed here if absent.
        `target`: a class for each image, integers [n]; then an image is broken where it is predicted as that class, and
        the loss leads there: `ce` is log softmax(z)_t, `margin` is z_t minus the largest other logit, `dlr` the
        targeted one. Works under `torch.no_grad()` and `torch.inference_mode()`; inside the loop nothing waits for the
        device, unless images exit early.

        Raises `UserError` for images outside [0, 1] and for a forward without a gradient.
        """
        x, y = prepare(x, y)
        if x.numel() == 0:
            return x.clone()
        generator = own_generator(x, generator)
        with differentiating():
            if find_loss(self.loss).against_clean and clean is None and target is None:
                with torch.no_grad():
                    clean = forward(x)
            goal = make_goal(self.loss, y, target, None if clean is None else usable(clean.detach()))
            best = Best(x, stop=self.early_exit) if self.keep == "best" else None
            options = {"steps": self.steps, "step_size": self.step, "momentum": self.momentum, "best": best}
            last = x
            for _ in range(self.restarts):
                start = self._start(x, generator)
                if best is None or not self.early_exit:
                    last = climb(forward, self.threat, goal, x, start, **options)
                    continue
                rows = best.standing()
                if not len(rows):
                    break
                climb(forward, self.threat, goal.take(rows), x[rows], start[rows], rows=rows, **options)
        return (last if best is None else best.x).detach()

    def _start(self, x: Tensor, generator: Generators) -> Tensor:
        if not self.random_start:
            return x.clone()
        if self.start == "gaussian":
            return self.threat.project(x + GAUSSIAN * normal(x.shape, generator, x.dtype).to(x.device), x)
        return self.threat.random_start(x, generator)
