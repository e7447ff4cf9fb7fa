"""Axes along which layers stand in execution order, with a mark where a stage of the model begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from robustlayers.analysis._axes import GRAY
from robustlayers.analysis.activations import Layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["label_layers", "starts"]

_READABLE = 16  # more names than that cannot be told apart on a phone; the stages stand for them


def starts(layers: Sequence[Layer]) -> list[tuple[int, str]]:
    """Return where each part of the model begins among its layers, and what it is called.

    >>> starts([Layer("conv1", "conv", "stem"), Layer("a.conv", "conv", "stage(1)"), Layer("a.bn", "norm", "stage(1)")])
    [(0, 'stem'), (1, 'stage 1')]
    """
    found: list[tuple[int, str]] = []
    part = None
    for place, layer in enumerate(layers):
        if layer.part is not None and layer.part != part:
            found.append((place, layer.part.replace("(", " ").rstrip(")")))
            part = layer.part
    return found


def label_layers(axes: Axes, layers: Sequence[Layer], which: str, *, color: str = GRAY) -> None:
    """Name the layers at 0, 1, ... on the axis `which` ("x" or "y") and draw a line before each new part of the model.

    A few layers are named one by one, many by the part that they belong to.
    """
    axis = axes.xaxis if which == "x" else axes.yaxis
    line = axes.axvline if which == "x" else axes.axhline
    parts = starts(layers)
    for place, _ in parts:
        if place:
            line(place - 0.5, color=color, linewidth=0.8)
    vertical: dict[str, Any] = {"rotation": 90} if which == "x" else {}
    if len(layers) <= _READABLE:
        axis.set_ticks(range(len(layers)), [layer.name for layer in layers], **vertical)
    elif len(parts) > 1:
        ends = [place for place, _ in parts[1:]] + [len(layers)]
        middles = [(first + end - 1) / 2 for (first, _), end in zip(parts, ends, strict=True)]
        axis.set_ticks(middles, [name for _, name in parts], **vertical)
    else:
        shown = range(0, len(layers), -(-len(layers) // _READABLE))
        axis.set_ticks(list(shown), [layers[place].name for place in shown], **vertical)
