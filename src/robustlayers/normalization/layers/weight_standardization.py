"""Weight standardization: the filters of a convolution are normalized instead of, or beside, its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robustlayers.core.errors import UserError
from robustlayers.core.quantities import number
from robustlayers.models.options import Integer
from robustlayers.normalization.layers.common import kind
from robustlayers.normalization.layers.group import group_norm

__all__ = ["GROUP_WS", "WeightStandardizedConv2d", "group_norm_ws", "plain_convolutions", "standardize_convolutions"]


class WeightStandardizedConv2d(nn.Conv2d):
    """A convolution by standardized filters.

    **What.** Each filter (all weights of one output channel) has mean 0 and variance 1 when it is used; what is learned is
    the filter before that. A convolution in every other respect: the selector `conv` finds it, its state dict is that of
    `nn.Conv2d`.

    **Maths.** w' = (w - mean(w)) / sqrt(var(w) + eps), mean and biased variance over the c_in * h * w weights of a filter.
    The gradient for w is orthogonal to the mean and, but for eps, to w itself.

    **Cost.** One pass over the weights for each forward; no parameters, no state.

    **Source.** Qiao et al. 2019 (arXiv 1903.10520). Published code differs in where eps stands and in dividing
    by n - 1.

    **Not known.** Its effect under adversarial training apart from group norm's; NoFrost's scaled variant is another layer.

    >>> layer = WeightStandardizedConv2d(3, 4, 3)
    >>> layer.standardized().mean((1, 2, 3)).abs().max() < 1e-6
    tensor(True)
    """

    def __init__(self, *args: Any, eps: float | str = 1e-5, **named: Any) -> None:
        super().__init__(*args, **named)
        self.eps = _eps(eps)

    def standardized(self) -> Tensor:
        """Return the filters [c_out, c_in / groups, h, w] that are used."""
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        return (self.weight - mean) * torch.rsqrt(variance + self.eps)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name
        """Return [n, c_out, h', w'], as `nn.Conv2d` does for the standardized filters."""
        return self._conv_forward(input, self.standardized(), self.bias)


def standardize_convolutions(model: nn.Module, *, eps: float | str = 1e-5) -> nn.Module:
    """Put a `WeightStandardizedConv2d` in the place of every plain `nn.Conv2d` of `model`, in place; return the model.

    Weights and biases stay the same parameters. The function of a trained network changes: the scale of its filters is
    lost. Convolutions of a subclass stay as they are.

    >>> standardize_convolutions(nn.Sequential(nn.Conv2d(1, 2, 3)))[0]
    WeightStandardizedConv2d(1, 2, kernel_size=(3, 3), stride=(1, 1))
    """
    eps = _eps(eps)
    return _swapped(model, nn.Conv2d, WeightStandardizedConv2d, eps=eps)


def plain_convolutions(model: nn.Module) -> nn.Module:
    """Put a plain `nn.Conv2d` back in the place of every weight standardized one, with the weights as they are."""
    return _swapped(model, WeightStandardizedConv2d, nn.Conv2d)


def _eps(eps: float | str) -> float:
    value = number(eps, "eps")
    if value <= 0:
        raise UserError(f"eps: {eps} is not allowed; it must be positive")
    return value


def _swapped(model: nn.Module, old: type[nn.Conv2d], new: type[nn.Conv2d], **settings: Any) -> nn.Module:
    made: dict[nn.Module, nn.Module] = {}

    def swap(module: nn.Module) -> nn.Module:
        if type(module) is not old:
            return module
        if module not in made:
            made[module] = _same_convolution(module, new, **settings)
        return made[module]

    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = swap(child)
    return swap(model)


def _same_convolution(layer: nn.Conv2d, make: type[nn.Conv2d], **settings: Any) -> nn.Conv2d:
    # Made on the meta device, so that no initial weights are drawn: they would move the global random state.
    new = make(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,  # pyright: ignore[reportArgumentType]
        stride=layer.stride,  # pyright: ignore[reportArgumentType]
        padding=layer.padding,  # pyright: ignore[reportArgumentType]
        dilation=layer.dilation,  # pyright: ignore[reportArgumentType]
        groups=layer.groups,
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
        device="meta",
        **settings,
    )
    new._parameters.update(layer._parameters)
    return new.train(layer.training)


def group_norm_ws(norm: nn.Module, groups: int = 32) -> nn.Module:
    """Return group norm in the place of `norm`, for a network whose convolutions are weight standardized.

    **What.** Group norm after `WeightStandardizedConv2d`: the pair that Qiao et al. 2019 propose for small batches. As a
    kind of norm it makes every plain convolution of the network a standardized one.

    **Cost, source, not known.** Those of the two.
    """
    return group_norm(norm, groups)


def _finish(network: nn.Module, **options: Any) -> None:
    standardize_convolutions(network)


GROUP_WS = kind(group_norm_ws, options={"groups": Integer(32)}, finish=_finish)
