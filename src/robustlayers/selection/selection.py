"""A selection: which entries of which tensors, with set algebra on whole tensors and on masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from robustlayers.selection.inventory import Inventory

__all__ = ["Selection"]


class Selection:
    """An immutable set of tensor entries of one model.

    `parts[name]` is None where the whole tensor is in, else a bool mask of the tensor's shape on the CPU. Masks that hold
    everything are stored as None and empty ones not at all, so equal sets compare equal.
    """

    def __init__(self, inventory: Inventory, parts: Mapping[str, torch.Tensor | None] | Iterable[str]) -> None:
        self.inventory = inventory
        given = dict(parts) if isinstance(parts, Mapping) else dict.fromkeys(parts)
        self.parts: dict[str, torch.Tensor | None] = {}
        for entry in inventory:  # registration order, whatever the order given
            if entry.name not in given:
                continue
            mask = given[entry.name]
            if mask is None or bool(mask.all()):
                self.parts[entry.name] = None
            elif bool(mask.any()):
                self.parts[entry.name] = mask
        # A tensor without entries has no mask to speak of: it is in as a whole if it is named.

    def _mask(self, name: str) -> torch.Tensor:
        shape = self.inventory.entries[name].tensor.shape
        if name not in self.parts:
            return torch.zeros(shape, dtype=torch.bool)
        mask = self.parts[name]
        return torch.ones(shape, dtype=torch.bool) if mask is None else mask

    def __or__(self, other: Selection) -> Selection:
        parts: dict[str, torch.Tensor | None] = {}
        for name in {**self.parts, **other.parts}:
            whole = any(name in side.parts and side.parts[name] is None for side in (self, other))
            parts[name] = None if whole else self._mask(name) | other._mask(name)
        return Selection(self.inventory, parts)

    def __and__(self, other: Selection) -> Selection:
        parts: dict[str, torch.Tensor | None] = {}
        for name in self.parts:
            if name in other.parts:
                mine, its = self.parts[name], other.parts[name]
                parts[name] = its if mine is None else mine if its is None else mine & its
        return Selection(self.inventory, parts)

    def __sub__(self, other: Selection) -> Selection:
        parts: dict[str, torch.Tensor | None] = {}
        for name, mask in self.parts.items():
            if name not in other.parts:
                parts[name] = mask
            elif other.parts[name] is not None:
                parts[name] = self._mask(name) & ~other._mask(name)
        return Selection(self.inventory, parts)

    def __invert__(self) -> Selection:
        return Selection(self.inventory, list(self.inventory.entries)) - self

    def __bool__(self) -> bool:
        return bool(self.parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __contains__(self, name: object) -> bool:
        return name in self.parts

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selection):
            return NotImplemented
        return list(self.parts) == list(other.parts) and all(
            torch.equal(self._mask(name), other._mask(name)) for name in self.parts
        )

    __hash__ = None  # type: ignore[assignment]  # equal by content, and masks cannot be hashed cheaply

    def count(self, name: str) -> int:
        """Return how many entries of the tensor `name` are selected."""
        if name not in self.parts:
            return 0
        mask = self.parts[name]
        return self.inventory.entries[name].size if mask is None else int(mask.sum())

    @property
    def parameters(self) -> int:
        """Number of selected entries of parameters."""
        return sum(self.count(name) for name in self if not self.inventory.entries[name].buffer)

    @property
    def buffers(self) -> int:
        """Number of selected entries of buffers."""
        return sum(self.count(name) for name in self if self.inventory.entries[name].buffer)

    @property
    def share(self) -> float:
        """Selected share of all parameters of the model."""
        return self.parameters / max(1, self.inventory.parameters)

    def describe(self) -> list[tuple[str, str, float]]:
        """Return (name, shape, selected share of the tensor) for every tensor that is touched."""
        lines = []
        for name in self:
            entry = self.inventory.entries[name]
            shape = "x".join(map(str, entry.tensor.shape)) or "scalar"
            lines.append((name, shape, self.count(name) / entry.size if entry.size else 1.0))
        return lines
