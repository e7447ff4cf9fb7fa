"""Transfer: adversarial images that were crafted on one model, measured on another, for every pair of some models."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from robustlayers.attacks import Attack
from robustlayers.core.errors import UserError
from robustlayers.evaluation._cross import CrossTable, View, cross
from robustlayers.evaluation._still import Forward
from robustlayers.evaluation.accuracy import Progress

__all__ = ["CrossTable", "transfer"]


def transfer(
    models: Mapping[str, Forward],
    x: Tensor,
    y: Tensor,
    attack: Attack,
    batch_size: int = 500,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> CrossTable:
    """Return the accuracies of all models under images crafted on each of them: crafted on row, measured on column.

    `models`: by name, `nn.Module`s (held in evaluation mode, left without a trace) or functions from images to logits.
    `x`: images [n, c, h, w], uint8 or floats in [0, 1]; `y`: labels [n]. An image counts as right where the measured
    model is right on it clean and as crafted; all images are attacked, also those that the source gets wrong. All rows
    see the same random draws, so the diagonal is that of `accuracy` with other draws. Every output is checked against
    the attack's threat. Cost for k models: k runs of the attack, and k^2 + k forwards for each image.

    A column whose smallest number is not on the diagonal is a sign of masked gradients (`CrossTable.worst`).

    Raises `UserError` as `accuracy` does, and for no model.

    Source: Papernot et al. 2017 (transfer as a black-box attack); Athalye et al. 2018, section 3.1 (as a sign).
    """
    if not models:
        raise UserError("models: there is none; give one or more by name")
    return cross({name: View(model) for name, model in models.items()}, x, y, attack, batch_size, seed, progress)
