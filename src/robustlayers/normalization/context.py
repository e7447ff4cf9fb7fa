"""Contexts that set every norm layer for one pass and put everything back; no class is touched, no mode is lost.

How torch's `_BatchNorm.forward` is steered without changing it: `training` decides between batch and running statistics,
and `track_running_stats=False` on a training layer makes it normalize by the batch without touching its buffers. A layer
of another class, of which only its user knows what it does to its buffers, gets copies of them for a pass that may not
change them. What that does not reach is done by a forward of the instance, which sets the layer for each call anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal

from torch import Tensor, nn

from robustlayers.core.errors import Fault, UserError, one_of
from robustlayers.core.quantities import number
from robustlayers.normalization._steer import STATISTICS, By, Scope, Setting, Steered, copies, has_statistics, steer
from robustlayers.normalization.synchronized import synchronize
from robustlayers.selection.inventory import Inventory, is_norm
from robustlayers.selection.selectors import resolve

__all__ = [
    "STATISTICS",
    "By",
    "Setting",
    "Snapshot",
    "check_setting",
    "inference",
    "layers_of",
    "normalization",
    "normalizing",
    "statistics_of",
]

Snapshot = Mapping[nn.Module, Mapping[str, Tensor]]
"""norm layer -> buffer's name -> its value at some time"""


_RUNNING = Setting("running", False)


@contextmanager
def normalizing(
    model: nn.Module,
    settings: Mapping[nn.Module, Setting | tuple[By, bool]],
    *,
    training: bool,
    moving: Collection[nn.Module] = (),
    frozen: Snapshot | None = None,
    strict: bool = False,
) -> Iterator[None]:
    """Run one pass with each norm layer as `settings` says and all other modules in `training` or evaluation mode.

    Norm layers without a setting normalize by running statistics. On exit, also after an exception, every module has the
    mode and every norm layer the attributes it had before. Contexts nest; the innermost holds.

    `moving` are norm layers whose running statistics change between this pass and its backward: they normalize by copies.
    Autograd keeps the statistics of the pass by reference, and torch updates them without telling autograd, so that the
    gradient would silently be taken at the new ones. `frozen` are the statistics of layers with that setting. `strict`
    holds the settings also against a `model.train()` or `model.eval()` inside the block. Where processes share the batch,
    see `synchronized.sharing`, batch norm by the batch is by all of it; with `training` their losses are means over images.
    """
    modules = list(model.modules())
    modes = [module.training for module in modules]
    scope = Scope()
    with ExitStack() as undo:
        # Last of all, since it undoes what the block did to modes too.
        undo.callback(_put_modes_back, modules, modes)
        undo.callback(scope.end)
        for module in modules:
            if is_norm(module):
                setting = settings.get(module, _RUNNING)
                if not isinstance(setting, Setting):
                    setting = Setting(setting[0], setting[1])
                _choose(module, setting, undo)
                module.training = setting.by == "batch"
                snapshot = None if frozen is None else frozen.get(module)
                synchronize(module, undo, mean=training)
                steer(module, setting, undo, scope, frozen=snapshot, moving=module in moving, strict=strict)
            else:
                module.training = training
        yield


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run `model` in evaluation mode, norm layers by running statistics, and restore each module's own mode after.

    >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    >>> _ = net[1].eval()
    >>> with inference(net):
    ...     print([module.training for module in net])
    [False, False]
    >>> [module.training for module in net]
    [True, False]
    """
    with normalizing(model, {}, training=False):
        yield


@contextmanager
def normalization(
    model: nn.Module,
    by: By | None = None,
    update: bool | None = None,
    *,
    alpha: float | str | None = None,
    momentum: float | str | None = None,
    branch: str | None = None,
    condition: float | None = None,
    select: str = "norm",
) -> Iterator[None]:
    """Say what the norm layers of any model do in the forwards inside the block.

    `by`: normalize by the statistics of the `batch`, the `running` ones, the `frozen` ones (the running ones as they are
    on entry), or a `mixture`, with mean = alpha mean_batch + (1 - alpha) mean_running and the variance alike, through which
    the gradient goes. `update`: whether each forward moves the running statistics, with the layer's own `momentum`, another
    one in (0, 1], or `"cumulative"`. `branch`: of the layers that have it (`main`, `auxiliary`, ...). `condition`: in
    [0, 1], of conditional layers. `select`: a selector; a layer is meant as a whole if any of its tensors is picked.

    Left out, `by` is what the mode of each layer says, and with neither `by` nor `update` statistics are as ever; with `by`
    alone nothing is updated. Modes are not touched: `model.train()` and `model.eval()` inside mean what they mean for every
    other module and last, while the norm layers do what was said. Blocks nest: the inner one holds, what it leaves open is
    the outer one's. On exit, also after an exception, everything but updated statistics is as before. Layers without
    running statistics normalize as they always do.

    Covered are torch's norm layers, their subclasses, and classes with `is_normalization = True`; `mixture` takes batch
    norm only. The mixture of subsets of a batch on several devices is that of each subset. Mixture: Schneider et al. 2020
    (arXiv 2006.16971), there for test batches.

    Raises `UserError` for a selector that picks no norm layer, a branch or condition that none has, and a setting that a
    layer cannot follow.

    >>> import torch
    >>> net = nn.Sequential(nn.BatchNorm1d(1)).eval()
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> with normalization(net, by="batch"):
    ...     net(x).flatten().detach().round()
    tensor([-1.,  1.])
    >>> with normalization(net, by="running", update=True):
    ...     _ = net(x)
    >>> net[0].running_mean
    tensor([0.2000])
    """
    if by is not None and by not in STATISTICS:
        raise UserError(one_of("statistics to normalize by", str(by), STATISTICS))
    if update is None and by is not None and momentum is not None:
        raise UserError("momentum: nothing is updated; add update=True")
    setting = Setting(by, update, checked_momentum(momentum), checked_alpha(by, alpha), branch, condition)
    layers = layers_of(Inventory(model), select)
    check_choice(layers, setting)
    faults = [Fault(text) for layer, name in layers.items() if (text := check_setting(layer, setting, name))]
    if faults:
        raise UserError(faults)
    scope = Scope()
    snapshot = statistics_of(layers) if by == "frozen" else {}
    with ExitStack() as undo:
        undo.callback(scope.end)
        for module in layers:
            _choose(module, setting, undo)
            outer = vars(module).get("forward")
            filled = setting
            if isinstance(outer, Steered) and outer.scope.active:
                filled = _filled(setting, outer.setting)
            if filled.by is None and filled.update is None:
                continue
            if filled.update is None:
                filled = filled._replace(update=False)
            values = snapshot.get(module)
            if setting.by is None and isinstance(outer, Steered):
                values = outer.frozen
            steer(module, filled, undo, scope, frozen=values, moving=False, strict=True)
        yield


def layers_of(inventory: Inventory, select: str) -> dict[nn.Module, str]:
    """Return the norm layers that a selector picks, with all norm layers inside them, and a name of each.

    A layer is picked as a whole if any of its tensors is; `norm` picks those without tensors too. Raises `UserError` where
    there is none.
    """
    model = inventory.model
    names = {module: name for name, module in model.named_modules() if is_norm(module)}
    if select == "norm":
        if not names:
            raise UserError(f"{type(model).__name__} has no norm layers")
        return names
    selection = resolve(inventory, select)
    owners = {owner for name in selection for owner in inventory.entries[name].owners}
    inside: set[nn.Module] = set()
    chosen: dict[nn.Module, str] = {}
    for module in names:  # from the outermost to the innermost
        if module in inside:
            continue
        parts = [part for part in module.modules() if part in names]
        inside.update(parts)
        if not owners.isdisjoint(module.modules()):
            chosen.update((part, names[part]) for part in parts)
    if not chosen:
        raise UserError(f"selector {select!r} picks no norm layer of {type(model).__name__}")
    return chosen


def statistics_of(modules: Iterable[nn.Module]) -> dict[nn.Module, dict[str, Tensor]]:
    """Return copies of the buffers of norm layers, for a later pass by `frozen` statistics."""
    return {module: copies(module) for module in modules if has_statistics(module)}


def checked_alpha(by: str | None, alpha: float | str | None) -> float | None:
    """Return the share of the batch in a mixture, in [0, 1]; `UserError` where it is missing or has no mixture."""
    if (by == "mixture") != (alpha is not None):
        raise UserError("alpha, the share of the batch from 0 to 1, goes with by: mixture, and the other way round")
    if alpha is None:
        return None
    value = number(alpha, "alpha")
    if not 0 <= value <= 1:
        raise UserError(f"alpha: {value:g} is not allowed; allowed: 0 to 1, the share of the batch")
    return value


def checked_momentum(momentum: float | str | None) -> float | Literal["cumulative"] | None:
    """Return a momentum in (0, 1], `cumulative`, or None for the layer's own."""
    if momentum is None or momentum == "cumulative":
        return momentum
    try:
        value = number(momentum, "momentum")
    except UserError:
        value = 0.0
    if not 0 < value <= 1:
        raise UserError(f"momentum: {momentum} is not allowed; allowed: more than 0 up to 1, or cumulative")
    return value


def check_setting(module: nn.Module, setting: Setting, name: str) -> str | None:
    """Return what keeps a norm layer from following a setting, or None."""
    if not has_statistics(module):
        return None
    what = f"{name or 'the model'}: {type(module).__name__}"
    if setting.by == "mixture" and not _mixes(module):
        return f"{what} has no running mean and variance per channel to mix; allowed: batch norm"
    if setting.momentum is not None and setting.update is not False:
        if not isinstance(getattr(module, "momentum", ""), float | int | None):
            return f"{what} has no momentum to set"
        if setting.momentum == "cumulative" and isinstance(module, nn.modules.instancenorm._InstanceNorm):
            return f"{what} does not count its batches, so there is no cumulative average"
    return None


def check_choice(layers: Iterable[nn.Module], setting: Setting) -> None:
    """Raise `UserError` for a branch or a condition that no layer has."""
    branches = {branch: None for layer in layers for branch in getattr(layer, "branches", ())}
    if setting.branch is not None and setting.branch not in branches:
        if not branches:
            raise UserError(f"branch {setting.branch!r}: no norm layer has branches; norm=dual, for one, makes them")
        raise UserError(one_of("branch", setting.branch, branches))
    if setting.condition is not None and not any(_is_conditional(layer) for layer in layers):
        raise UserError("condition: no norm layer is conditional (norm=film)")


# -- one layer -----------------------------------------------------------------------------------------------------


def _choose(module: nn.Module, setting: Setting, undo: ExitStack) -> None:
    """Set the branch and the condition of a layer that has them."""
    if setting.condition is not None and _is_conditional(module):
        from robustlayers.normalization.layers.film import conditioned

        undo.enter_context(conditioned(module, setting.condition))
    if setting.branch is not None and setting.branch in getattr(module, "branches", ()):
        undo.callback(partial(setattr, module, "branch", module.branch))
        setattr(module, "branch", setting.branch)  # noqa: B010


def _filled(setting: Setting, outer: Setting) -> Setting:
    """Return a setting with what it leaves open as the block around it has it."""
    if setting.by is None:
        setting = setting._replace(by=outer.by, alpha=outer.alpha)
    if setting.update is None:
        setting = setting._replace(update=outer.update, momentum=outer.momentum)
    return setting


def _put_modes_back(modules: list[nn.Module], modes: list[bool]) -> None:
    for module, mode in zip(modules, modes, strict=True):
        module.training = mode


def _mixes(module: nn.Module) -> bool:
    batch = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return batch and module.running_mean is not None and module.running_var is not None


def _is_conditional(module: nn.Module) -> bool:
    from robustlayers.normalization.layers.film import FilmNorm

    return isinstance(module, FilmNorm)
