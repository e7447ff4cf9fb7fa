"""Divergence: a loss or a tensor that stopped being finite ends a training, with a text that says which and when."""

from __future__ import annotations

import torch
from torch import nn

from robustlayers.training.tally import StepLog

__all__ = ["Diverged", "check_finite", "finite_loss"]


class Diverged(Exception):
    """The loss or a tensor stopped being finite; the text says which and at which step."""


def finite_loss(log: StepLog, epoch: int, step: int) -> float:
    """Return the sum over the images of a step's losses, or raise `Diverged`; epoch and step count from 0.

    This reads tensors, so that an accelerator is waited for.

    >>> finite_loss(StepLog({"natural": torch.tensor(0.5), "adversarial": torch.tensor(1.5)}, size=8), 0, 0)
    16.0
    """
    for name, loss in log.losses.items():
        if not bool(torch.isfinite(loss)):
            raise Diverged(f"the {name} loss is {loss.item()} at epoch {epoch + 1}, step {step + 1}")
    return float(log.loss) * log.size


def check_finite(model: nn.Module, epoch: int) -> None:
    """Raise `Diverged` for a tensor of the model that is not finite after an epoch, counted from 0."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise Diverged(f"{name} is not finite after epoch {epoch + 1}")
