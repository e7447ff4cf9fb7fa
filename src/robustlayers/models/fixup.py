"""Residual networks without norm layers by Fixup initialization (Zhang, Dauphin and Ma 2019, arXiv 1901.09321)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustlayers.models.architecture import Architecture, common_options
from robustlayers.models.layout import Layout, Network
from robustlayers.models.options import Integer
from robustlayers.models.parts import Normalize, PadShortcut, conv3x3, initialize

__all__ = ["ARCHITECTURE", "FixupBlock", "FixupResNet", "Scale", "Shift", "initialize_fixup"]

_CONVOLUTIONS = 2  # per residual branch: the paper's m


class Shift(nn.Module):
    """Adds one learned number, `bias` of shape [1], to all entries; starts at 0.

    A module and not a bare parameter, so that `type(Shift)` selects these tensors, which the paper trains at a tenth of
    the learning rate.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x + bias`, of the shape of `x`."""
        return x + self.bias


class Scale(nn.Module):
    """Multiplies all entries by one learned number, `weight` of shape [1]; starts at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x * weight`, of the shape of `x`."""
        return x * self.weight


class FixupBlock(nn.Module):
    """Two 3x3 convolutions with a scalar shift before each convolution and each ReLU, and a scalar scale.

    With shifts a, b, c, d and scale s: `relu(s conv2(relu(conv1(x + a) + b) + c) + d + shortcut)`. The shortcut is `x`,
    or slicing and zero channels of `x + a` where the shapes differ (the paper's figure 1, right).
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.bias1a = Shift()
        self.conv1 = conv3x3(inputs, outputs, stride=stride)
        self.bias1b = Shift()
        self.bias2a = Shift()
        self.conv2 = conv3x3(outputs, outputs)
        self.scale = Scale()
        self.bias2b = Shift()
        self.pads = stride != 1 or inputs != outputs
        self.shortcut = PadShortcut(stride, outputs - inputs) if self.pads else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, outputs, h / stride, w / stride]."""
        shifted = self.bias1a(x)
        y = functional.relu(self.bias1b(self.conv1(shifted)))
        y = self.bias2b(self.scale(self.conv2(self.bias2a(y))))
        return functional.relu(y + self.shortcut(shifted if self.pads else x))


class FixupResNet(Network):
    """The `resnet` of 6n+2 layers without norm layers: `depth` layers in stages of `width`, 2 `width`, 4 `width`.

    At initialization every block that keeps the shape is the identity and all logits are 0. It has no batch or running
    statistics and is the same function in training and evaluation; Galloway et al. 2019 (arXiv 1905.02161) compare a
    depth of 110 with BatchNorm. Shifts and scales are `type(Shift) | type(Scale)`; the paper trains them at a tenth of
    the learning rate (at the full rate they get the gradient of all pixels and can diverge) and regularizes by mixup,
    since norm layers no longer do.
    """

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        classes: int,
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        stem_stride: int,
    ) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.normalize = Normalize(mean, std)
        self.conv1 = conv3x3(channels, width, stride=stem_stride)
        self.bias1 = Shift()

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            first = FixupBlock(inputs, outputs, stride=stride)
            return nn.Sequential(first, *(FixupBlock(outputs, outputs, stride=1) for _ in range(blocks - 1)))

        self.layer1 = stage(width, width, 1)
        self.layer2 = stage(width, 2 * width, 2)
        self.layer3 = stage(2 * width, 4 * width, 2)
        self.bias2 = Shift()
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n, classes] of float images [n, c, h, w] in [0, 1]."""
        x = functional.relu(self.bias1(self.conv1(self.normalize(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.linear(self.bias2(x))

    def layout(self) -> Layout:
        """Return the module-name prefixes of stem, three stages and head."""
        stages = (("layer1",), ("layer2",), ("layer3",))
        return Layout(stem=("conv1", "bias1"), stages=stages, head=("bias2", "linear"))


def initialize_fixup(model: nn.Module) -> None:
    """Give the convolutions and linear layers of a Fixup network their initial weights, in place.

    Section 3 of the paper: all convolutions Kaiming-normal; those inside a branch of m = 2 convolutions times
    `L^(-1 / (2m - 2))` for L residual branches in all; the last of each branch, and the linear layer, 0.
    """
    initialize(model)
    blocks = [module for module in model.modules() if isinstance(module, FixupBlock)]
    with torch.no_grad():
        for block in blocks:
            block.conv1.weight.mul_(len(blocks) ** (-1 / (2 * _CONVOLUTIONS - 2)))
            block.conv2.weight.zero_()
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.zero_()
                module.bias.zero_()


ARCHITECTURE = Architecture(
    options={
        "depth": Integer(20, least=8, step=6),
        "width": Integer(16),
        **common_options(without=("norm",)),
    },
    make=FixupResNet,
    initialize=initialize_fixup,
)
