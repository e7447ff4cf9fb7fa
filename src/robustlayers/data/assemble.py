"""From what a reader found in files to a data set: every fact is checked here, and a fault names the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from robustlayers.core.errors import Fault, UserError
from robustlayers.data.images import Dataset, Images

__all__ = ["Part", "assemble", "fault"]


@dataclass(frozen=True)
class Part:
    """One half of a data set as read: images uint8 [n, c, h, w], labels of any integer type [n], where both were."""

    images: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    images_file: str
    labels_file: str


def fault(file: object, message: str) -> UserError:
    """Return the error for a mistake in `file`."""
    return UserError(Fault(message, file=str(file)))


def assemble(name: str, train: Part, test: Part, classes: Sequence[str] | None = None) -> Dataset:
    """Return the data set of two parts; without `classes`, they are called "0", "1", ... up to the highest label.

    Raises `UserError` for an empty part, a count that differs, labels out of range, or parts of different size.
    """
    for part in (train, test):
        _check(part)
    if classes is None:
        for part in (train, test):
            # Names are made for each class: a label such as 10^9 is damage, not a number of classes.
            if part.labels.max() >= len(train.labels) + len(test.labels):
                raise fault(part.labels_file, f"label {part.labels.max()}; allowed: 0 to the number of classes less 1")
        classes = [str(label) for label in range(int(max(train.labels.max(), test.labels.max())) + 1)]
    for part in (train, test):
        if part.labels.max() >= len(classes):
            row = int(part.labels.argmax())
            text = f"label {part.labels.max()} at image {row}; allowed: 0 to {len(classes) - 1}"
            raise fault(part.labels_file, text)
    if train.images.shape[1:] != test.images.shape[1:]:
        sizes = f"{list(test.images.shape[1:])}, training images {list(train.images.shape[1:])}"
        raise fault(test.images_file, f"test images are {sizes} (channels, height, width)")
    return Dataset.of(name, _images(train), _images(test), classes)


def _check(part: Part) -> None:
    if part.images.dtype != np.uint8:
        raise fault(part.images_file, f"images are {part.images.dtype}; allowed: uint8")
    if not np.issubdtype(part.labels.dtype, np.integer):
        raise fault(part.labels_file, f"labels are {part.labels.dtype}; allowed: integers")
    if len(part.images) != len(part.labels):
        raise fault(part.images_file, f"{len(part.images)} images, but {len(part.labels)} labels")
    if not len(part.images) or 0 in part.images.shape:
        raise fault(part.images_file, "no images")
    if part.labels.min() < 0:
        row = int(part.labels.argmin())
        raise fault(part.labels_file, f"label {part.labels.min()} at image {row}; labels count from 0")


def _images(part: Part) -> Images:
    # Copied: arrays over a file's bytes are read-only, which torch cannot express.
    images = torch.from_numpy(np.array(part.images, order="C"))
    return Images(images, torch.from_numpy(part.labels.astype(np.int64)))
