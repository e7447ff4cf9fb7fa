"""The ledger: after a phase, what moved in each group, how far, and whether the phase kept its promises.

Promises: a frozen group is bit-equal, buffers and counters included; in a trained group every parameter tensor got a
gradient or moved, and something did move (a group that holds only buffers: at least one of them).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustlayers.selection.partition import Partition
from robustlayers.selection.selection import Selection
from robustlayers.training.objectives import Signal, signal_text

__all__ = ["GroupChange", "compare", "snapshot"]


@dataclass(frozen=True)
class GroupChange:
    """What one group did in one phase."""

    group: str
    signal: str
    tensors: int
    parameters: int
    buffers: int
    moved_parameters: int  # entries that differ
    moved_buffers: int
    relative_l2: float  # |after - before|_2 / |before|_2 over the group's parameter entries
    largest: float  # max |after - before| over them
    broken: tuple[str, ...]  # tensors that broke the group's promise

    @property
    def kept(self) -> bool:
        """Whether the promise was kept."""
        return not self.broken


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every tensor of `model.state_dict()`."""
    return {
        name: tensor.detach().clone() for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)
    }


def compare(
    partition: Partition,
    signals: Mapping[str, Signal],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    reached: Collection[str] | None = None,
) -> list[GroupChange]:
    """Return the ledger of a phase from the tensors before and after it.

    A trained parameter tensor that did not move breaks its promise, unless it is among the `reached`: those that did get
    a gradient. A bias right before batch norm gets one of rounding noise, too small to change it.
    """
    return [
        _change(group, selection, signals[group], before, after, reached or ())
        for group, selection in partition.groups.items()
    ]


def _change(
    group: str,
    selection: Selection,
    signal: Signal,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    reached: Collection[str],
) -> GroupChange:
    moved = {False: 0, True: 0}
    broken: list[str] = []
    square = reference = largest = 0.0
    for name, mask in selection.parts.items():
        entry = selection.inventory.entries[name]
        old, new = before[name].detach().cpu(), after[name].detach().cpu()
        if mask is not None:
            old, new = old[mask], new[mask]
        # Bits, not values: -0.0 against 0.0 and one NaN against another are changes too.
        differs = _bits(old) != _bits(new)
        count = int(differs.sum())
        moved[entry.buffer] += count
        still = signal and not entry.buffer and not count and old.numel() and name not in reached
        if (not signal and count) or still:
            broken.append(name)
        if not entry.buffer:
            change = new.double() - old.double()
            square += float(change.square().sum())
            reference += float(old.double().square().sum())
            largest = max(largest, float(change.abs().max()) if change.numel() else 0.0)
    if signal and not moved[not selection.parameters]:  # nothing at all moved
        broken = list(selection)
    return GroupChange(
        group=group,
        signal=signal_text(signal),
        tensors=len(selection),
        parameters=selection.parameters,
        buffers=selection.buffers,
        moved_parameters=moved[False],
        moved_buffers=moved[True],
        relative_l2=(square / reference) ** 0.5 if reference else (0.0 if not square else float(square**0.5)),
        largest=largest,
        broken=tuple(broken),
    )


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()]) if tensor.dtype.is_floating_point else tensor
