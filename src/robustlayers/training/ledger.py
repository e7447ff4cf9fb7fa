"""The ledger: after a phase, what moved in each group, how far, and whether the phase kept its promises.

Promises: a frozen group is bit-equal, buffers and counters included; in a trained group every parameter tensor got a
gradient or moved, and something did move (a group that holds only buffers: at least one of them).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robustlayers.core.errors import Fault, UserError
from robustlayers.selection.partition import Partition
from robustlayers.selection.selection import Selection
from robustlayers.training.objectives import Signal, signal_text

__all__ = ["GroupChange", "check_promises", "compare", "snapshot"]


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
    before: str = ""  # SHA-256 of the group's entries before and after, 16 hexadecimal digits
    after: str = ""
    effective_lr: float | None = None  # mean over updates of |lr g|_2 / |theta|_2
    gradient_passes: int = 0  # backward passes of single images that the group's gradient was taken from

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
    *,
    effective_rates: Mapping[str, float] | None = None,
    learned: Mapping[str, int] | None = None,
) -> list[GroupChange]:
    """Return the ledger of a phase from the tensors before and after it.

    `effective_rates` and `learned` (backward passes) are what the training measured, by group.

    A trained parameter tensor that did not move breaks its promise, unless it is among the `reached`: those that did get
    a gradient. A bias right before batch norm gets one of rounding noise, too small to change it.
    """
    return [
        replace(
            _change(group, selection, signals[group], before, after, reached or ()),
            effective_lr=(effective_rates or {}).get(group),
            gradient_passes=(learned or {}).get(group, 0),
        )
        for group, selection in partition.groups.items()
    ]


def check_promises(ledger: Sequence[GroupChange]) -> None:
    """Raise `UserError` with the tensors that broke a promise, if there are any."""
    faults = [
        Fault(
            f"group {change.group!r} was promised {'frozen' if change.signal == 'frozen' else 'trained'}, but "
            f"{', '.join(change.broken[:4])} {'moved' if change.signal == 'frozen' else 'did not move'}"
        )
        for change in ledger
        if not change.kept
    ]
    if faults:
        raise UserError(faults)


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
    digests = hashlib.sha256(), hashlib.sha256()
    for name, mask in selection.parts.items():
        entry = selection.inventory.entries[name]
        old, new = before[name].detach().cpu(), after[name].detach().cpu()
        if mask is not None:
            old, new = old[mask.cpu()], new[mask.cpu()]
        for digest, tensor in zip(digests, (old, new), strict=True):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
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
        before=digests[0].hexdigest()[:16],
        after=digests[1].hexdigest()[:16],
    )


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()]) if tensor.dtype.is_floating_point else tensor
