"""Conditional normalization: scale and shift as functions of a number, so that one network is a whole trade-off curve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustlayers.core.errors import UserError
from robustlayers.core.quantities import number
from robustlayers.models.options import Integer
from robustlayers.normalization.layers.common import (
    Flag,
    batch_norm_like,
    channels_of,
    check_channels,
    kind,
    plain,
    precise,
)
from robustlayers.normalization.layers.dual import DualBatchNorm, dual_norm

__all__ = ["FILM", "Film", "FilmNorm", "conditioned", "film_norm"]


class Film(nn.Module):
    """Scale and shift per channel as a function of a number: a network with one hidden layer.

    h = leaky_relu(a lambda + b) with `hidden` units; scale = 1 + S h, shift = T h. S and T are 0 at the beginning, so scale
    is 1 and shift 0 for every lambda. The hidden units begin as ramps that set in at 0, 1/hidden, 2/hidden, ...
    """

    is_normalization = True

    def __init__(self, channels: int, hidden: int = 16) -> None:
        super().__init__()
        if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
            raise UserError(f"hidden: {hidden!r} is not allowed; allowed: a whole number from 1")
        self.channels = channels
        self.hidden_weight = nn.Parameter(torch.ones(hidden))
        self.hidden_bias = nn.Parameter(-torch.arange(hidden) / hidden)
        self.scale = nn.Parameter(torch.zeros(channels, hidden))
        self.shift = nn.Parameter(torch.zeros(channels, hidden))

    def scale_and_shift(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Return gamma, beta [n, c] for `condition` [n]."""
        value = condition.to(self.hidden_weight).unsqueeze(1)
        hidden = functional.leaky_relu(value * self.hidden_weight + self.hidden_bias)
        return 1 + hidden @ self.scale.T, hidden @ self.shift.T

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return gamma x + beta for `x` [n, c, ...] and `condition` [n] or [1]; shape and dtype of `x`."""
        check_channels(x, self.channels, "Film")
        with torch.autocast(x.device.type, enabled=False):
            gamma, beta = self.scale_and_shift(condition)
            shape = (*gamma.shape, *(1,) * (x.dim() - 2))
            return (precise(x) * gamma.view(shape) + beta.view(shape)).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the sizes, for `print(model)`."""
        return f"{self.channels}, hidden={len(self.hidden_weight)}"


class _Condition:
    """Where the number of the coming pass stands: an object, so that setting it does not look like a changed layer."""

    def __init__(self) -> None:
        self.value: float | Tensor = 0.0


class FilmNorm(nn.Module):
    """A norm layer whose output is scaled and shifted by functions of `condition`, a number lambda in [0, 1].

    **What.** The network learns for a mixture of lambda at once: lambda is the weight of the adversarial loss of an image,
    and at test the number chooses the place on the trade-off between clean and robust accuracy. `condition` is set for each
    pass: a number, or a tensor [n] with one for each image. It is no part of the state dict.

    **Maths.** y = gamma(lambda) norm(x) + beta(lambda) per channel; gamma = 1 and beta = 0 at the beginning. See `Film`.

    **Cost.** 2 c hidden + 2 hidden parameters, a multiply-add.

    **Source.** Wang et al. 2020, "Once-for-all adversarial training" (OAT); FiLM: Perez et al. 2018. OAT has a dual norm
    under it (lambda = 0 takes `main`, lambda > 0 `auxiliary`): `dual=true`, and `conditioned` sets both. Its lambda in
    training: 0, 0.1, 0.2, 0.3, 0.4, 1.

    **Not known.** The size of OAT's network and its encoding of lambda are not in our sources; here it is the number itself.

    >>> layer = FilmNorm(nn.BatchNorm2d(3))
    >>> layer.condition = 0.4
    """

    is_normalization = True

    def __init__(self, norm: nn.Module, *, hidden: int = 16) -> None:
        super().__init__()
        self.norm = norm
        self.film = Film(channels_of(norm), hidden)
        tensors = [t for t in (*norm.parameters(), *norm.buffers()) if t.is_floating_point()]
        if tensors:
            self.film.to(device=tensors[0].device, dtype=tensors[0].dtype)
        self._condition = _Condition()
        self.train(norm.training)

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.film.channels

    @property
    def condition(self) -> float | Tensor:
        """The number lambda in [0, 1] of the coming passes, or a tensor [n] of them."""
        return self._condition.value

    @condition.setter
    def condition(self, value: float | str | Tensor) -> None:
        if isinstance(value, Tensor):
            if value.dim() != 1 or not value.is_floating_point():
                raise UserError(f"condition: a tensor of shape {list(value.shape)}; allowed: one number for each image")
            self._condition.value = value.detach()
            return
        value = number(value, "condition")
        if not 0 <= value <= 1:
            raise UserError(f"condition: {value:g} is not allowed; allowed: 0 to 1")
        self._condition.value = value

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape and dtype of `x`, [n, channels, ...]."""
        value = self.condition
        if isinstance(value, Tensor):
            if len(value) != len(x):
                raise UserError(f"condition: {len(value)} numbers for {len(x)} images")
            condition = value.to(x.device)
        else:
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            condition = torch.full((1,), value, dtype=dtype, device=x.device)
        return self.film(self.norm(x), condition)

    @torch.no_grad()
    def plain(self) -> nn.Module:
        """Return batch norm that is this function at the present `condition`, which must be one number."""
        if isinstance(self.condition, Tensor):
            raise UserError("a conditional norm is converted at one condition; set a number, not one for each image")
        norm = plain(self.norm)
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            raise UserError(f"a conditional {type(norm).__name__} cannot be made one layer; allowed: batch norm")
        layer = batch_norm_like(norm, tracking=norm.running_mean is not None)
        (gamma,), (beta,) = self.film.scale_and_shift(torch.tensor([self.condition]))
        assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
        layer._parameters["weight"] = nn.Parameter(gamma * layer.weight)
        layer._parameters["bias"] = nn.Parameter(gamma * layer.bias + beta)
        return layer

    def extra_repr(self) -> str:
        """Return the condition, for `print(model)`."""
        return "one condition per image" if isinstance(self.condition, Tensor) else f"condition={self.condition:g}"


@contextmanager
def conditioned(model: nn.Module, condition: float | Tensor) -> Iterator[None]:
    """Run passes of `model` at `condition`, and put the conditions and branches back on exit.

    Where a conditional norm has a dual norm inside, its branch is `main` for a condition of 0 and `auxiliary` else, as in
    OAT; a tensor must then be all zero or all positive. Raises `UserError` for a model without conditional norms.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), FilmNorm(nn.BatchNorm2d(2)))
    >>> with conditioned(net, 0.3):
    ...     print(net[1].condition)
    0.3
    """
    layers = [module for module in model.modules() if isinstance(module, FilmNorm)]
    if not layers:
        raise UserError(f"{type(model).__name__} has no conditional norm layer (norm=film)")
    duals = [inner for layer in layers for inner in layer.norm.modules() if isinstance(inner, DualBatchNorm)]
    before = [layer.condition for layer in layers]
    branches = [inner.branch for inner in duals]
    zero = bool((condition == 0).all()) if isinstance(condition, Tensor) else number(condition, "condition") == 0
    if duals and not zero and isinstance(condition, Tensor) and bool((condition == 0).any()):
        raise UserError("condition: zero and other conditions go through different branches; run them as two batches")
    try:
        for layer in layers:
            layer.condition = condition
        for inner in duals:
            inner.branch = "main" if zero else "auxiliary"
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.condition = value
        for inner, branch in zip(duals, branches, strict=True):
            inner.branch = branch


def film_norm(norm: nn.Module, hidden: int = 16, dual: bool = False) -> nn.Module:
    """Return `norm` under a conditional scale and shift: the same function at the beginning, for every condition."""
    if isinstance(norm, FilmNorm):
        raise UserError("a conditional norm is converted to one again; convert it to batch first")
    return FilmNorm(dual_norm(norm) if dual else norm, hidden=hidden)


FILM = kind(film_norm, options={"hidden": Integer(16), "dual": Flag(False)})
