"""What a module of an architecture declares: the options that it takes and the function that makes the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from robustlayers.models.layout import Network
from robustlayers.models.norms import norm_names
from robustlayers.models.options import Choice, Integer, Option, PerChannel

__all__ = ["Architecture", "common_options"]


@dataclass(frozen=True)
class Architecture:
    """A family of networks: its options, and `make`, which is called with every one of them as a keyword."""

    options: Mapping[str, Option]
    make: Callable[..., Network]


def common_options() -> dict[str, Option]:
    """Return the options that every architecture has.

    `classes`, `channels` of the images, `norm` layers, `mean` and `std` of the input normalization (0.5 where not
    given), `stem_stride` of the first convolution (2 makes a quarter of the pixels: for fast studies on a CPU).
    """
    return {
        "classes": Integer(10, least=2),
        "channels": Integer(3),
        "norm": Choice("norm", "batch", norm_names),
        "mean": PerChannel(0.5),
        "std": PerChannel(0.5, positive=True),
        "stem_stride": Integer(1, most=4),
    }
