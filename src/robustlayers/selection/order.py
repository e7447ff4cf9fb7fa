"""Execution order: which module of a model runs when, seen on one real forward and not guessed from registration.

The order of registration is the order in which a constructor was written: a shortcut that runs beside the first
convolution may be registered after the second, and a head before everything. Cuts such as "all layers before `layer2`"
mean the order in which the layers run.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.selection.inventory import Inventory

__all__ = ["ExecutionOrder", "execution_order", "order_of"]


@dataclass(frozen=True)
class ExecutionOrder:
    """The modules that own tensors of `state_dict()`, in the order in which one forward first ran them.

    A module runs when its forward starts, so one that holds other modules beside tensors of its own comes before them.
    One whose forward is never called runs when an operator first reads one of its tensors, as `nn.MultiheadAttention`
    does with its output projection. A tensor that several modules own belongs to the one that runs first.
    """

    modules: tuple[str, ...]
    unused: tuple[str, ...]  # modules that own tensors and never ran, in registration order
    uses: Mapping[str, int]  # how often each of `modules` ran; 2 or more for a module used again
    kinds: Mapping[str, str]  # class names of `modules` and `unused`
    starts: Mapping[
        str, int
    ]  # when each module first ran, under all its names and also without tensors; gaps mean nothing
    holders: Mapping[str, str]  # tensor -> the first of its modules that ran; tensors of unused modules are left out
    shape: tuple[int, ...]  # of the example input

    def start_of(self, tensor: str) -> int | None:
        """Return when the tensor of that (first) name is first used, on the scale of `starts`; None for never."""
        return self.starts[self.holders[tensor]] if tensor in self.holders else None

    def __str__(self) -> str:
        """Return one line for each module: position, name, class, and how often it runs unless that is once."""
        width = max(map(len, self.kinds), default=0)
        lines = []
        for place, name in enumerate(self.modules, start=1):
            again = f"  runs {self.uses[name]} times" if self.uses[name] > 1 else ""
            lines.append(f"{place:>4}  {name:<{width}}  {self.kinds[name]}{again}")
        lines += [f"{'-':>4}  {name:<{width}}  {self.kinds[name]}  never runs" for name in self.unused]
        return "\n".join(lines)


def execution_order(model: nn.Module, example: Tensor | None = None) -> ExecutionOrder:
    """Return the order in which a forward of `model` runs the modules that own tensors.

    The forward is one in evaluation mode, without gradients, on `example`: a batch of inputs, moved to the model's device.
    Where none is given it is `model.example_input_array` if the model has that attribute, or a guess: two images of 32,
    28, 64 or 224 pixels with the channels of the model's input normalization or of a convolution, or two vectors that fit
    a linear layer; whichever the model takes first. A model whose path depends on its input shows the path of this one.

    The model is left as it was: modes, buffers, hooks, gradients and the global random states (torch, `random`, numpy),
    also after an exception. Not covered: plain attributes that a forward sets.

    Raises `UserError` for a model that cannot be run, with the reason, and for one on the meta device.

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.head, self.body = nn.Linear(4, 2), nn.Linear(3, 4)
    ...     def forward(self, x):
    ...         return self.head(self.body(x))
    >>> print(execution_order(Net()))
       1  body  Linear
       2  head  Linear
    """
    return order_of(Inventory(model), example)


# Kept beside the inventory that it belongs to and forgotten with it. Nothing in an order refers back to the inventory.
_KNOWN: WeakKeyDictionary[Inventory, ExecutionOrder] = WeakKeyDictionary()


def order_of(inventory: Inventory, example: Tensor | None = None) -> ExecutionOrder:
    """Return the execution order of an inventory's model; traced on the first call, or anew on a given `example`."""
    if example is not None or inventory not in _KNOWN:
        _KNOWN[inventory] = _traced(inventory, example)
    return _KNOWN[inventory]


def _traced(inventory: Inventory, example: Tensor | None) -> ExecutionOrder:
    model = inventory.model
    what = type(model).__name__
    tensors = [*model.parameters(), *model.buffers()]
    if any(is_lazy(tensor) for tensor in tensors):
        raise UserError(f"{what} has lazy modules, whose shapes a first forward fixes; run it once before selecting")
    if any(tensor.is_meta for tensor in tensors):
        raise UserError(f"{what} is on the meta device, where nothing can be run; move it to a real device first")
    device = tensors[0].device if tensors else torch.device("cpu")
    given = example if example is not None else getattr(model, "example_input_array", None)
    if given is not None and not isinstance(given, Tensor):
        raise UserError(
            f"the example input for {what} is of type {type(given).__name__}; allowed: one tensor, a batch of inputs"
        )
    inputs: list[tuple[int, ...]] = [tuple(given.shape)] if given is not None else list(_guesses(model))
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())
    furthest: tuple[int, Exception] | None = None
    for shape in inputs:
        x = given if given is not None else torch.rand(shape, generator=stream(0, "execution-order"), device="cpu")
        trace = _Trace(inventory)
        try:
            with _left_as_it_was(model):
                # A copy, since a forward may write into its input.
                trace.run(x.detach().clone().to(device, x.dtype if x is given else dtype))
        except Exception as error:  # whatever a user's forward may raise
            if furthest is None or trace.now > furthest[0]:
                furthest = (trace.now, error)
        else:
            return trace.order(tuple(x.shape))
    reason = "it has no convolution and no linear layer" if furthest is None else _one_line(furthest[1])
    if given is not None:
        raise UserError(f"{what} cannot be run on the example input of shape {list(given.shape)}: {reason}")
    raise UserError(
        f"{what} cannot be run on any guessed input, which its execution order needs: {reason}; "
        "give an example: execution_order(model, example), or set model.example_input_array = example, a batch of inputs"
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"


_SIDES = {1: (32, 28, 64, 224), 2: (32, 28, 64, 224), 3: (32,)}  # likeliest first


def _guesses(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Yield shapes of inputs, likeliest first: from the input normalization, else from convolutions and linear layers."""
    for name, module in model.named_modules():
        mean = getattr(module, "mean", None)
        if name.rpartition(".")[2] in ("normalize", "normalization") and isinstance(mean, Tensor):
            yield from ((2, mean.numel(), side, side) for side in _SIDES[2])
            return
    # In registration order, which is a hint only: what a model does not take is passed over.
    modules = list(model.modules())
    entrances = dict.fromkeys(
        (len(module.kernel_size), module.in_channels)
        for module in modules
        if isinstance(module, nn.modules.conv._ConvNd)
    )
    for dimensions, channels in entrances:
        yield from ((2, channels, *[side] * dimensions) for side in _SIDES[dimensions])
    for width in dict.fromkeys(module.in_features for module in modules if isinstance(module, nn.Linear)):
        yield (2, width)


class _Trace:
    """What one forward runs and reads; `now` counts these events."""

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self.now = 0
        self.calls: dict[int, list[int]] = {}  # id of a module -> events
        self.reads: dict[str, list[int]] = {}  # tensor -> events

    def run(self, x: Tensor) -> None:
        """Run the model on `x` and note every call of a module and every reading of a tensor."""
        with ExitStack() as stack:
            for module in self.inventory.model.modules():
                stack.callback(module.register_forward_pre_hook(self._called, prepend=True).remove)
            stack.enter_context(torch.no_grad())
            stack.enter_context(_Reads({id(entry.tensor): entry.name for entry in self.inventory}, self._read))
            self.inventory.model(x)

    def _called(self, module: nn.Module, inputs: object) -> None:
        self.calls.setdefault(id(module), []).append(self.now)
        self.now += 1

    def _read(self, tensor: str) -> None:
        self.reads.setdefault(tensor, []).append(self.now)
        self.now += 1

    def order(self, shape: tuple[int, ...]) -> ExecutionOrder:
        """Return what was seen."""
        names: dict[int, list[str]] = {}
        modules: dict[int, nn.Module] = {}
        for name, module in self.inventory.modules().items():
            names.setdefault(id(module), []).append(name)
            modules[id(module)] = module
        events = dict(self.calls)
        owners: dict[int, None] = {}
        for entry in self.inventory:
            ids = [id(module) for module in entry.owners]
            owners.update(dict.fromkeys(ids))
            if entry.name in self.reads and not any(owner in self.calls for owner in ids):
                seen = self.reads[entry.name]  # in the forward of another module
                for owner in ids:
                    if owner not in events or seen[0] < events[owner][0]:
                        events[owner] = seen
        ran = sorted((owner for owner in owners if owner in events), key=lambda owner: events[owner][0])
        holders = {}
        for entry in self.inventory:
            users = [id(module) for module in entry.owners if id(module) in events]
            if users:
                holders[entry.name] = names[min(users, key=lambda user: events[user][0])][0]
        return ExecutionOrder(
            modules=tuple(names[owner][0] for owner in ran),
            unused=tuple(names[owner][0] for owner in names if owner in owners and owner not in events),
            uses={names[owner][0]: len(events[owner]) for owner in ran},
            kinds={names[owner][0]: type(modules[owner]).__name__ for owner in names if owner in owners},
            starts={name: events[owner][0] for owner in names if owner in events for name in names[owner]},
            holders=holders,
            shape=shape,
        )


class _Reads(TorchDispatchMode):
    """Reports every operator's argument that is a watched tensor. Its shape or device may be asked for unnoticed."""

    def __init__(self, watched: Mapping[int, str], report: Callable[[str], None]) -> None:
        super().__init__()
        self.watched = watched
        self.report = report

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if id(leaf) in self.watched:
                self.report(self.watched[id(leaf)])
        return func(*args, **kwargs)


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and on exit put back modes, buffers and the global random states.

    `training` is set directly: a user's `train()` or `eval()` may do more than that, and need not undo it.
    """
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    boxes = [(module._buffers, dict(module._buffers)) for module in modules]
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    cuda = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy is not None else None
    with torch.random.fork_rng(devices=list(cuda)):
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for box, copy in boxes:
                if list(box) != list(copy) or any(box[name] is not tensor for name, tensor in copy.items()):
                    box.clear()
                    box.update(copy)
            for buffer, value in values:
                buffer.data.copy_(value)
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)
