"""The gradients of a step from its logits: one backward pass for each objective, for the tensors alone that learn from it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from robustlayers.training.ascent import stationary
from robustlayers.training.binding import Binding, Shares
from robustlayers.training.objectives import Objective
from robustlayers.training.tally import StepLog

__all__ = ["differentiate"]


def differentiate(
    binding: Binding,
    shares: Shares,
    logits: Mapping[str, Tensor],
    y: Tensor,
    tensors: Mapping[str, Tensor],
    log: StepLog,
    *,
    at_rest: bool = True,
    limit: float | None = None,
) -> dict[str, Tensor]:
    """Return the gradient of each tensor that has one, by name: over objectives o and groups G that learn from them

        g = sum_o sum_G w_oG m_G dL_o/dtheta

    with the weights w and masks m of `shares`. The tensors' `requires_grad` is switched on where a gradient is taken.

    Args:
        binding: whose objectives are differentiated, those of the shares.
        shares: what each objective trains.
        logits: by pass, [n, classes], each with its graph, which is spent.
        y: labels [n].
        tensors: the model's parameters by name.
        log: counts backward passes, and keeps the first losses that it is told.
        at_rest: whether the weights are as they are, of which the log is to tell.
        limit: only samples whose loss is below it count, as in an ascent that leaves out what has been perturbed enough.
    """
    gradients: dict[str, Tensor] = {}
    for place, objective in enumerate(binding.objectives):
        loss = _loss(objective, logits, y, limit)
        if at_rest and objective.name not in log.losses:
            log.losses[objective.name] = (loss if limit is None else objective.loss(logits, y)).detach()
        wanted = shares[objective.name]
        if not wanted or not loss.requires_grad:  # only buffers learn from it, or what is not used in the forward
            continue
        for name in wanted:  # another pass may have switched it off since the forward
            tensors[name].requires_grad_(True)
        found = torch.autograd.grad(
            loss, [tensors[name] for name in wanted], retain_graph=_read_again(binding, place), allow_unused=True
        )
        log.backward_passes += 1
        for name, gradient in zip(wanted, found, strict=True):
            if gradient is None:
                continue
            for weight, mask in wanted[name]:
                part = gradient if weight == 1.0 else gradient * weight
                if mask is not None:
                    part = part * mask
                gradients[name] = gradients[name] + part if name in gradients else part
    return {name: gradient.detach() for name, gradient in gradients.items()}


def _loss(objective: Objective, logits: Mapping[str, Tensor], y: Tensor, limit: float | None) -> Tensor:
    if limit is None:
        return objective.loss(logits, y)
    stays = stationary(logits[objective.passes[-1]].detach(), y, limit)
    return (objective.losses(logits, y) * stays).mean()


def _read_again(binding: Binding, place: int) -> bool:
    """Tell whether a later objective reads logits of the one at `place`, and needs their graph."""
    passes = binding.objectives[place].passes
    return any(binding.joint or not set(passes).isdisjoint(o.passes) for o in binding.objectives[place + 1 :])
