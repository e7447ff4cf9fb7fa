"""Amplification by norm layers: the factor by which each channel is stretched when it is normalized by running statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from robustlayers.analysis._axes import GRAY, INK, SERIES, axes_or_new, round_ticks
from robustlayers.analysis._ground import finite_row
from robustlayers.analysis.signal import QUANTILES
from robustlayers.core.errors import UserError
from robustlayers.normalization.layers.common import plain
from robustlayers.selection import Inventory, norm_layers, order_of, resolve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Amplification", "amplification"]


@dataclass(frozen=True)
class Amplification:
    """The factor |scale| / sqrt(running variance + eps) of every channel of every norm layer; see `amplification`."""

    layers: tuple[str, ...]
    values: tuple[np.ndarray, ...]  # of each layer [c]
    left_out: tuple[str, ...]  # norm layers without running statistics, whose factor depends on the input

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each layer, with quantiles over channels."""
        found = []
        for name, values in zip(self.layers, self.values, strict=True):
            numbers = zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)
            levels = {f"q{100 * level:02.0f}": float(v) for level, v in numbers}
            found.append(finite_row({"layer": name, "channels": len(values), **levels, "max": float(values.max())}))
        return found

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw a dot for each channel and a bar at the median: by how much a norm layer stretches what comes in.

        How to read it: norm layers in execution order from the top down, a dot for each channel. A channel at 1 hands
        differences on as they are, one at 10 makes them ten times as large, whether they are signal or perturbation; one at
        0 is dead.
        """
        axes = axes_or_new(axes, 5.2, 1.2 + 0.2 * len(self.layers))
        for place, values in enumerate(self.values):
            axes.plot(values, [place] * len(values), "o", color=SERIES[0], alpha=0.55, markersize=4, markeredgewidth=0)
        middles = [float(np.median(values)) for values in self.values]
        marks = {"marker": "|", "markersize": 13, "markeredgewidth": 2.2, "linestyle": ""}
        axes.plot(middles, range(len(middles)), color=INK, label="median of channels", **marks)
        axes.axvline(1, color=GRAY, linewidth=0.8)
        low, high = (float(np.concatenate(self.values).min()), 1.5 * max(1.0, float(np.concatenate(self.values).max())))
        if low > 0.02:  # no channel is near death: the scale need not go down to it
            axes.set_xscale("log")
            axes.set_xlim(0.8 * min(low, 0.9), high)
            ticks = round_ticks(0.8 * min(low, 0.9), high)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_xticks([], minor=True)
        else:
            axes.set_xscale("symlog", linthresh=1e-2)
            axes.set_xlim(0, high)
        axes.set_yticks(range(len(self.layers)), self.layers)
        axes.set_ylim(len(self.layers) - 0.5, -0.8)
        axes.set_xlabel("amplification: |scale| / standard deviation")
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
        return axes


def amplification(model: nn.Module, layers: str = "norm", *, example: Tensor | None = None) -> Amplification:
    """Return |scale| / sqrt(running variance + eps) for each channel of the norm layers that a selector picks.

    With running statistics a norm layer is an affine map of each channel, and this is its slope: the factor by which a
    difference between two inputs, such as a perturbation, leaves larger than it came. A layer of which the selector picks
    any tensor counts. In execution order; `example` as in `selection.execution_order`. Layers of this package that can run
    in several ways count as the one in use.

    Raises `UserError` where no norm layer has running statistics.

    >>> layer = nn.BatchNorm2d(2, eps=0)
    >>> _ = layer.running_var.copy_(torch.tensor([1.0, 4.0]))
    >>> amplification(nn.Sequential(nn.Conv2d(1, 2, 3), layer)).values[0].tolist()
    [1.0, 0.5]
    """
    inventory = Inventory(model)
    order = order_of(inventory, example)
    owners = {id(module) for name in resolve(inventory, layers) for module in inventory.entries[name].owners}
    norms = norm_layers(model)
    found: dict[str, np.ndarray] = {}
    left_out: list[str] = []
    for name in sorted(norms, key=lambda name: order.starts.get(name, len(order.starts) ** 2)):
        if not any(id(module) in owners for module in norms[name].modules()):
            continue
        if any(name.startswith(f"{above}.") for above in norms):
            continue  # a part of a norm layer that has several
        layer = plain(norms[name])
        values = _slopes(layer)
        if values is None:
            left_out.append(name)
        else:
            found[name] = values
    if not found:
        raise UserError(f"{layers!r} picks no norm layer with running statistics from {type(model).__name__}")
    return Amplification(tuple(found), tuple(found.values()), tuple(left_out))


def _slopes(layer: nn.Module) -> np.ndarray | None:
    if not isinstance(layer, nn.modules.batchnorm._NormBase) or layer.running_var is None:
        return None
    deviation = (layer.running_var.detach().cpu().double() + layer.eps).sqrt()
    scale = torch.ones_like(deviation) if layer.weight is None else layer.weight.detach().cpu().double().abs()
    return (scale / deviation).numpy()
