"""Similarity of layers across views: what several nets make of natural and of attacked images, all in one streaming pass.

A view is a net and its inputs. Attacked images may be crafted for either net and shown to either, and training images may
stand beside held-out ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from robustlayers.analysis._axes import axes_or_new, ink_on, lines
from robustlayers.analysis._ground import finite_row
from robustlayers.analysis._marks import label_layers
from robustlayers.analysis.activations import Layer, Layers, layers_of
from robustlayers.analysis.cka import CKA, Parting, Side, Similarity, alignments
from robustlayers.core.errors import UserError, one_of
from robustlayers.evaluation import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Contrast", "Crossing", "SameLayer", "View", "cka_views"]

View = tuple[nn.Module, Tensor]
"""A net and its inputs [n, ...]."""


def cka_views(
    views: Mapping[str, View],
    pairs: Sequence[tuple[str, str]],
    *,
    layers: Layers = None,
    batch_size: int = 250,
    pool: bool = False,
    permutations: int = 0,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> dict[tuple[str, str], CKA]:
    """Return the CKA of every layer of one view with every layer of another, for each of the pairs of views.

    `views`: name -> (net, inputs); row i of the inputs of all views belongs to one sample. `pairs`: names of two views, or
    of one twice. Each view runs once, whatever number of pairs it is in, and each pair's result is that of `cka` on these
    two; the baselines of all pairs are drawn with the same permutations. Memory: for each view [layers, batch_size^2]
    float64. Other arguments and errors as in `cka`; an unknown view is a `UserError` too.

    >>> net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5))
    >>> x = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    >>> found = cka_views({"clean": (net, x), "darker": (net, 0.5 * x)}, [("clean", "clean"), ("clean", "darker")])
    >>> found["clean", "darker"].diagonal().round(6).tolist()
    [1.0, 1.0]
    """
    names = list(views)
    for pair in pairs:
        for name in pair:
            if name not in views:
                raise UserError(one_of("view", name, views))
    counts = {len(x) for _, x in views.values()}
    if len(counts) != 1:
        raise UserError(f"all views need the same samples; got {' and '.join(map(str, sorted(counts)))} inputs")
    sides = [Side(net, x, layers_of(net, layers, example=x)) for net, x in views.values()]
    places = [(names.index(one), names.index(other)) for one, other in pairs]
    options: dict[str, Any] = {"pool": pool, "permutations": permutations, "generator": generator}
    found = alignments(sides, places, batch_size, **options, progress=progress)
    return {(str(one), str(other)): each for (one, other), each in zip(pairs, found, strict=True)}


@dataclass(frozen=True)
class SameLayer:
    """The similarity of each layer with the same layer of another view, for several pairs of views: name -> [layers]."""

    layers: tuple[Layer, ...]
    values: Mapping[str, np.ndarray]
    metric: str = "CKA"

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each pair of views and layer."""
        return [
            finite_row({"views": name, "layer": layer.name, "metric": self.metric, "similarity": float(value)})
            for name, values in self.values.items()
            for layer, value in zip(self.layers, values, strict=True)
        ]

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw a line over the layers for each pair of views.

        How to read it: layers in execution order from left to right; at 1 a layer represents both views alike, at 0 they
        have nothing in common there. A line that falls with depth is a difference that the net amplifies.
        """
        axes = axes_or_new(axes, 5.2, 3.4)
        lines(axes, {name: list(values) for name, values in self.values.items()})
        known = [float(value) for values in self.values.values() for value in values if np.isfinite(value)]
        low = min(known, default=0.0)
        bottom = next((start for start in (0.9, 0.5, 0.0) if low > start), low)  # few scales, so that arms share them
        axes.set_ylim(bottom, 1 + 0.03 * (1 - bottom))
        label_layers(axes, self.layers, "x")
        axes.set_ylabel(f"{self.metric} of the same layer")
        axes.legend(frameon=False, fontsize="small", loc="lower left")
        return axes


@dataclass(frozen=True)
class Crossing:
    """The same layers of two nets, whatever each of them sees: `values` [what one sees, what the other sees, layers]."""

    layers: tuple[Layer, ...]
    seen: tuple[str, ...]
    other_seen: tuple[str, ...]
    values: np.ndarray
    metric: str = "CKA"

    def parting(self, seen: str, other_seen: str, below: float = 0.5) -> Parting:
        """Return the depth at which the nets part on these inputs; see `Similarity.parting`."""
        under = np.flatnonzero(self._of(seen, other_seen) < below)
        if not len(under):
            return Parting(None, 1.0)
        return Parting(self.layers[under[0]].name, int(under[0]) / len(self.layers))

    def lines(self, pairs: Mapping[str, tuple[str, str]]) -> SameLayer:
        """Return some of the pairs under names, layer by layer."""
        return SameLayer(self.layers, {name: self._of(*pair) for name, pair in pairs.items()}, self.metric)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each pair of inputs and layer."""
        return [
            finite_row(
                {
                    "seen": seen,
                    "other_seen": other,
                    "layer": layer.name,
                    "metric": self.metric,
                    "similarity": float(value),
                }
            )
            for seen, line in zip(self.seen, self.values, strict=True)
            for other, values in zip(self.other_seen, line, strict=True)
            for layer, value in zip(self.layers, values, strict=True)
        ]

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw a table of shades: the mean over layers, and below it the depth at which the nets part.

        How to read it: rows are what the one net sees, columns what the other one sees, of the same images. Dark cells are
        pairs of inputs that the two nets represent differently; the percentage is how deep the first layer lies whose
        similarity is under 0.5.
        """
        means = np.array([[_mean(values) for values in line] for line in self.values])
        axes = axes_or_new(axes, 1.6 + 1.1 * len(self.other_seen), 1.0 + 0.7 * len(self.seen))
        axes.imshow(means, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for i, seen in enumerate(self.seen):
            for j, other in enumerate(self.other_seen):
                found = self.parting(seen, other)
                text = f"{means[i, j]:.2f}\n" + ("never" if found.layer is None else f"at {100 * found.depth:.0f}%")
                axes.text(j, i, text, ha="center", va="center", color=ink_on(float(means[i, j])), fontsize="small")
        axes.set_xticks(range(len(self.other_seen)), self.other_seen)
        axes.set_yticks(range(len(self.seen)), self.seen)
        return axes

    def _of(self, seen: str, other_seen: str) -> np.ndarray:
        for name, known in ((seen, self.seen), (other_seen, self.other_seen)):
            if name not in known:
                raise UserError(one_of("kind of input", name, known))
        return self.values[self.seen.index(seen), self.other_seen.index(other_seen)]


@dataclass(frozen=True)
class Contrast:
    """How the similarity of layers differs between two sets of images, such as training and held-out ones: one - other."""

    one: Similarity
    other: Similarity
    names: tuple[str, str] = ("training", "held-out")

    @property
    def values(self) -> np.ndarray:
        """The difference for every pair of layers, [rows, columns]."""
        return self.one.values - self.other.values

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each pair of layers, with both similarities and their difference."""
        rows = []
        for i, row in enumerate(self.one.rows_layers):
            for j, column in enumerate(self.one.columns_layers):
                pair = {"layer": row.name, "other_layer": column.name, "metric": self.one.metric}
                pair |= {"similarity": float(self.one.values[i, j]), "other_similarity": float(self.other.values[i, j])}
                rows.append(finite_row(pair | {"difference": float(self.values[i, j])}))
        return rows

    def largest(self) -> tuple[float, str, str]:
        """Return the largest difference by absolute value, and the two layers."""
        size = np.nan_to_num(np.abs(self.values))
        i, j = np.unravel_index(int(size.argmax()), size.shape)
        return float(self.values[i, j]), self.one.rows_layers[i].name, self.one.columns_layers[j].name

    def plot(self, axes: Axes | None = None, *, reach: float | None = None) -> Axes:
        """Draw a heat map of the difference: one color for each sign, pale where both sets give the same.

        How to read it: layers in execution order from the lower left corner on. Colored blocks are pairs of layers that
        represent the images that were trained on otherwise than unseen ones; a net that generalizes is pale everywhere.

        `reach`: the difference at both ends of the colors, so that several nets have the same scale.
        """
        axes = axes_or_new(axes, 5.2, 4.6)
        most = float(np.nanmax(np.abs(self.values), initial=0.0))
        reach = max(0.05, most if reach is None else reach)
        shown = {"cmap": "PuOr", "vmin": -reach, "vmax": reach}
        image = axes.imshow(self.values, origin="lower", interpolation="nearest", **shown)
        label_layers(axes, self.one.columns_layers, "x")
        label_layers(axes, self.one.rows_layers, "y")
        bar = axes.figure.colorbar(image, ax=axes, shrink=0.85)
        bar.set_label(f"{self.one.metric}, {self.names[0]} minus {self.names[1]}")
        return axes


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
