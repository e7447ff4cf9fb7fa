"""Noticing cheaply that a module is no longer what it was when it was traced: an attribute, a tensor, a child, a hook."""

from __future__ import annotations

import operator
from typing import Any

from torch import nn

from robustlayers.normalization.fold_layers import is_plain

__all__ = ["Watch"]

_CONTENTS = ("_parameters", "_buffers", "_modules")
# Everything that a bare module keeps in dictionaries and sets, hooks included.
_CONTAINERS = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set))


class Watch:
    """One module and what its forward may depend on, apart from the values of its tensors.

    That is which parameters, buffers and children it has, its plain attributes (with the contents of lists, dictionaries
    and sets), and whether it has hooks. Its mode is left out: a crafting forward is always in evaluation mode.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._attributes = dict(vars(module))
        self._mutable = {
            name: type(value)(value)
            for name, value in self._attributes.items()
            if type(value) in (list, dict, set) and name not in _CONTAINERS
        }
        self._contents = [(self._attributes[name], dict(self._attributes[name])) for name in _CONTENTS]
        self._plain = is_plain(module)

    def changed(self) -> bool:
        """Tell whether the module differs from what it was; a comparison that fails counts as a difference."""
        try:
            if vars(self.module) != self._attributes and not self._same_but_mode():
                return True
            if any(self._attributes[name] != value for name, value in self._mutable.items()):
                return True
        except Exception:
            return True
        return is_plain(self.module) != self._plain or not all(_same(now, was) for now, was in self._contents)

    def restore(self) -> None:
        """Put attributes and contents back, in the same objects."""
        vars(self.module).update(self._attributes)
        for name in [name for name in vars(self.module) if name not in self._attributes]:
            del vars(self.module)[name]
        for now, was in self._contents:
            if not _same(now, was):
                now.clear()
                now.update(was)
        for name, was in self._mutable.items():
            now = self._attributes[name]
            if isinstance(now, list):
                now[:] = was
            else:
                now.clear()
                now.update(was)

    def _same_but_mode(self) -> bool:
        now = vars(self.module)
        if {**now, "training": self._attributes["training"]} != self._attributes:
            return False
        self._attributes["training"] = now["training"]  # the next comparison is quick again
        return True


def _same(now: dict[str, Any], was: dict[str, Any]) -> bool:
    return len(now) == len(was) and all(map(operator.is_, now.values(), was.values())) and list(now) == list(was)
