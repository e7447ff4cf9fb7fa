"""Pre-activation ResNets: norm and ReLU before each convolution (He et al. 2016, arXiv 1603.05027)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from robustlayers.models.architecture import Architecture, common_options
from robustlayers.models.layout import Layout, Network
from robustlayers.models.norms import conv_bias, make_norm
from robustlayers.models.options import Integer
from robustlayers.models.parts import Normalize, conv3x3, projection

__all__ = ["ARCHITECTURE", "PreActBlock", "PreActNet"]

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


class PreActBlock(nn.Module):
    """`y = relu(bn1 x)`, then `conv2(relu(bn2(conv1 y))) + s`.

    The shortcut `s` is `x`, or a 1x1 convolution of `y` where the shapes differ.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, norm: str) -> None:
        super().__init__()
        bias = conv_bias(norm)
        self.bn1 = make_norm(norm, inputs)
        self.conv1 = conv3x3(inputs, outputs, stride=stride, bias=bias)
        self.bn2 = make_norm(norm, outputs)
        self.conv2 = conv3x3(outputs, outputs, bias=bias)
        self.projects = stride != 1 or inputs != outputs
        # conv2's bias, where there is one, serves the shortcut too: both are added.
        self.shortcut = projection(inputs, outputs, stride=stride, norm=None) if self.projects else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, outputs, h / stride, w / stride]."""
        y = functional.relu(self.bn1(x))
        shortcut = self.shortcut(y if self.projects else x)
        y = self.conv2(functional.relu(self.bn2(self.conv1(y))))
        return y + shortcut


class PreActNet(Network):
    """A convolution, stages of pre-activation blocks, a final norm layer and a linear layer.

    `widths` and `blocks` have an entry per stage; all stages but the first halve height and width. The final norm layer
    `bn` counts as part of the last stage.
    """

    def __init__(
        self,
        *,
        stem_width: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        classes: int,
        channels: int,
        norm: str,
        mean: Sequence[float],
        std: Sequence[float],
        stem_stride: int,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.conv1 = conv3x3(channels, stem_width, stride=stem_stride, bias=conv_bias(norm))
        self._stages = tuple(f"layer{index}" for index in range(1, len(widths) + 1))
        inputs = stem_width
        for name, outputs, count in zip(self._stages, widths, blocks, strict=True):
            stride = 1 if name == "layer1" else 2
            first = PreActBlock(inputs, outputs, stride=stride, norm=norm)
            rest = [PreActBlock(outputs, outputs, stride=1, norm=norm) for _ in range(count - 1)]
            self.add_module(name, nn.Sequential(first, *rest))
            inputs = outputs
        self.bn = make_norm(norm, inputs)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n, classes] of float images [n, c, h, w] in [0, 1]."""
        x = self.conv1(self.normalize(x))
        for name in self._stages:
            x = self.get_submodule(name)(x)
        x = functional.relu(self.bn(x))
        x = functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.linear(x)

    def layout(self) -> Layout:
        """Return the module-name prefixes of stem, stages and head."""
        *early, last = self._stages
        return Layout(stem=("conv1",), stages=(*((name,) for name in early), (last, "bn")), head=("linear",))


def _make(*, depth: int, width: int, **common: object) -> PreActNet:
    widths = [width * 2**stage for stage in range(4)]
    return PreActNet(stem_width=width, widths=widths, blocks=_BLOCKS[depth], **common)  # pyright: ignore[reportArgumentType]


ARCHITECTURE = Architecture(
    options={"depth": Integer(18, among=tuple(_BLOCKS)), "width": Integer(64), **common_options()},
    make=_make,
)
