"""The momentum iterative method: ascent along an average of past gradients, which transfers better between models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robustlayers.attacks._ascent import Best, Forward, count, differentiating, prepare, step_length
from robustlayers.attacks._climb import climb
from robustlayers.attacks._draws import Generators
from robustlayers.attacks._goal import make_goal
from robustlayers.attacks._identity import identity_of
from robustlayers.attacks.losses import find_loss
from robustlayers.attacks.threat import Threat
from robustlayers.core.errors import UserError
from robustlayers.core.quantities import number, pixels_text

__all__ = ["MIM"]


@dataclass(frozen=True)
class MIM:
    """From x, `steps` times v <- decay v + gradient / |gradient|_1, x' <- P(x' + step * direction of v).

    Also called MI-FGSM (Dong et al. 2018, algorithm 1). `step_size` is in pixel units, None means eps / steps, so that
    the path is just as long as the ball is wide. `loss` is `ce`, `margin` or `dlr`. The best iterate is returned:
    misclassified before not, then the higher loss. Nothing is random.

    Cost: steps + 1 forwards, `steps` backwards. Too weak to measure with: it starts at the image, does not restart, and
    momentum that helps to transfer overshoots on the model itself; use it as the attack of `Transfer`.

    Raises `UserError` for values that are not allowed.

    >>> MIM(Threat("linf", "8/255"), steps=10).describe()
    'mim-10, linf 8/255, step 0.8/255, decay 1, best iterate'
    """

    threat: Threat
    steps: int = 10
    step_size: float | str | None = None
    decay: float = 1.0
    loss: str = "ce"

    def __post_init__(self) -> None:
        count("steps", self.steps, 1)
        if self.step_size is not None:
            object.__setattr__(self, "step_size", step_length(self.step_size, self.threat))
        object.__setattr__(self, "decay", number(self.decay, "decay"))
        if self.decay <= 0:
            raise UserError(f"decay: {self.decay} is not allowed; allowed: more than 0; without momentum it is pgd")
        if find_loss(self.loss).against_clean:
            raise UserError(f"loss {self.loss}: its gradient is zero at the clean image, where mim starts")

    @property
    def step(self) -> float:
        """Length of a step in pixel units."""
        return self.threat.eps / self.steps if self.step_size is None else float(self.step_size)

    @property
    def forward_passes(self) -> int:
        """Forward passes for each image."""
        return self.steps + 1

    @property
    def backward_passes(self) -> int:
        """Backward passes for each image."""
        return self.steps

    def describe(self) -> str:
        """Return one line with everything that decides the attack's strength."""
        loss = f", loss {self.loss}" if self.loss != "ce" else ""
        step = f"step {pixels_text(self.step)}, decay {self.decay:g}"
        return f"mim-{self.steps}, {self.threat}, {step}, best iterate{loss}"

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
        """Return adversarial images for `x`, as `PGD` does; `generator` is not drawn from."""
        x, y = prepare(x, y)
        if x.numel() == 0:
            return x.clone()
        goal = make_goal(self.loss, y, target)
        options = {"steps": self.steps, "step_size": self.step, "momentum": self.decay}
        best = Best(x)
        with differentiating():
            climb(forward, self.threat, goal, x, x.clone(), best=best, **options)
        return best.x.detach()
