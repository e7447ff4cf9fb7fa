"""The modules a crafting forward is made of: layers with a norm layer folded in, multiply-adds, copies, and the rest."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.lazy import LazyModuleMixin

from robustlayers.models.parts import Normalize
from robustlayers.normalization.context import inference
from robustlayers.normalization.fold_scaling import Scaling

__all__ = ["AsItIs", "Folded", "MultiplyAdd", "duplicate", "foldable", "is_affine", "is_plain"]

# Dimensions of the inputs whose dimension 1 holds the channels.
_DIMS: dict[type[nn.Module], tuple[int, ...]] = {
    Normalize: (4,),
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
}
# The norm layer that fits each layer, and the dimensions of the inputs for which it does: of [n, l, c] a linear layer
# has the channels last, where BatchNorm1d takes l for them.
_PAIRS: dict[type[nn.Module], tuple[type[nn.Module], int]] = {
    nn.Linear: (nn.BatchNorm1d, 2),
    nn.Conv1d: (nn.BatchNorm1d, 3),
    nn.Conv2d: (nn.BatchNorm2d, 4),
    nn.Conv3d: (nn.BatchNorm3d, 5),
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module) -> bool:
    """Tell whether calling `module` does what its class says: no hooks, no parametrization, no forward of its own."""
    own = module.__dict__
    return not (any(own[name] for name in _HOOKS) or "forward" in own or "parametrizations" in own["_modules"])


def is_affine(module: nn.Module) -> bool:
    """Tell whether `module` in evaluation mode is a known affine map per channel: torch's BatchNorm, `Normalize`."""
    if type(module) not in _DIMS or not is_plain(module):
        return False
    if isinstance(module, Normalize):
        return _alike([module.mean, module.std])
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    if module.running_mean is None or module.running_var is None:  # normalizes by the batch in evaluation mode too
        return False
    return _alike([module.running_mean, module.running_var, module.weight, module.bias])


def foldable(layer: nn.Module, norm: nn.Module) -> bool:
    """Tell whether `norm`, if it alone reads the output of `layer`, can be folded into it."""
    if type(layer) not in _PAIRS or not is_plain(layer) or not is_affine(norm):
        return False
    if type(norm) is not _PAIRS[type(layer)][0] or len(norm.running_mean) != len(layer.weight):  # pyright: ignore[reportArgumentType]
        return False
    return _alike([layer.weight, layer.bias, norm.running_mean])  # pyright: ignore[reportArgumentType]


def _alike(tensors: Sequence[Tensor | None]) -> bool:
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors if tensor is not None}
    return len(kinds) == 1 and next(iter(kinds))[0] in (torch.float32, torch.float64)


def duplicate(module: nn.Module, *, channels_last: bool) -> nn.Module | None:
    """Return a copy in evaluation mode with tensors of its own; None where a copy might not do what the module does.

    Copied are plain layers of torch without children; the new tensors need no gradient and wait for their values.
    """
    known = type(module).__module__.startswith("torch.nn.modules.") and is_plain(module) and not module._modules
    if not known or isinstance(module, nn.RNNBase | LazyModuleMixin):
        return None
    double = copy.copy(module)
    double.training = False
    channels_last = channels_last and isinstance(module, nn.Conv2d)
    for kind in ("_parameters", "_buffers"):
        tensors: dict[str, Tensor | None] = getattr(module, kind)
        double.__dict__[kind] = {
            name: None if tensor is None else _new(tensor, channels_last) for name, tensor in tensors.items()
        }
    return double


def _new(tensor: Tensor, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last and tensor.dim() == 4 else torch.preserve_format
    return torch.empty_like(tensor, requires_grad=False, memory_format=layout)


class AsItIs(nn.Module):
    """Runs a module of the model as it is, in evaluation mode and without gradients for its parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._held = (module,)  # in a tuple, so that it does not become a part of this one

    def forward(self, *args: Any, **named: Any) -> Any:
        """Return what the module returns."""
        (module,) = self._held
        with inference(module), _frozen(module):
            return module(*args, **named)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


class MultiplyAdd(nn.Module):
    """scale x + shift per channel, in one pass: a norm layer that no layer before it can take in."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.scaling = Scaling.of(norm)
        self._dims = _DIMS[type(norm)]
        self._instead = (AsItIs(norm),)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of `x`, [n, c, ...]."""
        scale, shift = self.scaling.scale, self.scaling.shift
        if x.dtype == torch.bfloat16 and torch.is_autocast_enabled(x.device.type):
            scale, shift = scale.to(x.dtype), shift.to(x.dtype)
        if x.dim() not in self._dims or x.shape[1] != len(scale) or x.dtype != scale.dtype:
            return self._instead[0](x)  # which says what is wrong with it, or has its own rule for mixed dtypes
        shape = (-1,) + (1,) * (x.dim() - 2)
        return torch.addcmul(shift.view(shape), x, scale.view(shape))


def _without_tensors(convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Any:
    """Return what holds stride, padding and padding mode for `_conv_forward`, which is given weight and bias."""
    shell = copy.copy(convolution)
    shell.__dict__["_parameters"] = {}
    return shell


class Folded(nn.Module):
    """A convolution or linear layer and the norm layer after it, as one layer."""

    def __init__(self, layer: nn.Module, norm: nn.Module, *, channels_last: bool) -> None:
        super().__init__()
        assert isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        self.scaling = Scaling.of(norm, layer.bias)
        self.weight = _new(layer.weight, channels_last)
        self.scale = self.scaling.scale.view(-1, *[1] * (self.weight.dim() - 1))  # the same memory
        self.source = (layer.weight,)  # in a tuple, so that it does not become a parameter of this one
        self._dim = _PAIRS[type(layer)][1]
        self._operation = functional.linear if isinstance(layer, nn.Linear) else _without_tensors(layer)._conv_forward
        self._instead = (AsItIs(layer), AsItIs(norm))

    def forward(self, x: Tensor) -> Tensor:
        """Return what the norm layer returns for the layer's output."""
        if x.dim() != self._dim:
            layer, norm = self._instead
            return norm(layer(x))
        return self._operation(x, self.weight, self.scaling.shift)
