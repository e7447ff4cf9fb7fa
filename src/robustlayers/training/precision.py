"""How the forwards of an update are computed: in which precision, and with images laid out how.

Neither changes what is computed, but for rounding. Parameters, their gradients, the state of optimizers, losses and norm
layers are float32 in every precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustlayers.normalization.fold_rules import any_layout
from robustlayers.selection.inventory import norm_layers

__all__ = ["PRECISIONS", "Layout", "computing"]

PRECISIONS = ("fp32", "bf16")

# torch's kernels of these add up in float32 whatever they are given.
_NATIVE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@contextmanager
def computing(model: nn.Module, precision: str, device: torch.device) -> Iterator[None]:
    """Run forwards of `model` in a precision: `fp32` as it is, `bf16` under autocast with norm layers in float32.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    >>> with computing(net, "bf16", torch.device("cpu")):
    ...     net[0](torch.rand(3, 4)).dtype, net[1](net[0](torch.rand(3, 4))).dtype
    (torch.bfloat16, torch.float32)
    """
    if precision == "fp32":
        yield
        return
    with ExitStack() as undo:
        for module in norm_layers(model).values():
            if type(module) not in _NATIVE or "forward" in vars(module):
                handle = module.register_forward_pre_hook(_single, with_kwargs=True)
                undo.callback(handle.remove)
        undo.enter_context(torch.autocast(device.type, torch.bfloat16))
        yield


def _single(module: nn.Module, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return tuple(map(_float32, args)), {name: _float32(value) for name, value in named.items()}


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


class Layout:
    """Lays images out channels-last for a model whose code cannot notice, on which convolutions then cost less.

    On a CPU the natural step of a ResNet-20 in float32 takes two thirds of the time. A model that cannot be traced, or that
    asks how a tensor is laid out (`view`, `stride`), gets images as they come.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._free: bool | None = None  # told by a trace, which is made when images come

    def __call__(self, x: Tensor) -> Tensor:
        """Return the images, [n, c, h, w], in the better layout; anything else as it is."""
        if x.dim() != 4:
            return x
        if self._free is None:
            convolves = any(isinstance(module, nn.Conv2d) for module in self._model.modules())
            self._free = convolves and any_layout(self._model)
        return x.contiguous(memory_format=torch.channels_last) if self._free else x
