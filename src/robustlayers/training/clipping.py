"""Gradient clipping: a bound on the norm of the gradient, of all groups together or of one group alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from robustlayers.core.errors import UserError, one_of
from robustlayers.training.optimizers import OptimizerSettings

__all__ = ["clip_gradients"]


def clip_gradients(
    gradients: Mapping[str, Tensor], owner: Mapping[str, str], settings: OptimizerSettings
) -> dict[str, Tensor]:
    """Return the gradients of one step, scaled down where their norm is above its bound.

    A group with a clip c of its own is scaled by min(1, c / (norm + 1e-6)), its norm being the L2 norm of the gradients
    of all its tensors; all other groups together are scaled by the same rule with the settings' `clip`. This is the rule
    of `torch.nn.utils.clip_grad_norm_`. Nothing is read back from the device, and the given tensors stay as they are;
    those without a bound are returned as they came.

    Args:
        gradients: tensor name -> gradient; tensors that get none in this step are left out.
        owner: tensor name -> group, as `owners` tells of an optimizer.
        settings: the bounds.

    Raises:
        UserError: a gradient of a tensor without an owner.

    >>> settings = OptimizerSettings(clip=1.0)
    >>> clipped = clip_gradients({"w": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}, {"w": "g", "b": "g"}, settings)
    >>> [round(float(tensor.norm()), 3) for tensor in clipped.values()]
    [0.6, 0.8]
    """
    sets: dict[str | None, list[str]] = {}
    for name in gradients:
        if name not in owner:
            raise UserError(one_of("tensor of the optimizer", name, owner))
        own = settings.groups.get(owner[name])
        alone = own is not None and own.clip is not None
        sets.setdefault(owner[name] if alone else None, []).append(name)
    clipped = dict(gradients)
    for group, names in sets.items():
        bound = settings.clip if group is None else settings.groups[group].clip
        if bound is None:
            continue
        norm = torch.nn.utils.get_total_norm([gradients[name] for name in names])
        # Multiplied also where it is 1: to look would make the device wait.
        factor = torch.clamp(bound / (norm + 1e-6), max=1.0)
        clipped |= {name: gradients[name] * factor.to(gradients[name].device) for name in names}
    return clipped
