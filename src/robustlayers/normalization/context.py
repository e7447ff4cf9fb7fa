"""Contexts that set every norm layer for one pass and put everything back; no class is touched, no mode is lost.

How torch's `_BatchNorm.forward` is steered without changing it: `training` decides between batch and running statistics,
and `track_running_stats=False` on a training layer makes it normalize by the batch without touching its buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from robustlayers.selection.inventory import is_norm

__all__ = ["Setting", "inference", "normalizing"]

Setting = tuple[Literal["batch", "running"], bool]
"""(normalize by, update the running statistics)"""

_INSTANCE_NORMS = (nn.modules.instancenorm._InstanceNorm,)


@contextmanager
def normalizing(model: nn.Module, settings: Mapping[nn.Module, Setting], *, training: bool) -> Iterator[None]:
    """Run one pass with each norm layer as `settings` says and all other modules in `training` or evaluation mode.

    Norm layers without a setting normalize by running statistics. On exit, also after an exception, every module has the
    mode and every norm layer the attributes it had before. Contexts nest.
    """
    modules = list(model.modules())
    modes = [module.training for module in modules]
    saved: list[tuple[nn.Module, str, Any]] = []
    hooks: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for module in modules:
            if is_norm(module):
                by, update = settings.get(module, ("running", False))
                _set(module, by, update, saved, hooks)
            else:
                module.training = training
        yield
    finally:
        for handle in hooks:
            handle.remove()
        for module, name, value in reversed(saved):
            setattr(module, name, value)
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


def _set(
    module: nn.Module,
    by: str,
    update: bool,
    saved: list[tuple[nn.Module, str, Any]],
    hooks: list[torch.utils.hooks.RemovableHandle],
) -> None:
    module.training = by == "batch"
    if getattr(module, "running_mean", None) is None:  # no running statistics: nothing to keep still, nothing to update
        return
    if by == "batch" and not update:
        if isinstance(module, _INSTANCE_NORMS):
            # Instance norm hands its buffers on whenever it uses the input's statistics: a momentum of 0 keeps them.
            saved.append((module, "momentum", module.momentum))
            module.momentum = 0.0
        else:
            saved.append((module, "track_running_stats", module.track_running_stats))
            module.track_running_stats = False  # pyright: ignore[reportArgumentType]  # a plain attribute of norm layers
    elif by == "running" and update:
        hooks.append(module.register_forward_hook(_update_after))


@torch.no_grad()
def _update_after(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    """Update the running statistics with the batch's, after the layer has normalized by the old ones."""
    factor = module.momentum
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if factor is None:  # cumulative average
            factor = 1.0 / float(module.num_batches_tracked)
    torch.nn.functional.batch_norm(inputs[0], module.running_mean, module.running_var, training=True, momentum=factor)
