"""Mixing: entries of a model interpolated with, or exchanged for, those of another: scale and shift, statistics, anything.

Which entries is a matter of the selector: `norm.affine`, `norm.statistics`, `stage(3)`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from robustlayers.core.errors import Fault, UserError, nearest
from robustlayers.core.quantities import number
from robustlayers.selection.inventory import Entry, Inventory
from robustlayers.selection.selection import Selection
from robustlayers.selection.selectors import resolve

__all__ = ["interpolate", "swap"]


@torch.no_grad()
def interpolate(
    selection: Selection, source: Mapping[str, Tensor], share: float | str, what: str = "the source"
) -> list[str]:
    """Move the selected entries to (1 - share) own + share source, in place; return the names of the tensors.

    share 0 changes nothing and share 1 copies, both in every bit. Variances are interpolated linearly, like means: the
    weighted statistics of Schneider et al. 2020 with share = n / (N + n), not the variance of the mixture of both
    distributions, which is larger by share (1 - share) (difference of the means)^2. Integers, which are counters, are the
    source's from share 1/2 on.

    `source` is tensor name -> value, under any name that the model has for the tensor; `what` names it in messages. A
    counter or another buffer besides running mean and variance that it lacks stays as it is. Entries outside of the
    selection stay bit-equal, those of the same tensor too.

    Raises `UserError`, with nothing changed, for a share outside [0, 1], a tensor that the source lacks (with the nearest
    names) and a shape that differs.

    >>> net = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))
    >>> other = {name: tensor + 4 for name, tensor in net.state_dict().items()}
    >>> interpolate(resolve(Inventory(net), "norm.statistics"), other, 0.25)
    ['1.running_mean', '1.running_var', '1.num_batches_tracked']
    >>> net[1].running_mean, net[1].running_var, net[1].num_batches_tracked
    (tensor([1., 1.]), tensor([2., 2.]), tensor(0))
    """
    share = number(share, "share")
    if not 0 <= share <= 1:
        raise UserError(f"share: {share:g} is not allowed; allowed: 0 (as it is) to 1 (as in {what})")
    found = _found(selection, source, what)
    if share == 0:
        return list(found)
    for name, theirs in found.items():
        live, mask = _live(selection.inventory.entries[name]), selection.parts[name]
        new = _between(live, theirs.to(live.device, live.dtype), share)
        live.copy_(new if mask is None else torch.where(mask.to(live.device), new, live))
    return list(found)


@torch.no_grad()
def swap(one: nn.Module, other: nn.Module, selector: str | Selection) -> list[str]:
    """Exchange the selected entries between two models, in place; return the names of the tensors. Twice is identity.

    The selector is resolved on `one` (a `Selection` must be bound to it), and the other model must have tensors of the
    same names, shapes and dtypes, tied alike; the models may be on different devices.

    Raises `UserError`, with nothing changed, if it has not.

    >>> one, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    >>> _ = nn.init.constant_(other.weight, 7.0)
    >>> swap(one, other, "norm.weight")
    ['weight']
    >>> one.weight.tolist(), other.weight.tolist()
    ([7.0, 7.0], [1.0, 1.0])
    """
    selection = resolve(Inventory(one), selector) if isinstance(selector, str) else selector
    if selection.inventory.model is not one:
        raise UserError("the selection was bound to another model than the first")
    theirs = Inventory(other)
    faults: list[Fault] = []
    for name in selection:
        mine, entry = selection.inventory.entries[name], theirs.entries.get(name)
        if entry is None:
            close = nearest(name, theirs.entries)
            faults.append(
                Fault(f"the other model has no tensor {name!r}" + (f"; nearest: {', '.join(close)}" if close else ""))
            )
        elif entry.names != mine.names:
            faults.append(Fault(f"{name} is tied to other tensors in the other model, so that it cannot be exchanged"))
        elif (entry.tensor.shape, entry.tensor.dtype) != (mine.tensor.shape, mine.tensor.dtype):
            faults.append(Fault(f"{name} is {_kind(mine.tensor)}, and {_kind(entry.tensor)} in the other model"))
    if faults:
        raise UserError(faults)
    for name, mask in selection.parts.items():
        a, b = _live(selection.inventory.entries[name]), _live(theirs.entries[name])
        was, is_to_be = a.clone(), b.to(a.device, copy=True)
        if mask is None:
            a.copy_(is_to_be)
            b.copy_(was)
        else:
            a.copy_(torch.where(mask.to(a.device), is_to_be, was))
            b.copy_(torch.where(mask.to(a.device), was, is_to_be))
    return list(selection)


def _found(selection: Selection, source: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Return the source's value for each tensor of the selection; all that is missing or does not fit is a fault."""
    found: dict[str, Tensor] = {}
    faults: list[Fault] = []
    for name in selection:
        entry = selection.inventory.entries[name]
        alias = next((alias for alias in entry.names if alias in source), None)
        if alias is None:
            # As for a start from a file: published ones often lack counters and the input's mean and deviation.
            if not entry.buffer or entry.attribute.startswith("running_"):
                close = nearest(name, source)
                faults.append(
                    Fault(f"{what} has no tensor {name!r}" + (f"; nearest: {', '.join(close)}" if close else ""))
                )
        elif source[alias].shape != entry.tensor.shape:
            shapes = f"is {list(source[alias].shape)}, the model has {list(entry.tensor.shape)}"
            faults.append(Fault(f"{what}: {name} {shapes}"))
        else:
            found[name] = source[alias].detach()
    if faults:
        raise UserError(faults)
    return found


def _between(own: Tensor, source: Tensor, share: float) -> Tensor:
    if share == 1:
        return source
    if not own.is_floating_point():
        return source if share >= 0.5 else own
    return own.lerp(source, share)  # torch computes halves in float32


def _live(entry: Entry) -> Tensor:
    # Looked up anew, since moving a model to another device puts new tensors in the place of its buffers.
    tensor = (entry.module._buffers if entry.buffer else entry.module._parameters)[entry.attribute]
    return entry.tensor if tensor is None else tensor.detach()


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
