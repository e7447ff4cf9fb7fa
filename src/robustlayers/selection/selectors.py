"""What each word of a selector means: keywords, functions, exact names and globs, resolved on one model.

Nothing is matched by substring. Precedence: a keyword wins over a module of the same name; quote the name to mean the
module. Without wild cards a name is a tensor's or a module's exact name (a module stands for all its tensors).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from robustlayers.core.errors import UserError, one_of
from robustlayers.core.random import stream
from robustlayers.selection.grammar import Binary, Call, Name, Node, Not, Number, parse
from robustlayers.selection.inventory import Entry, Inventory, is_norm
from robustlayers.selection.layout import layout_of
from robustlayers.selection.selection import Selection

__all__ = ["FUNCTIONS", "KEYWORDS", "resolve", "select"]


def select(model: nn.Module, selector: str) -> list[str]:
    """Return the names of the tensors (parameters and buffers) that `selector` picks from `model`.

    Raises `UserError` for a syntax error, an unknown name (with the nearest ones) and an empty selection.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    >>> select(net, "norm.weight | linear.bias")
    ['1.weight', '3.bias']
    """
    return list(resolve(Inventory(model), selector))


def resolve(inventory: Inventory, selector: str) -> Selection:
    """Return the selection that `selector` makes on a model; empty ones raise `UserError`."""
    selection = _evaluate(parse(selector), inventory)
    if not selection:
        raise UserError(f"selector {selector!r} picks nothing from {type(inventory.model).__name__}")
    return selection


def _by_module(test: Callable[[nn.Module], bool]) -> Callable[[Inventory], Selection]:
    def pick(inventory: Inventory) -> Selection:
        # A tied tensor belongs to every module that holds it.
        return Selection(inventory, [entry.name for entry in inventory if any(map(test, entry.owners))])

    return pick


_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


def _bias(inventory: Inventory) -> Selection:
    return Selection(inventory, [entry.name for entry in inventory if not entry.buffer and entry.attribute == "bias"])


def _stem(inventory: Inventory) -> Selection:
    return _modules(inventory, layout_of(inventory).stem, "stem")


def _head(inventory: Inventory) -> Selection:
    return _modules(inventory, layout_of(inventory).head, "head")


def _shortcut(inventory: Inventory) -> Selection:
    names = [
        name
        for name in inventory.modules()
        if name.rpartition(".")[2] in ("shortcut", "downsample", "skip", "convShortcut")
    ]
    return _modules(inventory, tuple(names), "shortcut with tensors of its own")


KEYWORDS: dict[str, Callable[[Inventory], Selection]] = {
    "all": lambda inventory: Selection(inventory, list(inventory.entries)),
    "norm": _by_module(is_norm),
    "batchnorm": _by_module(lambda module: isinstance(module, _BATCH_NORMS)),
    "conv": _by_module(lambda module: isinstance(module, _CONVOLUTIONS)),
    "linear": _by_module(lambda module: isinstance(module, nn.Linear)),
    "bias": _bias,
    "stem": _stem,
    "head": _head,
    "shortcut": _shortcut,
}

_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})


def _is_statistics(entry: Entry) -> bool:
    return entry.buffer and (entry.attribute in _STATISTICS or any(map(is_norm, entry.owners)))


# `norm.weight` and the like: a part of the tensors that a keyword picks.
_PARTS: dict[str, Callable[[Entry], bool]] = {
    "weight": lambda entry: not entry.buffer and entry.attribute == "weight",
    "bias": lambda entry: not entry.buffer and entry.attribute == "bias",
    "affine": lambda entry: not entry.buffer and entry.attribute in ("weight", "bias"),
    "statistics": _is_statistics,
}
_PARTS["scale"] = _PARTS["weight"]
_PARTS["shift"] = _PARTS["bias"]


def _modules(inventory: Inventory, prefixes: tuple[str, ...], what: str) -> Selection:
    names = [
        entry.name
        for entry in inventory
        if any(alias.startswith(f"{prefix}.") for alias in entry.names for prefix in prefixes)
    ]
    if not names:
        raise UserError(
            f"{type(inventory.model).__name__} has no {what} that can be seen; name its modules or use a glob"
        )
    return Selection(inventory, names)


@dataclass(frozen=True)
class _Arguments:
    """The arguments of a call, with the checks that every function needs."""

    call: Call
    inventory: Inventory

    def bind(self, *positional: str, named: tuple[str, ...] = ()) -> dict[str, Node]:
        names = (*positional, *named)
        if len(self.call.positional) > len(positional):
            raise UserError(f"selector function {self.call.name!r} takes {', '.join(names)}")
        bound = dict(zip(positional, self.call.positional, strict=False))
        for key, node in self.call.named:
            if key not in names:
                raise UserError(one_of(f"argument of {self.call.name}()", key, names))
            if key in bound:
                raise UserError(f"selector function {self.call.name!r}: {key!r} is given twice")
            bound[key] = node
        return bound

    def whole_number(self, bound: dict[str, Node], key: str, least: int, default: int | None = None) -> int:
        if key not in bound:
            if default is None:
                raise UserError(f"selector function {self.call.name!r} needs {key}")
            return default
        node = bound[key]
        if not isinstance(node, Number) or node.value != int(node.value) or node.value < least:
            raise UserError(f"selector function {self.call.name!r}: {key} must be a whole number of at least {least}")
        return int(node.value)


def _stage(arguments: _Arguments) -> Selection:
    index = arguments.whole_number(arguments.bind("i"), "i", 1)
    return _modules(arguments.inventory, _stages(arguments.inventory, index), f"stage {index}")


def _block(arguments: _Arguments) -> Selection:
    bound = arguments.bind("stage", "block")
    stage = arguments.whole_number(bound, "stage", 1)
    block = arguments.whole_number(bound, "block", 1)
    modules = arguments.inventory.modules()
    blocks = [
        f"{prefix}.{child}"
        for prefix in _stages(arguments.inventory, stage)
        for child, _ in modules[prefix].named_children()
        if child.isdigit()
    ]
    if block > len(blocks):
        raise UserError(f"stage {stage} has {len(blocks)} block(s), not {block}")
    return _modules(arguments.inventory, (blocks[block - 1],), f"block ({stage}, {block})")


def _stages(inventory: Inventory, index: int) -> tuple[str, ...]:
    stages = layout_of(inventory).stages
    if index > len(stages):
        raise UserError(f"{type(inventory.model).__name__} has {len(stages)} stage(s), not {index}")
    return stages[index - 1]


def _type(arguments: _Arguments) -> Selection:
    """`type(BatchNorm2d)`: modules of a class of that name, or of a subclass of it."""
    node = arguments.bind("name").get("name")
    if not isinstance(node, Name):
        raise UserError("selector function 'type' needs the name of a class, as in type(BatchNorm2d)")
    names = [
        entry.name
        for entry in arguments.inventory
        if any(parent.__name__ == node.text for owner in entry.owners for parent in type(owner).__mro__)
    ]
    if not names:
        classes = {type(owner).__name__ for entry in arguments.inventory for owner in entry.owners}
        raise UserError(one_of("module type", node.text, classes))
    return Selection(arguments.inventory, names)


def _random(arguments: _Arguments) -> Selection:
    """`random(like=S, of=T, seed=0)`: as many parameter entries as S has, scattered uniformly over the parameters of T.

    T is every parameter outside of S unless given. The draw depends on the seed and the number of entries to draw from
    only. The control of Frankle et al. 2021 (section 5) for "is it the norm layers or just so many parameters".
    """
    bound = arguments.bind(named=("like", "of", "seed"))
    if "like" not in bound:
        raise UserError("selector function 'random' needs like=SELECTOR, as in random(like=norm, seed=0)")
    inventory = arguments.inventory
    like = _evaluate(bound["like"], inventory)
    seed = arguments.whole_number(bound, "seed", 0, default=0)
    pool = _evaluate(bound["of"], inventory) if "of" in bound else ~like
    pool = Selection(inventory, {name: mask for name, mask in pool.parts.items() if not inventory.entries[name].buffer})
    count, available = like.parameters, pool.parameters
    if count == 0:
        raise UserError("selector function 'random': like= picks no parameters")
    if count > available:
        raise UserError(f"selector function 'random': {count} entries wanted, only {available} to draw from")
    order = torch.randperm(available, generator=stream(seed, "random-selector"))
    drawn = torch.zeros(available, dtype=torch.bool)
    drawn[order[:count]] = True
    parts: dict[str, torch.Tensor | None] = {}
    start = 0
    for name, mask in pool.parts.items():
        shape = inventory.entries[name].tensor.shape
        size = pool.count(name)
        taken = drawn[start : start + size]
        start += size
        full = torch.zeros(shape.numel(), dtype=torch.bool)
        if mask is None:
            full[:] = taken
        else:
            full[mask.flatten()] = taken
        parts[name] = full.view(shape)
    return Selection(inventory, parts)


FUNCTIONS: dict[str, Callable[[_Arguments], Selection]] = {
    "stage": _stage,
    "block": _block,
    "type": _type,
    "random": _random,
}


def _evaluate(node: Node, inventory: Inventory) -> Selection:
    if isinstance(node, Not):
        return ~_evaluate(node.operand, inventory)
    if isinstance(node, Binary):
        left, right = _evaluate(node.left, inventory), _evaluate(node.right, inventory)
        return {"|": left.__or__, "&": left.__and__, "-": left.__sub__}[node.operator](right)
    if isinstance(node, Call):
        if node.name not in FUNCTIONS:
            raise UserError(one_of("selector function", node.name, FUNCTIONS))
        return FUNCTIONS[node.name](_Arguments(node, inventory))
    if isinstance(node, Number):
        raise UserError(f"{node.value:g} is not a selector")
    return _named(node, inventory)


def _named(node: Name, inventory: Inventory) -> Selection:
    if not node.quoted:
        if node.text in KEYWORDS:
            return KEYWORDS[node.text](inventory)
        word, _, part = node.text.partition(".")
        if word in KEYWORDS and part in _PARTS:
            whole = KEYWORDS[word](inventory)
            return Selection(inventory, {n: m for n, m in whole.parts.items() if _PARTS[part](inventory.entries[n])})
        if any(mark in node.text for mark in "*?["):
            return _glob(node.text, inventory)
    if node.text in inventory.canonical:
        return Selection(inventory, [inventory.canonical[node.text]])
    modules = inventory.modules()
    if node.text in modules and node.text:
        names = [e.name for e in inventory if any(alias.startswith(f"{node.text}.") for alias in e.names)]
        if names:
            return Selection(inventory, names)
        raise UserError(f"module {node.text!r} has no tensors to select")
    if node.text == "rest":
        raise UserError("'rest' stands alone, as the last group of a partition")
    known = [*KEYWORDS, *(f"{k}.{p}" for k in ("norm", "conv", "linear") for p in _PARTS), "rest"]
    known += [name for name in modules if name] + list(inventory.canonical)
    raise UserError(one_of("selector", node.text, known))


def _glob(pattern: str, inventory: Inventory) -> Selection:
    modules = [name for name in inventory.modules() if name and fnmatch.fnmatchcase(name, pattern)]
    names = [
        entry.name
        for entry in inventory
        if any(
            fnmatch.fnmatchcase(alias, pattern) or any(alias.startswith(f"{module}.") for module in modules)
            for alias in entry.names
        )
    ]
    if not names:
        raise UserError(f"selector {pattern!r} matches no tensor and no module")
    return Selection(inventory, names)
