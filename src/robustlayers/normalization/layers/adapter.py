"""Adapters: an additional scale and shift on a norm layer that stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustlayers.core.errors import UserError
from robustlayers.normalization.layers.common import (
    ScaleShift,
    affine_of,
    batch_norm_like,
    channels_of,
    chosen,
    kind,
    plain,
    settle,
)

__all__ = ["ADAPTER", "AdapterNorm", "adapter_norm"]


class AdapterNorm(nn.Module):
    """A norm layer and a scale and shift of its output.

    **What.** The layer `norm` is untouched and meant to be frozen; `adapter` is what learns. The branch `adapted`, the
    default, goes through both, `base` through the norm layer alone: the network as it was, bit for bit. At the beginning
    both are the same function.

    **Maths.** y = a norm(x) + b per channel; a = 1 and b = 0 at the beginning. Where the norm layer has a scale g and a
    shift h, this is one with a g and a h + b; what differs is what is trained and decayed, and that it can be taken off.

    **Cost.** 2 c parameters more and a multiply-add.

    **Source.** Rebuffi, Croce and Gowal 2023 (arXiv 2210.04886): a few parameters of their own for clean and adversarial
    images suffice, statistics can be shared; adapters mixed at test trade one accuracy for the other.

    **Not known.** How it compares with training the norm layer's own scale and shift at equal decay and learning rate.

    Freezing is the partition's business: `type(ScaleShift)` selects the adapters. Input and output: [n, channels, ...].

    >>> layer = AdapterNorm(nn.BatchNorm2d(3))
    >>> layer.branch = "base"
    """

    is_normalization = True
    branches = ("base", "adapted")

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.branch = "adapted"
        self.norm = norm
        tensors = [t for t in (*norm.parameters(), *norm.buffers()) if t.is_floating_point()]
        self.adapter = ScaleShift(channels_of(norm))
        if tensors:
            self.adapter.to(device=tensors[0].device, dtype=tensors[0].dtype)
        self.train(norm.training)

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.adapter.channels

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape and dtype of `x`."""
        y = self.norm(x)
        return y if chosen(self) == "base" else self.adapter(y)

    @torch.no_grad()
    def plain(self) -> nn.Module:
        """Return one layer that is this function: the norm layer for `base`, else with the adapter multiplied in."""
        norm = plain(self.norm)
        if chosen(self) == "base":
            return norm
        weight, bias = affine_of(norm)
        scale, shift = self.adapter.weight, self.adapter.bias
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            layer = batch_norm_like(norm, tracking=norm.running_mean is not None)
        elif isinstance(norm, nn.GroupNorm):
            layer = settle(nn.GroupNorm(norm.num_groups, norm.num_channels, norm.eps), norm)
        else:
            raise UserError(f"an adapter cannot be made one with {type(norm).__name__}; set branch = 'base' to drop it")
        layer._parameters["weight"] = nn.Parameter(scale if weight is None else scale * weight)
        layer._parameters["bias"] = nn.Parameter(shift if bias is None else scale * bias + shift)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """Return the branch in use, for `print(model)`."""
        return f"branch={self.branch}"


def adapter_norm(norm: nn.Module) -> nn.Module:
    """Return `norm` with an adapter on it: the same function at the beginning."""
    if isinstance(norm, AdapterNorm):
        raise UserError(
            "an adapter on an adapter is one adapter; convert to batch first, which makes one layer of them"
        )
    return AdapterNorm(norm)


ADAPTER = kind(adapter_norm)
