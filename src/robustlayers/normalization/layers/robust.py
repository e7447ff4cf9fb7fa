"""RobustNorm: batch norm with a power of the range in the place of the standard deviation."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from robustlayers.core.errors import UserError, one_of
from robustlayers.core.quantities import number
from robustlayers.models.options import Choice, Number
from robustlayers.normalization.layers.common import (
    Flag,
    Momentum,
    channels_of,
    check_channels,
    kind,
    per_channel,
    plain,
    precise,
    reduced,
    settle,
    track,
)

__all__ = ["ROBUST", "TRACKED", "RobustNorm", "robust_norm"]

TRACKED = ("none", "mean", "both")


class RobustNorm(nn.Module):
    """Normalization by mean and range.

    **What.** Of the batch in training. At test by what `tracked` says: `none` (RN, the paper's choice) the batch's mean and
    range, `mean` (RNM) the running mean and the batch's range, `both` (RNT) the running ones.

    **Maths.** y = weight (x - mu) / (r^power + eps) + bias; r = max - min over the images and pixels of a channel. Where r
    is 0 it counts as 1: x - mu is 0 there but for rounding, which 1 / eps would blow up, and the slope of r^power is
    infinite.

    **Cost.** 2 c parameters; 2 c + 1 numbers of state unless `tracked` is `none`. Maximum and minimum take a pass more than
    mean and variance. With batch statistics at test (`none`, `mean`) a prediction depends on the other images of the batch,
    and every evaluation should keep the batches fixed.

    **Source.** Awais, Shamshad and Bae 2020 (arXiv 2006.11007): power 0.2, momentum 0.1. The range is tracked as
    `running_range`; the published code calls it `running_var`, which it is not.

    **Not known.** What is left of its robustness under attacks on a fixed batch with gradients averaged over batches: the
    paper's explanation is that the attack shifts what running statistics assume.

    Input and output: [n, channels, ...]. A batch with one value per channel is a `UserError` where it would be normalized
    by itself.

    >>> RobustNorm(1, power=1, eps=1e-12)(torch.tensor([[0.0], [1.0], [2.0]])).flatten().tolist()
    [-0.5, 0.0, 0.5]
    """

    is_normalization = True
    stands_for: type[nn.Module] = nn.BatchNorm2d  # the batch norm for the same inputs

    def __init__(
        self,
        channels: int,
        *,
        power: float = 0.2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        tracked: str = "none",
    ) -> None:
        super().__init__()
        if tracked not in TRACKED:
            raise UserError(one_of("tracked statistics", str(tracked), TRACKED))
        self.channels, self.tracked = channels, tracked
        self.power, self.eps = number(power, "power"), number(eps, "eps")
        self.momentum = None if momentum is None else number(momentum, "momentum")
        if self.power <= 0 or self.eps <= 0:
            raise UserError("RobustNorm: power and eps must be positive")
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        keeps = tracked != "none"
        self.register_buffer("running_mean", torch.zeros(channels) if keeps else None)
        self.register_buffer("running_range", torch.ones(channels) if keeps else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0) if keeps else None)

    def reset_running_stats(self) -> None:
        """Set mean 0, range 1, counter 0."""
        for name, value in (("running_mean", 0), ("running_range", 1), ("num_batches_tracked", 0)):
            buffer = self._buffers[name]
            if buffer is not None:
                buffer.fill_(value)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape and dtype of `x`, [n, channels, ...]."""
        check_channels(x, self.channels, "RobustNorm")
        wide = precise(x)
        by_mean = self.training or self.tracked == "none"
        by_range = self.training or self.tracked != "both"
        mean, spread = cast(Tensor, self._buffers["running_mean"]), cast(Tensor, self._buffers["running_range"])
        if by_mean or by_range:
            if x.numel() == self.channels:
                raise UserError(f"RobustNorm: one value per channel in a batch of shape {list(x.shape)}; it needs more")
            dims = reduced(x)
            seen_mean, seen_range = wide.mean(dims), wide.amax(dims) - wide.amin(dims)
            mean, spread = seen_mean if by_mean else mean, seen_range if by_range else spread
            if self.training and self.tracked != "none":
                track(self, self.momentum, running_mean=seen_mean, running_range=seen_range)
        divisor = torch.where(spread == 0, 1, spread) ** self.power + self.eps
        y = (wide - per_channel(mean, x)) / per_channel(divisor, x)
        if self.weight is not None and self.bias is not None:
            y = y * per_channel(self.weight, x) + per_channel(self.bias, x)
        return y.to(x.dtype)

    def plain(self) -> nn.Module:
        """Return batch norm with this scale and shift; of its statistics only the names have something in common."""
        return settle(self.stands_for(self.channels, momentum=self.momentum), self)

    def extra_repr(self) -> str:
        """Return the settings, for `print(model)`."""
        return f"{self.channels}, power={self.power:g}, eps={self.eps:g}, tracked={self.tracked}"


def robust_norm(
    norm: nn.Module,
    power: float = 0.2,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
    tracked: str = "none",
) -> nn.Module:
    """Return RobustNorm in the place of `norm`. Scale and shift are carried over; the statistics begin anew."""
    norm = plain(norm)
    layer = RobustNorm(channels_of(norm), power=power, eps=eps, momentum=momentum, affine=affine, tracked=tracked)
    return settle(layer, norm)


ROBUST = kind(
    robust_norm,
    options={
        "power": Number(0.2),
        "eps": Number(1e-5),
        "momentum": Momentum(),
        "affine": Flag(True),
        "tracked": Choice("tracked statistics", "none", lambda: TRACKED),
    },
)
