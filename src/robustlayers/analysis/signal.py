"""Perturbation-to-signal ratios: how much of a perturbation of the input arrives at each layer, and each channel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from robustlayers.analysis._axes import GRAY, SERIES, axes_or_new, round_ticks
from robustlayers.analysis._ground import finite_row
from robustlayers.analysis._marks import label_layers
from robustlayers.analysis._ridges import Limits, ridges
from robustlayers.analysis.activations import Layer, Layers, batches, capture, layers_of
from robustlayers.core.errors import UserError, one_of
from robustlayers.evaluation import Progress
from robustlayers.evaluation._still import images

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["NORMS", "QUANTILES", "ChannelSpread", "SignalExcess", "SignalRatio", "signal_ratio"]

NORMS = {"l1": 1.0, "l2": 2.0, "linf": math.inf}
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class SignalRatio:
    """Perturbation-to-signal ratios; see `signal_ratio`.

    `samples[perturbation]` [norms, layers, n]: the ratio of each sample; infinite where its clean output is zero and the
    perturbed one is not, NaN where both are. `channels[perturbation]`: for each layer [norms, c], with the mean norm of the
    difference over the mean norm of the clean output, over samples, since a channel of a ReLU is zero for many of them;
    NaN for a channel that is zero for all.
    """

    layers: tuple[Layer, ...]
    samples: Mapping[str, np.ndarray]
    channels: Mapping[str, tuple[np.ndarray, ...]]
    norms: tuple[str, ...] = tuple(NORMS)

    def ratios(self, perturbation: str, norm: str = "l2") -> np.ndarray:
        """Return the ratios of all samples under one perturbation in one norm, [layers, n]."""
        return self.samples[self._known(perturbation)][self._norm(norm)]

    def quantiles(self, perturbation: str, norm: str = "l2", levels: Sequence[float] = QUANTILES) -> np.ndarray:
        """Return quantiles over samples, [layers, levels]; samples without a ratio are left out, NaN if all are."""
        return np.stack([_quantiles(values, levels) for values in self.ratios(perturbation, norm)])

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each perturbation, norm and layer, with quantiles over samples."""
        found = []
        for name in self.samples:
            for norm in self.norms:
                for layer, values in zip(self.layers, self.quantiles(name, norm), strict=True):
                    levels = {f"q{100 * level:02.0f}": float(v) for level, v in zip(QUANTILES, values, strict=True)}
                    about = {"perturbation": name, "norm": norm, "layer": layer.name, "kind": layer.kind}
                    found.append(finite_row(about | levels | {"samples": self.samples[name].shape[-1]}))
        return found

    def channel_rows(self) -> list[dict[str, Any]]:
        """Return one row for each perturbation, layer and channel, with a ratio for each norm."""
        found = []
        for name, by_layer in self.channels.items():
            for layer, values in zip(self.layers, by_layer, strict=True):
                for channel in range(values.shape[1]):
                    numbers = {norm: float(values[i, channel]) for i, norm in enumerate(self.norms)}
                    found.append(finite_row({"perturbation": name, "layer": layer.name, "channel": channel, **numbers}))
        return found

    def plot(self, axes: Axes | None = None, *, norm: str = "l2", limits: Limits | None = None) -> Axes:
        """Draw a ridge for each layer: how the ratio of perturbation to signal is spread over samples.

        How to read it: layers in execution order from the top down, the ratio on a logarithmic scale; 1 means that the
        perturbation is as large as the signal. Where the ridge of adversarial images moves to the right from one layer to
        the next while that of noise stays, the layer amplifies what the attack found.

        `limits`: ends of the scale, so that several nets share it.
        """
        shown = {name: list(self.ratios(name, norm)) for name in self.samples}
        return ridges(axes, self.layers, shown, f"perturbation / signal of an image, {norm}", limits)

    def over(self, perturbation: str, reference: str, norm: str = "l2") -> np.ndarray:
        """Return how many times the median ratio of one perturbation is that of another at each layer, [layers]."""
        one, other = (self.quantiles(name, norm, (0.5,))[:, 0] for name in (perturbation, reference))
        return _over(one, other)

    def spread(self, perturbation: str, norm: str = "l2", levels: Sequence[float] = QUANTILES) -> np.ndarray:
        """Return quantiles over the channels of each layer, [layers, levels]; channels without a ratio are left out."""
        values = self.channels[self._known(perturbation)]
        return np.stack([_quantiles(layer[self._norm(norm)], levels) for layer in values])

    def by_channel(self, norm: str = "l2") -> ChannelSpread:
        """Return the ratios of all channels in one norm, to be drawn."""
        place = self._norm(norm)
        found = {name: tuple(values[place] for values in by_layer) for name, by_layer in self.channels.items()}
        return ChannelSpread(self.layers, found, norm)

    def _known(self, perturbation: str) -> str:
        if perturbation not in self.samples:
            raise UserError(one_of("perturbation", perturbation, self.samples))
        return perturbation

    def _norm(self, norm: str) -> int:
        if norm not in self.norms:
            raise UserError(one_of("norm", norm, self.norms))
        return self.norms.index(norm)


@dataclass(frozen=True)
class SignalExcess:
    """How many times as much of an attack as of noise arrives at each layer, by name of a measure: name -> [layers].

    Names that end in `, cast` are of images that were cast to bytes; they are drawn dashed, in the color of their others.
    """

    layers: tuple[Layer, ...]
    values: Mapping[str, np.ndarray]
    reference: str = "gaussian noise"

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw a line over the layers for each measure, on a logarithmic scale.

        How to read it: the median ratio of perturbation to signal under the attack over that under noise. At 1 a layer hands
        on the attack as it does noise of the same l2 size in the image; a line that rises with depth is a net that amplifies
        what the attack found. Dashed: the same with all perturbed images cast to bytes, as the published code does, which
        cuts perturbations off; where it leaves the solid line, the cast decides.
        """
        axes = axes_or_new(axes, 5.2, 3.4)
        plain = [name.removesuffix(", cast") for name in self.values]
        colors = {name: SERIES[place % len(SERIES)] for place, name in enumerate(dict.fromkeys(plain))}
        pairs = sorted(zip(self.values, plain, strict=True), key=lambda pair: list(colors).index(pair[1]))
        for name, of in pairs:  # a measure and the same of cast images beside one another
            width, style = (2.4, "-") if name == of else (1.2, "--")
            axes.plot(range(len(self.layers)), self.values[name], style, color=colors[of], linewidth=width, label=name)
        known = np.concatenate([v[np.isfinite(v) & (v > 0)] for v in self.values.values()])
        low, high = (min(known.min(), 0.9), max(known.max(), 1.1)) if len(known) else (0.1, 10.0)
        axes.set_yscale("log")
        axes.set_ylim(low / 1.1, high * 1.1)
        ticks = round_ticks(low / 1.1, high * 1.1)
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks([], minor=True)
        axes.axhline(1, color=GRAY, linewidth=0.8)
        label_layers(axes, self.layers, "x")
        axes.set_ylabel(f"attack / {self.reference}")
        axes.legend(frameon=False, fontsize="small", ncols=2)
        return axes


@dataclass(frozen=True)
class ChannelSpread:
    """How ratios of perturbation to signal are spread over the channels of each layer: name -> for each layer [c]."""

    layers: tuple[Layer, ...]
    values: Mapping[str, tuple[np.ndarray, ...]]
    norm: str = "l2"

    def plot(self, axes: Axes | None = None, *, limits: Limits | None = None) -> Axes:
        """Draw a ridge for each layer: how the ratio is spread over its channels.

        How to read it: layers in execution order from the top down, the ratio of each channel on a logarithmic scale. A
        ridge with a long tail to the right, or a second hill, is a layer of which a few channels carry most of the
        perturbation; channels that are silent on clean images are left out.

        `limits`: ends of the scale, so that several nets share it.
        """
        return ridges(axes, self.layers, self.values, f"perturbation / signal of a channel, {self.norm}", limits)


def signal_ratio(
    model: nn.Module,
    x: Tensor,
    perturbed: Mapping[str, Tensor],
    *,
    layers: Layers = None,
    batch_size: int = 100,
    progress: Progress | None = None,
) -> SignalRatio:
    """Return PSR_p(l; x) = |f_l(x + d) - f_l(x)|_p / |f_l(x)|_p for p = 1, 2, infinity, every layer and sample.

    f_l is the output of layer l. `x`: images [n, c, h, w], uint8 or floats in [0, 1]; `perturbed`: x + d by name, for
    example `{"adversarial": craft(...), "gaussian": noise_like(...), "uniform": noise_like(...)}`, as floats of the same
    shape in [0, 1]. They are taken as they are; what the published code measures, whose cast to bytes cuts a perturbation
    off, is that of `perturb.as_bytes(..., "cast")`.

    Channels, the second dimension of an output, get a ratio of their own over all samples. `layers`: as in
    `activations.layers_of`. Memory: all outputs of one batch; about 2.3 MB for each image of a ResNet-20. The model is left
    as it was. `progress("signal", samples done, samples)`.

    Raises `UserError` for perturbed images that are no floats in [0, 1] of the shape of `x`.

    Source: Bakiskan et al. 2022.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> x = torch.full((1, 1), 0.5)
    >>> signal_ratio(net, x, {"more": x + 0.1}).ratios("more").round(4)
    array([[0.2]])
    """
    _check(x, perturbed)
    chosen = layers_of(model, layers, example=x)
    shape = (len(NORMS), len(chosen), len(x))
    samples = {name: np.zeros(shape) for name in perturbed}
    sums: dict[str, list[np.ndarray]] = {name: [np.zeros(0)] * len(chosen) for name in perturbed}
    signals: list[np.ndarray] = [np.zeros(0)] * len(chosen)
    for batch in batches(len(x), batch_size):
        clean: list[Tensor] = [torch.empty(0)] * len(chosen)
        sizes = np.zeros((len(NORMS), len(chosen), batch.stop - batch.start))

        def keep(index: int, output: Tensor, clean: list[Tensor] = clean, sizes: np.ndarray = sizes) -> None:
            clean[index] = output.clone()
            whole, channels = _sizes(output)
            sizes[:, index] = whole
            signals[index] = signals[index] + channels if signals[index].size else channels

        capture(model, x[batch], chosen, keep)
        for name, images_of in perturbed.items():
            found, mine = samples[name][..., batch], sums[name]

            def compare(
                index: int,
                output: Tensor,
                clean: list[Tensor] = clean,
                sizes: np.ndarray = sizes,
                found: np.ndarray = found,
                mine: list[np.ndarray] = mine,
            ) -> None:
                whole, channels = _sizes(output - clean[index])
                found[:, index] = _over(whole, sizes[:, index])
                mine[index] = mine[index] + channels if mine[index].size else channels

            capture(model, images_of[batch], chosen, compare)
        if progress is not None:
            progress("signal", batch.stop, len(x))
    channels = {
        name: tuple(_over(mine, signal) for mine, signal in zip(sums[name], signals, strict=True)) for name in perturbed
    }
    return SignalRatio(layers=chosen, samples=samples, channels=channels)


def _check(x: Tensor, perturbed: Mapping[str, Tensor]) -> None:
    if not perturbed:
        raise UserError("there is no perturbed input to compare with")
    images(x, x.device)
    for name, inputs in perturbed.items():
        if inputs.shape != x.shape or not inputs.is_floating_point():
            got = f"{inputs.dtype} {list(inputs.shape)} for {list(x.shape)}"
            raise UserError(f"{name}: perturbed images stay floats of the same shape as the images; got {got}")
        images(inputs, inputs.device)


def _sizes(output: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the norms of an output [n, c, ...]: of each sample [norms, n], and of each channel, summed, [norms, c]."""
    values = output.flatten(2) if output.ndim > 2 else output.unsqueeze(2)
    values = (values if values.device.type == "mps" else values.double()).abs()
    one, high = values.sum(2), values.amax(2)
    two = torch.linalg.vector_norm(values, dim=2)
    whole = torch.stack([one.sum(1), torch.linalg.vector_norm(two, dim=1), high.amax(1)])
    channels = torch.stack([one.sum(0), two.sum(0), high.sum(0)])
    return whole.cpu().double().numpy(), channels.cpu().double().numpy()


def _over(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return numerator / denominator


def _quantiles(values: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    values = values[~np.isnan(values)]
    if not len(values):
        return np.full(len(levels), np.nan)
    # Nearest ranks, since between a finite and an infinite ratio nothing can be interpolated.
    return np.quantile(values, levels, method="nearest")
