"""Selectors and partitions: which tensors, or which entries of them, a person means."""

from robustlayers.selection.inventory import Entry, Inventory, is_norm, norm_layers
from robustlayers.selection.order import ExecutionOrder, execution_order, order_of
from robustlayers.selection.partition import REST, Partition
from robustlayers.selection.scores import selector_content
from robustlayers.selection.selection import Selection
from robustlayers.selection.selectors import resolve, select

__all__ = [
    "REST",
    "Entry",
    "ExecutionOrder",
    "Inventory",
    "Partition",
    "Selection",
    "execution_order",
    "is_norm",
    "norm_layers",
    "order_of",
    "resolve",
    "select",
    "selector_content",
]
