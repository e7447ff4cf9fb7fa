"""The VGG networks of Simonyan and Zisserman 2015 (arXiv 1409.1556) for small images, with or without norm layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from robustlayers.models.architecture import Architecture, common_options
from robustlayers.models.layout import Layout, Network
from robustlayers.models.norms import make_norm
from robustlayers.models.options import Integer
from robustlayers.models.parts import Normalize, conv3x3

__all__ = ["ARCHITECTURE", "VGG"]

# Convolutions between one pooling and the next: configurations A, B, D and E of the paper's table 1.
_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_WIDTHS = (1, 2, 4, 8, 8)


class _Block(nn.Module):
    """A 3x3 convolution, a norm layer, ReLU.

    The convolution has a bias also where the norm layer shifts: the published networks have it, their weights load.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride=stride, bias=True)
        self.bn1 = make_norm(norm, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn1(self.conv1(x)))


class VGG(Network):
    """Five runs of 3x3 convolutions of `width` times 1, 2, 4, 8 and 8 channels, each followed by a 2x2 max pooling.

    A layer is counted where it has weights: `depth` = 11, 13, 16 or 19 counts the paper's three linear layers, of which
    the usual network for small images keeps one, after average pooling. `norm="none"` is the paper's network. Odd
    heights and widths are rounded up where they are halved, so that images of 28x28 pixels pass all five poolings.

    VGG has no stem of its own: its first run, before the first pooling, is taken for it; the other four are the stages.
    """

    def __init__(
        self,
        *,
        depth: int,
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
        self._runs = ("stem", "layer1", "layer2", "layer3", "layer4")
        inputs = channels
        for name, times, count in zip(self._runs, _WIDTHS, _CONVOLUTIONS[depth], strict=True):
            run = nn.Sequential()
            for index in range(count):
                stride = stem_stride if name == "stem" and index == 0 else 1
                run.append(_Block(inputs, times * width, stride=stride, norm=norm))
                inputs = times * width
            self.add_module(name, run)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n, classes] of float images [n, c, h, w] in [0, 1]."""
        x = self.normalize(x)
        for name in self._runs:
            x = functional.max_pool2d(self.get_submodule(name)(x), 2, ceil_mode=True)
        x = functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.linear(x)

    def layout(self) -> Layout:
        """Return the module-name prefixes of the run before the first pooling, the four others and the head."""
        stem, *stages = self._runs
        return Layout(stem=(stem,), stages=tuple((name,) for name in stages), head=("linear",))


ARCHITECTURE = Architecture(
    options={"depth": Integer(16, among=tuple(_CONVOLUTIONS)), "width": Integer(64), **common_options()},
    make=VGG,
)
