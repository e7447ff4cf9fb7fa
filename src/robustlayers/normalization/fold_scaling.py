"""Norm layers as scale and shift per channel, computed for all layers together from the model's live tensors.

In evaluation mode batch normalization is affine per channel, y = scale x + shift with scale = gamma / sqrt(var + eps) and
shift = beta - scale mean. After a convolution W * x + b this is a convolution again, of weight scale W and bias
scale b + shift.
"""

# torch has its operations on lists of tensors under private names only
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustlayers.models.parts import Normalize

__all__ = ["Scaling", "Scalings"]


@dataclass(eq=False)
class Scaling:
    """An affine map per channel: `scale` and `shift` [c], and the tensors of the model that they are made from.

    scale = gamma / sqrt(var + eps) or 1 / std; shift = scale (bias - mean) + beta, with the bias of the layer before.
    """

    mean: Tensor
    var: Tensor | None = None
    eps: float = 0.0
    std: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor = field(init=False)
    shift: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.scale, self.shift = torch.empty_like(self.mean), torch.empty_like(self.mean)

    @classmethod
    def of(cls, norm: nn.Module, bias: Tensor | None = None) -> Scaling:
        """Return the map of a `Normalize` or of a BatchNorm with running statistics; its values are not computed yet."""
        if isinstance(norm, Normalize):
            return cls(norm.mean, std=norm.std)
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None
        return cls(norm.running_mean, norm.running_var, norm.eps, gamma=norm.weight, beta=norm.bias, bias=bias)

    def sources(self) -> list[Tensor]:
        """Return the tensors of the model that it reads."""
        tensors = (self.mean, self.var, self.std, self.gamma, self.beta, self.bias)
        return [tensor for tensor in tensors if tensor is not None]


class Scalings:
    """Computes many `Scaling`s with few calls, in place; without autograd, which is the caller's to switch off."""

    def __init__(self, scalings: Sequence[Scaling]) -> None:
        self._scales = [s.scale for s in scalings]
        self._shifts = [s.shift for s in scalings]
        self._means = [s.mean for s in scalings]
        self._by_var = [(s.scale, s.var, s.eps) for s in scalings if s.var is not None]
        self._by_std = [(s.scale, s.std) for s in scalings if s.std is not None]
        self._gammas = [(s.scale, s.gamma) for s in scalings if s.gamma is not None]
        self._biases = [(s.shift, s.bias) for s in scalings if s.bias is not None]
        self._betas = [(s.shift, s.beta) for s in scalings if s.beta is not None]

    def compute(self) -> None:
        """Set every `scale` and `shift` from the current values of their sources."""
        if not self._scales:
            return
        if self._by_var:
            scales, variances, eps = (list(column) for column in zip(*self._by_var, strict=True))
            torch._foreach_copy_(scales, variances)
            torch._foreach_add_(scales, eps)
            torch._foreach_sqrt_(scales)
        if self._by_std:
            torch._foreach_copy_(*_columns(self._by_std))
        torch._foreach_reciprocal_(self._scales)
        if self._gammas:
            torch._foreach_mul_(*_columns(self._gammas))
        torch._foreach_copy_(self._shifts, self._means)
        torch._foreach_neg_(self._shifts)
        if self._biases:
            torch._foreach_add_(*_columns(self._biases))
        torch._foreach_mul_(self._shifts, self._scales)
        if self._betas:
            torch._foreach_add_(*_columns(self._betas))


def _columns(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [first for first, _ in pairs], [second for _, second in pairs]
