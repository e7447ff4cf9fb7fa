"""The loss around one image, in two directions: how steep and how bent what an attack climbs is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustlayers.analysis._axes import INK, axes_or_new
from robustlayers.analysis._ground import finite_row
from robustlayers.analysis.activations import batches
from robustlayers.analysis.pictures import input_gradients
from robustlayers.attacks import is_correct
from robustlayers.core.errors import UserError
from robustlayers.core.quantities import number
from robustlayers.evaluation import Progress
from robustlayers.evaluation._still import check_labels, device_of, images, still

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Surface", "loss_surface"]


@dataclass(frozen=True)
class Surface:
    """The cross-entropy of an image moved by a u + b v; see `loss_surface`.

    `losses[i, j]` in nats and `right[i, j]`, whether the prediction is the label, are at a = `offsets[j]` along the first
    direction and b = `offsets[i]` along the second.
    """

    offsets: np.ndarray  # [points]
    losses: np.ndarray  # [points, points]
    right: np.ndarray  # bool [points, points]
    names: tuple[str, str]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each point."""
        return [
            finite_row(
                {
                    "first": float(a),
                    "second": float(b),
                    "loss": float(self.losses[i, j]),
                    "right": bool(self.right[i, j]),
                }
            )
            for i, b in enumerate(self.offsets)
            for j, a in enumerate(self.offsets)
        ]

    def plot(self, axes: Axes | None = None, *, highest: float | None = None, eps: float | None = None) -> Axes:
        """Draw the losses as colors, with a line around where the prediction is right.

        How to read it: the image is in the middle, the first direction goes to the right, brighter is a higher loss. Even
        stripes mean that the loss is nearly linear, so that one gradient step finds what there is; ridges and pits near the
        middle mean that a single-step attack is misled. The solid line is the decision boundary; a dashed diamond holds the
        images that the attack may choose from.

        `highest`: loss at the upper end of the colors, so that several surfaces have the same scale. `eps`, in pixel units of
        [0, 1]: draws |a| + |b| <= eps, which is the linf ball where both directions consist of signs.
        """
        axes = axes_or_new(axes, 4.8, 4.0)
        pixels = 255 * self.offsets
        step = pixels[1] - pixels[0]
        ends = (pixels[0] - step / 2, pixels[-1] + step / 2) * 2
        image = axes.imshow(
            self.losses, origin="lower", extent=ends, cmap="cividis", aspect="equal", vmin=0, vmax=highest
        )
        if self.right.any() and not self.right.all():
            axes.contour(pixels, pixels, self.right.astype(float), levels=[0.5], colors="white", linewidths=2.5)
            axes.contour(pixels, pixels, self.right.astype(float), levels=[0.5], colors=INK, linewidths=1.2)
        if eps is not None:
            far = 255 * eps
            ends_of_ball = [far, 0, -far, 0, far], [0, far, 0, -far, 0]
            axes.plot(*ends_of_ball, color="white", linewidth=1.2, linestyle=(0, (4, 3)))
        axes.plot(0, 0, "o", color="white", markeredgecolor=INK)
        axes.set_xlabel(f"{self.names[0]}, 1/255")
        axes.set_ylabel(f"{self.names[1]}, 1/255")
        axes.locator_params(nbins=5)
        bar = axes.figure.colorbar(image, ax=axes, shrink=0.85)
        bar.set_label("cross-entropy, nats")
        return axes


def loss_surface(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    reach: float | str = "16/255",
    points: int = 31,
    directions: tuple[Tensor, Tensor] | None = None,
    names: tuple[str, str] | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 250,
    progress: Progress | None = None,
) -> Surface:
    """Return the cross-entropy at clip(x + a u + b v), for a and b on a grid from -reach to reach.

    `x`: one image [1, c, h, w], uint8 or floats in [0, 1]; `y`: its label [1]; `reach` in pixel units of [0, 1]; `points`
    on each side, odd, so that the image itself is on the grid. `directions` (u, v) have the shape of the image; left out, u
    is the sign of the loss's gradient at the image, in which a single-step attack goes, and v random signs drawn from
    `generator`, so that a and b are the largest changes of a pixel. Moved images are clipped to [0, 1].

    The model runs in evaluation mode with norm layers by running statistics, and is left as it was.
    `progress("surface", points done, points in all)`.

    Raises `UserError` for more than one image and for values that are not allowed.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> found = loss_surface(net, torch.rand(1, 1, 2, 2), torch.tensor([0]), points=5, generator=torch.Generator())
    >>> found.losses.shape, float(found.offsets[2])
    ((5, 5), 0.0)
    """
    check_labels(x, y)
    if len(x) != 1:
        raise UserError(f"a loss surface is that of one image [1, c, h, w]; got {len(x)}")
    if isinstance(points, bool) or not isinstance(points, int) or points < 3 or points % 2 == 0:
        raise UserError(f"points: {points!r} is not allowed; allowed: an odd whole number, 3 or more")
    far = number(reach, "reach")
    if far <= 0:
        raise UserError(f"reach: {reach} is not allowed; allowed: more than 0, in pixel units of [0, 1]")
    device = device_of(model, x)
    image, label = images(x, device), y.to(device).long()
    if directions is None:
        if generator is None:
            raise UserError("the second direction is drawn: give a generator, or both directions")
        signs = torch.randint(0, 2, image.shape, generator=generator, device=generator.device)
        gradient = torch.from_numpy(input_gradients(model, x, y).gradients)
        directions = (gradient.sign(), 2 * signs - 1)
        names = names or ("along the sign of the gradient", "along random signs")
    for direction in directions:
        if direction.shape != image.shape:
            raise UserError(f"directions have the image's shape {list(image.shape)}; got {list(direction.shape)}")
    u, v = (direction.to(device, image.dtype) for direction in directions)
    offsets = np.linspace(-far, far, points)
    offsets[points // 2] = 0.0
    b, a = (torch.from_numpy(grid.copy()).flatten() for grid in np.meshgrid(offsets, offsets, indexing="ij"))
    losses, right = torch.empty(points * points, dtype=torch.float64), torch.empty(points * points, dtype=torch.bool)
    with still(model, device), torch.no_grad():
        for batch in batches(points * points, batch_size):
            first, second = (w[batch].to(device, image.dtype).view(-1, *[1] * (image.ndim - 1)) for w in (a, b))
            moved = (image + first * u + second * v).clamp(0, 1)
            labels = label.expand(len(moved))
            logits = model(moved)
            losses[batch] = functional.cross_entropy(logits.float(), labels, reduction="none").double().cpu()
            right[batch] = is_correct(logits, labels).cpu()
            if progress is not None:
                progress("surface", batch.stop, points * points)
    square = (points, points)
    return Surface(
        offsets,
        losses.view(square).numpy(),
        right.view(square).numpy(),
        names or ("first direction", "second direction"),
    )
