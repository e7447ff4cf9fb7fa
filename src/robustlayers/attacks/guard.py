"""Leave no trace: whatever an attack does to a model, the model is put back as it was, also after an exception."""

from __future__ import annotations

import operator
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["guard"]

# Everything a bare module keeps in dictionaries and sets: parameters, buffers, children and every kind of hook. Read
# from torch itself, so that a kind of hook which a later torch adds is covered too.
_CONTAINERS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set))
_STATISTICS = ("_buffers", "_non_persistent_buffers_set")
_PLAIN = ("training", "_is_full_backward_hook")


@contextmanager
def guard(model: nn.Module, *, keep_statistics: bool = False) -> Iterator[None]:
    """Freeze the parameters of `model` inside the block, and on exit undo what the block did to it.

    Restored, for every module: its own `training`, its hooks, and which parameters, buffers and children it has. For
    every parameter: `requires_grad`, `.grad` (None inside the block), the same tensor object as before, and the memory
    that holds its values, so that a conversion such as `model.half()` is undone. For every
    buffer: its value, bit by bit, in the same tensor object. Besides: the global random states of torch (CPU, and the
    CUDA devices the model is on), of `random` and, where it is imported, of `numpy.random`; and whether autograd
    records.

    With `keep_statistics`, buffers stay as the block left them, for crafting that is meant to update running
    statistics. Not covered: values written into a parameter in place, and state of a module that is neither parameter
    nor buffer. Modes inside the block are the caller's: `with guard(net), inference(net):` crafts in evaluation mode.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    >>> with guard(net):
    ...     net(torch.ones(3, 2, requires_grad=True)).sum().backward()
    >>> net[0].weight.grad is None, net[1].running_mean, net[1].num_batches_tracked
    (True, tensor([0., 0.]), tensor(0))
    """
    modules = list(model.modules())
    names = [name for name in _CONTAINERS if not (keep_statistics and name in _STATISTICS)]
    plain = [(module, name, getattr(module, name)) for module in modules for name in _PLAIN if hasattr(module, name)]
    containers = [
        (module, name, value, value.copy() if value else None)
        for module in modules
        for name in names
        if (value := module.__dict__.get(name)) is not None
    ]
    # Walked by hand, each tensor once: `parameters()` and `buffers()` would walk the whole tree for each call.
    own_parameters = {p: None for module in modules for p in module._parameters.values() if p is not None}
    own_buffers = {b: None for module in modules for b in module._buffers.values() if b is not None}
    parameters = [(p, p.requires_grad, p.grad, p.data) for p in own_parameters]
    buffers = [] if keep_statistics else [(b, b.detach().clone()) for b in own_buffers]
    random_states = _random_states({tensor.device for tensor in (*own_parameters, *own_buffers)})
    recording = torch.is_grad_enabled()
    try:
        for parameter, *_ in parameters:
            parameter.grad = None
            parameter.requires_grad_(False)
        yield
    finally:
        torch.set_grad_enabled(recording)
        for module, name, value, copy in containers:
            _restore_container(module, name, value, copy)
        for module, name, value in plain:
            if getattr(module, name) is not value:
                setattr(module, name, value)
        for parameter, requires_grad, grad, data in parameters:
            if not _aliases(parameter, data):
                parameter.data = data
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for buffer, value in buffers:
            _restore_value(buffer, value)
        for restore, state in random_states:
            restore(state)


def _restore_container(module: nn.Module, name: str, value: Any, copy: Any) -> None:
    # In place, in the same object: handles of hooks hold a reference to their dictionary. And only where it differs:
    # compiled models check some of these dictionaries for writes.
    if module.__dict__.get(name) is not value:
        module.__dict__[name] = value
    if copy is None:
        value.clear()
    elif not _same(value, copy):
        value.clear()
        value.update(copy)


def _aliases(tensor: Tensor, data: Tensor) -> bool:
    return tensor.data_ptr() == data.data_ptr() and tensor.dtype == data.dtype and tensor.shape == data.shape


def _same(value: Any, copy: Any) -> bool:
    if isinstance(value, set):
        return value == copy
    return list(value) == list(copy) and all(map(operator.is_, value.values(), copy.values()))


@torch.no_grad()
def _restore_value(buffer: Tensor, value: Tensor) -> None:
    # Written without a comparison, which would wait for the device. Through `.data`, so that autograd does not take
    # it for a change: a graph from before the block may have saved this buffer. Version counters cannot tell whether
    # anything changed, since batch norm updates its statistics without counting.
    if buffer.shape == value.shape and buffer.dtype == value.dtype and buffer.device == value.device:
        buffer.data.copy_(value)
    else:
        buffer.data = value


def _random_states(devices: set[torch.device]) -> list[tuple[Callable[[Any], object], Any]]:
    states: list[tuple[Callable[[Any], object], Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (random.setstate, random.getstate()),
    ]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states.append((numpy.random.set_state, numpy.random.get_state()))
    cuda = [device for device in devices if device.type == "cuda"]
    return states + [(_cuda_setter(device), torch.cuda.get_rng_state(device)) for device in cuda]


def _cuda_setter(device: torch.device) -> Callable[[Tensor], None]:
    return lambda state: torch.cuda.set_rng_state(state, device)
