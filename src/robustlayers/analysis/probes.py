"""Linear probes: how well a linear classifier reads the labels from each layer's features, clean and under attack.

The probe of a layer is ridge regression of one-hot labels on its pooled features, in closed form, in float64 and without
a draw, so the same model and images give the same numbers. With z the features, standardized by their mean and standard
deviation on the n images that it is fitted on, and Y the labels less their mean,

    W = (Z^T Z + penalty n I)^-1 Z^T Y,    prediction = argmax of z W + mean of Y

(Alain & Bengio 2017, with regression in the place of logistic regression, which has no closed form.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robustlayers.analysis._axes import axes_or_new, lines
from robustlayers.analysis._ground import attacked, check_batch_size, finite_row, slices
from robustlayers.analysis._marks import label_layers
from robustlayers.analysis.activations import Layer, Layers, capture, layers_of, pooled
from robustlayers.attacks import Attack
from robustlayers.core.errors import UserError
from robustlayers.core.quantities import number
from robustlayers.evaluation import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ProbeRow", "Probes", "probes"]

CLEAN, ADVERSARIAL = "clean", "adversarial"


@dataclass(frozen=True)
class ProbeRow:
    """One probe on one kind of held-out images.

    `fitted_on` and `tested_on` are `clean` or `adversarial`; `fit_accuracy` is the accuracy on the images that the probe
    was fitted on, `accuracy` on the held-out ones, both in [0, 1]; `gap` is their difference, where both kinds are equal.
    """

    layer: str
    kind: str
    features: int
    fitted_on: str
    tested_on: str
    fit_accuracy: float
    accuracy: float
    gap: float | None


@dataclass(frozen=True)
class Probes:
    """The probes of all layers, in order of execution.

    How to read it: layers in execution order, a line for each kind of images that a probe was fitted on and then tested
    on, held-out ones. Where `clean to adversarial` leaves `clean to clean`, the features of attacked images are no longer
    those of their class; where `adversarial to adversarial` stays high, the label can still be read, only in another
    direction.
    """

    layers: tuple[Layer, ...]
    results: tuple[ProbeRow, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Return one plain row for each layer, kind of images fitted on and kind tested on."""
        return [finite_row(asdict(row)) for row in self.results]

    def of(self, fitted_on: str = CLEAN, tested_on: str = CLEAN) -> list[ProbeRow]:
        """Return the rows of all layers for one pair of kinds; one that was not measured is a `UserError`."""
        found = [row for row in self.results if (row.fitted_on, row.tested_on) == (fitted_on, tested_on)]
        if not found:
            pairs = dict.fromkeys(f"{row.fitted_on} to {row.tested_on}" for row in self.results)
            raise UserError(f"probes: {fitted_on} to {tested_on} was not measured; allowed: {', '.join(pairs)}")
        return found

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw held-out accuracy in percent over the layers, a line for each pair of kinds: fitted on to tested on."""
        pairs = list(dict.fromkeys((row.fitted_on, row.tested_on) for row in self.results))
        axes = axes_or_new(axes, 5.0, 3.8)
        found = {" to ".join(pair): [100 * row.accuracy for row in self.of(*pair)] for pair in pairs}
        lines(axes, found, [name for name, pair in zip(found, pairs, strict=True) if pair[0] != CLEAN])
        label_layers(axes, self.layers, "x")
        axes.set_ylim(0, 100)
        axes.set_ylabel("accuracy of the probe, %")
        axes.legend(frameon=False, fontsize="small", loc="lower right")
        return axes


def probes(
    model: nn.Module,
    layers: Layers,
    fit: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    *,
    attack: Attack | None = None,
    penalty: float | str = 1e-3,
    batch_size: int = 500,
    seed: int = 0,
    progress: Progress | None = None,
) -> Probes:
    """Return for each layer the accuracy of linear probes on its features, averaged over everything behind the channels.

    Args:
        model: frozen: in evaluation mode, by running statistics; left as it was.
        layers: a selector, names of layers, or None for all convolutions, norm layers, linear layers and activations; see
            `activations.layers_of`.
        fit: (x, y) that the probes are fitted on: images [n, c, h, w], uint8 or float in [0, 1], and labels from 0.
        held_out: (x, y) that they are tested on.
        attack: crafted against the model itself, not against the probe, on both parts. Then there are four pairs: fitted
            on clean or adversarial images, tested on clean or adversarial ones. None: clean images only.
        penalty: of the ridge, relative to the number of images; more than 0.
        seed: of the attack's draws.

    Memory: a matrix of features x features in float64 for each layer and kind of images. Cost: the attack on all images,
    and for each kind two forwards of `fit` and one of `held_out`.

    Raises `UserError` for unknown layers, and for values that are not allowed.
    """
    check_batch_size(batch_size)
    penalty = number(penalty, "penalty")
    if penalty <= 0:
        raise UserError(f"penalty: {penalty:g} is not allowed; allowed: more than 0")
    if not len(fit[0]) or not len(held_out[0]):
        raise UserError("probes: there is no image to fit on, or none to test on")
    chosen = layers_of(model, layers, example=fit[0][:4])
    classes = int(fit[1].max()) + 1
    kinds = (CLEAN,) if attack is None else (CLEAN, ADVERSARIAL)
    crafted = (len(fit[0]) + len(held_out[0])) * (attack is not None)
    done, total = 0, crafted + len(kinds) * (2 * len(fit[0]) + len(held_out[0]))

    def advance(what: str, images: int) -> None:
        nonlocal done
        done += images
        if progress is not None:
            progress(what, done, total)

    parts: dict[tuple[str, bool], tuple[Tensor, Tensor]] = {}  # (kind, held out) -> (x, y)
    for part, last in ((fit, False), (held_out, True)):
        for kind in kinds:
            seen = 0

            def crafting(images: int) -> None:
                nonlocal seen
                advance("crafting", images - seen)
                seen = images

            used = attack if kind == ADVERSARIAL else None
            parts[kind, last] = attacked(model, *part, used, batch_size=batch_size, seed=seed, report=crafting)

    fitted: dict[str, list[_Probe]] = {}
    for kind in kinds:
        moments = [_Moments(classes) for _ in chosen]
        x, y = parts[kind, False]
        for batch in slices(len(x), batch_size):
            labels = y[batch]
            capture(model, x[batch], chosen, lambda i, out, m=moments, labels=labels: m[i].add(pooled(out), labels))
            advance(f"fitting on {kind} images", len(labels))
        fitted[kind] = [each.solve(penalty) for each in moments]

    right: dict[tuple[str, str, bool], list[int]] = {}
    for (kind, last), (x, y) in parts.items():
        judges = kinds if last else (kind,)
        for judge in judges:
            right[judge, kind, last] = [0] * len(chosen)
        for batch in slices(len(x), batch_size):

            def judged(index: int, output: Tensor, kind=kind, last=last, judges=judges, labels=y[batch]) -> None:
                features = pooled(output)
                for judge in judges:
                    right[judge, kind, last][index] += fitted[judge][index].right(features, labels)

            capture(model, x[batch], chosen, judged)
            advance(f"testing on {kind} images", batch.stop - batch.start)
    counts = (len(fit[0]), len(held_out[0]))
    return Probes(chosen, tuple(_rows(chosen, kinds, fitted, right, counts)))


def _rows(
    layers: Sequence[Layer],
    kinds: Sequence[str],
    fitted: dict[str, list[_Probe]],
    right: dict[tuple[str, str, bool], list[int]],
    counts: tuple[int, int],
) -> list[ProbeRow]:
    rows = []
    for one in kinds:
        for two in kinds:
            for index, layer in enumerate(layers):
                before, after = right[one, one, False][index] / counts[0], right[one, two, True][index] / counts[1]
                gap = before - after if one == two else None
                rows.append(
                    ProbeRow(layer.name, layer.kind, len(fitted[one][index].mean), one, two, before, after, gap)
                )
    return rows


class _Moments:
    """Sums over images of features, their products, and their products with one-hot labels, in float64."""

    def __init__(self, classes: int) -> None:
        self.classes, self.count = classes, 0
        self.sums: list[Tensor] = []

    def add(self, features: Tensor, y: Tensor) -> None:
        """Take in features [n, d] and labels [n]."""
        z = features.double()
        labels = torch.nn.functional.one_hot(y, self.classes).double()
        if not self.count:
            # Sums of squares about a first guess of the mean lose no digits where the mean is large.
            self.guess = z.mean(0)
        z = z - self.guess
        found = [z.sum(0), labels.sum(0), z.T @ z, z.T @ labels]
        self.sums = [one + two for one, two in zip(self.sums, found, strict=True)] if self.count else found
        self.count += len(z)

    def solve(self, penalty: float) -> _Probe:
        """Return the probe of everything that was taken in."""
        n = self.count
        mean, share = self.sums[0] / n, self.sums[1] / n
        gram = self.sums[2] - n * torch.outer(mean, mean)
        cross = self.sums[3] - n * torch.outer(mean, share)
        deviation = (gram.diagonal() / n).clamp_min(0).sqrt()
        # A feature that never changes says nothing: its row of products is zero, and so are its weights.
        alive = deviation > 1e-12 * (1 + self.guess.abs())
        scale = torch.where(alive, deviation, 1).reciprocal() * alive
        gram, cross = gram * torch.outer(scale, scale), cross * scale[:, None]
        ridge = penalty * n * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weights = torch.cholesky_solve(cross, torch.linalg.cholesky(gram + ridge))
        return _Probe(mean + self.guess, scale[:, None] * weights, share)


@dataclass(frozen=True)
class _Probe:
    """A linear classifier of features: (z - mean) W + share."""

    mean: Tensor
    weights: Tensor
    share: Tensor

    def right(self, features: Tensor, y: Tensor) -> int:
        """Return how many of the labels are predicted."""
        scores = (features.double() - self.mean) @ self.weights + self.share
        return int((scores.argmax(1) == y).sum())
