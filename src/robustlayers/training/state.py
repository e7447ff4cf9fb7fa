"""The state of a resume: tensors by name, the parts that make it up under prefixes of their own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

__all__ = ["joined", "part"]


def joined(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of all parts as one state, each under `part/name`.

    >>> import torch
    >>> list(joined({"model": {"weight": torch.ones(1), "bias": torch.ones(1)}, "average": {}}))
    ['model/weight', 'model/bias']
    """
    return {f"{prefix}/{name}": tensor for prefix, tensors in parts.items() for name, tensor in tensors.items()}


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors of one part of a state by the names they have in it.

    >>> import torch
    >>> list(part({"model/layer/weight": torch.ones(1), "place": torch.ones(1)}, "model"))
    ['layer/weight']
    """
    begin = f"{prefix}/"
    return {name.removeprefix(begin): tensor for name, tensor in state.items() if name.startswith(begin)}
