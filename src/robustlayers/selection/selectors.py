"""What each word of a selector means: keywords, functions, exact names and globs, resolved on one model.

Nothing is matched by substring. Precedence: a keyword wins over a module of the same name; quote the name to mean the
module. Without wild cards a name is a tensor's or a module's exact name (a module stands for all its tensors).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable

from torch import Tensor, nn

from robustlayers.core.errors import UserError, one_of
from robustlayers.selection.arguments import Arguments
from robustlayers.selection.grammar import Binary, Call, Name, Node, Not, Number, parse
from robustlayers.selection.inventory import Entry, Inventory, is_norm
from robustlayers.selection.layout import layout_of
from robustlayers.selection.order import order_of
from robustlayers.selection.ordered import after, before, depth, first, last, unused
from robustlayers.selection.partial import channels, random_channels, random_entries
from robustlayers.selection.scores import bottom, top
from robustlayers.selection.selection import Selection

__all__ = ["FUNCTIONS", "KEYWORDS", "resolve", "select"]


def select(model: nn.Module, selector: str, example: Tensor | None = None) -> list[str]:
    """Return the names of the tensors (parameters and buffers) that `selector` picks from `model`.

    Selectors of execution order, such as `before("layer2")`, run the model once, on `example` if one is given (see
    `execution_order`).

    Raises `UserError` for a syntax error, an unknown name (with the nearest ones) and an empty selection.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    >>> select(net, "norm.weight | linear.bias")
    ['1.weight', '3.bias']
    """
    inventory = Inventory(model)
    if example is not None:
        order_of(inventory, example)
    return list(resolve(inventory, selector))


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
    "unused": unused,
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


def _stage(arguments: Arguments) -> Selection:
    index = arguments.whole_number(arguments.bind("i"), "i", 1)
    return _modules(arguments.inventory, _stages(arguments.inventory, index), f"stage {index}")


def _block(arguments: Arguments) -> Selection:
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


def _type(arguments: Arguments) -> Selection:
    """`type(BatchNorm2d)`: all tensors of modules of a class of that name, or of a subclass of it."""
    node = arguments.bind("name").get("name")
    if not isinstance(node, Name):
        raise UserError("selector function 'type' needs the name of a class, as in type(BatchNorm2d)")
    modules = arguments.inventory.modules()
    found = tuple(
        f"{name}." if name else ""  # the model itself is the module without a name
        for name, module in modules.items()
        if any(parent.__name__ == node.text for parent in type(module).__mro__)
    )
    if not found:
        raise UserError(one_of("module type", node.text, {type(module).__name__ for module in modules.values()}))
    return Selection(
        arguments.inventory,
        [entry.name for entry in arguments.inventory if any(alias.startswith(found) for alias in entry.names)],
    )


def _regex(arguments: Arguments) -> Selection:
    r"""`regex("layer[12]\..*")`: tensors, and modules with all their tensors, whose whole name the expression matches."""
    node = arguments.bind("expression").get("expression")
    if not isinstance(node, Name) or not node.quoted:
        raise UserError(r"selector function 'regex' needs a quoted expression, as in regex('layer[12]\..*')")
    try:
        matches = re.compile(node.text).fullmatch
    except re.error as error:
        raise UserError(f"selector function 'regex': {node.text!r} is no regular expression: {error}") from None
    return _matching(arguments.inventory, matches, f"regular expression {node.text!r}")


FUNCTIONS: dict[str, Callable[[Arguments], Selection]] = {
    "stage": _stage,
    "block": _block,
    "type": _type,
    "random": random_entries,
    "random_channels": random_channels,
    "channels": channels,
    "before": before,
    "after": after,
    "first": first,
    "last": last,
    "depth": depth,
    "regex": _regex,
    "top": top,
    "bottom": bottom,
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
        return FUNCTIONS[node.name](Arguments(node, inventory, _evaluate, KEYWORDS))
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
    known = [name for name in modules if name] + list(inventory.canonical)
    if node.quoted:
        raise UserError(one_of("module or tensor", node.text, known))
    known += [*KEYWORDS, *(f"{k}.{p}" for k in ("norm", "conv", "linear") for p in _PARTS), "rest"]
    raise UserError(one_of("selector", node.text, known))


def _glob(pattern: str, inventory: Inventory) -> Selection:
    return _matching(inventory, lambda name: fnmatch.fnmatchcase(name, pattern), f"selector {pattern!r}")


def _matching(inventory: Inventory, matches: Callable[[str], object], what: str) -> Selection:
    modules = tuple(f"{name}." for name in inventory.modules() if name and matches(name))
    names = [
        entry.name for entry in inventory if any(matches(alias) or alias.startswith(modules) for alias in entry.names)
    ]
    if not names:
        raise UserError(f"{what} matches no tensor and no module")
    return Selection(inventory, names)
