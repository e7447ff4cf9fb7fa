"""Contexts that set every norm layer for one pass and put everything back; no class is touched, no mode is lost.

How torch's `_BatchNorm.forward` is steered without changing it: `training` decides between batch and running statistics,
and `track_running_stats=False` on a training layer makes it normalize by the batch without touching its buffers. A layer
of another class, of which only its user knows what it does to its buffers, gets copies of them for a pass that may not
change them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from robustlayers.selection.inventory import is_norm

__all__ = ["Setting", "inference", "normalizing"]

Setting = tuple[Literal["batch", "running"], bool]
"""(normalize by, update the running statistics)"""


@contextmanager
def normalizing(
    model: nn.Module, settings: Mapping[nn.Module, Setting], *, training: bool, moving: Collection[nn.Module] = ()
) -> Iterator[None]:
    """Run one pass with each norm layer as `settings` says and all other modules in `training` or evaluation mode.

    Norm layers without a setting normalize by running statistics. On exit, also after an exception, every module has the
    mode and every norm layer the attributes it had before. Contexts nest.

    `moving` are norm layers whose running statistics change between this pass and its backward: they normalize by copies.
    Autograd keeps the statistics of the pass by reference, and torch updates them without telling autograd, so that the
    gradient would silently be taken at the new ones.
    """
    modules = list(model.modules())
    modes = [module.training for module in modules]
    undo: list[Callable[[], object]] = []
    try:
        for module in modules:
            if is_norm(module):
                by, update = settings.get(module, ("running", False))
                _set(module, by, update, undo, moving=module in moving)
            else:
                module.training = training
        yield
    finally:
        for step in reversed(undo):
            step()
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run `model` in evaluation mode, norm layers by running statistics, and restore each module's own mode after.

    >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    >>> _ = net[1].eval()
    >>> with inference(net):
    ...     print([module.training for module in net])
    [False, False]
    >>> [module.training for module in net]
    [True, False]
    """
    with normalizing(model, {}, training=False):
        yield


def _set(module: nn.Module, by: str, update: bool, undo: list[Callable[[], object]], *, moving: bool) -> None:
    module.training = by == "batch"
    if not any(buffer is not None for buffer in module._buffers.values()):
        return  # no running statistics: nothing to keep still, nothing to update
    current = vars(module).get("forward")
    if isinstance(current, _UpdatingForward):  # of a context around this one
        undo.append(partial(setattr, module, "forward", current))
        module.forward = current.plain
    if update:
        if by == "running":
            undo.append(partial(_put_back, module, "forward", vars(module).get("forward")))
            module.forward = _UpdatingForward(module)
        return
    # Instance norm hands its buffers on whenever it normalizes by the input.
    known = isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module).__module__.startswith("torch.nn.")
    if known and by == "batch":
        undo.append(partial(setattr, module, "track_running_stats", module.track_running_stats))
        setattr(module, "track_running_stats", False)  # noqa: B010  # type checkers take an attribute for a tensor
    elif moving or not known:
        undo.append(_lend_copies(module))


def _put_back(module: nn.Module, name: str, value: object) -> None:
    if value is None:
        delattr(module, name)
    else:
        setattr(module, name, value)


def _lend_copies(module: nn.Module) -> Callable[[], None]:
    """Put copies in the place of the buffers; return what puts the buffers back."""
    buffers = dict(module._buffers)
    module._buffers.update(
        {name: None if buffer is None else buffer.detach().clone() for name, buffer in buffers.items()}
    )
    return lambda: module._buffers.update(buffers)


class _UpdatingForward:
    """The forward of a layer that normalizes by its running statistics and updates them by the batch afterwards."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.plain = module, module.forward

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        put_back = _lend_copies(self.module)  # the update must not reach what autograd keeps for the backward
        try:
            output = self.plain(*inputs, **named)
        finally:
            put_back()
        self.module.training = True
        try:
            with torch.no_grad():
                self.plain(*inputs, **named)  # each kind of layer knows its own update
        finally:
            self.module.training = False
        return output
