"""Where a model's stem, stages, blocks and head are: told by the model itself, or read from the usual names."""

from __future__ import annotations

import re

from torch import nn

from robustlayers.core.errors import UserError
from robustlayers.models.layout import Layout
from robustlayers.selection.inventory import Inventory, norm_layers

__all__ = ["Layout", "layout_of"]

_STAGE = re.compile(r"^(?:.*\.)?(?:layer|stage|block|group)s?[._]?(\d+)$")
_HEADS = ("linear", "fc", "head", "classifier", "logits", "last_linear")


def layout_of(inventory: Inventory) -> Layout:
    """Return the layout of a model: its `layout()` where it has one, else what the usual names tell.

    The usual names are `layer1`, `stages.0`, `blocks.0` for stages; `fc`, `linear`, `head`, `classifier` (or the last
    linear layer) for the head; what is registered before the first stage and has parameters is the stem. The network may
    stand inside another module, as in `nn.Sequential(normalize, network)`. Raises `UserError` where no head can be seen.
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
    blocks = tuple(f"{prefix}." for stage in stages for prefix in stage)  # squeeze-and-excitation has an `fc` too
    named = [name for name, _ in modules if name.rpartition(".")[2] in _HEADS and not name.startswith(blocks)]
    if not linears and not named:
        raise UserError(f"{type(inventory.model).__name__} has no linear layer or module that could be its head")
    outermost = min((name.count(".") for name in named), default=0)
    head = [name for name in named if name.count(".") == outermost][-1] if named else linears[-1]  # the last of them
    stem = _before(inventory.model, stages[0][0]) if stages else []
    return Layout(stem=tuple(name for name in stem if name != head), stages=tuple(stages), head=(head,))


def _before(model: nn.Module, stage: str) -> list[str]:
    """Return the modules with parameters that are registered before `stage` beside it or beside what holds it."""
    found: list[str] = []
    path = stage.split(".")
    for depth, here in enumerate(path):
        above = ".".join(path[:depth])
        for child, module in model.get_submodule(above).named_children():
            if child == here:
                break
            if any(True for _ in module.parameters()) or norm_layers(module):
                found.append(f"{above}.{child}" if above else child)
    return found
