"""Learning-rate schedules: a factor of the base rate as a function of progress, applied to every parameter group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from robustlayers.core.errors import UserError, one_of

__all__ = ["SCHEDULES", "Schedule"]

SCHEDULES = ("constant", "cosine", "cyclic", "linear", "one-cycle", "piecewise")


@dataclass(frozen=True)
class Schedule:
    """The factor of the learning rate at progress t in [0, 1] of a phase.

    `constant` 1; `cosine` (1 + cos(pi t)) / 2; `linear` 1 - t; `one-cycle` rises linearly from 0 to 1 at t = `peak`, then
    falls linearly to 0; `cyclic` is `cycles` of these one after the other, each with its peak at the fraction `peak` of
    it; `piecewise` multiplies by `factor` at each of the `milestones`. With `warmup` w > 0 every schedule is multiplied
    by min(1, t / w). Rice et al. 2020 use piecewise at 1/2 and 3/4 with factor 0.1; their cyclic, which is that of Wong
    et al. 2020, is one cycle with its peak at 0.4.

    Raises `UserError` for an unknown name and for a number out of its range.

    >>> [round(Schedule("piecewise", milestones=(0.5,)).factor_at(t), 3) for t in (0.0, 0.49, 0.5)]
    [1.0, 1.0, 0.1]
    >>> [round(Schedule("cyclic", cycles=2, peak=0.5).factor_at(t), 3) for t in (0.0, 0.25, 0.5, 0.625)]
    [0.0, 1.0, 0.0, 0.5]
    """

    name: str = "constant"
    milestones: Sequence[float] = (0.5, 0.75)
    factor: float = 0.1
    peak: float = 0.4
    warmup: float = 0.0
    cycles: int = 1

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise UserError(one_of("schedule", self.name, SCHEDULES))
        rules = [
            (f"milestones {list(self.milestones)}", all(0 < t < 1 for t in self.milestones), "numbers between 0 and 1"),
            (f"factor {self.factor}", 0 < self.factor <= 1, "more than 0, at most 1"),
            (f"peak {self.peak}", 0 < self.peak < 1, "a number between 0 and 1"),
            (f"warmup {self.warmup}", 0 <= self.warmup < 1, "from 0 to less than 1"),
            (f"cycles {self.cycles}", type(self.cycles) is int and self.cycles >= 1, "a whole number of at least 1"),
        ]
        for what, fits, allowed in rules:
            if not fits:
                raise UserError(f"schedule: {what}; allowed: {allowed}")

    def __str__(self) -> str:
        extra = []
        if self.name == "piecewise":
            extra.append(f"x {self.factor:g} at {', '.join(f'{t:g}' for t in self.milestones)}")
        if self.name == "cyclic":
            extra.append("1 cycle" if self.cycles == 1 else f"{self.cycles} cycles")
        if self.name in ("cyclic", "one-cycle"):
            extra.append(f"peak at {self.peak:g}")
        if self.warmup:
            extra.append(f"warm-up {self.warmup:g}")
        return f"{self.name} ({'; '.join(extra)})" if extra else self.name

    def factor_at(self, t: float) -> float:
        """Return the factor at progress t."""
        value = 1.0
        if self.name == "cosine":
            value = (1 + math.cos(math.pi * t)) / 2
        elif self.name == "linear":
            value = 1 - t
        elif self.name in ("cyclic", "one-cycle"):
            u = t * self.cycles % 1.0 if self.name == "cyclic" else t
            value = u / self.peak if u < self.peak else (1 - u) / (1 - self.peak)
        elif self.name == "piecewise":
            value = self.factor ** sum(t >= milestone for milestone in self.milestones)
        return value * min(1.0, t / self.warmup) if self.warmup > 0 else value

    def factor_of(self, step: int, steps: int) -> float:
        """Return the factor of step `step` of `steps` (from 0).

        A schedule that rises from zero takes the factor in the middle of the step, so that the first step is not lost.
        (With several cycles a step is lost only where a cycle ends in its very middle.)
        """
        rises = self.name in ("cyclic", "one-cycle") or self.warmup > 0
        return self.factor_at((step + 0.5) / max(1, steps) if rises else step / max(1, steps))

    def apply(self, optimizer: torch.optim.Optimizer, step: int, steps: int) -> float:
        """Set the rate of step `step` of `steps` (from 0) in all parameter groups; return this schedule's factor.

        lr = base_lr * factor * rate in each group, by the group's own `schedule` where it has one, and with its layer
        rate `rate` where it has one.
        """
        factor = self.factor_of(step, steps)
        for group in optimizer.param_groups:
            own: Schedule | None = group.get("schedule")
            group["lr"] = group["base_lr"] * (factor if own is None else own.factor_of(step, steps))
            if "rate" in group:
                group["lr"] *= group["rate"]
        return factor
