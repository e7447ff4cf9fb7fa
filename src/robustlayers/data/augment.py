"""Random crops and flips, drawn for each image on its own and applied to a whole batch by indexed tensor operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from robustlayers.core.errors import UserError

__all__ = ["Augment"]


@dataclass(frozen=True)
class Augment:
    """How training images are varied.

    `crop`: pixels of zero padding on each side, from which a window of the old size is cut at a uniformly drawn place;
    `flip`: mirror left and right with probability 1/2. The defaults change nothing. A negative or fractional `crop` is
    a `UserError`.

    >>> Augment(crop=4, flip=True).apply(torch.ones(2, 3, 32, 32), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3, 32, 32])
    """

    crop: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.crop, bool) or not isinstance(self.crop, int) or self.crop < 0:
            raise UserError(f"augment.crop: {self.crop!r}; allowed: a whole number of pixels, at least 0")
        if not isinstance(self.flip, bool):
            raise UserError(f"augment.flip: {self.flip!r}; allowed: true, false")

    @property
    def active(self) -> bool:
        """Whether anything is varied at all."""
        return self.crop > 0 or self.flip

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Return the draws for `n` images on the generator's device, int64 [n, 3]: row, column, whether to flip.

        All three are always drawn, flips first: turning one kind on or off leaves the draws of the other as they were.
        """
        flips = torch.randint(0, 2, (n,), generator=generator, device=generator.device)
        places = torch.randint(0, 2 * self.crop + 1, (n, 2), generator=generator, device=generator.device)
        return torch.cat([places, flips[:, None]], dim=1)

    def at(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return `images` [n, c, h, w], bytes or floats, varied as `draws` [n, 3] on the same device say."""
        n, _, height, width = images.shape
        if self.crop and self.crop >= min(height, width):
            raise UserError(f"augment.crop: {self.crop} on images of {height}x{width}; allowed: less than their sides")
        if self.crop:
            padded = functional.pad(images, (self.crop,) * 4)
            # A view of all windows, [n, c, rows, columns, h, w]; the index then copies one of them per image.
            windows = padded.unfold(2, height, 1).unfold(3, width, 1)
            images = windows[torch.arange(n, device=images.device), :, draws[:, 0], draws[:, 1]]
        if self.flip:
            images = torch.where(draws[:, 2].view(n, 1, 1, 1).bool(), images.flip(3), images)
        return images

    def apply(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return `images` [n, c, h, w], bytes or floats, each varied by draws of its own from `generator`."""
        if not self.active:
            return images
        return self.at(images, self.draw(len(images), generator).to(images.device))
