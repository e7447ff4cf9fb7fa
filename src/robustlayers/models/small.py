"""A network that trains in seconds on a CPU, for tests and first tries: a stem, two one-convolution stages, a head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from robustlayers.models.architecture import Architecture, common_options
from robustlayers.models.layout import Layout, Network
from robustlayers.models.norms import conv_bias, make_norm
from robustlayers.models.options import Integer
from robustlayers.models.parts import Normalize, conv3x3

__all__ = ["ARCHITECTURE", "SmallCNN"]


class _Block(nn.Module):
    """A strided 3x3 convolution, a norm layer, ReLU."""

    def __init__(self, inputs: int, outputs: int, *, norm: str) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride=2, bias=conv_bias(norm))
        self.bn1 = make_norm(norm, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn1(self.conv1(x)))


class SmallCNN(Network):
    """Three convolutions with norm layers and ReLU (`width`, `width`, 2 `width` channels), average pooling, linear."""

    def __init__(
        self,
        *,
        width: int,
        classes: int,
        channels: int,
        norm: str,
        mean: Sequence[float],
        std: Sequence[float],
        stem_stride: int,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.conv1 = conv3x3(channels, width, stride=stem_stride, bias=conv_bias(norm))
        self.bn1 = make_norm(norm, width)
        self.layer1 = nn.Sequential(_Block(width, width, norm=norm))
        self.layer2 = nn.Sequential(_Block(width, 2 * width, norm=norm))
        self.linear = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n, classes] of float images [n, c, h, w] in [0, 1]."""
        x = functional.relu(self.bn1(self.conv1(self.normalize(x))))
        x = self.layer2(self.layer1(x))
        x = functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.linear(x)

    def layout(self) -> Layout:
        """Return the module-name prefixes of stem, two stages and head."""
        return Layout(stem=("conv1", "bn1"), stages=(("layer1",), ("layer2",)), head=("linear",))


ARCHITECTURE = Architecture(options={"width": Integer(8), **common_options()}, make=SmallCNN)
