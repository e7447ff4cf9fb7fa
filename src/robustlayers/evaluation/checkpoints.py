"""Weights to evaluate: safetensors, or a `state_dict` of torch as others publish it, into a model by strict rules."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustlayers.core.errors import Fault, UserError
from robustlayers.core.files import read_tensors
from robustlayers.models.weights import load_weights, read_weights

__all__ = ["fit_names", "load_checkpoint", "read_state"]

_WRAPPED = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "module",
)  # where files keep it beside an epoch or optimizer
_PREFIXES = ("module.", "model.", "_orig_mod.", "net.")  # of wrappers: data parallel, RobustBench, torch.compile
_TORCH = (".pt", ".pth", ".ckpt", ".tar", ".bin")


def load_checkpoint(model: nn.Module, path: Path | str, rename: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Copy the tensors of a file into `model`; return the names that kept their values, as `load_weights` does.

    The file is safetensors, or what `torch.save` made of a `state_dict` (`.pt`, `.pth`, `.ckpt`, `.tar`, `.bin`), alone or
    under one of the usual names, as on RobustBench; it is read without running code. `rename` goes first, as in
    `load_weights`: from a name or a dotted prefix to what the model calls it; then the prefixes of wrappers (`module.`,
    `model.`) are left out where the model knows the rest.

    Raises `UserError` for a file that holds anything but tensors, and for tensors that are missing, unexpected or of
    another shape; the model is then unchanged.
    """
    file = str(path)
    try:
        tensors = read_weights(read_state(path), rename)
        return load_weights(model, fit_names(tensors, model.state_dict()))
    except UserError as error:
        raise UserError([fault.at(file=file) for fault in error.faults]) from None


def read_state(path: Path | str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, or of a `state_dict` that `torch.save` wrote; no code of it is run.

    Raises `UserError` for a file that is missing or damaged, and for one that holds more than tensors and plain values.
    """
    path = Path(path)
    if path.suffix not in _TORCH:
        return read_tensors(path)
    if not path.is_file():
        raise UserError(Fault("no such file", file=str(path)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old files hold storages of a deprecated class
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many classes, some of them private
        said = " ".join(str(error).split())[:120]
        text = f"not readable as tensors alone ({type(error).__name__}: {said}); save its state_dict() as safetensors"
        raise UserError(Fault(text, file=str(path))) from None
    state = _state_of(content)
    if state is None:
        raise UserError(Fault(f"holds no state_dict; it has {_kinds(content)}", file=str(path)))
    return state


def fit_names(tensors: Mapping[str, Tensor], known: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors with prefixes of wrappers left out, from each name that `known` has only without them.

    >>> list(fit_names({"module.model.fc.weight": torch.zeros(1), "extra": torch.zeros(1)}, ["fc.weight"]))
    ['fc.weight', 'extra']

    Raises `UserError` where two names become one.
    """
    fitted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = _fitted(name, known)
        if new in fitted:
            raise UserError(f"two tensors would be called {new!r}; rename one")
        fitted[new] = tensor
    return fitted


def _fitted(name: str, known: Collection[str]) -> str:
    bare = name
    while bare not in known:
        prefix = next((prefix for prefix in _PREFIXES if bare.startswith(prefix)), None)
        if prefix is None:
            return name
        bare = bare.removeprefix(prefix)
    return bare


def _state_of(content: Any) -> dict[str, Tensor] | None:
    """Return the mapping of tensors in what a file holds: itself, or under one of the usual names."""
    if not isinstance(content, Mapping):
        return None
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors and len(tensors) == len(content):
        return tensors
    for name in _WRAPPED:
        if isinstance(content.get(name), Mapping):
            found = _state_of(content[name])
            if found is not None:
                return found
    return None


def _kinds(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a value of type {type(content).__name__}"
    shown = [f"{name!r} ({type(value).__name__})" for name, value in list(content.items())[:5]]
    return ", ".join(shown) + (", ..." if len(content) > 5 else "") if shown else "nothing"
