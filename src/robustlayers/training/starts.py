"""Starts: where a group's entries begin a phase. Each is a function of the present values, a seed, and named sources.

| start | a group begins the phase with |
|---|---|
| `keep` | what the phase before left |
| `reinitialize` | values of a freshly initialized model: the modules' own initializers, another seed |
| `reset-statistics` | running mean 0, variance (or range) 1, counter 0; parameters as they are |
| `shuffle` | its own entries, permuted inside each tensor: the same values, no structure (Frankle et al. 2021) |
| `scale-uniform` `scale-one` `scale-signs` | norm scales drawn from U[0, 1], set to 1, drawn from U[-1, 1] |
| `shift-zero` `shift-one` | norm shifts set to 0 or 1 |
| `scale-shift-one` | both set to 1 (`oneone` of Frankle et al. 2021) |
| `load: FILE` | values from a safetensors file; strict, with a mapping of names if needed |
| `from: PHASE` | values at the end of an earlier phase; `from: initial` is the untrained model |

Only the group's own entries change; where a group holds a part of a tensor, the other entries stay bit-equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from robustlayers.core.errors import UserError, nearest, one_of
from robustlayers.core.random import stream
from robustlayers.selection.inventory import Entry, is_norm
from robustlayers.selection.selection import Selection

__all__ = ["STARTS", "concerned", "copy_entries", "start_group"]

Change = Callable[[Entry, Tensor, torch.Generator], Tensor | None]
"""`change(entry, value, generator) -> new value`, or None where the start does not concern the tensor."""


def start_group(selection: Selection, start: str, seed: int) -> list[str]:
    """Apply a start that needs no source to a group's entries, in place; return the names of the tensors it set.

    Draws are a function of (seed, start, tensor name). Raises `UserError` for an unknown start, and where the start
    concerns no tensor of the group.
    """
    if start == "keep":
        return []
    if start not in STARTS:
        raise UserError(one_of("start", start, STARTS))
    new = _changed(selection, start, seed)
    if not new:
        raise UserError(f"start {start!r} concerns no tensor of the group")
    return copy_entries(selection, new, start)


def concerned(selection: Selection, start: str) -> list[str]:
    """Return the tensors of a group that a start of `STARTS` would set; nothing is changed."""
    return list(_changed(selection, start, 0))


def _changed(selection: Selection, start: str, seed: int) -> dict[str, Tensor]:
    new: dict[str, Tensor] = {}
    for name in selection:
        entry = selection.inventory.entries[name]
        value = STARTS[start](entry, entry.tensor.detach().cpu(), stream(seed, "start", start, name))
        if value is not None:
            new[name] = value
    return new


@torch.no_grad()
def copy_entries(selection: Selection, source: Mapping[str, Tensor], what: str, *, strict: bool = False) -> list[str]:
    """Copy the group's entries from `source` (tensor name -> value) in place and return the names that were set.

    With `strict` every tensor of the group must be in the source. Raises `UserError` for a missing name (with the
    nearest ones) and for a shape that differs.
    """
    changed = []
    for name, mask in selection.parts.items():
        entry = selection.inventory.entries[name]
        found = next((alias for alias in entry.names if alias in source), None)
        if found is None:
            # Published files often lack counters and the input's mean and standard deviation.
            if strict and not (entry.buffer and not entry.attribute.startswith("running_")):
                close = nearest(name, source)
                raise UserError(f"{what} has no tensor {name!r}" + (f"; nearest: {', '.join(close)}" if close else ""))
            continue
        value = source[found].to(entry.tensor.device, entry.tensor.dtype)
        if value.shape != entry.tensor.shape:
            raise UserError(f"{what}: {name} is {list(value.shape)}, the model has {list(entry.tensor.shape)}")
        if mask is None:
            entry.tensor.copy_(value)
        else:
            entry.tensor.copy_(torch.where(mask.to(value.device), value, entry.tensor))
        changed.append(name)
    return changed


def _reset_statistics(entry: Entry, value: Tensor, generator: torch.Generator) -> Tensor | None:
    if not entry.buffer or not is_norm(entry.module):
        return None
    spread = entry.attribute in ("running_var", "running_range")  # the latter is RobustNorm's
    return torch.ones_like(value) if spread else torch.zeros_like(value)


def _shuffle(entry: Entry, value: Tensor, generator: torch.Generator) -> Tensor | None:
    if entry.buffer:
        return None
    order = torch.randperm(value.numel(), generator=generator)
    return value.flatten()[order].view_as(value)


def _norm_parameter(attribute: str, make: Callable[[Tensor, torch.Generator], Tensor]) -> Change:
    def change(entry: Entry, value: Tensor, generator: torch.Generator) -> Tensor | None:
        if entry.buffer or entry.attribute != attribute or not is_norm(entry.module):
            return None
        return make(value, generator)

    return change


def _uniform(value: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(value.shape, generator=generator, dtype=value.dtype)


def _ones(entry: Entry, value: Tensor) -> Tensor | None:
    affine = not entry.buffer and entry.attribute in ("weight", "bias") and is_norm(entry.module)
    return torch.ones_like(value) if affine else None


STARTS: dict[str, Change] = {
    "reset-statistics": _reset_statistics,
    "shuffle": _shuffle,
    # Frankle et al. 2021, appendix: initializers of the scale when only norm layers are trained.
    "scale-uniform": _norm_parameter("weight", _uniform),
    "scale-one": _norm_parameter("weight", lambda value, _: torch.ones_like(value)),
    "scale-signs": _norm_parameter("weight", lambda value, generator: 2 * _uniform(value, generator) - 1),
    "scale-shift-one": lambda entry, value, _: _ones(entry, value),
    "shift-zero": _norm_parameter("bias", lambda value, _: torch.zeros_like(value)),
    "shift-one": _norm_parameter("bias", lambda value, _: torch.ones_like(value)),
}
