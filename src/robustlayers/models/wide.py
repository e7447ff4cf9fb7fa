"""Wide ResNets of Zagoruyko and Komodakis 2016 (arXiv 1605.07146): 6n+4 layers in three stages, no dropout."""

from __future__ import annotations

from robustlayers.models.architecture import Architecture, common_options
from robustlayers.models.options import Integer
from robustlayers.models.preact import PreActNet

__all__ = ["ARCHITECTURE"]


def _make(*, depth: int, widen: int, **common: object) -> PreActNet:
    widths = [16 * widen, 32 * widen, 64 * widen]
    blocks = [(depth - 4) // 6] * 3
    return PreActNet(stem_width=16, widths=widths, blocks=blocks, **common)  # pyright: ignore[reportArgumentType]


ARCHITECTURE = Architecture(
    options={"depth": Integer(28, least=10, step=6), "widen": Integer(10), **common_options()},
    make=_make,
)
