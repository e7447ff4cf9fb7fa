"""Normalizer-free ResNets: scaled weight standardization and known variances in place of norm layers.

Brock, De and Smith 2021 (arXiv 2101.08692). What a norm layer does to activations is done to weights, once and for all
images: no statistics, no dependence of an image on its batch, the same function in training and evaluation. Wang et al.
2022 (arXiv 2207.01156, NoFrost) train such networks adversarially.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import pi, prod, sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustlayers.models.architecture import Architecture, common_options
from robustlayers.models.layout import Layout, Network
from robustlayers.models.options import Choice, Integer, Number
from robustlayers.models.parts import Normalize

__all__ = ["ARCHITECTURE", "GAMMA_RELU", "NFBlock", "NFResNet", "ScaledStdConv2d"]

GAMMA_RELU = sqrt(2 / (1 - 1 / pi))
"""1 / standard deviation of relu(z) for a standard normal z, about 1.713."""

# Blocks per stage, and whether they are bottlenecks (1x1, 3x3, 1x1 convolutions) or two 3x3 convolutions.
_BLOCKS = {18: ((2, 2, 2, 2), False), 26: ((2, 2, 2, 2), True), 34: ((3, 4, 6, 3), False), 50: ((3, 4, 6, 3), True)}


class ScaledStdConv2d(nn.Conv2d):
    """A convolution by standardized weights: `gain gamma (W - mean) / sqrt(fan_in (var + eps))` per output channel.

    Mean and variance (that of a population, not of a sample) are over the `fan_in` = inputs * kernel^2 weights of an
    output channel; `eps` is 1e-6. `gain` [outputs, 1, 1, 1] is learned; `gamma` is a constant, `GAMMA_RELU` behind a
    ReLU, so that an input of variance 1 before that ReLU gives outputs of variance `gain^2`. The tensors of the layer
    are `weight`, `bias` and `gain`. Brock et al. 2021, section 4.3.

    >>> conv = ScaledStdConv2d(3, 4, 3)
    >>> conv.standardized().mean((1, 2, 3)).abs().max().item() < 1e-6
    True
    """

    eps = 1e-6

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, gamma: float = 1, gain: float = 1
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, padding=kernel // 2)
        self.gamma = gamma
        self.gain = nn.Parameter(torch.full((outputs, 1, 1, 1), float(gain)))

    def standardized(self) -> Tensor:
        """Return the weights that convolve, [outputs, inputs, kernel, kernel]."""
        fan_in = self.in_channels * prod(self.kernel_size)
        var, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        return (self.weight - mean) * (self.gain * (self.gamma * fan_in**-0.5) * torch.rsqrt(var + self.eps))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in torch
        """Return [n, outputs, h / stride, w / stride], halves rounded up."""
        return functional.conv2d(input, self.standardized(), self.bias, self.stride, self.padding)


class NFBlock(nn.Module):
    """A pre-activation block: `alpha f(relu(beta x)) + shortcut`, with `f` of two 3x3 or of 1x1, 3x3, 1x1 convolutions.

    `beta` = 1 / sqrt(expected variance of x) is a constant. The shortcut is `x`, or a 1x1 convolution of relu(beta x)
    where the shapes differ, which brings the variance back to 1. Unlike the published networks, which average before
    that convolution, it strides, as `preact-resnet` does: the two differ in their normalization alone.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        stride: int,
        bottleneck: bool,
        alpha: float,
        variance: float,
        last_gain: int,
    ) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, variance**-0.5
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        inner = outputs // 4 if bottleneck else outputs
        strided = kernels.index(3)  # the first 3x3 convolution
        self._convolutions = tuple(f"conv{index}" for index in range(1, len(kernels) + 1))
        width = inputs
        for index, (name, kernel) in enumerate(zip(self._convolutions, kernels, strict=True)):
            last = name == self._convolutions[-1]
            convolution = ScaledStdConv2d(
                width,
                outputs if last else inner,
                kernel,
                stride=stride if index == strided else 1,
                gamma=GAMMA_RELU,
                gain=last_gain if last else 1,
            )
            self.add_module(name, convolution)
            width = inner
        self.projects = stride != 1 or inputs != outputs
        self.shortcut = (
            ScaledStdConv2d(inputs, outputs, 1, stride=stride, gamma=GAMMA_RELU) if self.projects else nn.Identity()
        )
        self.expected_variance = (1.0 if self.projects else variance) + alpha**2

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, outputs, h / stride, w / stride]."""
        y = functional.relu(x * self.beta)
        shortcut = self.shortcut(y if self.projects else x)
        for name in self._convolutions:
            y = self.get_submodule(name)(y if name == "conv1" else functional.relu(y))
        return self.alpha * y + shortcut

    def extra_repr(self) -> str:
        """Return alpha and beta, for `print(model)`."""
        return f"alpha={self.alpha:g}, beta={self.beta:.4f}"


class NFResNet(Network):
    """A pre-activation ResNet of four stages in which the variance of the residual stream is known, not measured.

    `depth` 18 or 34 has blocks of two 3x3 convolutions, 26 or 50 bottlenecks. For inputs of variance 1 (`mean` and `std`
    of the data) the expected variance behind the stem is 1; a block adds `alpha^2`; one that changes the shape starts
    again from 1. `beta` of a block divides by its root. See `expected_variances`.

    `last_gain` is the gain of the last convolution of each branch at initialization: 1 is what the expected variances are
    derived for; 0, as in the networks that NoFrost trained, lets every block start as its shortcut, which is safer in great
    depth and slower at first. The expected variances, and so `beta`, count a gain of 1 in both cases, as in the paper.
    `stem` and `stem_stride` are those of `resnet18`; the max pooling of `stem="imagenet"` is not in the bookkeeping.

    The tensors of the model are `weight`, `bias` and `gain` of its convolutions (the gain belongs to `conv`, since there
    are no norm layers), and those of `linear`.
    """

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        stem: str,
        alpha: float,
        last_gain: int,
        classes: int,
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        stem_stride: int,
    ) -> None:
        super().__init__()
        blocks, bottleneck = _BLOCKS[depth]
        self.normalize = Normalize(mean, std)
        self.pools = stem == "imagenet"
        # No gamma: there is no ReLU before it.
        if self.pools:
            self.conv1 = ScaledStdConv2d(channels, width, 7, stride=2 * stem_stride)
        else:
            self.conv1 = ScaledStdConv2d(channels, width, 3, stride=stem_stride)
        self._stages = tuple(f"layer{index}" for index in range(1, 5))
        inputs, variance = width, 1.0
        for index, (name, count) in enumerate(zip(self._stages, blocks, strict=True)):
            outputs = width * 2**index * (4 if bottleneck else 1)
            stage = nn.Sequential()
            for place in range(count):
                block = NFBlock(
                    inputs,
                    outputs,
                    stride=2 if index > 0 and place == 0 else 1,
                    bottleneck=bottleneck,
                    alpha=alpha,
                    variance=variance,
                    last_gain=last_gain,
                )
                stage.append(block)
                inputs, variance = outputs, block.expected_variance
            self.add_module(name, stage)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n, classes] of float images [n, c, h, w] in [0, 1]."""
        x = self.conv1(self.normalize(x))
        if self.pools:
            x = functional.max_pool2d(x, 3, stride=2, padding=1)
        for name in self._stages:
            x = self.get_submodule(name)(x)
        x = functional.adaptive_avg_pool2d(functional.relu(x), 1).flatten(1)
        return self.linear(x)

    def expected_variances(self) -> dict[str, float]:
        """Return the variance of the residual stream behind each block, by the block's name.

        >>> NFResNet(depth=18, width=4, stem="cifar", alpha=0.5, last_gain=1, classes=2, channels=1, mean=[0], std=[1],
        ...     stem_stride=1).expected_variances()["layer1.1"]
        1.5
        """
        return {name: module.expected_variance for name, module in self.named_modules() if isinstance(module, NFBlock)}

    def layout(self) -> Layout:
        """Return the module-name prefixes of stem, four stages and head."""
        return Layout(stem=("conv1",), stages=tuple((name,) for name in self._stages), head=("linear",))


ARCHITECTURE = Architecture(
    options={
        "depth": Integer(18, among=tuple(_BLOCKS)),
        "width": Integer(64, least=4),
        "stem": Choice("stem", "cifar", lambda: ("cifar", "imagenet")),
        "alpha": Number(0.2),
        "last_gain": Integer(1, among=(0, 1)),
        **common_options(without=("norm",)),
    },
    make=NFResNet,
)
