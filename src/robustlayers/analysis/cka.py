"""Centered kernel alignment: how similar the representations of two layers are, for all pairs of layers in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from robustlayers.analysis._axes import axes_or_new
from robustlayers.analysis._ground import finite_row
from robustlayers.analysis._marks import label_layers
from robustlayers.analysis.activations import Layer, Layers, batches, capture, layers_of, pooled
from robustlayers.core.errors import UserError, one_of
from robustlayers.evaluation import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "CKA",
    "Block",
    "Parting",
    "Side",
    "Similarity",
    "alignments",
    "center",
    "check_permutations",
    "cka",
    "gram",
    "gram_batches",
    "sides_of",
]

Estimator = Literal["unbiased", "biased"]
_ESTIMATORS = ("biased", "unbiased")


@dataclass(frozen=True)
class Block:
    """The longest run of consecutive layers of which every two are similar."""

    first: str | None
    last: str | None
    layers: int
    share: float  # of all layers, in [0, 1]


@dataclass(frozen=True)
class Parting:
    """The first layer whose similarity to the same layer of another net is below a bound; None if there is none."""

    layer: str | None
    depth: float  # share of the layers that come before it, in [0, 1]; 1 if there is none


@dataclass(frozen=True)
class Similarity:
    """A number for every layer (row) with every other layer (column), both in execution order.

    `values` [rows, columns]: the similarity, 1 for equal representations; NaN where a layer's output is the same for all
    samples. `baseline` [permutations, rows, columns]: the same numbers with the samples of the columns in another order, so
    that nothing but chance makes them similar; None if none was asked for.
    """

    rows_layers: tuple[Layer, ...]
    columns_layers: tuple[Layer, ...]
    values: np.ndarray
    baseline: np.ndarray | None
    samples: int
    batch_size: int  # of the largest batch
    metric: str

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each pair of layers; numbers that are not finite are None."""
        floor = self.chance()
        return [
            finite_row(
                {
                    "layer": row.name,
                    "other_layer": column.name,
                    "metric": self.metric,
                    "similarity": float(self.values[i, j]),
                    "chance_95": None if floor is None else float(floor[i, j]),
                    "samples": self.samples,
                    "batch_size": self.batch_size,
                }
            )
            for i, row in enumerate(self.rows_layers)
            for j, column in enumerate(self.columns_layers)
        ]

    def chance(self, level: float = 0.95) -> np.ndarray | None:
        """Return the quantile of the permutation baseline, [rows, columns]: what is below it may be chance."""
        return None if self.baseline is None else np.quantile(self.baseline, level, axis=0)

    def diagonal(self) -> np.ndarray:
        """Return the similarity of each layer to the same layer of the other side; both need as many layers."""
        if len(self.rows_layers) != len(self.columns_layers):
            sides = f"{len(self.rows_layers)} and {len(self.columns_layers)}"
            raise UserError(f"layers can be compared one to one only where both sides have as many; got {sides}")
        return np.diagonal(self.values).copy()

    def long_range(self, share: float = 0.5) -> float:
        """Return the mean similarity of layers that are far apart, by at least `share` of the depth.

        mean of S_ij over |i - j| >= share (L - 1), for one model on both sides with L layers. Robust networks are said to
        have more of it than natural ones (Cianfarani et al. 2022, figure 2).
        """
        self.diagonal()
        place = np.arange(len(self.values))
        far = np.abs(place[:, None] - place[None]) >= max(1.0, share * (len(place) - 1))
        found = self.values[far & np.isfinite(self.values)]
        return float(found.mean()) if len(found) else math.nan

    def block_structure(self, least: float = 0.9) -> Block:
        """Return the longest run of consecutive layers of which every pair has a similarity of `least` or more.

        Its share of all layers is the summary number of block structure: 1 where all layers are alike, 1 / L where no two
        neighbors are, and 0 where not even a layer and itself are, which can be between two models. It depends on which
        layers are looked at: compare it between models with the same ones. Of several runs of the same length the first is
        returned. (Block structure as in Nguyen et al. 2021.)
        """
        self.diagonal()
        alike = self.values >= least
        alike &= alike.T
        best, first = (0, 0), 0
        for last in range(len(alike)):
            unlike = np.flatnonzero(~alike[first : last + 1, last])
            if len(unlike):
                first += int(unlike[-1]) + 1
            if last + 1 - first > best[1] - best[0]:
                best = (first, last + 1)
        names: list[str | None] = [layer.name for layer in self.rows_layers[best[0] : best[1]]]
        first_name, last_name = (names[0], names[-1]) if names else (None, None)
        return Block(first_name, last_name, len(names), len(names) / len(alike))

    def parting(self, below: float = 0.5) -> Parting:
        """Return the depth at which two nets part: the first layer l with S_ll < `below`, in execution order.

        For two nets of one architecture, for example a naturally and an adversarially trained one, on the same inputs.
        """
        under = np.flatnonzero(self.diagonal() < below)
        if not len(under):
            return Parting(None, 1.0)
        return Parting(self.rows_layers[under[0]].name, int(under[0]) / len(self.rows_layers))

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw a heat map: a bright square is a pair of layers with similar representations.

        How to read it: layers in execution order from the lower left corner on, thin lines where a stage begins. A bright
        band along the diagonal alone means that every layer does something of its own; a large bright square means that
        the layers in it all represent much the same (block structure).
        """
        axes = axes_or_new(axes, 5.2, 4.6)
        image = axes.imshow(self.values, origin="lower", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        label_layers(axes, self.columns_layers, "x", color="white")
        label_layers(axes, self.rows_layers, "y", color="white")
        bar = axes.figure.colorbar(image, ax=axes, shrink=0.85)
        bar.set_label(f"{self.metric}, 1: same representation")
        return axes


@dataclass(frozen=True)
class CKA(Similarity):
    """Similarity of representations by centered kernel alignment; see `cka`."""

    estimator: Estimator = "unbiased"


def cka(
    model: nn.Module,
    x: Tensor,
    other: nn.Module | None = None,
    other_x: Tensor | None = None,
    *,
    layers: Layers = None,
    other_layers: Layers = None,
    batch_size: int = 250,
    pool: bool = False,
    estimator: Estimator = "unbiased",
    permutations: int = 0,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> CKA:
    """Return the linear CKA of every layer of one side with every layer of the other, in one streaming pass.

    CKA(X, Y) = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)), X [n, p] and Y [n, q] being the flattened outputs of two layers;
    each HSIC is the mean of its estimates on batches of n samples, weighted by n. Unbiased estimator, with K = X X',
    L = Y Y' and zeros on their diagonals:

        HSIC = [tr(KL) + (1'K1)(1'L1) / ((n-1)(n-2)) - 2 1'KL1 / (n-2)] / (n (n-3)).

    `biased` is tr(KHLH) / (n-1)^2 with the centering H = I - 11'/n, and depends on the batch size; the unbiased one does
    not. One batch of all samples gives what is called debiased CKA. CKA does not change when features are rotated or
    scaled as a whole. It does when few samples are far off (Davari et al. 2023): look at `procrustes` too.

    `x`: inputs [n, ...] of `model`, uint8 or floats; natural or adversarial ones, crafted for any model. `other` is the
    second model (the same one if left out) and `other_x` its inputs (the same): row i of both belongs to one sample.
    `layers`, `other_layers`: as in `activations.layers_of`; the other side's are the same if left out. `pool`: features
    averaged over positions. `permutations`: how often the baseline is drawn, from `generator`, inside each batch.

    Memory: one layer's features of a batch and [layers, batch_size^2] float64 for each side. Models are run as `capture`
    does and left as they were. `progress("cka", samples done, samples)`.

    Raises `UserError` for inputs that do not belong together, fewer than 4 samples, and a missing generator.

    Source: Kornblith et al. 2019, section 3; minibatches: Nguyen et al. 2021; of robust networks: Cianfarani et al. 2022.

    >>> net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5))
    >>> found = cka(net, torch.rand(20, 3, generator=torch.Generator().manual_seed(0)))
    >>> found.values.shape, round(float(found.values[0, 0]), 6)
    ((2, 2), 1.0)
    """
    first = layers_of(model, layers, example=x)
    sides = sides_of(model, x, first, other, other_x, layers if other_layers is None else other_layers)
    options: dict[str, Any] = {"estimator": estimator, "permutations": permutations, "generator": generator}
    (found,) = alignments(sides, [(0, len(sides) - 1)], batch_size, pool=pool, progress=progress, **options)
    return found


def alignments(
    sides: Sequence[Side],
    pairs: Sequence[tuple[int, int]],
    batch_size: int,
    *,
    pool: bool = False,
    estimator: Estimator = "unbiased",
    permutations: int = 0,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> list[CKA]:
    """Return the CKA of pairs of sides, by their places: each side is run once, whatever number of pairs it is in.

    The baselines of all pairs are drawn with the same orders. Other arguments and errors as in `cka`.
    """
    if estimator not in _ESTIMATORS:
        raise UserError(one_of("estimator", str(estimator), _ESTIMATORS))
    check_permutations(permutations, generator)
    need, count = 4 if estimator == "unbiased" else 2, len(sides[0].x)
    own = [np.zeros(len(side.layers)) for side in sides]
    cross = [np.zeros((len(own[i]), len(own[j]))) for i, j in pairs]
    chance = [np.zeros((permutations, *values.shape)) for values in cross]
    largest = done = 0
    for grams in gram_batches(sides, batch_size, pool=pool, least=need, estimator=estimator):
        n = grams[0].shape[-1]
        # HSIC's divisor, n (n-3) or (n-1)^2, and the weight n of the batch.
        weight = 1 / (n - 3) if estimator == "unbiased" else n / (n - 1) ** 2
        flat = [gram.flatten(1) for gram in grams]
        for mine, gram in zip(own, flat, strict=True):
            mine += weight * gram.square().sum(1).numpy()
        for values, (i, j) in zip(cross, pairs, strict=True):
            values += weight * (flat[i] @ flat[j].T).numpy()
        for draw in range(permutations):
            order = shuffle(n, generator)
            shuffled = (order[:, None] * n + order[None]).flatten()
            for right in dict.fromkeys(j for _, j in pairs):
                theirs = flat[right][:, shuffled]
                for place, (i, j) in enumerate(pairs):
                    if j == right:
                        chance[place][draw] += weight * (flat[i] @ theirs.T).numpy()
        largest, done = max(largest, n), done + n
        if progress is not None:
            progress("cka", done, count)
    root = [np.sqrt(np.where(value > 0, value, np.nan)) for value in own]
    found = []
    for values, floor, (i, j) in zip(cross, chance, pairs, strict=True):
        scale = root[i][:, None] * root[j][None]
        baseline = floor / scale if permutations else None
        layers = sides[i].layers, sides[j].layers
        found.append(CKA(*layers, values / scale, baseline, count, largest, "CKA", estimator))
    return found


def center(grams: Tensor, estimator: Estimator = "unbiased") -> Tensor:
    """Return Gram matrices [..., n, n] centered so that the sum of the products of two is HSIC times n(n-3) or (n-1)^2.

    `biased` subtracts the means of rows and columns: HKH. `unbiased` does the same with the diagonal left out (Székely &
    Rizzo 2014), which turns the formula of the unbiased estimator into one sum of products.
    """
    n = grams.shape[-1]
    if estimator == "biased":
        return grams - grams.mean(-1, keepdim=True) - grams.mean(-2, keepdim=True) + grams.mean((-2, -1), keepdim=True)
    centered = grams.clone()
    centered.diagonal(dim1=-2, dim2=-1).zero_()
    sums = centered.sum(-1)
    total = sums.sum(-1)[..., None, None]
    centered -= (sums / (n - 2))[..., None]
    centered -= (sums / (n - 2))[..., None, :]
    centered += total / ((n - 1) * (n - 2))
    centered.diagonal(dim1=-2, dim2=-1).zero_()
    return centered


@dataclass(frozen=True)
class Side:
    """A model, its inputs, and the layers that are looked at."""

    model: nn.Module
    x: Tensor
    layers: tuple[Layer, ...]


def sides_of(
    model: nn.Module,
    x: Tensor,
    first: tuple[Layer, ...],
    other: nn.Module | None,
    other_x: Tensor | None,
    other_layers: Layers,
) -> list[Side]:
    """Return one side where both are the same, else two; a single one is not run twice."""
    sides = [Side(model, x, first)]
    if other_x is not None and len(other_x) != len(x):
        raise UserError(f"both sides need the same samples; got {len(x)} and {len(other_x)} inputs")
    second_model, second_x = other if other is not None else model, other_x if other_x is not None else x
    second = layers_of(second_model, other_layers, example=second_x)
    if second_model is not model or second_x is not x or second != first:
        sides.append(Side(second_model, second_x, second))
    return sides


def gram_batches(
    sides: Sequence[Side],
    batch_size: int,
    *,
    pool: bool,
    least: int,
    precise: bool = False,
    estimator: Estimator | None = None,
) -> Iterator[list[Tensor]]:
    """Yield for each batch the Gram matrices of every side, [layers, n, n] in float64 on the CPU; see `gram`.

    With an `estimator` they are centered as `center` does.
    """
    for batch in batches(len(sides[0].x), batch_size, least):
        found = []
        for side in sides:
            n = batch.stop - batch.start
            grams = torch.empty(len(side.layers), n, n, dtype=torch.float64)

            def keep(index: int, output: Tensor, grams: Tensor = grams) -> None:
                one = gram(output, pool=pool, precise=precise)
                grams[index] = one if estimator is None else center(one, estimator)

            capture(side.model, side.x[batch], side.layers, keep)
            found.append(grams)
        yield found


def gram(output: Tensor, *, pool: bool = False, precise: bool = False) -> Tensor:
    """Return the inner products of all samples of [n, ...] after the mean of each feature was subtracted, [n, n].

    No centered Gram matrix changes by the subtraction, and what is left is small enough for the products to be taken in
    the features' own precision. `precise` ones are taken in float64, for uses that look at the smallest eigenvalues.
    """
    features = pooled(output) if pool else output.flatten(1)
    if precise:
        features = features.cpu().double()
    elif features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    features = features - features.mean(0)
    return (features @ features.T).cpu().double()


def check_permutations(permutations: int, generator: torch.Generator | None) -> None:
    """Raise `UserError` unless the number is allowed and the draws have a generator."""
    if isinstance(permutations, bool) or not isinstance(permutations, int) or permutations < 0:
        raise UserError(f"permutations: {permutations!r} is not allowed; allowed: a whole number, 0 or more")
    if permutations and generator is None:
        raise UserError("a permutation baseline is drawn: give a generator, such as torch.Generator().manual_seed(0)")


def shuffle(count: int, generator: torch.Generator | None) -> Tensor:
    """Return a drawn order of `count` samples, on the CPU."""
    device = "cpu" if generator is None else generator.device
    return torch.randperm(count, generator=generator, device=device).cpu()
