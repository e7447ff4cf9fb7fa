"""The plain data of a norm report, and its rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from robustlayers.core.errors import UserError, one_of

__all__ = ["LayerPass", "NormLayer", "NormReport", "Numbers"]

Numbers = tuple[float, ...]
"""One number for each channel, or none."""


@dataclass(frozen=True)
class LayerPass:
    """What one kind of pass showed of one layer; what does not apply is empty or None.

    `mean` and `variance` (unbiased) are those of the layer's inputs, averaged over its forwards: what a recalibration on
    this pass would make of the running statistics. `mean_l2`, `variance_l2`, `kl` and `wasserstein` are their distances
    from the running ones, see `normalization.distances`; `lipschitz` is |scale| / sigma by the pass's own variance, for
    batch norm. `scale_rate` and `shift_rate` are ||g|| / ||w||, g the gradient of the mean cross-entropy of the pass.
    """

    forwards: int
    mean: Numbers
    variance: Numbers
    mean_l2: float | None
    variance_l2: float | None
    kl: Numbers
    wasserstein: Numbers
    lipschitz: Numbers
    scale_rate: float | None
    shift_rate: float | None


@dataclass(frozen=True)
class NormLayer:
    """One norm layer: its tensors as numbers, and what each pass showed; passes that did not run it are left out.

    `lipschitz` is |scale| / sqrt(running variance + eps) per channel, for a layer of scale and shift alone |scale|.
    """

    name: str
    kind: str  # name of the class
    scale: Numbers
    shift: Numbers
    running_mean: Numbers
    running_variance: Numbers
    lipschitz: Numbers
    dead: tuple[int, ...]  # channels with |scale| under the report's threshold
    passes: Mapping[str, LayerPass]


@dataclass(frozen=True)
class NormReport:
    """The norm layers of a model in execution order, as plain data."""

    layers: tuple[NormLayer, ...]
    passes: tuple[str, ...]
    by: str  # the statistics that normalized: "running" or "batch"
    threshold: float  # of |scale|, under which a channel is dead
    batches: int
    images: int

    def layer(self, name: str) -> NormLayer:
        """Return the layer of that name; an unknown one is a `UserError` with the nearest names."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise UserError(one_of("norm layer", name, [layer.name for layer in self.layers]))

    @property
    def dead_share(self) -> float | None:
        """Dead channels as a share of all that have a scale; None where none has."""
        scaled = sum(len(layer.scale) for layer in self.layers)
        return sum(len(layer.dead) for layer in self.layers) / scaled if scaled else None

    def rows(self) -> list[dict[str, Any]]:
        """Return the report as rows of `layer`, `pass`, `metric`, `value`; what does not apply has no row.

        Rows whose pass is empty are about the layer's tensors: `scale_` and `shift_` with `min`, `q25`, `median`, `q75`,
        `max`, `mean`, `std`; `scaled_channels`, `dead_channels`, `dead_share`; `lipschitz_median`, `lipschitz_max`. For
        each pass: `mean_l2`, `variance_l2`, `kl_mean`, `kl_max`, `wasserstein_mean`, `wasserstein_max`,
        `lipschitz_median`, `lipschitz_max`, `scale_rate`, `shift_rate`. The layer `all` stands last, for the whole model:
        its channels, dead ones, their share and the threshold, and for each pass `kl_mean` over all channels.
        """
        rows = [row for layer in self.layers for row in _layer_rows(layer)]
        found: dict[tuple[str, str], float] = {}
        scaled = sum(len(layer.scale) for layer in self.layers)
        if scaled:
            found["", "scaled_channels"] = float(scaled)
            found["", "dead_channels"] = float(sum(len(layer.dead) for layer in self.layers))
            found["", "dead_share"] = found["", "dead_channels"] / scaled
            found["", "dead_threshold"] = self.threshold
        for name in self.passes:
            apart = [value for layer in self.layers if name in layer.passes for value in layer.passes[name].kl]
            if apart:
                found[name, "kl_mean"] = math.fsum(apart) / len(apart)
        return rows + [_row("all", name, metric, value) for (name, metric), value in found.items()]


def _row(layer: str, name: str, metric: str, value: float) -> dict[str, Any]:
    return {"layer": layer, "pass": name, "metric": metric, "value": value}


def _spread(values: Numbers) -> dict[str, float]:
    if not values:
        return {}
    tensor = torch.tensor(values, dtype=torch.float64)
    points = torch.quantile(tensor, torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)).tolist()
    found = dict(zip(("min", "q25", "median", "q75", "max"), points, strict=True))
    return {**found, "mean": float(tensor.mean()), "std": float(tensor.std(correction=0))}


def _ends(name: str, values: Numbers, *which: str) -> dict[str, float]:
    spread = _spread(values)
    return {f"{name}_{one}": spread[one] for one in which if spread}


def _layer_rows(layer: NormLayer) -> list[dict[str, Any]]:
    found: dict[str, float | None] = {}
    for what, values in (("scale", layer.scale), ("shift", layer.shift)):
        found |= {f"{what}_{key}": value for key, value in _spread(values).items()}
    if layer.scale:
        dead = len(layer.dead)
        found |= {"scaled_channels": float(len(layer.scale)), "dead_channels": float(dead)}
        found["dead_share"] = dead / len(layer.scale)
    found |= _ends("lipschitz", layer.lipschitz, "median", "max")
    rows = [_row(layer.name, "", metric, value) for metric, value in found.items() if value is not None]
    for name, one in layer.passes.items():
        found = {"mean_l2": one.mean_l2, "variance_l2": one.variance_l2}
        found |= _ends("kl", one.kl, "mean", "max") | _ends("wasserstein", one.wasserstein, "mean", "max")
        found |= _ends("lipschitz", one.lipschitz, "median", "max")
        found |= {"scale_rate": one.scale_rate, "shift_rate": one.shift_rate}
        rows += [_row(layer.name, name, metric, value) for metric, value in found.items() if value is not None]
    return rows
