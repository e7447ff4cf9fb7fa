"""Learning-rate schedules: a factor of the base rate as a function of progress, applied to every parameter group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from robustlayers.core.errors import UserError, one_of

__all__ = ["SCHEDULES", "Schedule"]

SCHEDULES = ("constant", "cosine", "linear", "one-cycle", "piecewise")


@dataclass(frozen=True)
class Schedule:
    """The factor of the learning rate at progress t in [0, 1] of a phase.

    `constant` 1; `cosine` (1 + cos(pi t)) / 2; `linear` 1 - t; `one-cycle` rises linearly from 0 to 1 at t = `peak`, then
    falls linearly to 0; `piecewise` multiplies by `factor` at each of the `milestones`. With `warmup` w > 0 every schedule
    is multiplied by min(1, t / w). Rice et al. 2020 use piecewise at 1/2 and 3/4 with factor 0.1.

    >>> [round(Schedule("piecewise", milestones=(0.5,)).factor_at(t), 3) for t in (0.0, 0.49, 0.5)]
    [1.0, 1.0, 0.1]
    """

    name: str = "constant"
    milestones: Sequence[float] = (0.5, 0.75)
    factor: float = 0.1
    peak: float = 0.4
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise UserError(one_of("schedule", self.name, SCHEDULES))

    def factor_at(self, t: float) -> float:
        """Return the factor at progress t."""
        value = 1.0
        if self.name == "cosine":
            value = (1 + math.cos(math.pi * t)) / 2
        elif self.name == "linear":
            value = 1 - t
        elif self.name == "one-cycle":
            value = t / self.peak if t < self.peak else (1 - t) / (1 - self.peak)
        elif self.name == "piecewise":
            value = self.factor ** sum(t >= milestone for milestone in self.milestones)
        return value * min(1.0, t / self.warmup) if self.warmup > 0 else value

    def apply(self, optimizer: torch.optim.Optimizer, step: int, steps: int) -> float:
        """Set the rate of step `step` of `steps` (from 0) in all parameter groups; return the factor.

        The first step of a schedule that rises from zero takes the rate of the middle of its interval, so no step is lost.
        """
        factor = self.factor_at(
            (step + 0.5) / max(1, steps) if self.name in ("one-cycle",) or self.warmup else step / max(1, steps)
        )
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        return factor
