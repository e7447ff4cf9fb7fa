"""Selectors and partitions: which tensors, or which entries of them, a person means."""

from robustlayers.selection.inventory import Entry, Inventory, is_norm, norm_layers
from robustlayers.selection.partition import REST, Partition
from robustlayers.selection.selection import Selection
from robustlayers.selection.selectors import resolve, select

__all__ = [
    "REST",
    "Entry",
    "Inventory",
    "Partition",
    "Selection",
    "is_norm",
    "norm_layers",
    "resolve",
    "select",
]
