"""Batch norm of a joint batch: clean and adversarial images as one batch, by the statistics of both or of one half."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustlayers.core.errors import UserError, one_of
from robustlayers.models.options import Choice
from robustlayers.normalization.layers.common import (
    batch_norm_like,
    check_channels,
    chosen,
    kind,
    per_channel,
    plain,
    precise,
    reduced,
)

__all__ = ["HALVES", "JOINT", "JointBatchNorm", "joint_norm"]

HALVES = ("both", "clean", "adversarial")


class JointBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm that knows that a batch is made of clean images and then as many adversarial ones.

    **What.** `branch = "joint"`: the batch is [clean; adversarial], and `statistics` says which half's mean and variance
    normalize *both* halves and move the running ones: `both` (`cat`: plain batch norm of the joint batch), `clean` (OCT
    clean) or `adversarial` (OCT adv). `branch = "single"`, the default: the batch is of one kind, and this is batch norm.

    **Maths.** y = weight (x - mu) / sqrt(var + eps) + bias with mu, var of the named half, through which the gradient goes.
    Running: var is the unbiased variance of that half, not a standard deviation, and eps is in the root, as in torch.

    **Cost.** That of batch norm, and a pass over the named half. Same parameters and state dict.

    **Source.** Zhang et al. 2024 (arXiv 2403.19150), where the variants are called cat, OCT clean and OCT adv. In its code
    the adversarial half comes first, a running *standard deviation* is tracked that starts at 0, and there is no eps.

    **Not known.** Numbers: the paper shows them in figures only.

    Input and output: [n, channels, ...], n even for a joint batch; else a `UserError`. By running statistics (evaluation
    mode) both branches are batch norm.

    >>> layer = JointBatchNorm(1, statistics="clean")
    >>> layer.branch = "joint"
    >>> layer(torch.tensor([[-1.0], [1.0], [3.0], [5.0]])).round().flatten().tolist()
    [-1.0, 1.0, 3.0, 5.0]
    """

    is_normalization = True
    branches = ("single", "joint")
    stands_for: type[nn.Module] = nn.BatchNorm2d  # the batch norm for the same inputs

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        statistics: str = "both",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        if statistics not in HALVES:
            raise UserError(one_of("statistics of a joint batch", str(statistics), HALVES))
        self.statistics = statistics
        self.branch = "single"

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002  # torch's name
        check_channels(input, self.num_features, "JointBatchNorm")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return a tensor of the shape and dtype of the input."""
        by_batch = self.training or self.running_mean is None
        if chosen(self) == "single" or not by_batch:
            return super().forward(input)
        if len(input) % 2:
            raise UserError(
                f"JointBatchNorm: a joint batch has as many adversarial as clean images; this has {len(input)}"
            )
        if self.statistics == "both":
            return super().forward(input)
        clean, adversarial = input.chunk(2)
        if self.statistics == "clean":
            return torch.cat([super().forward(clean), self._by(clean, adversarial)])
        return torch.cat([self._by(adversarial, clean), super().forward(adversarial)])

    def _by(self, source: Tensor, x: Tensor) -> Tensor:
        """Return `x` normalized by the mean and variance of `source`."""
        variance, mean = torch.var_mean(precise(source), reduced(source), correction=0)
        scale = torch.rsqrt(variance + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        y = (precise(x) - per_channel(mean, x)) * per_channel(scale, x)
        y = y if self.bias is None else y + per_channel(self.bias, x)
        return y.to(x.dtype)

    def plain(self) -> nn.Module:
        """Return torch's batch norm with these parameters and buffers."""
        return batch_norm_like(self, affine=self.affine, tracking=self.track_running_stats)

    def extra_repr(self) -> str:
        """Return the settings, for `print(model)`."""
        return f"{super().extra_repr()}, statistics={self.statistics}"


def joint_norm(norm: nn.Module, statistics: str = "both") -> nn.Module:
    """Return joint batch norm in the place of `norm`, with the scale, shift and statistics of batch norm carried over."""
    norm = batch_norm_like(plain(norm))
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    layer = JointBatchNorm(norm.num_features, norm.eps, norm.momentum, statistics=statistics)
    layer._parameters.update(norm._parameters)
    layer._buffers.update(norm._buffers)
    layer.stands_for = type(norm)
    return layer.train(norm.training)


JOINT = kind(joint_norm, options={"statistics": Choice("statistics of a joint batch", "both", lambda: HALVES)})
