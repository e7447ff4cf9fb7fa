"""What the architectures are built from: input normalization, convolutions, shortcuts and how weights start."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustlayers.core.errors import UserError
from robustlayers.models.norms import conv_bias, make_norm
from robustlayers.models.slicing import subsample

__all__ = ["Normalize", "PadShortcut", "conv3x3", "initialize", "projection"]


def _normalized(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    # Checked, since a grey image would be broadcast to three channels unnoticed, and bytes be taken for pixels of 0 to
    # 255. One opaque node in a traced graph: the checks are not traced, and mean and std stay the module's buffers.
    channels = mean.shape[0]
    if x.dim() != 4 or x.shape[1] != channels:
        raise UserError(f"model input: shape {list(x.shape)}; this model takes [n, {channels}, height, width]")
    if not x.is_floating_point():
        raise UserError(f"model input: {x.dtype}; models take floats in [0, 1] (robustlayers.data.to_float converts)")
    return (x - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


torch.fx.wrap("_normalized")
torch.fx.wrap("subsample")  # its gradient is its own, which a trace through it would lose


class Normalize(nn.Module):
    """Input normalization as the first layer of a model: `(x - mean) / std` per channel.

    It stands inside the model so that attacks work on pixels in [0, 1] and `eps` means pixels. `mean` and `std` [c] are
    persistent buffers: a `state_dict` alone gives the whole function.

    >>> Normalize([0.5], [0.25])(torch.ones(1, 1, 1, 1)).item()
    2.0
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([float(value) for value in mean]))
        self.register_buffer("std", torch.tensor([float(value) for value in std]))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized images; the shape is that of `x`, [n, c, h, w]."""
        return _normalized(x, self.mean, self.std)

    def extra_repr(self) -> str:
        """Return the number of channels, for `print(model)`."""
        return f"channels={self.mean.shape[0]}"


class PadShortcut(nn.Module):
    """The parameter-free shortcut "A": every `stride`-th pixel, and zeros for the channels that are new.

    Half of the new channels come before the old ones and half after, as in the pretrained CIFAR networks in
    circulation (He et al. 2016, section 3.3, leaves the place open).

    >>> PadShortcut(2, 2)(torch.ones(1, 2, 4, 4)).shape
    torch.Size([1, 4, 2, 2])
    """

    def __init__(self, stride: int, new_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = new_channels // 2
        self.after = new_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, c + new, h / stride, w / stride], halves rounded up."""
        return functional.pad(subsample(x, self.stride, self.stride), (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        """Return stride and padding, for `print(model)`."""
        return f"stride={self.stride}, channels={self.before}+{self.after}"


def conv3x3(inputs: int, outputs: int, *, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps height and width at stride 1."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


def projection(inputs: int, outputs: int, *, stride: int, norm: str | None) -> nn.Sequential:
    """Return the shortcut "B": a strided 1x1 convolution and, unless `norm` is None, a norm layer after it."""
    if norm is None:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))
    convolution = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=conv_bias(norm))
    return nn.Sequential(convolution, make_norm(norm, outputs))


def initialize(model: nn.Module) -> None:
    """Give convolutions Kaiming-normal weights (fan-out, ReLU) and zero biases, in place.

    He et al. 2015 (arXiv 1502.01852). Norm layers (weight 1, bias 0) and linear layers keep torch's defaults.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
