"""Fully connected networks with norm layers: for tests, and for the mean-field questions that are asked of depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustlayers.core.errors import UserError
from robustlayers.models.architecture import Architecture, common_options
from robustlayers.models.layout import Layout, Network
from robustlayers.models.norms import NormOption, conv_bias, make_norm
from robustlayers.models.options import Integer
from robustlayers.models.parts import Normalize

__all__ = ["ARCHITECTURE", "MLP"]


def _flattened(x: Tensor, size: int) -> Tensor:
    # Checked here, since a linear layer's complaint about the shape of a matrix does not tell what to change.
    if x.shape[2:] != (size, size):
        height, width = x.shape[2:]
        raise UserError(f"model input: images of {height}x{width} pixels; this mlp takes {size}x{size} (option `size`)")
    return x.flatten(1)


torch.fx.wrap("_flattened")


class _Block(nn.Module):
    """A linear layer, a norm layer, ReLU.

    The norm layer sees each unit as a channel of 1x1 pixels, so that every kind that is made for images fits;
    `BatchNorm2d` is then the same function as `BatchNorm1d`.
    """

    def __init__(self, inputs: int, outputs: int, *, norm: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, outputs, bias=conv_bias(norm))
        self.bn1 = make_norm(norm, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn1(self.fc1(x)[:, :, None, None]).flatten(1))


class MLP(Network):
    """`hidden` layers of `width` units with norm layers and ReLU, and a linear layer, on images of `size` x `size`.

    The stem is the first hidden layer, the others are the blocks of one stage. InstanceNorm,
    and kinds that may choose it, are refused: it averages over the pixels of a channel, and a unit has none.
    """

    def __init__(
        self,
        *,
        hidden: int,
        width: int,
        size: int,
        classes: int,
        channels: int,
        norm: str,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.size = size
        self.channels = channels
        self.normalize = Normalize(mean, std)
        self.stem = _Block(channels * size * size, width, norm=norm)
        self.layer1 = nn.Sequential(*(_Block(width, width, norm=norm) for _ in range(hidden - 1)))
        self.linear = nn.Linear(width, classes)

    @property
    def example_input_array(self) -> Tensor:
        """Images that a forward can be tried with: other sizes than its own do not fit."""
        return torch.zeros(2, self.channels, self.size, self.size, device=self.normalize.mean.device)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n, classes] of float images [n, c, size, size] in [0, 1]; other sizes are a `UserError`."""
        return self.linear(self.layer1(self.stem(_flattened(self.normalize(x), self.size))))

    def layout(self) -> Layout:
        """Return the module-name prefixes of the first hidden layer, the others and the head."""
        return Layout(stem=("stem",), stages=(("layer1",),), head=("linear",))


def _initialize(model: nn.Module) -> None:
    # Hidden layers as in He et al. 2015 (fan-in, ReLU): the default of torch shrinks what a deep network passes on.
    for module in model.modules():
        if isinstance(module, _Block):
            nn.init.kaiming_normal_(module.fc1.weight, nonlinearity="relu")
            if module.fc1.bias is not None:
                nn.init.zeros_(module.fc1.bias)


@dataclass(frozen=True)
class _Norm(NormOption):
    """The option `norm`, without the kinds that cannot normalize single values."""

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with `value`, or None."""
        problem = super().problem(value)
        if problem is not None:
            return problem
        layer: Any = make_norm(value, 16)
        try:
            for branch in getattr(layer, "branches", [None]):  # a kind may hold others to choose from
                if branch is not None:
                    layer.branch = branch
                layer(torch.zeros(4, 16, 1, 1))
        except ValueError:  # from InstanceNorm: "more than 1 spatial element"
            return f"{value} averages over the pixels of a channel; the units of an mlp have none"
        return None


ARCHITECTURE = Architecture(
    options={
        "hidden": Integer(3, least=2),
        "width": Integer(256),
        "size": Integer(32),
        **common_options(without=("stem_stride",)),
        "norm": _Norm(),
    },
    make=MLP,
    initialize=_initialize,
)
