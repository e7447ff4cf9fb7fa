"""Attacks of a single step: the fast gradient sign method, from the image, from the ball, and from noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustlayers.attacks._ascent import Forward, differentiating, flag, gradient, prepare, step_length
from robustlayers.attacks._draws import Generators, own_generator
from robustlayers.attacks._goal import make_goal
from robustlayers.attacks._identity import identity_of
from robustlayers.attacks.losses import find_loss
from robustlayers.attacks.threat import Threat
from robustlayers.core.errors import UserError
from robustlayers.core.quantities import number, pixels_text

__all__ = ["FGSM", "NFGSM", "RFGSM"]


@dataclass(frozen=True)
class FGSM:
    """One step of length eps from x: x' = P(x + eps sign(gradient)) for linf (Goodfellow et al. 2015, section 4).

    For l2 the step goes along the normalized gradient. `loss` is `ce`, `margin` or `dlr`. Nothing is random.

    Cost: 1 forward, 1 backward. Too weak to measure with: it follows the gradient at the image only, and a model that
    was trained with single steps may mask it there (catastrophic overfitting); compare with PGD.

    >>> FGSM(Threat("linf", "8/255")).describe()
    'fgsm, linf 8/255'
    """

    threat: Threat
    loss: str = "ce"

    def __post_init__(self) -> None:
        if find_loss(self.loss).against_clean:
            raise UserError(f"loss {self.loss}: its gradient is zero at the clean image, where fgsm takes it")

    @property
    def forward_passes(self) -> int:
        """Forward passes for each image."""
        return 1

    @property
    def backward_passes(self) -> int:
        """Backward passes for each image."""
        return 1

    def describe(self) -> str:
        """Return one line with everything that decides the attack's strength."""
        return f"fgsm, {self.threat}" + (f", loss {self.loss}" if self.loss != "ce" else "")

    def identity(self) -> dict[str, Any]:
        """Return what decides the attack as plain data."""
        return identity_of(self)

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        *,
        generator: Generators | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """Return adversarial images for `x`, as `PGD` does; `generator` is not drawn from."""
        x, y = prepare(x, y)
        if x.numel() == 0:
            return x.clone()
        goal = make_goal(self.loss, y, target)
        with differentiating():
            _, _, slope = gradient(forward, x, goal.losses)
            return self.threat.project(self.threat.ascend(x, slope, self.threat.eps), x)


@dataclass(frozen=True)
class RFGSM:
    """One step from a uniform point of the ball: x' = P(x0 + step * direction) (Wong et al. 2020, algorithm 3).

    Called RS-FGSM, FGSM-RS or fast FGSM as well. `step_size` is in pixel units, None means the paper's 1.25 eps. The
    direction and the start are those of `PGD`; `loss` is `ce`, `margin` or `dlr`. Not the R+FGSM of Tramer et al. 2018.

    Cost: 1 forward, 1 backward. Too weak to measure with: most pixels end inside the ball, not on its boundary. In
    training, larger eps and longer runs end in catastrophic overfitting (Andriushchenko & Flammarion 2020).

    Raises `UserError` for values that are not allowed.

    >>> RFGSM(Threat("linf", "8/255")).describe()
    'r-fgsm, linf 8/255, step 10/255'
    """

    threat: Threat
    step_size: float | str | None = None
    loss: str = "ce"

    def __post_init__(self) -> None:
        _check_step(self)

    @property
    def step(self) -> float:
        """Length of the step in pixel units."""
        return 1.25 * self.threat.eps if self.step_size is None else float(self.step_size)

    @property
    def forward_passes(self) -> int:
        """Forward passes for each image."""
        return 1

    @property
    def backward_passes(self) -> int:
        """Backward passes for each image."""
        return 1

    def describe(self) -> str:
        """Return one line with everything that decides the attack's strength."""
        loss = f", loss {self.loss}" if self.loss != "ce" else ""
        return f"r-fgsm, {self.threat}, step {pixels_text(self.step)}{loss}"

    def identity(self) -> dict[str, Any]:
        """Return what decides the attack as plain data."""
        return identity_of(self, {"step_size": self.step})

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        *,
        generator: Generators | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """Return adversarial images for `x`, as `PGD` does."""
        x, y = prepare(x, y)
        if x.numel() == 0:
            return x.clone()
        goal = make_goal(self.loss, y, target)
        generator = own_generator(x, generator)
        with differentiating():
            start = self.threat.random_start(x, generator)
            _, _, slope = gradient(forward, start, goal.losses)
            return self.threat.project(self.threat.ascend(start, slope, self.step), x)


@dataclass(frozen=True)
class NFGSM:
    """One step from an image with strong noise: x' = x + u + step * direction, u uniform (de Jorge et al. 2022).

    u is drawn from the ball of radius `noise` * eps, 2 eps by default; `step_size` None means eps. The paper trains on
    x' as it is, up to (noise + 1) eps from x, and finds that projecting it back brings catastrophic overfitting back:
    that is `project=False`, kept in the box [0, 1] alone, for training. It is outside of the threat, so an evaluation
    refuses it. The default projects onto the ball.

    Cost: 1 forward, 1 backward. Too weak to measure with: a single step from a point that noise chose.

    Raises `UserError` for values that are not allowed.

    >>> NFGSM(Threat("linf", "8/255"), project=False).describe()
    'n-fgsm, linf 8/255, noise 16/255, step 8/255, not projected'
    """

    threat: Threat
    noise: float = 2.0
    step_size: float | str | None = None
    loss: str = "ce"
    project: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise", number(self.noise, "noise"))
        if self.noise < 0:
            raise UserError(f"noise: {self.noise} is not allowed; allowed: 0 or more, in units of eps")
        flag("project", self.project)
        _check_step(self)

    @property
    def step(self) -> float:
        """Length of the step in pixel units."""
        return self.threat.eps if self.step_size is None else float(self.step_size)

    @property
    def forward_passes(self) -> int:
        """Forward passes for each image."""
        return 1

    @property
    def backward_passes(self) -> int:
        """Backward passes for each image."""
        return 1

    def describe(self) -> str:
        """Return one line with everything that decides the attack's strength."""
        loss = f", loss {self.loss}" if self.loss != "ce" else ""
        noise = f"noise {pixels_text(self.noise * self.threat.eps)}, step {pixels_text(self.step)}"
        return f"n-fgsm, {self.threat}, {noise}{loss}" + ("" if self.project else ", not projected")

    def identity(self) -> dict[str, Any]:
        """Return what decides the attack as plain data."""
        return identity_of(self, {"step_size": self.step})

    def __call__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        *,
        generator: Generators | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """Return adversarial images for `x`, as `PGD` does, except that without `project` they may leave the ball."""
        x, y = prepare(x, y)
        if x.numel() == 0:
            return x.clone()
        goal = make_goal(self.loss, y, target)
        around = Threat(self.threat.norm, self.noise * self.threat.eps)
        generator = own_generator(x, generator)
        with differentiating():
            start = around.random_start(x, generator)
            _, _, slope = gradient(forward, start, goal.losses)
            x_adv = self.threat.ascend(start, slope, self.step)
            return self.threat.project(x_adv, x) if self.project else torch.clamp(x_adv, 0, 1)


def _check_step(attack: RFGSM | NFGSM) -> None:
    """Check the options that attacks from a random point share, and make the step a number."""
    if attack.step_size is not None:
        object.__setattr__(attack, "step_size", step_length(attack.step_size, attack.threat))
    if find_loss(attack.loss).against_clean:
        raise UserError(f"loss {attack.loss}: not offered for an attack of one step; allowed: ce, dlr, margin")
