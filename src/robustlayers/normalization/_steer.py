"""Steering one norm layer: a setting for its forwards, made by its attributes where that will do, else by its forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["STATISTICS", "By", "Scope", "Setting", "Steered", "copies", "has_statistics", "steer"]

STATISTICS = ("batch", "running", "frozen", "mixture")
By = Literal["batch", "running", "frozen", "mixture"]


class Setting(NamedTuple):
    """What one norm layer does in one pass.

    `by` the statistics of the `batch`, the `running` ones, the `frozen` ones of a snapshot, or a `mixture`:
    alpha batch + (1 - alpha) running, of mean and of variance. None: as the layer's mode says.
    `update` the running statistics by the batch, with the layer's own `momentum`, another one, or `cumulative`: the mean of
    all batches since the counter began.
    """

    by: By | None
    update: bool | None
    momentum: float | Literal["cumulative"] | None = None
    alpha: float | None = None
    branch: str | None = None
    condition: float | None = None

    @property
    def still(self) -> bool:
        """Whether it is evaluation mode: by running statistics without an update."""
        return self.by == "running" and not self.update


class Scope:
    """Whether a block is still open: a copy of a model that was made inside one must not stay steered."""

    def __init__(self) -> None:
        self.active = True

    def end(self) -> None:
        """Close it."""
        self.active = False

    def __deepcopy__(self, memo: Any) -> Scope:
        return self


_ABSENT = object()


class Steered:
    """The forward of one layer under a setting; the layer's own attributes are as they were after each call."""

    def __init__(
        self, module: nn.Module, setting: Setting, moving: bool, frozen: Mapping[str, Tensor] | None, scope: Scope
    ) -> None:
        if setting.by == "mixture" and setting.alpha in (0, 1):  # exactly what torch does
            setting = setting._replace(by="batch" if setting.alpha == 1 else "running", alpha=None)
        self.module, self.setting, self.moving, self.frozen, self.scope = module, setting, moving, frozen, scope
        self.plain: Callable[..., Any] = module.forward

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if not self.scope.active:
            return self.plain(*inputs, **named)
        module, own = self.module, vars(self.module)
        before = {name: own.get(name, _ABSENT) for name in ("training", "track_running_stats", "momentum")}
        buffers = dict(module._buffers)
        by = self.setting.by or ("batch" if module.training else "running")
        try:
            if by == "batch" and self.setting.update:
                return self._updating(*inputs, **named)
            try:
                output = self._still(by, inputs, named)
            finally:
                module._buffers.update(buffers)
            if self.setting.update:
                with torch.no_grad():
                    self._updating(*inputs, **named)  # each kind of layer knows its own update
            return output
        finally:
            for name, value in before.items():
                if value is not _ABSENT:
                    own[name] = value
                else:
                    own.pop(name, None)

    def _updating(self, *inputs: Any, **named: Any) -> Any:
        own = vars(self.module)
        own["training"] = True
        if self.setting.momentum is not None:
            own["momentum"] = None if self.setting.momentum == "cumulative" else self.setting.momentum
        return self.plain(*inputs, **named)

    def _still(self, by: str, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Normalize without a change of the buffers, for which the caller puts the layer's own back."""
        module, own = self.module, vars(self.module)
        own["training"] = by == "batch"
        if by == "frozen" and self.frozen is not None:
            lent = {name: _alike(value, module._buffers[name]) for name, value in self.frozen.items()}
            module._buffers.update(lent if _is_torchs(module) else {name: t.clone() for name, t in lent.items()})
        elif by == "mixture":
            return self._mixed(inputs, named)
        elif by == "batch" and _is_torchs(module):
            own["track_running_stats"] = False
        elif by == "batch" or self.moving or self.setting.update or not _is_torchs(module):
            module._buffers.update(copies(module))  # for the backward too, which an update must not reach
        return self.plain(*inputs, **named)

    def _mixed(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Hand on an input that is normalized already, and statistics that leave it so: mean 0, variance 1 - eps.

        Through the running statistics themselves no gradient goes in torch, and that of the batch's has to.
        """
        module, alpha = self.module, self.setting.alpha
        assert isinstance(module, nn.modules.batchnorm._BatchNorm) and alpha is not None
        running_mean, running_var = module.running_mean, module.running_var
        assert running_mean is not None and running_var is not None
        x: Tensor = inputs[0] if inputs else named["input"]
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        var, mean = torch.var_mean(wide, (0, *range(2, x.dim())), correction=0)
        mean = alpha * mean + (1 - alpha) * running_mean
        var = alpha * var + (1 - alpha) * running_var
        shape = (1, -1, *(1,) * (x.dim() - 2))
        y = ((wide - mean.view(shape)) * torch.rsqrt(var + module.eps).view(shape)).to(x.dtype)
        module._buffers.update(
            running_mean=torch.zeros_like(running_mean), running_var=torch.full_like(running_var, 1 - module.eps)
        )
        return self.plain(y)


def steer(
    module: nn.Module,
    setting: Setting,
    undo: ExitStack,
    scope: Scope,
    *,
    frozen: Mapping[str, Tensor] | None,
    moving: bool,
    strict: bool,
) -> None:
    """Make one layer follow a setting until `undo` is closed.

    `frozen`: its statistics, for that setting. `moving`: they change before the backward of the pass. `strict`: the setting
    holds against a change of the layer's mode, too.
    """
    if not has_statistics(module):
        return  # nothing to keep still, nothing to update
    own = vars(module)
    current = own.get("forward", _ABSENT)
    if isinstance(current, Steered):  # of a block around this one
        undo.callback(_put_back, module, "forward", current)
        own["forward"] = current.plain
    simple = setting.by in ("batch", "running") and setting.momentum is None and not strict
    if not simple or (setting.by == "running" and setting.update):
        undo.callback(_put_back, module, "forward", own.get("forward", _ABSENT))
        own["forward"] = Steered(module, setting, moving, frozen, scope)
        return
    if setting.update:
        return
    known = _is_torchs(module)
    if known and setting.by == "batch":
        undo.callback(setattr, module, "track_running_stats", module.track_running_stats)
        setattr(module, "track_running_stats", False)  # noqa: B010  # type checkers take an attribute for a tensor
    elif moving or not known:
        undo.callback(module._buffers.update, dict(module._buffers))
        module._buffers.update(copies(module))


def _put_back(module: nn.Module, name: str, value: object) -> None:
    if value is _ABSENT:
        vars(module).pop(name, None)
    else:
        vars(module)[name] = value


def has_statistics(module: nn.Module) -> bool:
    """Tell whether a layer has buffers of its own."""
    return any(buffer is not None for buffer in module._buffers.values())


def _is_torchs(module: nn.Module) -> bool:
    # Instance norm hands its buffers on whenever it normalizes by the input.
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module).__module__.startswith("torch.nn.")


def copies(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of a layer\'s own buffers by name."""
    return {name: buffer.detach().clone() for name, buffer in module._buffers.items() if buffer is not None}


def _alike(value: Tensor, buffer: Tensor | None) -> Tensor:
    return value if buffer is None else value.to(buffer)  # the model may have been moved or converted since
