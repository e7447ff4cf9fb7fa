"""Selector functions of execution order: `before`, `after`, `first`, `last`, `depth`, and the keyword `unused`.

They pick whole modules: each tensor that a module owns itself, parameter or buffer. A tensor that several modules own, and
a module that is used twice, stand where they are used first. What never runs is picked by none of them but `unused`.
"""

from __future__ import annotations

from collections.abc import Callable

from robustlayers.core.errors import UserError
from robustlayers.selection.arguments import Arguments
from robustlayers.selection.grammar import Name, Node, Number
from robustlayers.selection.inventory import Inventory
from robustlayers.selection.order import ExecutionOrder, order_of
from robustlayers.selection.selection import Selection

__all__ = ["after", "before", "depth", "first", "last", "unused"]


def before(arguments: Arguments) -> Selection:
    """`before(x)`: every tensor of the modules that run before `x`; `x` itself is not in.

    `x` is the name of a module or a tensor, or a selector, of which the tensor that is used first counts. The early part
    of the cuts of Bakiskan, Cekic and Madhow 2022, there in the order of registration.
    """
    order, cut = _cut(arguments)
    return _where(arguments.inventory, order, lambda start: start < cut)


def after(arguments: Arguments) -> Selection:
    """`after(x)`: `x` and every tensor of the modules that run after it: all that runs and is not in `before(x)`."""
    order, cut = _cut(arguments)
    return _where(arguments.inventory, order, lambda start: start >= cut)


def first(arguments: Arguments) -> Selection:
    """`first(n, of=S)`: the first `n` modules with parameters; with `of`, the first `n` of them with a tensor in S."""
    bound, counted = _counted(arguments, "n")
    return _held(arguments, counted[: _how_many(arguments, bound, counted)])


def last(arguments: Arguments) -> Selection:
    """`last(n, of=S)`: the last `n` modules with parameters; with `of`, the last `n` of them with a tensor in S."""
    bound, counted = _counted(arguments, "n")
    return _held(arguments, counted[-_how_many(arguments, bound, counted) :])


def depth(arguments: Arguments) -> Selection:
    """`depth(a, b, of=S)`: the modules with parameters at a fraction of the depth in [a, b), for 0 <= a < b <= 1.

    The fraction of the i-th of N such modules, counted from 0, is i / N: `depth(0, 0.5)` and `depth(0.5, 1)` together are
    `depth(0, 1)`, which is all of them. With `of`, only modules with a tensor in S are counted.
    """
    bound, counted = _counted(arguments, "a", "b")
    low, high = arguments.fraction(bound, "a"), arguments.fraction(bound, "b")
    if low >= high:
        raise UserError(f"selector function 'depth': a must be less than b, got {low:g} and {high:g}")
    chosen = [name for index, name in enumerate(counted) if low <= index / len(counted) < high]
    if not chosen:
        raise UserError(
            f"depth({low:g}, {high:g}) holds no module; {len(counted)} are counted, one every {1 / len(counted):.3g}"
        )
    return _held(arguments, chosen)


def unused(inventory: Inventory) -> Selection:
    """`unused`: the tensors of modules that never run."""
    order = order_of(inventory)
    return Selection(inventory, [entry.name for entry in inventory if entry.name not in order.holders])


def _where(inventory: Inventory, order: ExecutionOrder, test: Callable[[int], bool]) -> Selection:
    starts = {entry.name: order.start_of(entry.name) for entry in inventory}
    return Selection(inventory, [name for name, start in starts.items() if start is not None and test(start)])


def _cut(arguments: Arguments) -> tuple[ExecutionOrder, int]:
    """Return the order, and when the module, tensor or selection that is the argument first runs."""
    function = arguments.call.name
    bound = arguments.bind("x")
    if "x" not in bound:
        raise UserError(
            f'selector function {function!r} needs a module, a tensor or a selector, as in {function}("conv1")'
        )
    node = bound["x"]
    if isinstance(node, Number):
        raise UserError(
            f'selector function {function!r}: quote the name of a module, as in {function}("{node.value:g}")'
        )
    inventory = arguments.inventory
    module = arguments.named_module(node)
    # What is picked is known before the model is run, so that a misspelled name is told at once.
    tensors = [] if module is not None else list(arguments.evaluate(node, inventory))
    order = order_of(inventory)
    if module is not None and module in order.starts:
        return order, order.starts[module]
    if module is not None:  # a container whose forward is never called, as a list of blocks
        starts = [start for name, start in order.starts.items() if name.startswith(f"{module}.")]
    else:
        starts = [start for name in tensors if (start := order.start_of(name)) is not None]
    if not starts:
        what = f"{node.text!r}" if isinstance(node, Name) else "its argument"
        raise UserError(
            f"selector function {function!r}: {what} never runs in a forward of {type(inventory.model).__name__}, "
            "so nothing comes before or after it"
        )
    return order, min(starts)


def _counted(arguments: Arguments, *positional: str) -> tuple[dict[str, Node], list[str]]:
    """Return the arguments, and the modules that hold a parameter, and a tensor of `of`, in execution order."""
    bound = arguments.bind(*positional, named=("of",))
    inventory = arguments.inventory
    wanted = arguments.evaluate(bound["of"], inventory) if "of" in bound else None
    order = order_of(inventory)
    owners = {order.holders[e.name] for e in inventory if not e.buffer and e.name in order.holders}
    if wanted is not None:
        owners &= {order.holders[name] for name in wanted if name in order.holders}
    counted = [name for name in order.modules if name in owners]
    if not counted:
        raise UserError(f"selector function {arguments.call.name!r}: of= picks no module that has parameters and runs")
    return bound, counted


def _how_many(arguments: Arguments, bound: dict[str, Node], counted: list[str]) -> int:
    count = arguments.whole_number(bound, "n", 1)
    if count > len(counted):
        which = "such modules" if "of" in bound else "modules with parameters"
        raise UserError(f"{type(arguments.inventory.model).__name__} has {len(counted)} {which} that run, not {count}")
    return count


def _held(arguments: Arguments, modules: list[str]) -> Selection:
    inventory, order, chosen = arguments.inventory, order_of(arguments.inventory), set(modules)
    return Selection(inventory, [entry.name for entry in inventory if order.holders.get(entry.name) in chosen])
