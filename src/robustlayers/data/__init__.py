"""Data sets as two tensors of bytes each, on the device that trains: readers, splits, training order, augmentation."""

from robustlayers.data.augment import Augment
from robustlayers.data.fetch import fetch
from robustlayers.data.images import Dataset, Images, to_float
from robustlayers.data.order import batch_count, batch_sizes, batches, split
from robustlayers.data.sources import load, names

__all__ = [
    "Augment",
    "Dataset",
    "Images",
    "batch_count",
    "batch_sizes",
    "batches",
    "fetch",
    "load",
    "names",
    "split",
    "to_float",
]
