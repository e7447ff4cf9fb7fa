"""No normalization: the identity in the place of a norm layer."""

from __future__ import annotations

from torch import nn

from robustlayers.models.norms import NormKind

__all__ = ["NONE", "no_norm"]


def no_norm(norm: nn.Module) -> nn.Module:
    """Return the identity: what is left of `norm` is nothing.

    **What.** The control without normalization. `norm=none` gives each convolution a bias.

    **Maths.** y = x. A conversion of a trained network is not the same function: scale, shift and statistics are gone, not
    folded into the layer before. (The folded forward, which is the same function, is `crafting_forward`.)

    **Cost.** None.

    **Source.** Galloway et al. 2019 and Benz, Zhang and Kweon 2021 compare networks with and without batch norm.

    **Not known.** How much of the difference is the learning rate: networks without norm layers need a smaller one, and
    the comparisons do not all tune it.
    """
    return nn.Identity().train(norm.training)


NONE = NormKind(lambda channels: nn.Identity(), shifts=False, replace=no_norm)
