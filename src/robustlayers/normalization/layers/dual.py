"""Dual batch norm: two branches, one for clean and one for adversarial images, with own or shared halves."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from robustlayers.core.errors import UserError
from robustlayers.normalization.layers.common import (
    Flag,
    ScaleShift,
    affine_of,
    batch_norm_like,
    channels_of,
    chosen,
    duplicate,
    kind,
    plain,
)

__all__ = ["DUAL", "DualBatchNorm", "dual_norm"]


class DualBatchNorm(nn.Module):
    """A norm layer with the branches `main` and `auxiliary`, of which `branch` names the one in use.

    **What.** Two independent switches: whether each branch has its own running statistics, and its own scale and shift.

    | own statistics | own affine | |
    |---|---|---|
    | yes | yes | AdvProp, mixture batch norm: two layers |
    | no | yes | "linear projection": one normalization, two scales and shifts |
    | yes | no | "StatP": two normalizations, one scale and shift |
    | no | no | one batch norm, two forward passes: the control |

    `main` is what clean images go through, and what predicts in AdvProp; either branch can be trained, evaluated and
    attacked.

    **Maths.** That of batch norm with the tensors of the branch. By the batch's statistics, branches that share their
    affine part are the same function; they differ by running ones.

    **Cost.** Twice the tensors of the halves that are own; time that of one layer, and a multiply-add where one half is
    shared.

    **Source.** Xie and Yuille 2020 (arXiv 1906.03787), mixture batch norm; Xie et al. 2020 (arXiv 1911.09665), AdvProp;
    the four cells: Zhang et al. 2024 (arXiv 2403.19150), Disentangling_LP and Disentangling_StatP.

    **Not known.** Which half matters: the last paper says the affine one, and gives figures without numbers.

    `norm` is the layer that becomes `main`, with its own tensors; `auxiliary` begins as a copy. Children: `main`,
    `auxiliary`, and `shared` for a half that is. Private tensors are named `main.weight`, `auxiliary.running_mean`, ...

    Raises `UserError` for a norm without the halves that are to be divided.

    >>> layer = DualBatchNorm(nn.BatchNorm2d(3), own_statistics=False)
    >>> sorted(layer.state_dict())[:4]
    ['auxiliary.bias', 'auxiliary.weight', 'main.bias', 'main.weight']
    >>> layer.branch = "auxiliary"
    """

    is_normalization = True
    branches = ("main", "auxiliary")

    def __init__(self, norm: nn.Module, *, own_statistics: bool = True, own_affine: bool = True) -> None:
        super().__init__()
        self.own_statistics, self.own_affine = own_statistics, own_affine
        self.branch = "main"
        if own_statistics and own_affine:
            self.main, self.auxiliary = norm, copy.deepcopy(norm)
        elif not own_statistics and not own_affine:
            self.shared = norm
        else:
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or not norm.affine:
                raise UserError(
                    f"dual norm: {type(norm).__name__} has no statistics and scale and shift that could be divided; "
                    "allowed: batch norm with both"
                )
            weight, bias = affine_of(norm)
            assert weight is not None and bias is not None
            statistics = batch_norm_like(norm, affine=False, tracking=norm.track_running_stats)
            affine = ScaleShift(weight, bias)
            if own_affine:
                self.shared = statistics
                self.main, self.auxiliary = affine, ScaleShift(duplicate(weight), duplicate(bias))
            else:
                self.shared = affine
                self.main, self.auxiliary = statistics, copy.deepcopy(statistics)
        self.train(norm.training)

    @property
    def channels(self) -> int:
        """Number of channels."""
        return channels_of(next(self.children()))

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape and dtype of `x`, [n, channels, ...]."""
        branch = chosen(self)
        if not (self.own_statistics or self.own_affine):
            return self.shared(x)
        own = self.get_submodule(branch)
        if self.own_statistics and self.own_affine:
            return own(x)
        return own(self.shared(x)) if self.own_affine else self.shared(own(x))

    def plain(self) -> nn.Module:
        """Return the layer that the branch in use is, with its tensors themselves."""
        branch = chosen(self)
        if not (self.own_statistics or self.own_affine):
            return self.shared
        own = self.get_submodule(branch)
        if self.own_statistics and self.own_affine:
            return own
        affine, statistics = (own, self.shared) if self.own_affine else (self.shared, own)
        assert isinstance(statistics, nn.modules.batchnorm._BatchNorm)
        layer = batch_norm_like(statistics, tracking=statistics.track_running_stats)
        layer._parameters.update(affine._parameters)
        return layer

    def extra_repr(self) -> str:
        """Return the settings, for `print(model)`."""
        own = [name for name, own in (("statistics", self.own_statistics), ("affine", self.own_affine)) if own]
        return f"own={' and '.join(own) or 'nothing'}, branch={self.branch}"


def dual_norm(norm: nn.Module, own_statistics: bool = True, own_affine: bool = True) -> nn.Module:
    """Return a dual norm in the place of `norm`: `main` is what it was, bit for bit where both halves are own."""
    if isinstance(norm, DualBatchNorm):
        raise UserError("a dual norm is converted to one again; convert it to batch first, on the branch to keep")
    norm = plain(norm)
    if own_statistics and own_affine:
        return DualBatchNorm(norm)
    return DualBatchNorm(_with_both(norm), own_statistics=own_statistics, own_affine=own_affine)


def _with_both(norm: nn.Module) -> nn.Module:
    batch = isinstance(norm, nn.modules.batchnorm._BatchNorm)
    return norm if batch and norm.affine and norm.running_mean is not None else batch_norm_like(norm)


DUAL = kind(dual_norm, options={"own_statistics": Flag(True), "own_affine": Flag(True)})
