"""The outputs of a model's layers in execution order, handed over one by one while a batch runs through the model.

Layers are modules and functional activations. A ReLU that a forward calls as `functional.relu(y)` has no module, so it is
seen as an operator and named after the module in whose forward it runs: `layer1.0:relu`, the second one `layer1.0:relu#2`.
A module that runs twice has a second output, `act#2`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robustlayers.core.errors import UserError, one_of
from robustlayers.core.random import stream
from robustlayers.evaluation._still import device_of, still
from robustlayers.selection.inventory import Inventory, is_norm
from robustlayers.selection.layout import layout_of
from robustlayers.selection.order import order_of
from robustlayers.selection.selectors import resolve

__all__ = ["Layer", "Layers", "activations", "batches", "capture", "inputs", "layers_of", "pooled"]

Layers = str | Sequence[str] | None
"""A selector, names of layers, or None: all convolutions, norm layers, linear layers and activations."""

_USUAL = ("conv", "norm", "linear", "activation")

# Operators that are activations where no module of torch's stands around them.
_OPERATORS = frozenset(
    {
        "_prelu_kernel",
        *("relu", "leaky_relu", "elu", "celu", "gelu", "silu", "mish", "softplus", "hardswish"),
        *("hardtanh", "threshold", "tanh", "sigmoid"),
    }
)


@dataclass(frozen=True)
class Layer:
    """One layer whose output is looked at.

    `kind`: `conv`, `norm`, `linear`, `activation`, or the name of the module's class. `part`: `stem`, `stage(1)`, ...,
    `head`, that of the layer before where the module has none of its own; None where the model's parts cannot be seen.
    """

    name: str
    kind: str
    part: str | None = None

    def __str__(self) -> str:
        return self.name


def layers_of(
    model: nn.Module, layers: Layers = None, *, activations: bool | None = None, example: Tensor | None = None
) -> tuple[Layer, ...]:
    """Return the layers that are meant, in the order in which one forward produces their outputs.

    `layers`: a selector stands for the modules that own a tensor it picks; a sequence of names for exactly these modules
    or functional activations, at any depth (`layer1.0` is the output of a block); None for what is usually looked at
    (`conv | norm | linear` and all activations). With `activations` the activations that follow a chosen layer are taken
    too; left out, they are where `layers` is None. The forward runs on four samples of `example`, else on a random input as
    in `selection.execution_order`. Modules that never run, or whose output has no batch dimension, are no layers; a norm
    layer made of several modules counts as one, unless they are named.

    Raises `UserError` for an unknown name or selector, and where nothing is left.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2))
    >>> x = torch.rand(4, 1, 3, 3)
    >>> [layer.name for layer in layers_of(net, example=x)], [layer.kind for layer in layers_of(net, "linear", example=x)]
    (['0', '1', '3'], ['linear'])
    """
    what = type(model).__name__
    inventory = Inventory(model)
    if example is None:
        shape = order_of(inventory).shape
        example = torch.rand(shape, generator=stream(0, "execution-order"))
    example = example[:4]
    if not len(example):
        raise UserError(f"there is no sample to run {what} on")
    found = _probed(model, example)
    with_activations = layers is None if activations is None else activations
    chosen: set[str]  # names of modules and operators, without the count of their calls
    if layers is None:
        kinds = _USUAL if with_activations else _USUAL[:3]
        chosen = {seen.owner for seen in found if seen.kind in kinds and _whole(model, seen.module) == seen.module}
    elif isinstance(layers, str):
        order_of(inventory, inputs(example, model))
        chosen = set()
        first_names = _names(model)
        for tensor in resolve(inventory, layers):
            for module in inventory.entries[tensor].owners:
                name = first_names[id(module)].partition(".parametrizations.")[0]
                chosen.add(_whole(model, name))
    else:
        chosen = set()
    if layers is None or isinstance(layers, str):
        taken = [seen for seen in found if seen.owner in chosen]
        if with_activations:
            taken = _with_following(found, chosen)
        if not taken:
            text = "conv | norm | linear" if layers is None else layers
            raise UserError(f"{text!r} picks no layer of {what} with an output for each sample; give names of modules")
    else:
        known = {seen.key: seen for seen in found}
        for name in layers:
            if name not in known:
                raise UserError(one_of(f"layer of {what}", str(name), known))
        wanted = set(layers)
        if with_activations:
            taken = _with_following(found, wanted | {known[name].owner for name in wanted if "#" not in name})
        else:
            taken = [seen for seen in found if seen.key in wanted]
        if not taken:
            raise UserError("no layer is named")
    return tuple(_with_parts(inventory, found, taken))


def capture(
    model: nn.Module, x: Tensor, layers: Sequence[Layer], receive: Callable[[int, Tensor], object]
) -> Tensor | None:
    """Run one batch through `model` and hand over each layer's output as soon as it is there: `receive(index, output)`.

    `layers` come from `layers_of`. An output [n, ...] is valid during the call only, since a later operator may write into
    it. The model runs in evaluation mode with norm layers by running statistics, without gradients or autocast, and is
    left as it was (modes, buffers, hooks, gradients, random states), also after an exception. Returns the model's output
    if that is a tensor.

    Raises `UserError` where a layer did not run on this batch.
    """
    wanted = {layer.name: index for index, layer in enumerate(layers)}
    missing = set(wanted)

    def emit(seen: _Seen, output: Tensor) -> None:
        index = wanted.get(seen.key)
        if index is not None:
            missing.discard(seen.key)
            receive(index, output)

    operators = any(":" in name for name in wanted)
    output = _watched(model, inputs(x, model), emit, operators=operators)
    if missing:
        raise UserError(f"these layers of {type(model).__name__} did not run on a batch: {', '.join(sorted(missing))}")
    return output if isinstance(output, Tensor) else None


def activations(
    model: nn.Module, x: Tensor, layers: Layers = None, *, batch_size: int = 100, pool: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Yield for each batch of `x` [n, ...] the outputs of the layers by name, in execution order, on the model's device.

    With `pool` they are averaged over all dimensions behind the channels, [n, c]. Nothing is left on the model between two
    batches. Memory: all outputs of one batch. Arguments and errors as in `layers_of` and `capture`.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> [{name: list(value.shape) for name, value in batch.items()} for batch in activations(net, torch.rand(4, 2))]
    [{'0': [4, 3], '1': [4, 3]}]
    """
    chosen = layers_of(model, layers, example=x)
    for batch in batches(len(x), batch_size):
        found: dict[str, Tensor] = {}

        def keep(index: int, output: Tensor, found: dict[str, Tensor] = found) -> None:
            found[chosen[index].name] = pooled(output) if pool else output.clone()

        capture(model, x[batch], chosen, keep)
        yield found


def inputs(x: Tensor, model: nn.Module) -> Tensor:
    """Return a batch on the model's device in the dtype of its floats: bytes divided by 255, floats as they are."""
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise UserError(f"analyses take inputs as uint8 or floats; got {x.dtype}")
    tensors = (tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point())
    dtype = next((tensor.dtype for tensor in tensors), torch.float32 if x.dtype == torch.uint8 else x.dtype)
    moved = x.detach().to(device_of(model, x), dtype)
    return moved / 255 if x.dtype == torch.uint8 else moved


def batches(count: int, batch_size: int, least: int = 1) -> list[slice]:
    """Return slices that cut `count` samples into the fewest batches of at most `batch_size`, of nearly equal size.

    Raises `UserError` where a batch would have fewer than `least` samples.

    >>> batches(10, 4)
    [slice(0, 4, None), slice(4, 7, None), slice(7, 10, None)]
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < least:
        raise UserError(f"batch_size: {batch_size!r} is not allowed; allowed: a whole number, {least} or more")
    parts = -(-count // batch_size)
    if count < max(1, parts * least):
        raise UserError(f"{count} samples are too few: every batch needs {least} at least")
    size, more = divmod(count, parts)
    starts = [part * size + min(part, more) for part in range(parts + 1)]
    return [slice(first, last) for first, last in pairwise(starts)]


def pooled(output: Tensor) -> Tensor:
    """Return the mean of [n, c, ...] over everything behind the channels: [n, c]."""
    return output.flatten(2).mean(2) if output.ndim > 2 else output.clone()


@dataclass(frozen=True)
class _Seen:
    """One output that a forward produced."""

    key: str  # with the count of calls: act#2
    owner: str  # without it
    module: str  # in whose forward it was produced
    kind: str
    holds: bool  # the module owns tensors


def _probed(model: nn.Module, example: Tensor) -> list[_Seen]:
    """Return all outputs with a batch dimension, in order."""
    found: list[_Seen] = []

    def emit(seen: _Seen, output: Tensor) -> None:
        if output.ndim >= 2 and len(output) == len(example):
            found.append(seen)

    try:
        _watched(model, inputs(example, model), emit, operators=True)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"{type(model).__name__} cannot be run on inputs of shape {list(example.shape)}: {text}"
        ) from error
    return found


def _whole(model: nn.Module, name: str) -> str:
    """Return the outermost norm layer that the module is a part of, as a branch of dual batch norm is, or the module."""
    path = name.split(".")
    for depth in range(1, len(path)):
        above = ".".join(path[:depth])
        if is_norm(model.get_submodule(above)):
            return above
    return name


def _with_following(found: list[_Seen], chosen: set[str]) -> list[_Seen]:
    """Return the chosen outputs, and each activation for which the layer with tensors that ran last is chosen."""
    taken, after_chosen = [], False
    for seen in found:
        mine = seen.owner in chosen or seen.key in chosen
        if seen.kind != "activation" and seen.holds:
            after_chosen = mine
        if mine or (seen.kind == "activation" and after_chosen):
            taken.append(seen)
    return taken


def _with_parts(inventory: Inventory, found: list[_Seen], taken: list[_Seen]) -> Iterator[Layer]:
    try:
        layout = layout_of(inventory)
    except UserError:
        layout = None
    keys = {seen.key for seen in taken}
    part: str | None = None
    for seen in found:
        if layout is not None:
            own = layout.part_of(seen.module)
            # A container that ends a stage must not hide that the layer inside it came before.
            part = own if own is not None else part
        if seen.key in keys:
            yield Layer(seen.key, seen.kind, part)


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    if is_norm(module):
        return "norm"
    if isinstance(module, nn.Linear):
        return "linear"
    if _is_activation(module):
        return "activation"
    return type(module).__name__


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ == nn.ReLU.__module__ and not isinstance(module, nn.MultiheadAttention)


def _watched(model: nn.Module, x: Tensor, emit: Callable[[_Seen, Tensor], None], *, operators: bool) -> Any:
    """Run `model` on `x` and report each output of a module or functional activation, once it is there."""
    alone = not any(True for _ in model.children())  # a single layer is its own and only layer
    names = _names(model)
    inside: list[nn.Module] = []  # whose forwards are running
    calls: dict[str, int] = {}

    def report(owner: str, module: nn.Module, kind: str, output: Any) -> None:
        calls[owner] = count = calls.get(owner, 0) + 1
        tensor = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
        if tensor is not None:
            key = owner if count == 1 else f"{owner}#{count}"
            holds = kind == "norm" or (kind != "activation" and bool(module._parameters or module._buffers))
            emit(_Seen(key, owner, names[id(module)], kind, holds), tensor)

    def enter(module: nn.Module, arguments: object) -> None:
        inside.append(module)

    def leave(module: nn.Module, arguments: object, output: object) -> None:
        inside.pop()
        if module is not model or alone:
            report(names[id(module)], module, _kind(module), output)

    def operator(name: str, output: object) -> None:
        if inside and not _is_activation(inside[-1]):
            report(f"{names[id(inside[-1])]}:{name}", inside[-1], "activation", output)

    with still(model, x.device), torch.no_grad(), ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        if operators:
            stack.enter_context(_Operators(operator))
        # A copy, since a forward may write into its input.
        return model(x.clone())


def _names(model: nn.Module) -> dict[int, str]:
    """Return the first name of each module; that of a model which is a single layer is its class."""
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    if len(names) == 1:
        names[id(model)] = type(model).__name__
    return names


class _Operators(TorchDispatchMode):
    """Reports the result of every operator that is an activation."""

    def __init__(self, report: Callable[[str, object], None]) -> None:
        super().__init__()
        self.report = report

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.removesuffix("_")
        if name in _OPERATORS:
            self.report("prelu" if name == "_prelu_kernel" else name, output)
        return output
