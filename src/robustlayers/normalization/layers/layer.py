"""Layer norm of images: each image by itself, over all channels."""

from __future__ import annotations

from torch import nn

from robustlayers.normalization.layers.common import channels_of, kind, plain, settle

__all__ = ["LAYER", "layer_norm"]


def layer_norm(norm: nn.Module) -> nn.Module:
    """Return layer norm over channels and pixels in the place of `norm`: group norm with one group.

    **What.** Mean and variance over all channels and pixels of one image; scale and shift per channel.

    **Maths.** y = weight (x - mu) / sqrt(var + eps) + bias; mu, var per image. `torch.nn.LayerNorm([c, h, w])` is the same
    but for a scale and a shift for each pixel, which would fix the size of the images.

    **Cost.** 2 c parameters, no state.

    **Source.** Ba, Kiros and Hinton 2016 (arXiv 1607.06450); as a special case of group norm, Wu and He 2018, section 3.

    **Carried over.** Scale and shift.

    **Not known.** For convolutional networks under attack there are few measurements of it.
    """
    norm = plain(norm)
    return settle(nn.GroupNorm(1, channels_of(norm)), norm)


LAYER = kind(layer_norm)
