"""Swapping the norm layers of any model for another kind, with what they hold carried over where it has a meaning."""

from __future__ import annotations

from typing import Any

from torch import nn

from robustlayers.core.errors import UserError
from robustlayers.models.norms import find_norm, finish_norms, norm_options
from robustlayers.normalization.layers.common import channels_of, plain, settle
from robustlayers.selection.inventory import Inventory, is_norm
from robustlayers.selection.selectors import resolve

__all__ = ["convert", "outermost_norms"]


def convert(model: nn.Module, to: str, *, select: str = "norm", **settings: Any) -> nn.Module:
    """Put norm layers of the kind `to` in the place of those of `model`, in place, and return the model.

    `to` is a name of `norm_names()`, `settings` are its options: `convert(model, "group", groups=8)`, or both as one text,
    `"group(groups=8)"`. `select` is a
    selector: a layer is converted as a whole if any of its tensors is picked. Where the model itself is a norm layer, what
    is returned is the new one.

    Carried over are scale and shift (the same parameters, so `requires_grad` and an optimizer that holds them stay right),
    and of batch norm to a kind that has them also the running statistics, `eps` and `momentum`; the docstring of each kind
    says what. A layer with branches gives what the branch in use holds. To `dual` with both halves own, and back on
    `main`, the model is the same bit for bit. To `none` scale, shift and statistics are gone, not folded into other layers.
    New parameters (an auxiliary branch, an adapter) are unknown to an optimizer that was made before, and copies for an
    auxiliary branch are copies for each layer, also where two layers share a parameter.

    A layer that is used under several names is converted once and stays shared. Names of layers stay, so the layout of a
    `Network` stays valid; what is inside a layer with branches gets names below it. `group-ws` also makes the plain
    convolutions of the whole model weight standardized; `plain_convolutions` undoes that, a later conversion does not.

    Raises `UserError`, with the model unchanged, for an unknown kind or option, a selector that picks no norm layer, a norm
    layer with hooks (they would be lost), and one whose channels cannot be seen.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    >>> convert(net, "group", groups=2)[1].num_groups
    2
    """
    name, options = norm_options({**settings, "name": to})
    kind = find_norm(name)
    chosen = _selected(model, select)
    new: dict[nn.Module, nn.Module] = {}
    for path, norm in chosen.items():
        hooked = next((part for part in norm.modules() if _has_hooks(part)), None)
        if hooked is not None:
            raise UserError(
                f"{path or type(model).__name__}: this norm layer has hooks, which would be lost; remove them"
            )
        try:
            if kind.replace is not None:
                new[norm] = kind.replace(norm, **options)
            else:
                old = plain(norm)
                new[norm] = settle(kind.make(channels_of(old), **options), old)
        except UserError as error:
            raise UserError([fault.at(path=path or None) for fault in error.faults]) from None
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():
            if child is not None and child in new:
                parent._modules[child_name] = new[child]
    model = new.get(model, model)
    finish_norms({**options, "name": name}, model)
    return model


def outermost_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the norm layers of `model` that are not inside another one, by the first of their names.

    >>> from robustlayers.normalization.layers import DualBatchNorm
    >>> list(outermost_norms(nn.Sequential(DualBatchNorm(nn.BatchNorm2d(2)), nn.ReLU(), nn.GroupNorm(1, 2))))
    ['0', '2']
    """
    inside: set[nn.Module] = set()
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if is_norm(module) and module not in inside:
            found[name] = module
            inside.update(module.modules())
    return found


def _selected(model: nn.Module, select: str) -> dict[str, nn.Module]:
    norms = outermost_norms(model)
    if select == "norm":  # those without tensors too, which no selector can pick
        if not norms:
            raise UserError(f"{type(model).__name__} has no norm layers to convert")
        return norms
    inventory = Inventory(model)
    selection = resolve(inventory, select)
    owners = {owner for name in selection for owner in inventory.entries[name].owners}
    chosen = {name: norm for name, norm in norms.items() if not owners.isdisjoint(norm.modules())}
    if not chosen:
        raise UserError(f"selector {select!r} picks no norm layer of {type(model).__name__}")
    return chosen


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(vars(module)[kind] for kind in kinds)
