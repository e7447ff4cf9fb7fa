"""Weights from a file into a model: strict, checked as a whole before anything is copied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from robustlayers.core.errors import Fault, UserError, nearest
from robustlayers.core.files import read_tensors
from robustlayers.models.parts import Normalize

__all__ = ["load_weights", "read_weights"]

_MOST = 5  # names per list in a message


def load_weights(
    model: nn.Module, source: str | Path | Mapping[str, Tensor], mapping: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Copy the tensors of a safetensors file, or of a mapping, into `model`; return the names that kept their values.

    Every tensor of the model must be there under its name and with its shape, and no other. Only counters
    (`num_batches_tracked`) and the buffers of the input normalization may be missing: many published files lack them.
    `mapping` renames first: from a tensor's name or a dotted prefix of it to what the model calls it (`{"module": ""}`
    drops a prefix); the longest key that fits wins.

    Raises `UserError` that lists missing, unexpected and misshapen tensors with the nearest names; the model is then
    unchanged.
    """
    file = None if isinstance(source, Mapping) else str(source)
    tensors = read_weights(source, mapping)
    targets = dict(model.state_dict())
    optional = _optional(model)
    missing = [name for name in targets if name not in tensors and name not in optional]
    unexpected = [name for name in tensors if name not in targets]
    faults = []
    if missing:
        faults.append(Fault(f"{len(missing)} tensor(s) missing: {_listed(missing, unexpected)}", file=file))
    if unexpected:
        faults.append(Fault(f"{len(unexpected)} unexpected tensor(s): {_listed(unexpected, missing)}", file=file))
    for name in [name for name in targets if name in tensors]:
        theirs, ours = tensors[name], targets[name]
        if theirs.shape != ours.shape:
            text = f"shape {list(theirs.shape)}, the model's is {list(ours.shape)}"
            faults.append(Fault(text, file=file, path=name))
        elif theirs.is_floating_point() != ours.is_floating_point():
            faults.append(Fault(f"{theirs.dtype}, the model's is {ours.dtype}", file=file, path=name))
    if faults:
        raise UserError(faults)
    with torch.no_grad():
        for name, ours in targets.items():
            if name in tensors:
                ours.copy_(tensors[name])
    return tuple(name for name in targets if name not in tensors)


def read_weights(
    source: str | Path | Mapping[str, Tensor], mapping: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, or of a mapping, renamed by `mapping` as in `load_weights`."""
    file = None if isinstance(source, Mapping) else str(source)
    tensors = dict(source) if isinstance(source, Mapping) else read_tensors(Path(source))
    return _renamed(tensors, mapping or {}, file)


def _optional(model: nn.Module) -> set[str]:
    names = {name for name in model.state_dict() if name.rpartition(".")[2] == "num_batches_tracked"}
    for prefix, module in model.named_modules():
        if isinstance(module, Normalize):
            names |= {f"{prefix}.{name}" if prefix else name for name in ("mean", "std")}
    return names


def _renamed(tensors: dict[str, Tensor], mapping: Mapping[str, str], file: str | None) -> dict[str, Tensor]:
    if not mapping:
        return tensors
    renamed: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, tensor in tensors.items():
        fits = [key for key in mapping if name == key or name.startswith(key + ".")]
        new = name
        if fits:
            key = max(fits, key=len)
            used.add(key)
            new = (mapping[key] + name[len(key) :]).removeprefix(".")
        if new in renamed:
            raise UserError(Fault(f"mapping: two tensors would be called {new!r}", file=file))
        renamed[new] = tensor
    unused = [key for key in mapping if key not in used]
    if unused:
        hint = nearest(unused[0], _prefixes(tensors))
        text = f"mapping: no tensor is called {unused[0]!r}" + (f"; nearest: {', '.join(hint)}" if hint else "")
        raise UserError(Fault(text, file=file))
    return renamed


def _prefixes(names: Mapping[str, Tensor]) -> list[str]:
    pieces = (name.split(".") for name in names)
    return list(dict.fromkeys(".".join(parts[:end]) for parts in pieces for end in range(1, len(parts) + 1)))


def _listed(names: list[str], others: list[str]) -> str:
    texts = []
    for name in names[:_MOST]:
        hint = nearest(name, others, 1)
        texts.append(f"{name} (nearest: {hint[0]})" if hint else name)
    more = len(names) - len(texts)
    return ", ".join(texts) + (f" and {more} more" if more > 0 else "")
