"""What a model is made of: every tensor of its `state_dict()`, the module that owns it, and the part it plays there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

__all__ = ["Entry", "Inventory", "is_norm", "norm_layers"]

# Torch's own normalization layers; user subclasses are found by inheritance. `_NormBase` covers BatchNorm1d/2d/3d,
# SyncBatchNorm and InstanceNorm.
_NORM_TYPES: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


def is_norm(module: nn.Module) -> bool:
    """Tell whether `module` normalizes: a torch norm layer, a subclass, or a class with `is_normalization = True`.

    >>> is_norm(nn.BatchNorm2d(3)), is_norm(nn.Conv2d(3, 3, 1))
    (True, False)
    """
    return isinstance(module, _NORM_TYPES) or getattr(module, "is_normalization", False) is True


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the norm layers of `model` by name, each module once, in registration order."""
    return {name: module for name, module in model.named_modules() if is_norm(module)}


@dataclass(frozen=True, eq=False)
class Entry:
    """One tensor of a model, under the first of its names."""

    name: str
    tensor: torch.Tensor
    buffer: bool
    module_name: str
    module: nn.Module
    attribute: str  # "weight", "running_mean", ...
    aliases: tuple[str, ...] = ()  # further names of the same tensor: tied parameters, modules used twice
    sharers: tuple[nn.Module, ...] = ()  # further modules that own the same tensor

    @property
    def names(self) -> tuple[str, ...]:
        """All names under which `state_dict()` lists this tensor."""
        return (self.name, *self.aliases)

    @property
    def owners(self) -> tuple[nn.Module, ...]:
        """All modules that own this tensor: several where it is tied."""
        return (self.module, *self.sharers)

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.tensor.numel()


class Inventory:
    """All tensors of a model's `state_dict()`, tied ones once, in registration order.

    >>> inventory = Inventory(nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2)))
    >>> [entry.name for entry in inventory][:3], inventory.parameters
    (['0.weight', '1.weight', '1.bias'], 22)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        saved = set(model.state_dict())
        found: dict[int, Entry] = {}
        # remove_duplicate=False also walks the second name of a module that is used twice.
        for module_name, module in model.named_modules(remove_duplicate=False):
            prefix = f"{module_name}." if module_name else ""
            tensors = [(name, tensor, False) for name, tensor in module._parameters.items()]
            tensors += [(name, tensor, True) for name, tensor in module._buffers.items()]
            for attribute, tensor, buffer in tensors:
                name = prefix + attribute
                if tensor is None or name not in saved:  # absent, or a buffer that is not saved
                    continue
                entry = found.get(id(tensor))
                if entry is None:
                    found[id(tensor)] = Entry(name, tensor, buffer, module_name, module, attribute)
                else:
                    sharers = entry.sharers if module in entry.owners else (*entry.sharers, module)
                    found[id(tensor)] = replace(entry, aliases=(*entry.aliases, name), sharers=sharers)
        self.entries: dict[str, Entry] = {entry.name: entry for entry in found.values()}
        self.canonical: dict[str, str] = {name: entry.name for entry in self for name in entry.names}

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> Entry:
        return self.entries[self.canonical[name]]

    @property
    def parameters(self) -> int:
        """Number of entries of all parameters, buffers left out."""
        return sum(entry.size for entry in self if not entry.buffer)

    def modules(self) -> dict[str, nn.Module]:
        """Return all modules below the model by every name they have."""
        return dict(self.model.named_modules(remove_duplicate=False))
