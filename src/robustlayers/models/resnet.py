"""The ResNet for small images of He et al. 2016 (arXiv 1512.03385, section 4.2): 6n+2 layers in three stages."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from robustlayers.models.architecture import Architecture, common_options
from robustlayers.models.layout import Layout, Network
from robustlayers.models.norms import conv_bias, make_norm
from robustlayers.models.options import Choice, Integer
from robustlayers.models.parts import Normalize, PadShortcut, conv3x3, projection

__all__ = ["ARCHITECTURE", "BasicBlock", "ResNet"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with norm layers beside a shortcut: `relu(bn2(conv2(relu(bn1(conv1 x)))) + s(x))`."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, shortcut: str, norm: str) -> None:
        super().__init__()
        bias = conv_bias(norm)
        self.conv1 = conv3x3(inputs, outputs, stride=stride, bias=bias)
        self.bn1 = make_norm(norm, outputs)
        self.conv2 = conv3x3(outputs, outputs, bias=bias)
        self.bn2 = make_norm(norm, outputs)
        self.shortcut: nn.Module
        if stride == 1 and inputs == outputs:
            self.shortcut = nn.Identity()
        elif shortcut == "A":
            self.shortcut = PadShortcut(stride, outputs - inputs)
        else:
            self.shortcut = projection(inputs, outputs, stride=stride, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, outputs, h / stride, w / stride]."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return functional.relu(y + self.shortcut(x))


class ResNet(Network):
    """A CIFAR-style ResNet: `depth` = 6n+2 layers, stages of `width`, 2 `width` and 4 `width` channels.

    `shortcut="A"` (slicing and zero channels, no parameters) is the paper's choice on CIFAR-10; "B" is a 1x1
    convolution and a norm layer.
    """

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        shortcut: str,
        classes: int,
        channels: int,
        norm: str,
        mean: Sequence[float],
        std: Sequence[float],
        stem_stride: int,
    ) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.normalize = Normalize(mean, std)
        self.conv1 = conv3x3(channels, width, stride=stem_stride, bias=conv_bias(norm))
        self.bn1 = make_norm(norm, width)

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            first = BasicBlock(inputs, outputs, stride=stride, shortcut=shortcut, norm=norm)
            rest = [BasicBlock(outputs, outputs, stride=1, shortcut=shortcut, norm=norm) for _ in range(blocks - 1)]
            return nn.Sequential(first, *rest)

        self.layer1 = stage(width, width, 1)
        self.layer2 = stage(width, 2 * width, 2)
        self.layer3 = stage(2 * width, 4 * width, 2)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n, classes] of float images [n, c, h, w] in [0, 1]."""
        x = self.normalize(x)
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.linear(x)

    def layout(self) -> Layout:
        """Return the module-name prefixes of stem, three stages and head."""
        return Layout(stem=("conv1", "bn1"), stages=(("layer1",), ("layer2",), ("layer3",)), head=("linear",))


ARCHITECTURE = Architecture(
    options={
        "depth": Integer(20, least=8, step=6),
        "width": Integer(16),
        "shortcut": Choice("shortcut", "A", lambda: ("A", "B")),
        **common_options(),
    },
    make=ResNet,
)
