"""Common corruptions made in code: noise, blur, weather and digital artifacts at five severities, and accuracy on them.

Families and numbers are those of CIFAR-10-C (Hendrycks & Dietterich 2019, "Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations", and the code that made the data). Departures: images are not rounded to bytes
(but by JPEG), frost is procedural, and filters are our own. So numbers compare models measured here; they are close to,
and must not be called, those on the published files. All 15 families of the benchmark and its 4 extra ones are here.

| group | families |
|---|---|
| noise | gaussian-noise, shot-noise, impulse-noise |
| blur | defocus-blur, glass-blur, motion-blur, zoom-blur |
| weather | snow, procedural-frost, fog, brightness |
| digital | contrast, elastic-transform, pixelate, jpeg-compression |
| extra | speckle-noise, gaussian-blur, spatter, saturate |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from robustlayers.attacks import is_correct
from robustlayers.core.errors import UserError, one_of
from robustlayers.core.random import stream
from robustlayers.evaluation import corruption_formulas as formulas
from robustlayers.evaluation._drawing import grid
from robustlayers.evaluation._still import Forward, check_labels, device_of, images
from robustlayers.evaluation._views import check_by, held, seed_draws
from robustlayers.evaluation.accuracy import Progress
from robustlayers.evaluation.intervals import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CORRUPTIONS", "SEVERITIES", "Corruption", "CorruptionTable", "corrupt", "corruption_accuracy"]

SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Corruption:
    """A family: its formula, and the numbers of its five severities.

    `group` is `noise`, `blur`, `weather`, `digital`, or `extra` for those that the benchmark keeps for validation and
    leaves out of its mean. `channels`: how many channels images may have; None for any number.
    """

    group: str
    formula: formulas.Formula
    levels: tuple[Any, Any, Any, Any, Any]
    channels: tuple[int, ...] | None = None


CORRUPTIONS: Mapping[str, Corruption] = {
    "gaussian-noise": Corruption("noise", formulas.gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot-noise": Corruption("noise", formulas.shot_noise, (500, 250, 100, 75, 50)),
    "impulse-noise": Corruption("noise", formulas.impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus-blur": Corruption(
        "blur", formulas.defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))
    ),
    "glass-blur": Corruption("blur", formulas.glass_blur, ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))),
    "motion-blur": Corruption("blur", formulas.motion_blur, ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))),
    "zoom-blur": Corruption("blur", formulas.zoom_blur, (1.06, 1.11, 1.15, 1.20, 1.25)),
    "snow": Corruption(
        "weather",
        formulas.snow,
        (
            (0.1, 0.2, 1.0, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1.0, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "procedural-frost": Corruption(
        "weather", formulas.frost, ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))
    ),
    "fog": Corruption("weather", formulas.fog, ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))),
    "brightness": Corruption("weather", formulas.brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Corruption("digital", formulas.contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic-transform": Corruption(
        "digital",
        formulas.elastic_transform,
        ((0.0, 0.0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": Corruption("digital", formulas.pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg-compression": Corruption("digital", formulas.jpeg_compression, (80, 65, 58, 50, 40), (1, 3)),
    "speckle-noise": Corruption("extra", formulas.speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian-blur": Corruption("extra", formulas.gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "spatter": Corruption(
        "extra",
        formulas.spatter,
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, False),
            (0.65, 0.1, 0.8, 0.7, 0.5, False),
            (0.65, 0.3, 1.0, 0.69, 0.5, False),
            (0.65, 0.1, 0.7, 0.69, 0.6, True),
            (0.65, 0.1, 0.5, 0.68, 0.6, True),
        ),
    ),
    "saturate": Corruption("extra", formulas.saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2.0, 0.1), (2.5, 0.2)), (3,)),
}
"""Families by name, in the order of the paper."""


def corrupt(x: Tensor, family: str, severity: int, *, seed: int = 0, first: int = 0) -> Tensor:
    """Return corrupted images, in [0, 1], on the device of `x`.

    `x`: images [n, c, h, w], uint8 or floats in [0, 1]; bytes give float32. `family`: a name of `CORRUPTIONS`;
    `severity`: 1 to 5. `first`: the place of the first image in its data set. Image i draws from a stream of (seed,
    family, first + i): the same in every batch, and the same draws at every severity.

    A higher severity is farther from the clean image, but not in every family: by the published numbers, glass blur,
    frost, elastic transform and saturate change their character on the way, and spatter is of water up to 3, then of mud.

    Raises `UserError` for an unknown family or severity, images outside [0, 1], and channels that a family does not do.

    >>> corrupt(torch.full((1, 1, 2, 2), 0.5), "brightness", 5)[0, 0, 0]
    tensor([0.8000, 0.8000])
    """
    corruption = _find(family)
    if severity not in SEVERITIES or isinstance(severity, bool):
        raise UserError(f"severity: {severity!r} is not allowed; allowed: 1 to 5")
    x = images(x, x.device)
    if x.ndim != 4:
        raise UserError(f"{family}: takes images [n, c, h, w]; got shape {list(x.shape)}")
    if corruption.channels is not None and x.shape[1] not in corruption.channels:
        allowed = " or ".join(map(str, corruption.channels))
        raise UserError(f"{family}: images with {x.shape[1]} channels; allowed: {allowed}")
    if not x.numel():
        return x.clone()
    draws = [stream(seed, "corruption", family, first + place) for place in range(len(x))]
    with torch.no_grad():
        return corruption.formula(x, corruption.levels[severity - 1], draws).clamp(0, 1)


@dataclass(frozen=True)
class CorruptionTable:
    """How many of `total` images are right, clean and by family and severity; see `corruption_accuracy`.

    `means`, `mean` and `mean_error` are means of accuracies with equal weights; `mean` is over the families of the
    benchmark, without `extra`, unless there are no others. The paper's mCE divides by the errors of an AlexNet; with a
    table of another model, `relative_to` does.
    """

    families: tuple[str, ...]
    severities: tuple[int, ...]
    counts: Mapping[str, tuple[int, ...]]  # family -> right images for each severity
    clean: int
    total: int
    by: str

    def accuracy(self, family: str, severity: int) -> float:
        """Return the accuracy in one cell, in [0, 1]."""
        if family not in self.counts:
            raise UserError(one_of("family of this table", family, self.families))
        if severity not in self.severities:
            raise UserError(
                f"severity: {severity!r} was not measured; measured: {', '.join(map(str, self.severities))}"
            )
        return self.counts[family][self.severities.index(severity)] / self.total

    @property
    def means(self) -> dict[str, float]:
        """Mean accuracy over the severities, by family."""
        return {family: sum(self.counts[family]) / self.total / len(self.severities) for family in self.families}

    @property
    def mean(self) -> float:
        """Mean accuracy over families and severities, not normalized by a reference model."""
        means = self.means
        counted = [family for family in self.families if CORRUPTIONS[family].group != "extra"] or self.families
        return sum(means[family] for family in counted) / len(counted)

    @property
    def mean_error(self) -> float:
        """1 - `mean`: the mean corruption error without a reference."""
        return 1 - self.mean

    def relative_to(self, reference: CorruptionTable) -> float:
        """Return the mCE: the mean over families of sum of errors / sum of the reference's errors, 1 for the same.

        Over the families of the benchmark that both have. Raises `UserError` where the tables differ in severities or
        have no such family, and where the reference makes no error.
        """
        if self.severities != reference.severities:
            raise UserError("relative_to: the tables were measured at different severities")
        shared = [f for f in self.families if f in reference.counts and CORRUPTIONS[f].group != "extra"]
        if not shared:
            raise UserError("relative_to: the tables share no family of the benchmark")
        ours, theirs = self.means, reference.means
        faultless = [family for family in shared if theirs[family] == 1]
        if faultless:
            raise UserError(f"relative_to: the reference makes no error under {', '.join(faultless)}")
        return sum((1 - ours[family]) / (1 - theirs[family]) for family in shared) / len(shared)

    def rows(self) -> list[dict[str, Any]]:
        """Return one plain row for each cell, the clean images first as severity 0, with exact intervals."""
        cells = [("clean", "", 0, self.clean)]
        for family in self.families:
            cells += [
                (family, CORRUPTIONS[family].group, severity, count)
                for severity, count in zip(self.severities, self.counts[family], strict=True)
            ]
        found = []
        for family, group, severity, count in cells:
            low, high = interval(count, self.total)
            value = count / self.total
            found.append(
                {
                    "family": family,
                    "group": group,
                    "severity": severity,
                    "accuracy": value,
                    "low": low,
                    "high": high,
                    "count": count,
                    "total": self.total,
                    "by": self.by,
                }
            )
        return found

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw accuracies in percent, families from the top down, severities from left to right."""
        values = [[count / self.total for count in self.counts[family]] for family in self.families]
        return grid(axes, values, self.families, [str(s) for s in self.severities], "severity", "")


def corruption_accuracy(
    model: Forward,
    x: Tensor,
    y: Tensor,
    families: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    batch_size: int = 500,
    *,
    seed: int = 0,
    by: str = "running",
    progress: Progress | None = None,
) -> CorruptionTable:
    """Return the accuracy of a model on corrupted images, by family and severity.

    `model`: an `nn.Module`, held in evaluation mode and left without a trace, or a function from images to logits.
    `x`: images [n, c, h, w], uint8 or floats in [0, 1]; `y`: labels [n]. `families`: None means all that the channels
    of the images allow. `by`: norm layers normalize by `running` statistics, or by those of each `batch`, which adapts
    them to the corruption (Schneider et al. 2020; Benz et al. 2021); then the result depends on `batch_size` and on the
    order of the images. Cost: a forward for each image, family and severity.

    Every image counts, also those that are wrong clean. Raises `UserError` as `corrupt` does.
    """
    check_labels(x, y)
    check_by(by)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch_size: {batch_size!r} is not allowed; allowed: a whole number, 1 or more")
    if families is None:
        families = [name for name, c in CORRUPTIONS.items() if c.channels is None or x.shape[1] in c.channels]
    for family in families:
        _find(family)
    device = device_of(model, x)
    rest = range(0, len(x), batch_size)

    def right(family: str, severity: int) -> int:
        count = 0
        for first in rest:
            batch = images(x[first : first + batch_size], device)
            if severity:
                batch = corrupt(batch, family, severity, seed=seed, first=first)
            seed_draws(model, seed, "corruption", family, severity, first)
            count += int(is_correct(model(batch), y[first : first + batch_size].to(device)).sum())
            if progress is not None:
                name = f"{family} {severity}" if severity else family
                progress(name, min(first + batch_size, len(x)), len(x))
        return count

    with held(model, device, by), torch.no_grad():
        clean = right("clean", 0)
        counts = {family: tuple(right(family, severity) for severity in severities) for family in families}
    return CorruptionTable(tuple(families), tuple(severities), counts, clean, len(x), by)


def _find(family: str) -> Corruption:
    if family not in CORRUPTIONS:
        raise UserError(one_of("corruption", str(family), CORRUPTIONS, most=20))
    return CORRUPTIONS[family]
