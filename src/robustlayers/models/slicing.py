"""Every so manieth pixel, with a gradient that is laid out as the images are.

The gradient of `x[:, :, ::2, ::2]` in torch is laid out contiguously whatever the layout of `x`. Where activations are
channels-last, all that meets it until the next convolution then reads memory across the grain, many times slower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["layout_of", "subsample"]


class _Subsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: int, b: int) -> Tensor:
        ctx.steps, ctx.shape, ctx.layout = (a, b), x.shape, layout_of(x)
        return x[:, :, ::a, ::b]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), (a, b) = gradients, ctx.steps
        whole = torch.empty(ctx.shape, dtype=gradient.dtype, device=gradient.device, memory_format=ctx.layout).zero_()
        whole[:, :, ::a, ::b] = gradient
        return whole, None, None


def subsample(x: Tensor, a: int, b: int) -> Tensor:
    """Return x[:, :, ::a, ::b], whose gradient has the layout of `x`, [n, c, h, w].

    >>> x = torch.ones(1, 2, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    >>> (gradient,) = torch.autograd.grad(subsample(x, 2, 2).sum(), x)
    >>> gradient.is_contiguous(memory_format=torch.channels_last), gradient.sum().item()
    (True, 8.0)
    """
    if x.dim() == 4 and x.requires_grad and torch.is_grad_enabled():
        return _Subsample.apply(x, a, b)  # pyright: ignore[reportReturnType]
    return x[:, :, ::a, ::b]


def layout_of(x: Tensor) -> torch.memory_format:
    """Return `torch.channels_last` for images [n, c, h, w] that are laid out so, else `torch.contiguous_format`."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
