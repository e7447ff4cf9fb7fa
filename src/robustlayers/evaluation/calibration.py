"""Calibration: whether a model that says it is 80 % sure is right in 80 % of such cases, clean and under attack."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robustlayers.attacks import Attack, is_own, label
from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.evaluation._cross import check_batch_size, described, slices
from robustlayers.evaluation._drawing import GRAY, SERIES, axes_or_new
from robustlayers.evaluation._still import Forward, check_labels, device_of, images, still, untouched
from robustlayers.evaluation._views import seed_draws
from robustlayers.evaluation.accuracy import Progress, _check
from robustlayers.normalization.fold import crafting_forward

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Bin", "Calibration", "calibration", "expected_calibration_error", "reliability"]


@dataclass(frozen=True)
class Bin:
    """Images whose confidence lies in (low, high]: how many, their mean confidence, and the share that is right."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """How well confidences fit accuracies, on n images; see `calibration`.

    `ece` over 15 equal-width bins and `adaptive_ece` over bins of equal counts, in [0, 1]; `confidence` and `accuracy`
    are means (their difference is over-confidence where positive); `nll` is the mean cross-entropy in nats; `brier` the
    mean squared distance of the probabilities from the one-hot label, in [0, 2].
    """

    bins: tuple[Bin, ...]
    ece: float
    adaptive_ece: float
    confidence: float
    accuracy: float
    nll: float
    brier: float
    total: int
    attack: str

    def rows(self) -> list[dict[str, Any]]:
        """Return one plain row for each bin; an empty one has no confidence and no accuracy."""
        rows = [asdict(one) for one in self.bins]
        return [row if row["count"] else {**row, "confidence": None, "accuracy": None} for row in rows]

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the reliability diagram: accuracy against confidence, bin by bin, areas of dots as counts.

        How to read it: on the diagonal a model is calibrated, below it is over-confident. A bin of few images says
        little.
        """
        axes = axes_or_new(axes, 3.6, 3.4)
        seen = [one for one in self.bins if one.count]
        axes.plot([0, 1], [0, 1], "--", color=GRAY, linewidth=1)
        confidences, accuracies = [one.confidence for one in seen], [one.accuracy for one in seen]
        axes.plot(confidences, accuracies, color=SERIES[0], linewidth=1)
        axes.scatter(confidences, accuracies, [8 + 300 * one.count / self.total for one in seen], color=SERIES[0])
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy")
        axes.set_title(f"ECE {100 * self.ece:.1f} points", fontsize="medium")
        return axes


def reliability(confidences: Tensor, right: Tensor, bins: int = 15, *, adaptive: bool = False) -> tuple[Bin, ...]:
    """Return images in bins by confidence: of equal width, (k/bins, (k+1)/bins], or `adaptive`, of equal counts.

    `confidences`: [n] in [0, 1]; `right`: bool [n]. The first equal-width bin holds 0 too. Adaptive bins divide the
    images in order of confidence; there are at most n, and equal confidences may be divided between two, in the order of
    the images. Raises `UserError` for other shapes, values outside [0, 1], no image, or no bin.
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise UserError(f"bins: {bins!r} is not allowed; allowed: a whole number, 1 or more")
    confidences, right = confidences.detach().cpu().double(), right.detach().cpu()
    if confidences.ndim != 1 or confidences.shape != right.shape or right.dtype != torch.bool or not len(right):
        raise UserError("reliability: takes confidences [n] and bool verdicts [n], n 1 or more")
    if not bool(((confidences >= 0) & (confidences <= 1)).all()):  # also for NaN
        raise UserError("reliability: confidences are probabilities in [0, 1]")
    n = len(confidences)
    if adaptive:
        order = confidences.argsort(stable=True)
        bins = min(bins, n)
        groups = [order[part * n // bins : (part + 1) * n // bins] for part in range(bins)]
        edges = [(float(confidences[group[0]]), float(confidences[group[-1]])) for group in groups]
    else:
        uppers = torch.arange(1, bins, dtype=torch.float64) / bins
        places = torch.bucketize(confidences, uppers)  # edges belong to the bin below
        groups = [(places == place).nonzero().flatten() for place in range(bins)]
        edges = [(place / bins, (place + 1) / bins) for place in range(bins)]
    return tuple(
        Bin(
            *edge,
            len(group),
            float(confidences[group].mean()) if len(group) else 0.0,
            float(right[group].double().mean()) if len(group) else 0.0,
        )
        for edge, group in zip(edges, groups, strict=True)
    )


def expected_calibration_error(confidences: Tensor, right: Tensor, bins: int = 15, *, adaptive: bool = False) -> float:
    """Return sum over bins of (n_b / n) |accuracy_b - confidence_b|, in [0, 1]; arguments and errors as `reliability`.

    Equal widths: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2 (bins of Naeini et al. 2015);
    equal counts: Nixon et al. 2019, "Measuring Calibration in Deep Learning". Both are biased upwards on few images.

    >>> round(expected_calibration_error(torch.tensor([0.9, 0.9]), torch.tensor([True, False])), 6)
    0.4
    """
    found = reliability(confidences, right, bins, adaptive=adaptive)
    return sum(one.count * abs(one.accuracy - one.confidence) for one in found) / len(right)


def calibration(
    model: Forward,
    x: Tensor,
    y: Tensor,
    attack: Attack | None = None,
    batch_size: int = 500,
    *,
    bins: int = 15,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Return how well the confidences max softmax(z) of a model fit its accuracy, clean or under an attack.

    `model`: an `nn.Module`, evaluated in evaluation mode with norm layers by running statistics and left without a
    trace, or a function from images to logits. `x`: images [n, c, h, w], uint8 or floats in [0, 1]; `y`: labels [n].
    Under an attack, every image is attacked and only the attacked image counts; its accuracy may be a little above that
    of `accuracy`, where a wrong clean image counts as wrong. An attack that looks for wrong predictions does not look
    for the worst calibration.

    Raises `UserError` as `accuracy` and `reliability` do, and for logits that are not finite.
    """
    check_labels(x, y)
    check_batch_size(batch_size)
    device = device_of(model, x)
    found = []
    with still(model, device):
        for batch, logits in _logits(model, x, y, attack, batch_size, seed, device):
            if not bool(logits.isfinite().all()):
                raise UserError("calibration: there are logits that are not finite")
            found.append(logits)
            if progress is not None:
                progress("calibration", batch.stop, len(x))
    logs = torch.cat(found).double().log_softmax(1)
    labels = y.detach().cpu().long()
    probabilities = logs.exp()
    confidences, predictions = probabilities.max(1)
    right = predictions == labels
    truth = nn.functional.one_hot(labels, logs.shape[1])
    return Calibration(
        bins=reliability(confidences.clamp_max(1), right, bins),
        ece=expected_calibration_error(confidences.clamp_max(1), right, bins),
        adaptive_ece=expected_calibration_error(confidences.clamp_max(1), right, bins, adaptive=True),
        confidence=float(confidences.mean()),
        accuracy=float(right.double().mean()),
        nll=float(-logs.gather(1, labels[:, None]).mean()),
        brier=float((probabilities - truth).square().sum(1).mean()),
        total=len(labels),
        attack="" if attack is None else described(attack),
    )


def _logits(
    model: Forward, x: Tensor, y: Tensor, attack: Attack | None, batch_size: int, seed: int, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    crafting = (
        crafting_forward(model) if attack is not None and is_own(attack) and isinstance(model, nn.Module) else model
    )
    for batch in slices(len(x), batch_size):
        pixels = images(x[batch], device)
        if attack is not None:
            generator = stream(seed, "calibration", label(attack), batch.start)
            seed_draws(model, seed, "calibration", label(attack), batch.start)
            with untouched(model):
                adversarial = attack(crafting, pixels, y[batch].to(device), generator=generator)
            _check(label(attack), attack, adversarial, pixels)
            pixels = adversarial.to(pixels.dtype)
        seed_draws(model, seed, "calibration", "verdict", batch.start)
        with torch.no_grad():
            yield batch, model(pixels).detach().cpu()
