"""What a module of an architecture declares: the options that it takes and the function that makes the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from robustlayers.models.layout import Network
from robustlayers.models.norms import NormOption
from robustlayers.models.options import Integer, Option, PerChannel
from robustlayers.models.parts import initialize

__all__ = ["Architecture", "common_options"]


@dataclass(frozen=True)
class Architecture:
    """A family of networks: its options, and `make`, which is called with every one of them as a keyword.

    `initialize` gives a network just made its initial weights, in place; by default Kaiming-normal convolutions.
    """

    options: Mapping[str, Option]
    make: Callable[..., Network]
    initialize: Callable[[nn.Module], None] = initialize


def common_options(*, without: tuple[str, ...] = ()) -> dict[str, Option]:
    """Return the options that every architecture has, but for those that make no sense for it (`without`).

    `classes`, `channels` of the images, `norm` layers, `mean` and `std` of the input normalization (0.5 where not
    given), `stem_stride` of the first convolution (2 makes a quarter of the pixels: for fast studies on a CPU).
    """
    options: dict[str, Option] = {
        "classes": Integer(10, least=2),
        "channels": Integer(3),
        "norm": NormOption(),
        "mean": PerChannel(0.5),
        "std": PerChannel(0.5, positive=True),
        "stem_stride": Integer(1, most=4),
    }
    return {name: option for name, option in options.items() if name not in without}
