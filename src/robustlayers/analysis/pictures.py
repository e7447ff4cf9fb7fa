"""What a net looks at and for: the gradient of its loss for the input, and the filters of its first convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustlayers.analysis._axes import axes_or_new
from robustlayers.analysis._ground import finite_row
from robustlayers.analysis.activations import batches
from robustlayers.attacks import is_correct
from robustlayers.core.errors import UserError
from robustlayers.evaluation import Progress
from robustlayers.evaluation._still import check_labels, device_of, images, still
from robustlayers.selection import Inventory, order_of, resolve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Filters", "InputGradients", "first_filters", "input_gradients"]


@dataclass(frozen=True)
class InputGradients:
    """The gradient of each image's cross-entropy for its pixels; see `input_gradients`."""

    images: np.ndarray  # [n, c, h, w] in [0, 1]
    gradients: np.ndarray  # [n, c, h, w], nats per unit of pixel
    losses: np.ndarray  # [n], nats
    right: np.ndarray  # bool [n]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each image: loss, whether it is right, and norms of its gradient."""
        flat = self.gradients.reshape(len(self.gradients), -1)
        return [
            finite_row(
                {
                    "image": index,
                    "loss": float(self.losses[index]),
                    "right": bool(self.right[index]),
                    "gradient_l1": float(np.abs(values).sum()),
                    "gradient_l2": float(np.linalg.norm(values)),
                    "gradient_linf": float(np.abs(values).max(initial=0)),
                }
            )
            for index, values in enumerate(flat)
        ]

    def plot(self, axes: Axes | None = None, *, most: int = 8) -> Axes:
        """Draw images and, below them, their gradients: where a change of a pixel changes the loss.

        How to read it: mid-gray is no gradient, darker lowers the loss when the pixel is made brighter, brighter raises
        it, each image on its own scale (three times its standard deviation). Gradients of robust nets follow the shape of
        the object, those of natural nets look like noise.
        """
        shown = slice(0, most)
        gradients = self.gradients[shown]
        scale = 3 * gradients.reshape(len(gradients), -1).std(1)
        scaled = 0.5 + 0.5 * gradients / np.where(scale > 0, scale, 1)[:, None, None, None]
        return _sheet([self.images[shown], scaled], axes, ["image", "gradient"])


def input_gradients(
    model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = 250, progress: Progress | None = None
) -> InputGradients:
    """Return d CE(model(x), y) / dx for every image, [n, c, h, w].

    `x`: images [n, c, h, w], uint8 or floats in [0, 1]; `y`: labels [n]. The model runs in evaluation mode with norm layers
    by running statistics, and is left as it was. `progress("gradients", images done, images)`.

    Source: the maps of Tsipras et al. 2019.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> input_gradients(net, torch.rand(2, 1, 2, 2), torch.tensor([0, 1])).gradients.shape
    (2, 1, 2, 2)
    """
    check_labels(x, y)
    device = device_of(model, x)
    pixels, gradients, losses, right = [], [], [], []
    with torch.inference_mode(False), still(model, device), torch.enable_grad():
        for batch in batches(len(x), batch_size):
            leaf = images(x[batch], device).clone().requires_grad_()
            labels = y[batch].to(device).long()
            logits = model(leaf)
            loss = functional.cross_entropy(logits.float(), labels, reduction="none")
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            for found, value in zip(
                (pixels, gradients, losses, right), (leaf, gradient, loss, is_correct(logits, labels)), strict=True
            ):
                found.append(value.detach().cpu().numpy())
            if progress is not None:
                progress("gradients", batch.stop, len(x))
    return InputGradients(*(np.concatenate(found) for found in (pixels, gradients, losses, right)))


@dataclass(frozen=True)
class Filters:
    """The weights of a convolution, [filters, channels, height, width]; see `first_filters`."""

    layer: str
    weights: np.ndarray

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each filter: its norm, its mean, and the share of its energy that is its mean.

        A share of 1 is a filter that averages, one of 0 a filter that sees differences only.
        """
        found = []
        for index, weights in enumerate(self.weights):
            energy, mean = float((weights**2).sum()), float(weights.mean())
            share = mean**2 * weights.size / energy if energy else math.nan
            row = {"layer": self.layer, "filter": index, "l2": math.sqrt(energy), "mean": mean, "mean_share": share}
            found.append(finite_row(row))
        return found

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw each filter as a small picture, in color if it has three channels, else the mean of its channels.

        How to read it: mid-gray is weight zero, and all filters have the same scale, so a filter that is gray all over
        does little. Smooth filters keep noise out; checkered ones let the finest patterns of a perturbation in.
        """
        reach = float(np.abs(self.weights).max(initial=0)) or 1.0
        scaled = 0.5 + 0.5 * self.weights / reach
        columns = math.ceil(math.sqrt(2 * len(scaled)))
        return _sheet([scaled[first : first + columns] for first in range(0, len(scaled), columns)], axes)


def first_filters(model: nn.Module, layers: str = "conv", *, example: Tensor | None = None) -> Filters:
    """Return the weights of the convolution that runs first among those that a selector picks.

    `example`: a batch of inputs for the execution order, as in `selection.execution_order`. Raises `UserError` where the
    selector picks no convolution that runs.

    >>> first_filters(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 3))).weights.shape
    (2, 1, 3, 3)
    """
    inventory = Inventory(model)
    order = order_of(inventory, example)
    modules = inventory.modules()
    names = {order.holders[name] for name in resolve(inventory, layers) if name in order.holders}
    running = [name for name in order.modules if name in names]
    for name in running:
        module = modules[name]
        if isinstance(module, nn.Conv2d):
            return Filters(name or type(module).__name__, module.weight.detach().cpu().float().numpy())
    raise UserError(f"{layers!r} picks no convolution over images that runs in {type(model).__name__}")


def _sheet(lines: Sequence[np.ndarray], axes: Axes | None, names: Sequence[str] = ()) -> Axes:
    """Draw lines of pictures [n, c, h, w] around 0.5 on one pair of axes, without a scale."""
    columns, gap = max(len(line) for line in lines), 0.08
    axes = axes_or_new(axes, 0.75 * columns + 0.8, 0.75 * len(lines) + 0.2)
    for row, line in enumerate(lines):
        for column, picture in enumerate(line):
            if len(picture) != 3:
                picture = np.repeat(picture.mean(0, keepdims=True), 3, axis=0)
            box = (column, column + 1 - gap, row + 1 - gap, row)
            axes.imshow(np.moveaxis(np.clip(picture, 0, 1), 0, -1), extent=box, interpolation="nearest")
    axes.set_xlim(0, columns)
    axes.set_ylim(len(lines), 0)
    axes.set_xticks([])
    axes.set_yticks([row + 0.5 for row in range(len(names))], list(names))
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return axes
