"""Layer rates by relative gradient norm: a layer whose gradient is large against its parameters learns faster.

once per epoch:
    measured = [relative_gradient_norms(optimizer, gradients of one batch) for so many batches]
    apply_rates(optimizer, average_norms(measured))
each step:
    schedule.apply(optimizer, step, steps)            # lr = base_lr * factor * rate

Auto-RGN of Lee et al., "Surgical fine-tuning improves adaptation to distribution shifts", ICLR 2023, section 5. Here a
layer is a module, with its bias; their code gives each tensor a rate, leaves batch norm out, and starts Adam anew with
every measurement, while here momenta go on.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from robustlayers.core.errors import UserError

__all__ = ["apply_rates", "average_norms", "relative_gradient_norms"]


def relative_gradient_norms(optimizer: torch.optim.Optimizer, gradients: Mapping[str, Tensor]) -> list[float]:
    """Return the norm of the gradient over the norm of the parameters, of the layer of each parameter group.

    r_i = ||g_i|| / ||theta_i|| with L2 norms over all tensors of layer i that the optimizer has. A layer is what has the
    same `module`: parameter groups that weight decay or the partition tells apart have one r; without that key each
    parameter group is a layer. Of a tensor of which only some entries are trained, all entries count.

    A tensor that `gradients` lacks has gradient 0, so measure on a step on which every group is due. A layer of which
    all parameters are 0 has no relative norm: r is infinity, whatever its gradient.

    Raises `UserError` for a gradient that is not finite.
    """
    keys = [_layer(index, group) for index, group in enumerate(optimizer.param_groups)]
    norms: dict[Hashable, tuple[list[Tensor], list[Tensor]]] = {}
    for key, group in zip(keys, optimizer.param_groups, strict=True):
        of_gradient, of_value = norms.setdefault(key, ([], []))
        for name, parameter in zip(group["names"], group["params"], strict=True):
            gradient = gradients.get(name)
            of_value.append(_norm(parameter))
            of_gradient.append(torch.zeros_like(of_value[-1]) if gradient is None else _norm(gradient))
    # One transfer for all layers.
    pairs = torch.stack([torch.stack([_norm(torch.stack(some)) for some in pair]) for pair in norms.values()]).tolist()
    ratios: dict[Hashable, float] = {}
    for key, (gradient, value) in zip(norms, pairs, strict=True):
        if not math.isfinite(gradient):
            group = optimizer.param_groups[keys.index(key)]
            raise UserError(f"layer rates: the gradient of {group['names'][0]} or its layer is not finite")
        ratios[key] = gradient / value if value > 0 else math.inf
    return [ratios[key] for key in keys]


def average_norms(measured: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean over batches of what `relative_gradient_norms` found; any order of the batches gives the same.

    >>> average_norms([[1.0, 4.0], [3.0, 0.0]])
    [2.0, 2.0]
    """
    if not measured:
        raise UserError("layer rates need at least one batch to be measured on")
    return [math.fsum(values) / len(measured) for values in zip(*measured, strict=True)]


def apply_rates(optimizer: torch.optim.Optimizer, averaged: Sequence[float]) -> list[float]:
    """Set `rate` of every parameter group to r_i / max_j r_j and return these rates, each from 0 to 1.

    They reach the learning rate with the next `Schedule.apply`, and the checkpoint with `optimizer_tensors`. Layers
    without a relative norm (infinity) do not count in the maximum and have rate 1, so that a layer that starts at zero
    can leave it; where no layer has a gradient, all have rate 1.

    >>> weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
    >>> optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=0.1)
    >>> apply_rates(optimizer, [0.5, 2.0, math.inf])
    [0.25, 1.0, 1.0]
    """
    if len(averaged) != len(optimizer.param_groups):
        raise UserError(f"layer rates: {len(averaged)} norms for {len(optimizer.param_groups)} parameter groups")
    highest = max((value for value in averaged if math.isfinite(value)), default=0.0)
    rates = [value / highest if math.isfinite(value) and highest > 0 else 1.0 for value in averaged]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["rate"] = rate
    return rates


def _layer(index: int, group: Mapping[str, object]) -> Hashable:
    return ("module", group["module"]) if "module" in group else ("group", index)


def _norm(tensor: Tensor) -> Tensor:
    # Half precision overflows at 65504.
    return torch.linalg.vector_norm(tensor.detach(), dtype=torch.promote_types(tensor.dtype, torch.float32))
