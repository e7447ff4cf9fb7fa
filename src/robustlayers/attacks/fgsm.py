"""The fast gradient sign method: one step of full length from the clean image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from robustlayers.attacks._ascent import Forward, differentiating, gradient, prepare
from robustlayers.attacks.losses import find_loss
from robustlayers.attacks.threat import Threat
from robustlayers.core.errors import UserError

__all__ = ["FGSM"]


@dataclass(frozen=True)
class FGSM:
    """One step of length eps from x: x' = P(x + eps sign(gradient)) for linf (Goodfellow et al. 2015, section 4).

    For l2 the step goes along the normalized gradient. `loss` is `ce`, `margin` or `dlr`. Nothing is random.

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

    def __call__(self, forward: Forward, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return adversarial images for `x`, as `PGD` does; `generator` is not drawn from."""
        x, y = prepare(x, y)
        if x.numel() == 0:
            return x.clone()
        with differentiating():
            _, _, slope = gradient(forward, x, partial(find_loss(self.loss), y=y))
            return self.threat.project(self.threat.ascend(x, slope, self.threat.eps), x)
