"""Keeping gradients channels-last: operations whose backward gives another layout get one that does not.

A gradient that is laid out unlike the activations makes every ReLU and addition that it meets read memory across the grain,
at five to twenty times the cost, until the next convolution puts it right. On a ResNet-20 in bfloat16 that was a tenth of PGD.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from robustlayers.models.slicing import layout_of, subsample

__all__ = ["keep_layout", "overwrites_views"]

# What keeps the layout of a gradient, or takes it in any layout and gives it on channels-last.
_KEEPING_FUNCTIONS = {torch.relu_, torch.relu, functional.relu, operator.add, operator.iadd, torch.add}
_IN_PLACE = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "setitem"}
_VIEWS = re.compile(
    "getitem|flatten|reshape|reshape_as|unflatten|ravel|transpose|permute|movedim|swapaxes|swapdims|t|T|mT|chunk|split|"
    "tensor_split|unbind|narrow|select|squeeze|unsqueeze|expand|expand_as|contiguous|diagonal|unfold|detach|subsample"
)
_KEEPING_MODULES = (nn.Conv2d, nn.ReLU, nn.Identity, nn.MaxPool2d)


class _Laid(torch.autograd.Function):
    """The identity, whose gradient has the layout of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.layout = layout_of(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous(memory_format=ctx.layout)


def _laid(x: Tensor) -> Tensor:
    return _Laid.apply(x) if x.dim() == 4 else x  # pyright: ignore[reportReturnType]


def in_place(node: fx.Node, modules: Mapping[str, Any]) -> bool:
    """Tell whether an operation writes to its operand."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    return _name(node).endswith("_") or _name(node) in _IN_PLACE or bool(node.kwargs.get("inplace", False))


def overwrites_views(graph: fx.Graph, modules: Mapping[str, Any]) -> bool:
    """Tell whether something is written to that shares, or may share, memory with a view.

    Whether `flatten` or `reshape` makes a view depends on the layout, and so who sees what is written.
    """

    def views(node: fx.Node) -> bool:
        return _VIEWS.fullmatch(_name(node)) is not None or (
            node.op == "call_module" and isinstance(modules[str(node.target)], nn.Flatten)
        )

    for node in graph.nodes:
        if node.op in ("call_function", "call_method", "call_module") and in_place(node, modules):
            operand = node.args[0] if node.args else None
            if not isinstance(operand, fx.Node) or views(operand) or any(map(views, operand.users)):
                return True
    return False


def _name(node: fx.Node) -> str:
    if node.op == "call_module":
        return ""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def keep_layout(graph: fx.Graph, parts: Mapping[str, Any], keeping: tuple[type[nn.Module], ...]) -> None:
    """Rewrite a graph that runs channels-last: strided slices as one operation, the layout put right before what loses it.

    `parts`: the modules that the graph calls by name; `keeping`: kinds of them, beside torch's, that keep the layout.
    """

    def keeps(node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(parts[str(node.target)], (*_KEEPING_MODULES, *keeping))
        if node.op == "call_method":
            return node.target in ("relu", "relu_")
        return node.op == "call_function" and node.target in (*_KEEPING_FUNCTIONS, subsample)

    for node in list(graph.nodes):
        steps = _strides(node)
        if steps is not None and not any(in_place(user, parts) for user in node.users):
            node.target, node.args = subsample, (node.args[0], *steps)
    for node in list(graph.nodes):
        # The result of such an operation alone: what follows it has no images' layout to lose.
        if not keeps(node) or node.target is subsample:
            continue
        losing = [user for user in node.users if user.op != "output" and not keeps(user)]
        if losing and not any(in_place(user, parts) for user in losing):
            with graph.inserting_after(node):
                laid = graph.call_function(_laid, (node,))
            for user in losing:
                user.replace_input_with(node, laid)


def _strides(node: fx.Node) -> tuple[int, int] | None:
    """Return (a, b) of x[:, :, ::a, ::b], None for anything else."""
    if node.op != "call_function" or node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return None
    index = node.args[1]
    if len(index) != 4 or not all(isinstance(one, slice) and one.start is None and one.stop is None for one in index):
        return None
    n, c, a, b = (one.step for one in index)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    whole = (None, 1)
    if n not in whole or c not in whole or not all(isinstance(step, int) and step > 0 for step in (a, b)):
        return None
    return a, b  # pyright: ignore[reportReturnType]
