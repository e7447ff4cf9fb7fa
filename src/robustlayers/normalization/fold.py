"""The fast crafting forward: a model in evaluation mode with its norm layers folded away, refreshed from live weights.

Crafting needs the gradient for the images only. With norm layers that normalize by running statistics, a model then has an
equivalent that is cheaper in both directions: BatchNorm becomes part of the convolution before it, or one multiply-add.
"""

# torch has its operations on lists of tensors under private names only
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustlayers.core.errors import UserError, one_of
from robustlayers.normalization.fold_rules import plan
from robustlayers.normalization.fold_scaling import Scalings
from robustlayers.normalization.precision import PRECISIONS, Choice, choose

__all__ = ["CraftingForward", "crafting_forward"]


def crafting_forward(
    model: nn.Module, *, precision: str = "fp32", channels_last: bool = True, compiled: bool = False
) -> CraftingForward:
    """Return a function equal to `model` in evaluation mode, with the same gradient for the images, that costs less.

    Equal means within rounding; in the dtype of the model. Norm layers normalize by their running statistics, and no
    parameter gets a gradient. The model is read only. See `CraftingForward` for what happens when it changes.

    BatchNorm1d/2d/3d after a linear layer or convolution, which nothing else reads, becomes part of that layer; another
    BatchNorm with running statistics, and the input's `Normalize`, become one multiply-add. What cannot be traced by
    `torch.fx`, has hooks, or is a norm layer of the user's own, runs as it is; so in the last resort does the whole model.
    The trace holds the path that the model's Python code takes in evaluation mode: a path that depends on global
    variables, or on attributes of anything but modules, is not followed when they change.

    `channels_last` lays out the weights so that convolutions of images run channels-last, unless the traced code could
    notice (`view`, `stride`) or a part runs as it is.

    `precision` is `fp32`, in the dtype of the model; `bf16`, under autocast with float32 logits; or `auto`: at the first
    images the candidates are timed, and the fastest whose gradient agrees with the model's is kept (`choice` tells which
    and why).

    `compiled` gives the result to `torch.compile`, which takes a while at the first images and at the first batch of another
    size. On a CPU it gains nothing; on a GPU `auto` tries it. It needs a compiler, and a model that does not run as it is.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    >>> forward = crafting_forward(net)
    >>> forward
    CraftingForward(folded=1, fused=0, as_it_is=0)
    >>> x = torch.rand(3, 1, 4, 4)
    >>> torch.allclose(forward(x), net.eval()(x), atol=1e-6)
    True
    """
    if precision not in PRECISIONS:
        raise UserError(one_of("precision", precision, PRECISIONS))
    return CraftingForward(model, precision=precision, channels_last=channels_last, compiled=compiled)


class CraftingForward:
    """Images [n, c, h, w] in [0, 1] -> logits, by the weights and running statistics at the last `refresh`.

    `refresh` reads the model anew and is meant to be called before each batch is crafted; it costs about as much as
    copying the weights once. Between a change of the model and the next refresh, the old values stay, but for modules
    that run as they are, which are live. In-place changes by optimizers and `load_state_dict` are read; a change of
    structure (a parameter or module replaced, moved or converted, an attribute set, a hook added) makes it trace anew.

    `folded`: norm layers that became part of the layer before. `fused`: norm layers, the input's included, that became a
    multiply-add. `as_it_is`: module name -> why it runs as it is; `""` is the whole model. `reason`: that in one line.
    """

    def __init__(
        self, model: nn.Module, *, precision: str = "fp32", channels_last: bool = True, compiled: bool = False
    ) -> None:
        self._model = model
        self.precision = precision
        self.choice: Choice | None = None
        self._choice, self._compile = channels_last, compiled
        self._build()

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits, with a graph to the images alone."""
        if self.precision == "auto":
            self.settle(images)
        if self.precision == "bf16" and images.dtype == torch.float32:
            with torch.autocast(images.device.type, torch.bfloat16):
                return self._run(images).float()
        return self._run(images)

    def settle(self, images: Tensor, choice: Choice | None = None) -> Choice:
        """Decide what `auto` stands for, by timing on `images`, or as `choice` says; return the choice."""
        self.choice = choice or choose(self._model, images, crafting_forward)
        self.precision, self._choice = self.choice.precision, self.choice.channels_last
        self._compile = self.choice.compiled
        self._build()
        return self.choice

    def __repr__(self) -> str:
        return f"CraftingForward(folded={self.folded}, fused={self.fused}, as_it_is={len(self.as_it_is)})"

    @property
    def folded(self) -> int:
        """Number of norm layers that became part of the layer before them."""
        return len(self._plan.folded)

    @property
    def fused(self) -> int:
        """Number of norm layers that became a multiply-add."""
        return len(self._plan.fused)

    @property
    def as_it_is(self) -> dict[str, str]:
        """Modules that run as they are, and why."""
        return dict(self._plan.as_it_is)

    @property
    def reason(self) -> str:
        """Why modules run as they are, in one line; empty if none does."""
        return "; ".join(f"{name or 'the model'}: {why}" for name, why in self._plan.as_it_is.items())

    @property
    def channels_last(self) -> bool:
        """Whether convolutions of images run channels-last."""
        return self._plan.channels_last

    def refresh(self) -> None:
        """Read the model's current weights and running statistics; trace anew if its structure has changed."""
        stale = any(watch.changed() for watch in self._plan.watches)
        stale = stale or any(_kind(tensor) != kind for tensor, kind in self._kinds)
        if stale:
            self._build()
        else:
            self._read()

    @torch.inference_mode(False)
    def _build(self) -> None:
        self._plan = plan(self._model, self._choice)
        self._run: Callable[[Tensor], Tensor] = self._plan.run
        if self._compile and not self._plan.as_it_is:
            self._run = torch.compile(self._plan.run)
        parts = (*self._plan.folded, *self._plan.fused)
        self._scalings = Scalings([part.scaling for part in parts])
        self._sources = [source for source, _ in self._plan.copies]
        self._targets = [target for _, target in self._plan.copies]
        weights = [weight for part in self._plan.folded for weight in part.source]
        read = [*self._sources, *weights, *(tensor for part in parts for tensor in part.scaling.sources())]
        self._kinds = [(tensor, _kind(tensor)) for tensor in read]
        self._read()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _read(self) -> None:
        if self._targets:
            torch._foreach_copy_(self._targets, self._sources)
        self._scalings.compute()
        for part in self._plan.folded:
            torch.mul(part.source[0], part.scale, out=part.weight)


def _kind(tensor: Tensor) -> tuple[torch.device, torch.dtype, torch.Size]:
    return tensor.device, tensor.dtype, tensor.shape
