"""Group norm: each image by itself, over groups of channels."""

from __future__ import annotations

from torch import nn

from robustlayers.core.errors import UserError
from robustlayers.models.options import Integer
from robustlayers.normalization.layers.common import channels_of, kind, plain, settle

__all__ = ["GROUP", "group_count", "group_norm"]


def group_norm(norm: nn.Module, groups: int = 32) -> nn.Module:
    """Return group norm in the place of `norm`: torch's own layer, with `group_count(channels, groups)` groups.

    **What.** Mean and variance over the pixels and the channels of a group, of one image: the same in training and at
    test, no batch, no running statistics.

    **Maths.** y = weight (x - mu) / sqrt(var + eps) + bias; mu, var per image and group, weight and bias per channel.

    **Cost.** 2 c parameters, no state. Unlike batch norm by running statistics it cannot be folded away for crafting.

    **Source.** Wu and He 2018 (arXiv 1803.08494); 32 groups are its default. Xie and Yuille 2020 report that it behaves as
    separate batch norms for clean and adversarial images do.

    **Carried over.** Scale and shift.

    **Not known.** The number of groups for narrow networks: the paper's are 64 channels and wider.
    """
    norm = plain(norm)
    channels = channels_of(norm)
    return settle(nn.GroupNorm(group_count(channels, groups), channels), norm)


def group_count(channels: int, groups: int = 32) -> int:
    """Return how many groups `channels` are divided into where `groups` are wanted.

    The largest divisor of `channels` that is at most `groups`, and leaves at least two channels to a group: group norm
    with one channel per group would be instance norm, which is a kind of its own.

    >>> [group_count(channels) for channels in (16, 32, 64, 320, 7)]
    [8, 16, 32, 32, 1]
    """
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise UserError(f"groups: {groups!r} is not allowed; allowed: a whole number from 1")
    fitting = (count for count in range(min(groups, channels // 2), 0, -1) if channels % count == 0)
    return next(fitting, 1)


GROUP = kind(group_norm, options={"groups": Integer(32)})
