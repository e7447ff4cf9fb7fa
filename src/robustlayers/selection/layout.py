"""Where a model's stem, stages, blocks and head are: told by the model itself, or read from the usual names."""

from __future__ import annotations

import re

from torch import nn

from robustlayers.core.errors import UserError
from robustlayers.models.layout import Layout
from robustlayers.selection.inventory import Inventory

__all__ = ["Layout", "layout_of"]

_STAGE = re.compile(r"^(?:.*\.)?(?:layer|stage|block|group)s?[._]?(\d+)$")
_HEADS = ("linear", "fc", "head", "classifier", "logits", "last_linear")


def layout_of(inventory: Inventory) -> Layout:
    """Return the layout of a model: its `layout()` where it has one, else what the usual names tell.

    The usual names are `layer1`, `stages.0`, `blocks.0` for stages; `fc`, `linear`, `head`, `classifier` (or the last
    linear layer) for the head; all that is registered before the first stage is the stem. Raises `UserError` where no
    head can be seen.
    """
    own = getattr(inventory.model, "layout", None)
    if callable(own):
        found = own()
        if isinstance(found, Layout):
            return found
    modules = list(inventory.model.named_modules())
    stages: list[tuple[str, ...]] = []
    depth: int | None = None
    for name, module in modules:
        if _STAGE.match(name) and any(True for _ in module.children()):
            level = name.count(".")
            if depth is None or level < depth:
                depth, stages = level, []
            if level == depth:
                stages.append((name,))
    linears = [name for name, module in modules if isinstance(module, nn.Linear)]
    named = [name for name, _ in modules if name in _HEADS]
    if not linears and not named:
        raise UserError(f"{type(inventory.model).__name__} has no linear layer or module that could be its head")
    head = (named[-1],) if named else (linears[-1],)
    stem: list[str] = []
    for name, _ in inventory.model.named_children():
        if stages and (stages[0][0] == name or stages[0][0].startswith(f"{name}.")):
            break
        if stages and name not in head and name != "normalize":
            stem.append(name)
    return Layout(stem=tuple(stem), stages=tuple(stages), head=head)
