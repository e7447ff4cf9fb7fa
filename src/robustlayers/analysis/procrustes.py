"""Orthogonal Procrustes: how well a rotation turns one layer's representation into another's, as a check of CKA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from robustlayers.analysis.activations import Layers, batches, capture, layers_of, pooled
from robustlayers.analysis.cka import Side, Similarity, check_permutations, gram_batches, shuffle, sides_of
from robustlayers.core.errors import UserError
from robustlayers.evaluation import Progress

__all__ = ["Procrustes", "nuclear", "procrustes", "roots"]

_NEGLIGIBLE = 1e-12  # of the largest eigenvalue: what rounding in float64 leaves where there is nothing


@dataclass(frozen=True)
class Procrustes(Similarity):
    """Similarity of representations by orthogonal Procrustes; see `procrustes`. `distances` are 1 - `values`.

    `values` is NaN for pairs that were not computed.
    """

    @property
    def distances(self) -> np.ndarray:
        """The normalized distance of each pair, in [0, 1]; 0 for representations that a rotation makes equal."""
        return 1 - self.values


def procrustes(
    model: nn.Module,
    x: Tensor,
    other: nn.Module | None = None,
    other_x: Tensor | None = None,
    *,
    layers: Layers = None,
    other_layers: Layers = None,
    same_layer: bool = False,
    batch_size: int = 250,
    pool: bool = False,
    permutations: int = 0,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Procrustes:
    """Return the Procrustes similarity of every layer of one side with every layer of the other.

    X [n, p] and Y [n, q] are the flattened outputs of two layers, features centered, divided by their Frobenius norms. The
    best rotation leaves min_R |X - YR|_F^2 = 2 - 2 |X'Y|_*, with |.|_* the sum of singular values; the normalized distance
    is half of that, 1 - |X'Y|_* in [0, 1], and the similarity |X'Y|_*. It does not change when features are rotated or
    scaled as a whole. Unlike CKA, which squares the singular values, it counts directions of little variance too.

    |X'Y|_* is computed from the Gram matrices of a batch: with K = XX' = AA' and L = YY' = BB' it is |A'B|_*, where A and B
    have n columns at most, however many features there are. The result is the mean over batches, weighted by their size.
    It grows as samples get fewer, since n points fit into n dimensions: compare results of the same `batch_size` only, and
    with the baseline that `permutations` gives.

    With `pool` features are averaged over positions, which leaves as many as there are channels. They are kept, [n, c] of
    every layer, and all samples are taken at once: the result does not depend on `batch_size`, and means something with
    fewer samples. It does not see where in an image a feature is.

    With `same_layer` each layer is compared with the same one of the other side only, the diagonal; all other values are
    NaN. Cost: for each batch and pair the singular values of an n x n matrix, about 10 ms for n = 250 on one core, once
    for every permutation, so choose few `layers` or `same_layer`; with `pool` of one c x c' matrix, a millisecond for 64
    channels. Other arguments and errors as in `cka`; `progress("procrustes", layers done, layers of all batches)`.

    Source: Schönemann 1966; as a distance of representations: Ding et al. 2021 (Grounding representation similarity).

    >>> net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5))
    >>> found = procrustes(net, torch.rand(20, 3, generator=torch.Generator().manual_seed(0)))
    >>> round(float(found.values[0, 0]), 5)
    1.0
    """
    check_permutations(permutations, generator)
    first = layers_of(model, layers, example=x)
    sides = sides_of(model, x, first, other, other_x, layers if other_layers is None else other_layers)
    second = sides[-1].layers
    if same_layer and len(first) != len(second):
        raise UserError(f"same_layer needs as many layers on both sides; got {len(first)} and {len(second)}")
    wanted = [[j for j in range(len(second)) if i == j or not same_layer] for i in range(len(first))]
    values = np.full((len(first), len(second)), np.nan)
    chance = np.full((permutations, *values.shape), np.nan)
    for i, columns in enumerate(wanted):
        values[i, columns] = 0
        chance[:, i, columns] = 0
    largest, done = 0, 0
    total = len(first) * (1 if pool else len(batches(len(x), batch_size, 2)))
    symmetric = len(sides) == 1
    for found in _pooled_roots(sides, batch_size) if pool else _gram_roots(sides, batch_size):
        with _one_thread():
            mine, theirs = found[0], found[-1]
            n = len(mine[0])
            weight = n / len(x)
            orders = [shuffle(n, generator) for _ in range(permutations)]
            for i, columns in enumerate(wanted):
                for j in columns:
                    if not symmetric or i <= j:
                        values[i, j] += weight * nuclear(mine[i], theirs[j])
                    for draw, order in enumerate(orders):
                        chance[draw, i, j] += weight * nuclear(mine[i], theirs[j][order])
                done += 1
                if progress is not None:
                    progress("procrustes", done, total)
        largest = max(largest, n)
    if symmetric:
        values = np.where(np.tri(len(values), k=-1, dtype=bool), values.T, values)
    return Procrustes(
        rows_layers=first,
        columns_layers=second,
        values=values,
        baseline=chance if permutations else None,
        samples=len(x),
        batch_size=largest,
        metric="Procrustes",
    )


def _gram_roots(sides: Sequence[Side], batch_size: int) -> Iterator[list[list[Tensor]]]:
    """Yield for each batch and side the roots of all layers' Gram matrices."""
    for grams in gram_batches(sides, batch_size, pool=False, least=2, precise=True):
        with _one_thread():
            yield [roots(of) for of in grams]


def _pooled_roots(sides: Sequence[Side], batch_size: int) -> Iterator[list[list[Tensor]]]:
    """Yield once, for each side, the pooled features of all layers and samples, centered and of norm 1."""
    found = []
    for side in sides:
        parts: list[list[Tensor]] = [[] for _ in side.layers]
        for batch in batches(len(side.x), batch_size, 2):
            capture(
                side.model, side.x[batch], side.layers, lambda i, out, p=parts: p[i].append(pooled(out).cpu().double())
            )
        found.append([_unit(torch.cat(layer)) for layer in parts])
    yield found


def _unit(features: Tensor) -> Tensor:
    """Return features [n, c] centered and divided by their norm, with n columns at most; NaN where they are constant."""
    features = features - features.mean(0)
    if features.shape[1] > len(features):
        return roots((features @ features.T)[None])[0]
    length = torch.linalg.vector_norm(features)
    return features / length if length > 0 else torch.full_like(features, torch.nan)


def roots(grams: Tensor) -> list[Tensor]:
    """Return for each Gram matrix K [n, n] a matrix A [n, rank] with AA' = K / tr K; NaN where K is zero."""
    found = []
    for gram in grams:
        values, vectors = torch.linalg.eigh(gram)
        kept = values > _NEGLIGIBLE * values[-1]
        if not bool(kept.any()) or float(values[-1]) <= 0:
            found.append(torch.full((len(gram), 1), torch.nan, dtype=gram.dtype))
            continue
        root = vectors[:, kept] * values[kept].sqrt()
        found.append(root / torch.linalg.vector_norm(root))
    return found


def nuclear(one: Tensor, other: Tensor) -> float:
    """Return the sum of the singular values of one' other, for [n, p] and [n, q] of norm 1: at most 1 up to rounding."""
    product = one.T @ other
    if not bool(product.isfinite().all()):
        return float("nan")
    return min(1.0, float(torch.linalg.svdvals(product).sum()))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Decompose matrices of this size on one thread: two take as long on idle cores, and five times that on busy ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
