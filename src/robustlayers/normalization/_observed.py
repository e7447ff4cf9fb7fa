"""What a norm report sees: the inputs of layers and the gradients of tensors in passes that leave no trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustlayers.core.errors import UserError, one_of
from robustlayers.normalization.context import inference, normalizing
from robustlayers.normalization.distances import relative_norm
from robustlayers.normalization.layers.random_norm import RandomNorm
from robustlayers.normalization.recalibration import _no_trace
from robustlayers.selection.inventory import norm_layers
from robustlayers.selection.order import _left_as_it_was

__all__ = ["By", "Moments", "Observation", "attacked", "left_alone", "on_branch"]

By = Literal["running", "batch"]


@contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Freeze the parameters of `model`, and put everything back on exit: see `_no_trace` and `_left_as_it_was`.

    The draws of random norms count from where they were, so that a report does not change what a training draws next.
    """
    draws = [(module._draws, module._draws.count) for module in model.modules() if isinstance(module, RandomNorm)]
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        try:
            with _left_as_it_was(model), _no_trace(model):
                yield
        finally:
            for position, count in draws:
                position.count = count


@contextmanager
def on_branch(model: nn.Module, branch: str | None) -> Iterator[None]:
    """Set the branch of all layers that have one of that name; None leaves them. A name that no layer has is an error."""
    able: list[tuple[Any, tuple[str, ...]]] = [
        (module, names) for module in model.modules() if isinstance(names := getattr(module, "branches", None), tuple)
    ]
    chosen = [module for module, names in able if branch in names]
    if branch is not None and not chosen:
        known = {str(name) for _, names in able for name in names}
        raise UserError(one_of(f"branch of {type(model).__name__}", branch, known))
    before = [module.branch for module in chosen]
    try:
        for module in chosen:
            module.branch = branch
        yield
    finally:
        for module, own in zip(chosen, before, strict=True):
            module.branch = own


def attacked(model: nn.Module, attack: Callable[..., Tensor], x: Tensor, y: Tensor | None, generator: Any) -> Tensor:
    """Return what `attack` makes of a batch, the model in evaluation mode by running statistics."""
    if y is None:
        raise UserError("norm report: attacked inputs need labels: batches of (x, y)")
    with _no_trace(model), inference(model), torch.enable_grad():
        return attack(model, x, y, generator=generator).detach()


class Moments:
    """Mean and unbiased variance per channel of a layer's inputs, each averaged over the layer's forwards."""

    def __init__(self, name: str, module: nn.Module, channels: int | None) -> None:
        self.name, self.module, self.channels = name, module, channels
        self.forwards = self.measured = 0
        self.mean = self.variance = torch.zeros(0, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Take the input of one forward in. One in which the channels cannot be found only counts."""
        self.forwards += 1
        values = self._by_channel(x)
        if values is None:
            return
        images, channels, size = values.shape
        if images * size < 2 or (size < 2 and self._alone):
            raise UserError(
                f"norm report: {self.name or type(self.module).__name__}: an input of shape {list(x.shape)} has one value "
                "per channel, and so no variance; give batches of more images"
            )
        # An image at a time as instance norm does it, else all images together.
        values = values if self._alone else values.transpose(0, 1).reshape(1, channels, -1)
        variance, mean = torch.var_mean(values, dim=2, correction=1)
        self.measured += 1
        share = 1 / self.measured
        if not len(self.mean):
            self.mean, self.variance = variance.new_zeros(channels), variance.new_zeros(channels)
        self.mean = self.mean.lerp(mean.mean(0), share)
        self.variance = self.variance.lerp(variance.mean(0), share)

    @property
    def _alone(self) -> bool:
        return isinstance(self.module, nn.modules.instancenorm._InstanceNorm)

    def _by_channel(self, x: Tensor) -> Tensor | None:
        """Return the values as float64 [images, channels, size]."""
        wide = x.detach().double()
        if isinstance(self.module, nn.LayerNorm | nn.RMSNorm):  # their channels are the last dimensions
            return wide.reshape(-1, math.prod(self.module.normalized_shape), 1)
        if x.dim() < 2 or x.shape[1] != self.channels:
            return None
        return wide.reshape(len(x), x.shape[1], -1)


class Observation:
    """One kind of pass, batch by batch: moments of the inputs of `layers`, mean gradient of the loss for `parameters`."""

    def __init__(
        self, model: nn.Module, moments: Mapping[str, Moments], parameters: Mapping[str, nn.Parameter], by: By
    ) -> None:
        self.model, self.moments, self.parameters = model, moments, parameters
        self.settings = dict.fromkeys(norm_layers(model).values(), (by, False))
        self.images = 0
        self.reached: set[str] = set()
        self.gradients = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}

    def run(self, x: Tensor, y: Tensor | None) -> None:
        """Run one batch through the model; without labels there are no gradients."""
        learning = y is not None and bool(self.parameters)
        wanted = dict.fromkeys(self.parameters.values())
        try:
            for parameter in wanted if learning else ():
                parameter.requires_grad_(True)
            with (
                normalizing(self.model, self.settings, training=False),
                self._watching(),
                torch.set_grad_enabled(learning),
            ):
                logits = self.model(x.detach().clone())  # a copy: the caller may be in inference mode
                if y is not None and learning:
                    self._learn(_loss(logits, y))
                    self.images += len(x)
        finally:
            for parameter in wanted if learning else ():
                parameter.requires_grad_(False)

    def rate(self, name: str) -> float | None:
        """Return ||g|| / ||w|| of a tensor; None for one that got no gradient, and for one that is 0."""
        if name not in self.reached:
            return None
        return relative_norm(self.gradients[name] / self.images, self.parameters[name])

    def _learn(self, loss: Tensor) -> None:
        if not loss.requires_grad:  # the output depends on none of the parameters
            return
        found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        for name, gradient in zip(self.parameters, found, strict=True):
            if gradient is not None:
                self.gradients[name] += gradient
                self.reached.add(name)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for moments in self.moments.values():
                hook = moments.module.register_forward_pre_hook(partial(_seen, moments), with_kwargs=True)
                stack.callback(hook.remove)
            yield


def _seen(moments: Moments, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    x = next((value for value in (*inputs, *named.values()) if isinstance(value, Tensor)), None)
    if x is not None:
        moments.add(x)


def _loss(logits: Any, y: Tensor) -> Tensor:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or y.shape != logits.shape[:1] or y.is_floating_point():
        what = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(
            "norm report: gradients need logits [n, classes] and integer labels [n]; got "
            f"{what} and {y.dtype} {list(y.shape)}"
        )
    return functional.cross_entropy(logits, y, reduction="sum")
