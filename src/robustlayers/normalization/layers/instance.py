"""Instance norm: each image and channel by itself."""

from __future__ import annotations

from torch import nn

from robustlayers.normalization.layers.common import channels_of, kind, plain, settle

__all__ = ["INSTANCE", "instance_norm"]


def instance_norm(norm: nn.Module) -> nn.Module:
    """Return instance norm in the place of `norm`: torch's own layer, with scale and shift, without running statistics.

    **What.** Mean and variance over the pixels of one channel of one image: contrast and brightness of each feature map
    are removed.

    **Maths.** y = weight (x - mu) / sqrt(var + eps) + bias; mu, var per image and channel, weight and bias per channel.
    (torch leaves weight and bias out unless they are asked for.)

    **Cost.** 2 c parameters, no state. Feature maps of one pixel are an error: nothing would be left of them.

    **Source.** Ulyanov, Vedaldi and Lempitsky 2016 (arXiv 1607.08022).

    **Carried over.** Scale and shift. After a layer for images it is `InstanceNorm2d`, after `BatchNorm1d`
    `InstanceNorm1d`.

    **Not known.** Numbers under adversarial training: Zhang et al. 2024 (arXiv 2403.19150) compare it in figures only.
    """
    norm = plain(norm)
    make: type[nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d] = nn.InstanceNorm2d
    if isinstance(norm, nn.BatchNorm1d | nn.InstanceNorm1d):
        make = nn.InstanceNorm1d
    elif isinstance(norm, nn.BatchNorm3d | nn.InstanceNorm3d):
        make = nn.InstanceNorm3d
    return settle(make(channels_of(norm), affine=True), norm)


INSTANCE = kind(instance_norm)
