"""What the norm layers here share: scale and shift per channel, checks, running averages, and what a layer holds.

Every layer of this package says `is_normalization = True`, so that `is_norm` finds it. Layers that can run in several ways
also have

* `branches`: the names of the ways, a tuple, and
* `branch`: the one in use, a plain attribute that anyone may set. It is no part of the state dict.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustlayers.core.errors import UserError, one_of
from robustlayers.core.quantities import number
from robustlayers.models.norms import NormKind
from robustlayers.models.options import Option

__all__ = [
    "Flag",
    "Momentum",
    "ScaleShift",
    "affine_of",
    "batch_class",
    "batch_norm_like",
    "channels_of",
    "check_channels",
    "chosen",
    "duplicate",
    "kind",
    "per_channel",
    "plain",
    "precise",
    "reduced",
    "settle",
    "track",
]


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Return `values` [c] in the shape in which they meet `x` [n, c, ...]."""
    return values.view(1, -1, *(1,) * (x.dim() - 2))


def reduced(x: Tensor) -> tuple[int, ...]:
    """Return the dimensions of `x` [n, c, ...] over which a statistic per channel is taken."""
    return (0, *range(2, x.dim()))


def precise(x: Tensor) -> Tensor:
    """Return `x` in float32 if it is in half precision: sums of squares of a feature map do not fit into that."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def check_channels(x: Tensor, channels: int, what: str) -> None:
    """Refuse an input that is not [n, channels, ...]."""
    if x.dim() < 2 or x.shape[1] != channels:
        raise UserError(f"{what}: input of shape {list(x.shape)}; it takes [n, {channels}, ...]")


def chosen(layer: Any) -> str:
    """Return the branch of a layer that is in use; one that it does not have is a `UserError`."""
    if layer.branch not in layer.branches:
        raise UserError(one_of(f"branch of {type(layer).__name__}", str(layer.branch), layer.branches))
    return layer.branch


class ScaleShift(nn.Module):
    """Scale and shift per channel: y = weight x + bias, for x [n, c, ...]; weight 1 and bias 0 at the beginning.

    The affine half of a norm layer. It counts as normalization, so that `norm.weight` and `norm.bias` select it.
    """

    is_normalization = True

    def __init__(self, weight: nn.Parameter | int, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        if isinstance(weight, int):
            weight, bias = nn.Parameter(torch.ones(weight)), nn.Parameter(torch.zeros(weight))
        self.weight = weight
        self.bias = bias if bias is not None else nn.Parameter(torch.zeros_like(weight))

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape and dtype of `x`."""
        check_channels(x, self.channels, "ScaleShift")
        y = precise(x) * per_channel(self.weight, x) + per_channel(self.bias, x)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """Return the number of channels, for `print(model)`."""
        return f"{self.channels}"


@torch.no_grad()
def track(module: nn.Module, momentum: float | None, **observed: Tensor) -> None:
    """Move running statistics towards what was observed: r <- (1 - m) r + m v, as torch's batch norm does.

    m is `momentum`; None stands for 1 / number of batches, which makes r the mean of all of them. The counter
    `num_batches_tracked` goes up by one.
    """
    counter = module.get_buffer("num_batches_tracked")
    counter.add_(1)
    share = 1.0 / float(counter) if momentum is None else momentum
    for name, value in observed.items():
        buffer = module.get_buffer(name)
        buffer.mul_(1 - share).add_(value.detach().to(buffer.dtype), alpha=share)


_HERE = __name__.rpartition(".")[0] + "."


# -- what an existing norm layer holds ----------------------------------------------------------------------------


def plain(norm: nn.Module) -> nn.Module:
    """Return torch's layer with what `norm` holds: of a layer of this package its `plain()`, else `norm` itself."""
    make: Callable[[], nn.Module] | None = getattr(norm, "plain", None)  # pyright: ignore[reportAssignmentType]
    own = any(base.__module__.startswith(_HERE) for base in type(norm).__mro__)
    return make() if own and make is not None else norm


def channels_of(norm: nn.Module) -> int:
    """Return how many channels a norm layer has; a `UserError` for one of which that cannot be seen."""
    for name in ("num_features", "num_channels", "channels"):
        value = getattr(norm, name, None)
        if isinstance(value, int):
            return value
    raise UserError(
        f"{type(norm).__name__} has no number of channels (num_features, num_channels), so nothing can take its place"
    )


def affine_of(norm: nn.Module) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """Return the scale and shift [c] of a norm layer, the parameters themselves; None where it has none."""
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    shape = (channels_of(norm),)
    return (
        weight if weight is not None and weight.shape == shape else None,
        bias if bias is not None and bias.shape == shape else None,
    )


def settle(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """Give a new `layer` the device, dtype, mode, scale and shift of the `norm` whose place it takes; return it.

    Scale and shift stay the same parameters, so that an optimizer that holds them, and `requires_grad`, stay right.
    """
    tensors = [*norm.parameters(), *norm.buffers()]
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    if floats:
        layer.to(device=floats[0].device, dtype=floats[0].dtype)
    if hasattr(layer, "stands_for"):
        setattr(layer, "stands_for", batch_class(norm))  # noqa: B010  # type checkers take it for a tensor
    for name, value in zip(("weight", "bias"), affine_of(norm), strict=True):
        own = layer._parameters.get(name)
        if own is not None and value is not None and own.shape == value.shape:
            layer._parameters[name] = value
    return layer.train(norm.training)


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.InstanceNorm1d: nn.BatchNorm1d,
    nn.InstanceNorm2d: nn.BatchNorm2d,
    nn.InstanceNorm3d: nn.BatchNorm3d,
}


def batch_class(norm: nn.Module) -> type[nn.Module]:
    """Return torch's batch norm for the inputs of `norm`; for images where that cannot be seen, as of group norm."""
    if hasattr(norm, "stands_for"):
        return norm.stands_for  # pyright: ignore[reportReturnType]
    if type(norm) in _INSTANCE_NORMS:
        return _INSTANCE_NORMS[type(norm)]
    return next((known for known in _BATCH_NORMS if isinstance(norm, known)), nn.BatchNorm2d)


def batch_norm_like(norm: nn.Module, *, affine: bool = True, tracking: bool = True) -> nn.Module:
    """Return a new batch norm layer for the inputs of `norm`, with its scale, shift and running statistics.

    Of batch norm the class, `eps` and `momentum` are kept too, and the buffers themselves. For group norm, which does not
    know the dimensions of its inputs, it is the one for images.
    """
    own = isinstance(norm, nn.modules.batchnorm._BatchNorm)
    make: Callable[..., nn.Module] = batch_class(norm)
    settings: dict[str, Any] = {"eps": norm.eps, "momentum": norm.momentum} if own else {}
    layer = make(channels_of(norm), affine=affine, track_running_stats=tracking, **settings)
    settle(layer, norm)
    if own and tracking and norm.running_mean is not None:
        layer._buffers.update(norm._buffers)
    return layer


def duplicate(parameter: nn.Parameter) -> nn.Parameter:
    """Return a parameter of its own with the same values."""
    return copy.deepcopy(parameter)


# -- kinds ---------------------------------------------------------------------------------------------------------


def kind(
    replace: Callable[..., nn.Module],
    *,
    options: Mapping[str, Option] | None = None,
    shifts: bool = True,
    finish: Callable[..., object] | None = None,
) -> NormKind:
    """Return the `NormKind` of which a new layer is what takes the place of a new `BatchNorm2d`."""

    def make(channels: int, **settings: Any) -> nn.Module:
        return replace(nn.BatchNorm2d(channels), **settings)

    return NormKind(make, shifts=shifts, options=options or {}, replace=replace, finish=finish)


@dataclass(frozen=True)
class Flag(Option):
    """Yes or no."""

    default: bool

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with `value`, or None."""
        return None if isinstance(value, bool) else f"{value!r} is not allowed; allowed: {self.allowed()}"

    def allowed(self) -> str:
        """Return `true, false`."""
        return "true, false"


@dataclass(frozen=True)
class Momentum(Option):
    """The share of the newest batch in the running statistics, in (0, 1]; None for the mean of all batches."""

    default: float | None = 0.1

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with `value`, or None."""
        if value is None:
            return None
        try:
            inside = 0 < number(value, "momentum") <= 1
        except UserError as error:
            return error.faults[0].message
        return None if inside else f"{value!r} is not allowed; allowed: {self.allowed()}"

    def allowed(self) -> str:
        """Return the range in words."""
        return "above 0, up to 1; none for the mean of all batches"

    def resolve(self, value: Any, resolved: Mapping[str, Any]) -> float | None:
        """Return the number as a float."""
        return None if value is None else number(value, "momentum")
