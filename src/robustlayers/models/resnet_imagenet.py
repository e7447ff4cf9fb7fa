"""The ResNets of 18, 34 and 50 layers that He et al. 2016 designed for ImageNet, with its stem or one for small images.

They are architectures of their own, not depths of `resnet`, the family of 6n+2 layers for small images: 50 = 6 * 8 + 2
is a depth there too. Tensors are called as in torchvision, so its state dicts load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from robustlayers.models.architecture import Architecture, common_options
from robustlayers.models.layout import Layout, Network
from robustlayers.models.norms import conv_bias, make_norm
from robustlayers.models.options import Choice, Integer, Option
from robustlayers.models.parts import Normalize, conv3x3, projection

__all__ = ["RESNET18", "RESNET34", "RESNET50", "BasicBlock", "Bottleneck", "ImageNetResNet"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with norm layers beside a shortcut, and ReLU; `width` channels.

    The shortcut `downsample` is the identity, or a 1x1 convolution and a norm layer where the shapes differ.
    """

    expansion = 1

    def __init__(self, inputs: int, width: int, *, stride: int, norm: str) -> None:
        super().__init__()
        bias = conv_bias(norm)
        self.conv1 = conv3x3(inputs, width, stride=stride, bias=bias)
        self.bn1 = make_norm(norm, width)
        self.conv2 = conv3x3(width, width, bias=bias)
        self.bn2 = make_norm(norm, width)
        same = stride == 1 and inputs == width
        self.downsample = nn.Identity() if same else projection(inputs, width, stride=stride, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, width, h / stride, w / stride]."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return functional.relu(y + self.downsample(x))


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3, 1x1 with norm layers beside a shortcut, and ReLU; `width` channels inside, 4 `width` out.

    The stride is that of the 3x3 convolution, as in torchvision ("v1.5"); the paper strides the first 1x1 one.
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, *, stride: int, norm: str) -> None:
        super().__init__()
        bias, outputs = conv_bias(norm), width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=bias)
        self.bn1 = make_norm(norm, width)
        self.conv2 = conv3x3(width, width, stride=stride, bias=bias)
        self.bn2 = make_norm(norm, width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=bias)
        self.bn3 = make_norm(norm, outputs)
        same = stride == 1 and inputs == outputs
        self.downsample = nn.Identity() if same else projection(inputs, outputs, stride=stride, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, 4 width, h / stride, w / stride]."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return functional.relu(y + self.downsample(x))


class ImageNetResNet(Network):
    """A ResNet of four stages with `blocks` blocks each, of `width` times 1, 2, 4 and 8 channels.

    `stem="cifar"` is a 3x3 convolution of stride `stem_stride`; the usual change for images of 32x32 pixels.
    `stem="imagenet"` is the paper's 7x7 convolution of stride 2 `stem_stride` and a 3x3 max pooling of stride 2, which
    leave 8x8 of 32x32 pixels to the first stage.
    """

    def __init__(
        self,
        *,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        width: int,
        stem: str,
        classes: int,
        channels: int,
        norm: str,
        mean: Sequence[float],
        std: Sequence[float],
        stem_stride: int,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.pools = stem == "imagenet"
        bias = conv_bias(norm)
        if self.pools:
            self.conv1 = nn.Conv2d(channels, width, 7, stride=2 * stem_stride, padding=3, bias=bias)
        else:
            self.conv1 = conv3x3(channels, width, stride=stem_stride, bias=bias)
        self.bn1 = make_norm(norm, width)
        inputs = width

        def stage(inner: int, count: int, stride: int) -> nn.Sequential:
            nonlocal inputs
            made = nn.Sequential()
            for index in range(count):
                made.append(block(inputs, inner, stride=stride if index == 0 else 1, norm=norm))
                inputs = inner * block.expansion
            return made

        self.layer1 = stage(width, blocks[0], 1)
        self.layer2 = stage(2 * width, blocks[1], 2)
        self.layer3 = stage(4 * width, blocks[2], 2)
        self.layer4 = stage(8 * width, blocks[3], 2)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n, classes] of float images [n, c, h, w] in [0, 1]."""
        x = functional.relu(self.bn1(self.conv1(self.normalize(x))))
        if self.pools:
            x = functional.max_pool2d(x, 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.fc(x)

    def layout(self) -> Layout:
        """Return the module-name prefixes of stem, four stages and head."""
        stages = tuple((f"layer{index}",) for index in range(1, 5))
        return Layout(stem=("conv1", "bn1"), stages=stages, head=("fc",))


def _options() -> dict[str, Option]:
    stem = Choice("stem", "cifar", lambda: ("cifar", "imagenet"))
    return {"width": Integer(64), "stem": stem, **common_options()}


RESNET18 = Architecture(
    options=_options(),
    make=partial(ImageNetResNet, block=BasicBlock, blocks=(2, 2, 2, 2)),
)
RESNET34 = Architecture(
    options=_options(),
    make=partial(ImageNetResNet, block=BasicBlock, blocks=(3, 4, 6, 3)),
)
RESNET50 = Architecture(
    options=_options(),
    make=partial(ImageNetResNet, block=Bottleneck, blocks=(3, 4, 6, 3)),
)
