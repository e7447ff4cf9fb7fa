"""What an attack is after, for each image of a batch: which loss it raises, and when the image counts as broken."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustlayers.attacks.losses import Loss, find_loss, is_correct, margin
from robustlayers.core.errors import UserError

__all__ = ["Goal", "make_goal"]

_CLEAR = 1e-4  # of the largest logit: the rounding of another batch size or an equivalent forward is far below


@dataclass(frozen=True)
class Goal:
    """A loss with what it is measured against: labels [n], logits of the clean images, or target classes [n].

    An image is broken where its prediction is not its label; with `reach`, where its prediction is its target.
    """

    loss: Loss
    y: Tensor
    clean: Tensor | None = None
    target: Tensor | None = None
    reach: bool = False

    def losses(self, logits: Tensor) -> Tensor:
        """Return one loss per image, higher is better for the attacker."""
        return self.loss(logits, self.y, self.clean, self.target)

    def broken(self, logits: Tensor) -> Tensor:
        """Return which images have reached the goal."""
        if self.reach and self.target is not None:
            return is_correct(logits, self.target)
        return ~is_correct(logits, self.y)

    def settled(self, logits: Tensor) -> Tensor:
        """Return which images have reached the goal so clearly that rounding cannot undo it; they may be left alone."""
        wanted = self.target if self.reach and self.target is not None else None
        ahead = margin(logits, self.y) if wanted is None else -margin(logits, wanted)
        return self.broken(logits) & (ahead > _CLEAR * logits.abs().amax(1))

    def take(self, places: Tensor) -> Goal:
        """Return the goal for some images of the batch."""
        clean, target = (None if part is None else part[places] for part in (self.clean, self.target))
        return replace(self, y=self.y[places], clean=clean, target=target)


def make_goal(loss: str, y: Tensor, target: Tensor | None = None, clean: Tensor | None = None) -> Goal:
    """Return the goal to leave the label, or to reach a `target` class for each image.

    Raises `UserError` for targets that are not one class for each image, or are its label, and for a loss that knows
    no target.
    """
    found = find_loss(loss)
    if target is None:
        return Goal(found, y, clean)
    if target.shape != y.shape or target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise UserError(
            f"target: one class for each image; got {target.dtype} {list(target.shape)} for {len(y)} images"
        )
    if found.toward is None:
        raise UserError(f"loss {loss}: knows no target class")
    target = target.detach().to(y.device).long()
    if bool((target == y).any()):
        raise UserError("target: the label of an image cannot be its target; give another class")
    return Goal(found, y, None, target, reach=True)
