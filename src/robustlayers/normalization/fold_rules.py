"""From a model to the graph of its crafting forward: what is traced, what is folded, what runs as it is, and why.

The model is traced once by `torch.fx`. Its own modules are traced through; layers of torch, norm layers, and modules with
hooks are nodes. A module whose forward cannot be traced, or whose trace would miss something, becomes a node too, which
runs as it is; in the last resort that is the whole model.
"""

from __future__ import annotations

import operator
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, partialmethod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn import functional

from robustlayers.models.parts import Normalize
from robustlayers.normalization.context import inference
from robustlayers.normalization.fold_layers import (
    AsItIs,
    Folded,
    MultiplyAdd,
    duplicate,
    foldable,
    is_affine,
    is_plain,
)
from robustlayers.normalization.fold_layout import keep_layout, overwrites_views
from robustlayers.normalization.fold_watch import Watch
from robustlayers.selection.inventory import is_norm

__all__ = ["Plan", "any_layout", "plan"]

_ROOT = "model"
_OPAQUE = "a layer that is not known well enough to be copied"
# What gives another result, or an error, where a tensor is laid out channels-last.
_LAYOUT_METHODS = {"view", "view_as", "stride", "is_contiguous", "as_strided", "storage_offset", "data_ptr", "set_"}
_LAYOUT_FUNCTIONS = {torch.as_strided, torch.view_copy, torch.as_strided_copy}


@dataclass
class Plan:
    """The rewritten graph as a module, what refreshes it, and what became of each part of the model."""

    run: nn.Module = field(default_factory=nn.Identity)
    folded: list[Folded] = field(default_factory=list)
    fused: list[MultiplyAdd] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (of the model, own)
    as_it_is: dict[str, str] = field(default_factory=dict)  # module -> why
    watches: list[Watch] = field(default_factory=list)
    channels_last: bool = False


def plan(model: nn.Module, channels_last: bool) -> Plan:
    """Trace `model`, which is left as it was, and return its plan; its own tensors wait for a first refresh."""
    trace = _trace(model)
    return _Rewriting(trace, channels_last=channels_last and _any_layout(trace)).plan()


def any_layout(model: nn.Module) -> bool:
    """Tell whether `model` surely gives the same result, within rounding, for images that are laid out channels-last."""
    return _any_layout(_trace(model))


# -- tracing -------------------------------------------------------------------------------------------------------


class _Root(nn.Module):
    """Holds the model, so that the model itself is a module like all others; the tracer writes to this one only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.add_module(_ROOT, model)

    def forward(self, images: Tensor) -> Tensor:
        return self._modules[_ROOT](images)  # pyright: ignore[reportOptionalCall]


@dataclass
class _Trace:
    graph: fx.Graph
    modules: dict[str, nn.Module]
    tensors: dict[str, Tensor]
    as_it_is: dict[str, str]
    watches: list[Watch]


class _Proxy(fx.Proxy):
    """Traces `x += y` as what it is, where `fx` writes `x + y`: something else where `x` is a view, or is read again."""

    def _in_place(self, operation: Callable[..., Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    __iadd__ = partialmethod(_in_place, operator.iadd)
    __isub__ = partialmethod(_in_place, operator.isub)
    __imul__ = partialmethod(_in_place, operator.imul)
    __itruediv__ = partialmethod(_in_place, operator.itruediv)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # else what a forward computes from buffers alone would be a constant

    def __init__(self, as_it_is: dict[str, str]) -> None:
        super().__init__()
        self.as_it_is = as_it_is
        self.failed: str | None = None  # innermost module in whose forward an exception arose

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.as_it_is or isinstance(m, Normalize) or is_norm(m):
            return True
        if type(m).__module__.startswith("torch.nn.") and not isinstance(m, nn.Sequential):
            return True
        why = None
        if not is_plain(m):
            why = "it has hooks or a forward of its own"
        elif any(isinstance(value, Tensor) for value in vars(m).values()):
            why = "it keeps a tensor that is no parameter or buffer"
        if why is not None:
            self.as_it_is[module_qualified_name] = why
        return why is not None

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = next((name for name, module in self.root.named_modules() if module is m), None)
            raise

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor | nn.Module):  # parameters and buffers come as proxies
            raise TraceError(f"a {type(a).__name__} that is no parameter or buffer is an operand")
        return super().create_arg(a)


def _trace(model: nn.Module) -> _Trace:
    root = _Root(model)
    modules: dict[str, nn.Module] = dict(root.named_modules())
    watches = {name: Watch(module) for name, module in modules.items() if name}
    as_it_is: dict[str, str] = {}
    graph = fx.Graph()
    while True:
        tracer = _Tracer(as_it_is)
        failed: dict[str, str] = {}
        with _random_states_kept() as drew:
            try:
                with inference(model), warnings.catch_warnings(), _gradients_as_written():
                    warnings.simplefilter("ignore")
                    graph = tracer.trace(root)
            except Exception as error:  # whatever a foreign forward raises when it is given proxies
                first = str(error).strip().partition("\n")[0]
                failed[tracer.failed or _ROOT] = f"its forward cannot be traced: {type(error).__name__}: {first}"
        if drew:
            failed = {_ROOT: "its forward draws random numbers in Python"}
        for name, watch in watches.items():
            if watch.changed():
                watch.restore()
                failed.setdefault(name, "its forward changes its attributes")
        tensors = dict(root.named_parameters()) | dict(root.named_buffers())
        if any(node.op == "get_attr" and node.target not in tensors for node in graph.nodes):
            failed.setdefault(_ROOT, "its forward uses something that is no parameter or buffer")
        if not failed or _ROOT in as_it_is:
            break
        if any(name in as_it_is for name in failed):  # that did not help
            failed = {_ROOT: next(iter(failed.values()))}
        as_it_is.update(failed)
    followed = [watch for name, watch in watches.items() if not any(_within(name, other) for other in as_it_is)]
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    as_it_is = {name: why for name, why in as_it_is.items() if name in called}
    return _Trace(graph, modules, tensors, as_it_is, followed)


def _within(name: str, other: str) -> bool:
    return name == other or name.startswith(other + ".")


@contextmanager
def _random_states_kept() -> Iterator[list[bool]]:
    """Put the global random states back; the list given is no longer empty if any was drawn from."""
    numpy = sys.modules.get("numpy")
    of_torch, of_python = torch.get_rng_state(), random.getstate()
    of_numpy = None if numpy is None else numpy.random.get_state(legacy=False)
    drew: list[bool] = []
    try:
        yield drew
    finally:
        if not torch.equal(torch.get_rng_state(), of_torch):
            torch.set_rng_state(of_torch)
            drew.append(True)
        if random.getstate() != of_python:
            random.setstate(of_python)
            drew.append(True)
        if numpy is not None and not _same_draws(numpy.random.get_state(legacy=False), of_numpy):
            numpy.random.set_state(of_numpy)
            drew.append(True)


@contextmanager
def _gradients_as_written() -> Iterator[None]:
    """Refuse what a trace would lose: a backward of the user's own, and gradients that are switched off or on."""

    def refuse(what: str) -> Callable[..., Any]:
        def refused(*arguments: Any, **named: Any) -> Any:
            raise TraceError(f"it {what}")

        return refused

    own = torch.autograd.Function
    switches = (torch.no_grad, torch.enable_grad, torch.inference_mode)
    apply = own.__dict__["apply"]
    enters = [switch.__dict__["__enter__"] for switch in switches]
    start = torch.set_grad_enabled.__init__
    try:
        own.apply = classmethod(refuse("has a backward of its own, an autograd.Function"))  # pyright: ignore[reportAttributeAccessIssue]
        for switch in switches:
            switch.__enter__ = refuse(f"uses {switch.__name__}")
        torch.set_grad_enabled.__init__ = refuse("uses set_grad_enabled")
        yield
    finally:
        own.apply = apply
        for switch, enter in zip(switches, enters, strict=True):
            switch.__enter__ = enter
        torch.set_grad_enabled.__init__ = start


def _same_draws(now: Any, was: Any) -> bool:
    if isinstance(now, dict):
        return now.keys() == was.keys() and all(_same_draws(now[key], was[key]) for key in now)
    return now.tobytes() == was.tobytes() if hasattr(now, "tobytes") else now == was


def _any_layout(trace: _Trace) -> bool:
    """Tell whether the graph surely gives the same result where tensors are laid out channels-last."""
    if trace.as_it_is or overwrites_views(trace.graph, trace.modules):
        return False
    return not any(
        (node.op == "call_method" and node.target in _LAYOUT_METHODS)
        or (node.op == "call_function" and node.target in _LAYOUT_FUNCTIONS)
        for node in trace.graph.nodes
    )


# -- rewriting -----------------------------------------------------------------------------------------------------

_RELUS = (functional.relu, torch.relu)
_ADDITIONS = (operator.add, torch.add)


class _Rewriting:
    """Gives every node that reads the model a part of its own: a folded layer, a multiply-add, a copy, or an `AsItIs`."""

    def __init__(self, trace: _Trace, *, channels_last: bool) -> None:
        self.trace = trace
        self.parts: dict[str, nn.Module | Tensor] = {}
        self.names: dict[tuple[int, ...], str] = {}  # by the modules, or the tensor, that a part stands for
        self.made = Plan(watches=trace.watches, channels_last=channels_last)

    def plan(self) -> Plan:
        graph = self.trace.graph
        for node in list(graph.nodes):
            if node.op == "get_attr":
                tensor = self.trace.tensors[node.target]
                node.target = self.part(partial(self.copy, tensor), tensor)
            elif node.op == "call_module":
                self.rewrite(node)
        for node in list(graph.nodes):
            self.overwrite(node)
        if self.made.channels_last:
            keep_layout(graph, self.parts, (Folded, MultiplyAdd))
        self.made.run = fx.GraphModule(self.parts, graph, "Crafting")
        return self.made

    def part(self, make: Callable[[], nn.Module | Tensor], *of: object) -> str:
        """Return the name of the one part that stands for `of`."""
        key = tuple(id(thing) for thing in of)
        if key not in self.names:
            self.names[key] = f"part{len(self.names)}"
            self.parts[self.names[key]] = make()
        return self.names[key]

    def rewrite(self, node: fx.Node) -> None:
        name = str(node.target)
        module = self.trace.modules[name]
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        norm = self.norm_after(node)
        if norm is not None:
            layer, bn = module, self.trace.modules[str(norm.target)]
            node.target = self.part(partial(self.fold, layer, bn), layer, bn)
            norm.replace_all_uses_with(node)
            self.trace.graph.erase_node(norm)
        elif self.free(name) and source is not None and is_affine(module):
            node.target = self.part(partial(self.fuse, module), module)
        else:
            node.target = self.part(partial(self.keep, name, module), module)

    def free(self, name: str) -> bool:
        return name not in self.trace.as_it_is

    def norm_after(self, node: fx.Node) -> fx.Node | None:
        """Return the node of a norm layer that can be folded into the layer of `node`, if there is one."""
        if len(node.users) != 1 or len(node.args) != 1 or node.kwargs or not self.free(str(node.target)):
            return None
        (user,) = node.users
        if user.op != "call_module" or user.args != (node,) or user.kwargs or not self.free(str(user.target)):
            return None
        fits = foldable(self.trace.modules[str(node.target)], self.trace.modules[str(user.target)])
        return user if fits else None

    def fold(self, layer: nn.Module, norm: nn.Module) -> nn.Module:
        folded = Folded(layer, norm, channels_last=self.made.channels_last)
        self.made.folded.append(folded)
        return folded

    def fuse(self, norm: nn.Module) -> nn.Module:
        fused = MultiplyAdd(norm)
        self.made.fused.append(fused)
        return fused

    def keep(self, name: str, module: nn.Module) -> nn.Module:
        double = duplicate(module, channels_last=self.made.channels_last) if self.free(name) else None
        if double is None:
            self.made.as_it_is[name[len(_ROOT) + 1 :]] = self.trace.as_it_is.get(name, _OPAQUE)
            return AsItIs(module)
        for kind in ("_parameters", "_buffers"):
            own = getattr(double, kind)
            pairs = [(tensor, own[key]) for key, tensor in getattr(module, kind).items() if tensor is not None]
            self.made.copies.extend(pairs)
        return double

    def copy(self, tensor: Tensor) -> Tensor:
        own = tensor.detach().clone()
        self.made.copies.append((tensor, own))
        return own

    def overwrite(self, node: fx.Node) -> None:
        """Let a ReLU overwrite its operand, where that is a new tensor which nothing else reads, autograd included."""
        called = self.parts.get(str(node.target)) if node.op == "call_module" else None
        relu = type(called) is nn.ReLU or node.target in _RELUS or (node.op == "call_method" and node.target == "relu")
        operand = node.args[0] if node.args else None
        if not relu or not isinstance(operand, fx.Node) or len(operand.users) != 1:
            return
        if self.is_new(operand):
            node.op, node.target, node.args, node.kwargs = "call_function", torch.relu_, (operand,), {}

    def is_new(self, node: fx.Node) -> bool:
        """Tell whether the result of `node` is a tensor that nothing but its users holds, and no backward needs."""
        if node.op == "call_module":
            return isinstance(self.parts[str(node.target)], Folded | MultiplyAdd)
        if node.op != "call_function" or node.kwargs:
            return False
        first = node.args[0] if node.args else None
        if node.target is operator.iadd:
            return isinstance(first, fx.Node) and len(first.users) == 1 and self.is_new(first)
        return node.target in _ADDITIONS
