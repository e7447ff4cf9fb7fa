"""The arguments of a selector function, with the checks that every function needs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from robustlayers.core.errors import UserError, one_of
from robustlayers.core.quantities import number
from robustlayers.selection.grammar import Call, Name, Node, Number
from robustlayers.selection.inventory import Inventory
from robustlayers.selection.selection import Selection

__all__ = ["Arguments"]


@dataclass(frozen=True)
class Arguments:
    """A call as it stands in a selector, the model that it is about, and how to evaluate selectors inside of it."""

    call: Call
    inventory: Inventory
    evaluate: Callable[[Node, Inventory], Selection]
    keywords: Collection[str]

    def bind(self, *positional: str, named: tuple[str, ...] = ()) -> dict[str, Node]:
        """Return the arguments by name; `UserError` for one too many, an unknown name, or one given twice."""
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
        """Return a whole number of at least `least`; without a default it must be given."""
        if key not in bound:
            if default is None:
                raise UserError(f"selector function {self.call.name!r} needs {key}")
            return default
        node = bound[key]
        if not isinstance(node, Number) or node.value != int(node.value) or node.value < least:
            raise UserError(f"selector function {self.call.name!r}: {key} must be a whole number of at least {least}")
        return int(node.value)

    def fraction(self, bound: dict[str, Node], key: str) -> float:
        """Return a number from 0 to 1, written as `0.25` or `"1/3"`."""
        if key not in bound:
            raise UserError(f"selector function {self.call.name!r} needs {key}")
        node = bound[key]
        value = -1.0
        if isinstance(node, Number):
            value = node.value
        elif isinstance(node, Name) and node.quoted:
            value = number(node.text, f"selector function {self.call.name!r}: {key}")
        if not 0 <= value <= 1:
            raise UserError(f'selector function {self.call.name!r}: {key} must be from 0 to 1, as in 0.25 or "1/3"')
        return value

    def selection(self, bound: dict[str, Node], key: str, example: str) -> Selection:
        """Return what an inner selector picks; `example` is the call that a message about its absence shows."""
        if key not in bound:
            raise UserError(f"selector function {self.call.name!r} needs {key}, as in {example}")
        return self.evaluate(bound[key], self.inventory)

    def named_module(self, node: Node) -> str | None:
        """Return the name of the module that `node` names, if it does: quoted, or not hidden by a keyword."""
        if not isinstance(node, Name) or not (node.quoted or node.text not in self.keywords):
            return None
        return node.text if node.text and node.text in self.inventory.modules() else None
