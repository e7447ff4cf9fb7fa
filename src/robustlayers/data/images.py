"""What a data set is here: bytes of images and their labels, for training and for testing, named by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustlayers.core.errors import UserError
from robustlayers.core.identity import canonical

__all__ = ["Dataset", "Images", "to_float"]


@dataclass(frozen=True)
class Images:
    """Images and their labels: `images` uint8 [n, c, h, w], `labels` int64 [n], on one device.

    Other types or shapes are a `UserError`.

    >>> some = Images(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0]))
    >>> len(some), some.shape, some.take([2, 1]).labels.tolist()
    (3, (1, 8, 8), [0, 1])
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise UserError(f"images: {images.dtype} {list(images.shape)}; allowed: uint8 [n, channels, height, width]")
        if labels.dtype != torch.int64 or labels.dim() != 1:
            raise UserError(f"labels: {labels.dtype} {list(labels.shape)}; allowed: int64 [n]")
        if len(images) != len(labels):
            raise UserError(f"{len(images)} images, but {len(labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def device(self) -> torch.device:
        """The device that holds the bytes."""
        return self.images.device

    def to(self, device: torch.device | str) -> Images:
        """Return the same images on `device`."""
        return Images(self.images.to(device), self.labels.to(device))

    def take(self, indices: Tensor | Sequence[int]) -> Images:
        """Return a copy of the images at `indices`, in that order; one that does not exist is a `UserError`."""
        index = torch.as_tensor(indices, dtype=torch.int64, device=self.device)
        low, high = _span(index)
        if low < 0 or high >= len(self):
            raise UserError(f"take: indices from {low} to {high}; allowed: 0 to {len(self) - 1}")
        return Images(self.images[index], self.labels[index])

    def first(self, n: int) -> Images:
        """Return the first `n` images; fewer than `n` in all is a `UserError`, so that no table claims too many."""
        if not 0 <= n <= len(self):
            raise UserError(f"first: {n} images were asked for; allowed: 0 to {len(self)}")
        return Images(self.images[:n], self.labels[:n])


@dataclass(frozen=True)
class Dataset:
    """Training and test images, the names of the classes, and `digest`, which names the content.

    `digest` is the SHA-256 of shapes, class names and the bytes of all four tensors: equal content, equal digest, under
    whatever name and from whatever kind of file it was read.
    """

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]
    digest: str

    @classmethod
    def of(cls, name: str, train: Images, test: Images, classes: Sequence[str]) -> Dataset:
        """Return the data set with its digest computed; parts that do not fit each other are a `UserError`."""
        if train.shape != test.shape:
            raise UserError(f"{name}: training images are {list(train.shape)}, test images {list(test.shape)}")
        for part, images in (("training", train), ("test", test)):
            low, high = _span(images.labels)
            if low < 0 or high >= len(classes):
                raise UserError(f"{name}: {part} labels are {low} to {high}; allowed: 0 to {len(classes) - 1}")
        return cls(name, train, test, tuple(classes), _digest(train, test, classes))

    def to(self, device: torch.device | str) -> Dataset:
        """Return the same data set on `device`."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def to_float(images: Tensor) -> Tensor:
    """Return bytes as float32 pixels in [0, 1]: k becomes the float nearest to k/255, on every device.

    >>> to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == [0.0, torch.tensor(0.2).item(), 1.0]
    True
    """
    if images.dtype != torch.uint8:
        raise UserError(f"to_float: {images.dtype}; allowed: uint8")
    # A divisor on the device, not a Python number: CUDA turns the latter into a product with 1/255, which rounds twice.
    return images.to(torch.float32).div_(torch.full((), 255.0, device=images.device))


def _span(numbers: Tensor) -> tuple[int, int]:
    return (int(numbers.min()), int(numbers.max())) if numbers.numel() else (0, -1)


def _digest(train: Images, test: Images, classes: Sequence[str]) -> str:
    parts = [train.images, train.labels, test.images, test.labels]
    facts = {"shapes": [list(part.shape) for part in parts], "classes": list(classes)}
    content = hashlib.sha256(canonical(facts).encode())
    for part in parts:
        array = part.cpu().contiguous().numpy()
        content.update(array.astype(array.dtype.newbyteorder("<"), copy=False).data)
    return content.hexdigest()
