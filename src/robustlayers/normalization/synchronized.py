"""Batch norm over a batch that several processes share: normalized by the statistics of all images, forward and backward.

Torch's own layer for this, `SyncBatchNorm`, runs on CUDA only and takes shards of any size for equally heavy. Here the
processes know how many images each of them has, and an exchange is a sum over processes, so that gloo on a CPU will do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from robustlayers.core.errors import Fault, UserError
from robustlayers.core.ranks import Ranks
from robustlayers.normalization._steer import Steered
from robustlayers.selection.inventory import is_norm

__all__ = ["Shared", "check_layers", "shared", "sharing", "synchronize"]


@dataclass(frozen=True)
class Shared:
    """A batch that processes share: how many images each has; one with none computes along, and counts for nothing."""

    ranks: Ranks
    sizes: tuple[int, ...]

    def values(self, x: Tensor) -> int:
        """Return how many values a channel has in all processes, for this one's `x` [k n, c, ...]: k passes as one batch."""
        total = sum(self.sizes)
        own = self.sizes[self.ranks.index] or min(2, total)
        return total * x.numel() // (own * x.shape[1])


_SHARED: ContextVar[Shared | None] = ContextVar("shared", default=None)


def shared() -> Shared | None:
    """Return the batch that is shared now, None where there is none."""
    return _SHARED.get()


@contextmanager
def sharing(batch: Shared | None) -> Iterator[None]:
    """Make batch norm normalize by all images of a shared batch in the passes inside that normalize by the batch."""
    token = _SHARED.set(batch)
    try:
        yield
    finally:
        _SHARED.reset(token)


def check_layers(model: nn.Module) -> None:
    """Raise `UserError` for norm layers that depend on the batch in a way of their own, which no exchange is known for.

    Batch norm is exchanged; layers that normalize each image by itself need no exchange.

    >>> check_layers(nn.Sequential(nn.BatchNorm1d(2), nn.GroupNorm(1, 2)))
    """
    faults = [
        f"{name or 'the model'}: {type(module).__name__}"
        for name, module in model.named_modules()
        if is_norm(module) and not _known(module)
    ]
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        text = (
            f"statistics: sync is known for batch norm only, not for {', '.join(faults[:4])}{more}; allowed: none, mean"
        )
        raise UserError(Fault(text))


def _known(module: nn.Module) -> bool:
    if isinstance(module, _BatchNorm):
        return _plain(module)
    if isinstance(module, _InstanceNorm):
        return True
    from robustlayers.normalization.layers.robust import RobustNorm

    return not isinstance(module, RobustNorm) and not any(buffer is not None for buffer in module._buffers.values())


def _plain(module: nn.Module) -> bool:
    """Tell whether a batch norm computes what torch's does."""
    from robustlayers.normalization.layers.joint import JointBatchNorm

    if isinstance(module, JointBatchNorm):
        return module.statistics == "both"
    return type(module).forward is _BatchNorm.forward


def synchronize(module: nn.Module, undo: ExitStack, *, mean: bool) -> None:
    """Make one batch norm normalize by the shared batch, if there is one, until `undo` is closed.

    `mean`: the loss is a mean over the images of a process, and processes weigh by their images; else it is a sum.
    """
    batch = _SHARED.get()
    if batch is None or not isinstance(module, _BatchNorm) or not _plain(module):
        return
    own = vars(module)
    undo.callback(_put_back, own, own.get("forward"))
    plain = module.forward
    while isinstance(plain, Steered):  # by a block around this one, which does not hold in here
        plain = plain.plain
    own["forward"] = _Synchronized(module, plain, batch, mean)


def _put_back(own: dict[str, Any], forward: Any) -> None:
    own.pop("forward", None)
    if forward is not None:
        own["forward"] = forward


class _Synchronized:
    """The forward of one batch norm over a shared batch; what the layer's attributes say holds as ever."""

    def __init__(self, module: _BatchNorm, plain: Callable[[Tensor], Tensor], batch: Shared, mean: bool) -> None:
        self.module, self.plain, self.batch, self.mean = module, plain, batch, mean

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name
        module = self.module
        if not module.training and (module.running_mean is not None or module.running_var is not None):
            return self.plain(input)
        module._check_input_dim(input)
        values = self.batch.values(input)
        if values < 2:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
        y, mean, var = _Normalize.apply(input, self.batch, self.mean, module.eps)  # pyright: ignore[reportGeneralTypeIssues]
        if module.training and module.track_running_stats:
            _track(module, mean, var * (values / (values - 1)))
        shape = (1, -1, *(1,) * (input.dim() - 2))
        if module.weight is not None:
            y = y * module.weight.view(shape)
        if module.bias is not None:
            y = y + module.bias.view(shape)
        return y.to(input.dtype)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self.plain, memo)  # a copy of the model outlives the pass


@torch.no_grad()
def _track(module: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    factor: float | Tensor = 0.0 if module.momentum is None else module.momentum
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:
            factor = 1.0 / module.num_batches_tracked
    for running, value in ((module.running_mean, mean), (module.running_var, var)):
        if running is not None:
            running.mul_(1 - factor).add_(value.to(running.dtype) * factor)


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) by mean and variance of each channel over all images of all processes.

    With p_r = n_r / N the share of the images of process r, m_r and v_r the mean and variance of its own:

        mean = sum_r p_r m_r,    var = sum_r p_r (v_r + (m_r - mean)^2)

    Let g be the gradient of a process's own loss for y, and S the pixels of an image. The gradient for x that it returns is
    in the units of its own loss too, so that gradients of parameters, averaged over processes by their images, are those
    of the whole batch's loss:

        dx = (g - w / (N S) (sum_r c_r sum(g_r) + y sum_r c_r sum(g_r y_r))) / sqrt(var + eps)

    with w = 1 / n, c_r = n_r where the loss is a mean over images, w = c_r = 1 where it is a sum.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Shared, mean_loss: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        wide = x if x.dtype == torch.float64 else x.float()
        dims = (0, *range(2, x.dim()))
        shape = (1, -1, *(1,) * (x.dim() - 2))
        variances, means = batch.ranks.gather(torch.stack(torch.var_mean(wide, dims, correction=0))).unbind(1)
        shares = _shares(batch.sizes, wide.dtype, wide.device)
        mean = (shares * means).sum(0)
        var = (shares * (variances + (means - mean) ** 2)).sum(0)
        scale = torch.rsqrt(var + eps)
        y = (wide - mean.view(shape)) * scale.view(shape)
        ctx.save_for_backward(y, scale)
        ctx.batch, ctx.mean_loss, ctx.dims, ctx.shape, ctx.dtype = batch, mean_loss, dims, shape, x.dtype
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # torch wraps it
        ctx: Any, *gradients: Any
    ) -> tuple[Tensor, None, None, None]:
        g: Tensor = gradients[0]
        y, scale = ctx.saved_tensors
        sizes, ranks = ctx.batch.sizes, ctx.batch.ranks
        own = sizes[ranks.index]
        counts = own if ctx.mean_loss else float(own > 0)
        sums = ranks.total(torch.stack([g.sum(ctx.dims), (g * y).sum(ctx.dims)]) * counts)
        weight = 1 / max(1, own) if ctx.mean_loss else 1.0
        first, second = (sums * (weight / ctx.batch.values(g))).unbind(0)
        dx = (g - first.view(ctx.shape) - y * second.view(ctx.shape)) * scale.view(ctx.shape)
        return dx.to(ctx.dtype), None, None, None


@lru_cache(maxsize=16)
def _shares(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([[size / sum(sizes)] for size in sizes], dtype=dtype, device=device)
