"""How far apart two sets of statistics are, and what scale and variance do to a signal: pure formulas on tensors.

A channel's statistics are taken for a Gaussian N(mean, variance). Everything is computed in float64 and per channel unless
the name says otherwise; nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from robustlayers.core.errors import UserError, one_of

__all__ = ["DRIFTS", "l2", "lipschitz", "norm_drift", "relative_norm", "symmetric_kl", "wasserstein"]

DRIFTS = ("mean_l2", "variance_l2", "kl_mean", "wasserstein_mean", "scale_l2", "shift_l2")
"""What `norm_drift` measures, in this order."""


def l2(a: Tensor, b: Tensor) -> float:
    """Return ||a - b||_2 over all entries of two tensors of one shape.

    >>> l2(torch.tensor([0.0, 3.0]), torch.tensor([4.0, 0.0]))
    5.0
    """
    a, b = _wide(a, b)
    return float(torch.linalg.vector_norm(a - b))


def symmetric_kl(
    mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor, eps: float = 0.0
) -> Tensor:
    """Return KL(p || q) + KL(q || p) per channel, p = N(mean, variance + eps), q alike, in nats; float64 [c].

    In closed form ((v - w)^2 + (m - n)^2 (v + w)) / (2 v w) for p = N(m, v), q = N(n, w). It does not change when both
    channels are scaled and shifted alike, so layers can be compared by it; of a layer it is the mean over channels that
    Pan et al. 2018 (IBN-Net, arXiv 1807.09441) call feature divergence. Two variances of 0 are 0 apart where the means are
    equal; one of 0 is infinitely far from all others. With a layer's `eps` it is the distance of what the layer divides by.

    Raises `UserError` for shapes that differ and for a negative variance.

    >>> symmetric_kl(torch.zeros(2), torch.ones(2), torch.tensor([0.0, 1.0]), torch.ones(2)).tolist()
    [0.0, 1.0]
    """
    mean, variance, other_mean, other_variance = _gaussians(mean, variance, other_mean, other_variance)
    v, w = variance + eps, other_variance + eps
    # The root of v w is taken first: the product of two small variances would be 0.
    root = v.sqrt() * w.sqrt()
    apart = ((v - w) / root).square() / 2 + (mean - other_mean).square() * (1 / v + 1 / w) / 2
    same = (v == w) & (mean == other_mean)
    return torch.where(same, torch.zeros_like(apart), torch.where(root == 0, torch.inf, apart))


def wasserstein(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """Return the Wasserstein-2 distance of N(mean, variance) and another Gaussian per channel; float64 [c].

    sqrt((m - n)^2 + (sqrt(v) - sqrt(w))^2), in units of the signal: how far its values would have to be moved.

    Raises `UserError` for shapes that differ and for a negative variance.

    >>> wasserstein(torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([25.0])).tolist()
    [5.0]
    """
    mean, variance, other_mean, other_variance = _gaussians(mean, variance, other_mean, other_variance)
    return torch.hypot(mean - other_mean, variance.sqrt() - other_variance.sqrt())


def lipschitz(scale: Tensor | None, variance: Tensor, eps: float = 0.0) -> Tensor:
    """Return |scale| / sqrt(variance + eps) per channel: by how much a norm layer stretches differences; float64 [c].

    The layer's Lipschitz constant in every p-norm is the largest of them, as long as the variance is a constant of the
    layer and not one of the batch. Without a scale it is 1 / sqrt(variance + eps).

    >>> lipschitz(torch.tensor([-3.0]), torch.tensor([4.0])).tolist()
    [1.5]
    """
    scale, variance = _wide(torch.ones_like(variance) if scale is None else scale, variance)
    if bool((variance < 0).any()):
        raise UserError("a variance is negative")
    return scale.abs() / (variance + eps).sqrt()


def relative_norm(change: Tensor, weight: Tensor) -> float | None:
    """Return ||change||_2 / ||weight||_2, of a gradient the effective learning rate at rate 1; None where weight is 0.

    A step of size r along the gradient moves the weights by r times this share of their length.

    >>> relative_norm(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 10.0]))
    0.5
    """
    change, weight = _wide(change, weight)
    length = float(torch.linalg.vector_norm(weight))
    return float(torch.linalg.vector_norm(change)) / length if length else None


def norm_drift(
    states: Sequence[Mapping[str, Tensor]], layers: Sequence[str], *, eps: float = 1e-5
) -> list[dict[str, object]]:
    """Return how far norm layers moved over checkpoints: rows of `layer`, `checkpoint`, `since`, `metric`, `value`.

    `states` are state dicts in the order of training, `layers` names of modules such as `layer1.0.bn1` (the empty name is
    the model itself). From the second checkpoint on, each is compared with the one before (`since` = its position less 1)
    and with the first (`since` = 0); for the second these are the same and stand once. Metrics are those of `DRIFTS` for
    which a layer has the tensors: L2 norms of the change of `running_mean`, `running_var`, `weight` and `bias`, and the means
    over channels of `symmetric_kl` (with `eps` in both variances) and `wasserstein` between the running statistics.

    Raises `UserError` for fewer than two states, and for a layer that a state does not have, with the nearest names.

    >>> states = [{"bn.weight": torch.ones(2)}, {"bn.weight": torch.tensor([1.0, 3.0])}]
    >>> norm_drift(states, ["bn"])
    [{'layer': 'bn', 'checkpoint': 1, 'since': 0, 'metric': 'scale_l2', 'value': 2.0}]
    """
    if len(states) < 2:
        raise UserError(f"drift: {len(states)} checkpoint(s); it needs two or more")
    rows: list[dict[str, object]] = []
    for layer in layers:
        held = [_held(state, layer, place) for place, state in enumerate(states)]
        for place in range(1, len(states)):
            for since in dict.fromkeys((place - 1, 0)):
                found = _moved(held[since], held[place], eps)
                common = {"layer": layer, "checkpoint": place, "since": since}
                rows += [{**common, "metric": metric, "value": value} for metric, value in found.items()]
    return rows


_HELD = ("running_mean", "running_var", "weight", "bias")


def _held(state: Mapping[str, Tensor], layer: str, place: int) -> dict[str, Tensor]:
    prefix = f"{layer}." if layer else ""
    found = {name: state[prefix + name] for name in _HELD if prefix + name in state}
    if not found:
        known = {name.rpartition(".")[0] for name in state if name.rpartition(".")[2] in _HELD}
        raise UserError(f"drift: checkpoint {place}: {one_of('norm layer', layer, known)}")
    return found


def _moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor], eps: float) -> dict[str, float]:
    common = {name for name in _HELD if name in before and name in after}
    found = {}
    for metric, name in (("mean_l2", "running_mean"), ("variance_l2", "running_var")):
        if name in common:
            found[metric] = l2(before[name], after[name])
    if {"running_mean", "running_var"} <= common:
        ends = (before["running_mean"], before["running_var"], after["running_mean"], after["running_var"])
        found["kl_mean"] = float(symmetric_kl(*ends, eps).mean())
        found["wasserstein_mean"] = float(wasserstein(*ends).mean())
    for metric, name in (("scale_l2", "weight"), ("shift_l2", "bias")):
        if name in common:
            found[metric] = l2(before[name], after[name])
    return found


def _wide(*tensors: Tensor) -> list[Tensor]:
    shapes = [list(tensor.shape) for tensor in tensors]
    if any(shape != shapes[0] for shape in shapes):
        raise UserError(f"these statistics belong to different layers: their shapes are {', '.join(map(str, shapes))}")
    return [tensor.detach().double() for tensor in tensors]


def _gaussians(*tensors: Tensor) -> list[Tensor]:
    wide = _wide(*tensors)
    if any(bool((variance < 0).any()) for variance in (wide[1], wide[3])):
        raise UserError("a variance is negative")
    return wide
