"""One model measured in each of its ways to normalize: by running or batch statistics, on each branch of dual norms."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from robustlayers.attacks import Attack
from robustlayers.core.errors import UserError, one_of
from robustlayers.evaluation._cross import CrossTable, View, cross
from robustlayers.evaluation._views import BY, branches_of, check_by
from robustlayers.evaluation.accuracy import Progress

__all__ = ["branches", "policies"]


def branches(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    batch_size: int = 500,
    *,
    only: Sequence[str] | None = None,
    by: str = "running",
    seed: int = 0,
    progress: Progress | None = None,
) -> CrossTable:
    """Return the accuracy of each branch under images crafted on each branch: crafted on row, measured on column.

    A dual norm has the branches `main` and `auxiliary`; an attacker chooses which one to attack, so the robust accuracy
    of a branch is the smallest of its column. A branch is set on all layers that have one of that name; `only` are the
    branches to look at, all by default. Norm layers normalize by `running` statistics, or by those of each `batch`.
    Other arguments, and what counts as right, as in `transfer`. The model is left without a trace, `branch` included.

    Raises `UserError` for a model without branches, and an unknown branch.

    Source: Xie & Yuille 2020 evaluate both branches of mixture batch norm; the whole table is rarely shown.
    """
    check_by(by)
    known = branches_of(model)
    if not known:
        raise UserError(f"branches: no layer of {type(model).__name__} has branches; dual norms have")
    names = known if only is None else tuple(only)
    for name in names:
        if name not in known:
            raise UserError(one_of("branch", name, known))
    if not names:
        raise UserError("only: there is no branch; give one or more, or None for all")
    return cross({name: View(model, by, name) for name in names}, x, y, attack, batch_size, seed, progress)


def policies(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    batch_size: int = 500,
    *,
    by: Sequence[str] = BY,
    seed: int = 0,
    progress: Progress | None = None,
) -> CrossTable:
    """Return the accuracy by running and by batch statistics, under images crafted by each: crafted on row.

    By the `batch`, an image's prediction depends on the images beside it, so the numbers depend on `batch_size` and on
    the order of the images; they say what a net owes to its statistics, not how robust it is for one image. Batches
    are of nearly equal size. The branch of dual norms stays as it is. Other arguments as in `transfer`; nothing is
    updated, and the model is left without a trace.

    Raises `UserError` for a policy other than `running` and `batch`.
    """
    for name in by:
        check_by(name)
    if not by:
        raise UserError("by: there is no policy; give running, batch, or both")
    return cross({name: View(model, name) for name in by}, x, y, attack, batch_size, seed, progress)
