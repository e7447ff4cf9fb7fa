"""What a net looks at and for: filters of its first convolution, gradients for the input, what an attack makes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustlayers.analysis._ground import finite_row
from robustlayers.analysis._sheets import picture, sheet, signed
from robustlayers.analysis.activations import batches
from robustlayers.analysis.perturb import craft
from robustlayers.attacks import Attack, is_correct, label
from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.evaluation import Progress
from robustlayers.evaluation._still import check_labels, device_of, images, still
from robustlayers.selection import Inventory, order_of, resolve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Filters", "InputGradients", "Perturbations", "first_filters", "input_gradients", "perturbations"]


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

        How to read it: mid-gray is no gradient; where a pixel is orange the loss rises when it is made brighter, where it is
        blue it falls; of color images each channel is shown around mid-gray. Every map has its own scale, three times its
        standard deviation. Gradients of robust nets follow the shape of the object, those of natural nets look like noise.
        """
        lines = [[picture(image) for image in self.images[:most]], self.maps()[:most]]
        return sheet(lines, axes, ["image", "gradient"])

    def maps(self) -> list[np.ndarray]:
        """Return each gradient as a picture [h, w, 3] in [0, 1], on its own scale."""
        return [signed(gradient, 3 * float(gradient.std())) for gradient in self.gradients]


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
        """Draw each filter as a small picture: three channels in color around mid-gray, else the mean of its channels.

        How to read it: mid-gray is weight zero, orange above, blue below it, and all filters of a net have the same scale,
        so a filter that is gray all over does little. Smooth filters keep noise out; checkered ones let the finest patterns
        of a perturbation in.
        """
        shown = self.maps()
        columns = math.ceil(math.sqrt(2 * len(shown)))
        return sheet([shown[first : first + columns] for first in range(0, len(shown), columns)], axes)

    def maps(self) -> list[np.ndarray]:
        """Return each filter as a picture [h, w, 3] in [0, 1]; full color is the largest weight of all."""
        reach = float(np.abs(self.weights).max(initial=0))
        return [signed(weights, reach) for weights in self.weights]


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


@dataclass(frozen=True)
class Perturbations:
    """What an attack made of some images; see `perturbations`."""

    images: np.ndarray  # [n, c, h, w] in [0, 1]
    adversarial: np.ndarray  # the same shape
    right: np.ndarray  # bool [n]: before the attack
    right_attacked: np.ndarray  # bool [n]
    losses: np.ndarray  # [n], nats, before
    losses_attacked: np.ndarray  # [n]

    @property
    def reach(self) -> float:
        """The largest change of any pixel."""
        return float(np.abs(self.adversarial - self.images).max(initial=0))

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each image: right or wrong and loss before and after, and norms of the change."""
        change = (self.adversarial.astype(float) - self.images).reshape(len(self.images), -1)
        return [
            finite_row(
                {
                    "image": index,
                    "right": bool(self.right[index]),
                    "right_attacked": bool(self.right_attacked[index]),
                    "loss": float(self.losses[index]),
                    "loss_attacked": float(self.losses_attacked[index]),
                    "change_l1": float(np.abs(moved).sum()),
                    "change_l2": float(np.linalg.norm(moved)),
                    "change_linf": float(np.abs(moved).max(initial=0)),
                }
            )
            for index, moved in enumerate(change)
        ]

    def maps(self, reach: float | None = None) -> list[np.ndarray]:
        """Return each change as a picture [h, w, 3] in [0, 1]; full color is `reach`, the largest change unless given."""
        far = self.reach if reach is None else reach
        return [
            signed(one - image, far) for one, image in zip(self.adversarial.astype(float), self.images, strict=True)
        ]

    def plot(self, axes: Axes | None = None, *, most: int = 8) -> Axes:
        """Draw images, the same under attack, and what the attack changed.

        How to read it: mid-gray is no change, orange brighter, blue darker, of color images each channel around mid-gray;
        full color is the largest change that occurs. What has to be done to a robust net looks like parts of an object,
        what is enough for a natural one looks like noise.
        """
        seen = [[picture(one) for one in images[:most]] for images in (self.images, self.adversarial)]
        return sheet([*seen, self.maps()[:most]], axes, ["image", "attacked", "change"])


def perturbations(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    *,
    seed: int = 0,
    batch_size: int = 250,
    progress: Progress | None = None,
) -> Perturbations:
    """Return what an attack on `model` makes of images, and what the model says before and after.

    `x`: images [n, c, h, w], uint8 or floats in [0, 1]; `y`: labels [n]; `seed`: of the attack's draws. The model runs in
    evaluation mode with norm layers by running statistics, and is left as it was. `progress(what, images done, images)`.

    >>> from robustlayers.attacks import FGSM, Linf
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> found = perturbations(net, torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), FGSM(Linf("8/255")))
    >>> bool((found.losses_attacked > found.losses).all()), round(255 * found.reach)
    (True, 8)
    """
    draws = stream(seed, "analysis", label(attack))
    made = craft(model, x, y, attack, generator=draws, batch_size=batch_size, progress=progress)
    device = device_of(model, x)
    natural = images(x, device)
    found: list[np.ndarray] = []
    with torch.inference_mode(False), still(model, device), torch.no_grad():
        labels = y.to(device).long()
        for shown in (natural, made.to(device)):
            logits = torch.cat([model(shown[batch]) for batch in batches(len(shown), batch_size)])
            found.append(is_correct(logits, labels).cpu().numpy())
            found.append(functional.cross_entropy(logits.float(), labels, reduction="none").cpu().numpy())
    right, losses, right_attacked, losses_attacked = found
    return Perturbations(natural.cpu().numpy(), made.cpu().numpy(), right, right_attacked, losses, losses_attacked)
