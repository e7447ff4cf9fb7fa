"""Ways to run a model: held in evaluation mode, norm layers by running or by the batch's statistics, on one branch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from robustlayers.attacks import guard
from robustlayers.core.errors import UserError, one_of
from robustlayers.evaluation._still import Forward
from robustlayers.normalization import Setting, layers, normalizing
from robustlayers.selection.inventory import is_norm

__all__ = ["BY", "branches_of", "check_by", "held", "seed_draws"]

BY = ("running", "batch")
"""Statistics that norm layers may normalize by in an evaluation."""


@contextmanager
def held(forward: Forward, device: torch.device, by: str = "running", branch: str | None = None) -> Iterator[None]:
    """Hold an `nn.Module` in evaluation mode without autocast, by some statistics and on a branch, and undo it all.

    By the batch's, nothing is updated. A branch is set on every layer that has one of that name. Functions are let be.
    """
    if not isinstance(forward, nn.Module):
        yield
        return
    with ExitStack() as undo:
        undo.enter_context(guard(forward))
        norms = [module for module in forward.modules() if is_norm(module)] if by == "batch" else []
        undo.enter_context(normalizing(forward, dict.fromkeys(norms, Setting("batch", False)), training=False))
        undo.enter_context(torch.autocast(device.type, enabled=False))
        for module in forward.modules() if branch is not None else ():
            if branch in _branches(module):
                undo.callback(setattr, module, "branch", module.branch)
                setattr(module, "branch", branch)  # noqa: B010  # type checkers take an attribute for a tensor
        yield


def seed_draws(forward: Forward, seed: int, *position: int | str) -> None:
    """Make what random norm layers of an `nn.Module` draw next a function of (seed, position); functions are let be."""
    if isinstance(forward, nn.Module):
        layers.seed_draws(forward, seed, *position)


def branches_of(model: nn.Module) -> tuple[str, ...]:
    """Return the branches of a model's layers, in order of first appearance."""
    return tuple(dict.fromkeys(branch for module in model.modules() for branch in _branches(module)))


def check_by(by: str) -> None:
    """Raise `UserError` for statistics that no evaluation normalizes by."""
    if by not in BY:
        raise UserError(one_of("statistics to normalize by", str(by), BY))


def _branches(module: nn.Module) -> tuple[str, ...]:
    found = getattr(module, "branches", ())
    return found if isinstance(found, tuple) and hasattr(module, "branch") else ()
