"""What steps and epochs cost and saw: one log for each step, counted step by step, told at the end of the epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["EpochLog", "StepLog", "Tally"]


@dataclass
class StepLog:
    """What one step saw; tensors stay on the device, so that reading them is the caller's choice of a wait."""

    losses: dict[str, Tensor] = field(default_factory=dict)  # objective -> scalar
    correct: dict[str, Tensor] = field(default_factory=dict)  # pass -> number of right answers; of log after the update
    size: int = 0
    forward_passes: int = 0  # of the whole batch
    backward_passes: int = 0

    @property
    def loss(self) -> Tensor:
        """Sum of the losses of all objectives."""
        return torch.stack(list(self.losses.values())).sum() if self.losses else torch.zeros(())


@dataclass(frozen=True)
class EpochLog:
    """What one epoch cost and saw."""

    epoch: int  # from 1, over all phases
    loss: float  # mean over images of the sum of all objectives
    seconds: float
    forward_passes: int  # of single images
    backward_passes: int


@dataclass
class Tally:
    """What was seen and spent so far: of the epoch under way, and `learned` of the whole phase."""

    loss: float = 0.0
    images: int = 0
    forward: int = 0
    backward: int = 0
    learned: dict[str, int] = field(default_factory=dict)  # group -> backward passes that its gradient was taken from

    def add(self, log: StepLog, learned: Mapping[str, int], *, images: bool = True) -> None:
        """Count a step; of one that only measures, the images do not count."""
        self.images += log.size if images else 0
        self.forward += log.forward_passes * log.size
        self.backward += log.backward_passes * log.size
        for group, count in learned.items():
            self.learned[group] = self.learned.get(group, 0) + count * log.size
