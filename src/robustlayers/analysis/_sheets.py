"""Small pictures in lines on one pair of axes, and numbers with a sign as pictures that every eye reads the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from robustlayers.analysis._axes import axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["picture", "sheet", "signed"]

# Blue below zero, mid-gray at zero, orange above: told apart under every common color blindness, and on any paper.
_BELOW, _ZERO, _ABOVE = (np.array(end) / 255 for end in ((0, 78, 160), (148, 148, 148), (255, 176, 30)))


def picture(image: np.ndarray) -> np.ndarray:
    """Return an image [channels, height, width] as [height, width, 3]; other channels than three are shown as their mean."""
    image = np.asarray(image, dtype=float)
    return np.moveaxis(image if len(image) == 3 else np.repeat(image.mean(0, keepdims=True), 3, axis=0), 0, -1)


def signed(values: np.ndarray, reach: float) -> np.ndarray:
    """Return values [channels, height, width] as a picture [height, width, 3] in [0, 1]: full color is +-`reach`.

    One channel: mid-gray is zero, blue is below, orange above. Three channels: each is shown as 0.5 + 0.5 value / reach, so
    that the sign of every channel is kept. Other numbers of channels are shown as their mean.

    >>> signed(np.zeros((3, 1, 1)), 1.0)
    array([[[0.5, 0.5, 0.5]]])
    """
    share = np.clip(np.asarray(values, dtype=float) / (reach or 1.0), -1, 1)
    if len(share) == 3:
        return np.moveaxis(0.5 + 0.5 * share, 0, -1)
    mean = share.mean(axis=0)[..., None]
    return np.where(mean < 0, _ZERO + (_BELOW - _ZERO) * -mean, _ZERO + (_ABOVE - _ZERO) * mean)


def sheet(lines: Sequence[Sequence[np.ndarray]], axes: Axes | None, names: Sequence[str] = ()) -> Axes:
    """Draw lines of pictures [height, width, 3] in [0, 1], each pixel as it is, without a scale; `names` stand on the left."""
    columns, gap = max(len(line) for line in lines), 0.08
    axes = axes_or_new(axes, 0.75 * columns + 0.8, 0.75 * len(lines) + 0.2)
    for row, line in enumerate(lines):
        for column, shown in enumerate(line):
            box = (column, column + 1 - gap, row + 1 - gap, row)
            axes.imshow(np.clip(shown, 0, 1), extent=box, interpolation="none")
    axes.set_xlim(0, columns)
    axes.set_ylim(len(lines), 0)
    axes.set_xticks([])
    axes.set_yticks([row + 0.5 for row in range(len(names))], list(names))
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    return axes
