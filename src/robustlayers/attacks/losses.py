"""What an attack maximizes: one number per image, higher is worse for the defender."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from robustlayers.core.errors import UserError, one_of

__all__ = ["LOSSES", "Loss", "cross_entropy", "dlr", "dlr_targeted", "find_loss", "is_correct", "kl", "margin"]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return -log softmax(z)_y for each image: [n, classes], [n] -> [n]."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return max over j != y of z_j, minus z_y: positive where misclassified (Carlini & Wagner 2017, section V).

    >>> margin(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
    tensor([-1.])
    """
    own = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return others - own


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Return the difference of logits ratio -(z_y - max over j != y of z_j) / (z_(1) - z_(3)), z_(k) the k-th largest.

    Unchanged when the logits are shifted or scaled, so a model cannot hide by inflating them; three or more classes
    (Croce & Hein 2020, section 4).

    >>> dlr(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
    tensor([-0.5000])
    """
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2) for a target class t != y; four or more classes.

    Positive where the target is ahead of the label (Croce & Hein 2020, section 4).

    >>> dlr_targeted(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), torch.tensor([0]), torch.tensor([2]))
    tensor([-0.4000])
    """
    top = logits.topk(4, dim=1).values
    ahead = logits.gather(1, target[:, None]).squeeze(1) - logits.gather(1, y[:, None]).squeeze(1)
    return ahead / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def kl(logits: Tensor, clean: Tensor) -> Tensor:
    """Return KL(softmax(clean) || softmax(z)), the loss that TRADES attacks (Zhang et al. 2019); no labels."""
    difference = F.kl_div(logits.log_softmax(1), clean.log_softmax(1), reduction="none", log_target=True)
    return difference.sum(1)


@dataclass(frozen=True)
class Loss:
    """A loss by name: `function(logits, labels)`, or of the logits and those of the clean images (`against_clean`).

    `toward(logits, labels, target)` is the loss that leads to a target class; None where there is none.
    """

    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    against_clean: bool = False
    classes: int = 2  # needs at least so many
    toward: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    classes_toward: int = 2

    def __call__(self, logits: Tensor, y: Tensor, clean: Tensor | None = None, target: Tensor | None = None) -> Tensor:
        """Return one value per image, float32 or wider, higher is better for the attacker.

        With a `target`, the value says how near the prediction is to that class. Raises `UserError` for logits of
        another shape than [n, classes], and for a loss that lacks what it needs.
        """
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(y):
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"the forward must return logits [{len(y)}, classes]; it returned {shape}")
        least = self.classes if target is None else self.classes_toward
        if logits.shape[1] < least:
            kind = self.name if target is None else f"{self.name} with a target"
            raise UserError(f"loss {kind}: needs {least} or more classes, the forward has {logits.shape[1]}")
        if target is not None:
            if self.toward is None:
                raise UserError(f"loss {self.name}: knows no target class; allowed with a target: {_TOWARD}")
            return self.toward(_wide(logits), y, target)
        if self.against_clean:
            if clean is None:
                raise UserError(f"loss {self.name}: needs the logits of the clean images")
            return self.function(_wide(logits), _wide(clean))
        return self.function(_wide(logits), y)


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("ce", cross_entropy, toward=lambda logits, y, target: -cross_entropy(logits, target)),
        Loss("margin", margin, toward=lambda logits, y, target: -margin(logits, target)),
        Loss("dlr", dlr, classes=3, toward=dlr_targeted, classes_toward=4),
        Loss("kl", kl, against_clean=True),
    )
}

_TOWARD = ", ".join(name for name, loss in LOSSES.items() if loss.toward)


def find_loss(name: str) -> Loss:
    """Return the loss called `name`; an unknown name is a `UserError`."""
    if name not in LOSSES:
        raise UserError(one_of("loss of an attack", str(name), LOSSES))
    return LOSSES[name]


def is_correct(logits: Tensor, y: Tensor) -> Tensor:
    """Return, for each image, whether the largest logit is the label's; logits with a NaN are wrong.

    >>> is_correct(torch.tensor([[2.0, 1.0], [float("nan"), 1.0]]), torch.tensor([0, 0]))
    tensor([ True, False])
    """
    return (logits.argmax(1) == y) & ~logits.isnan().any(1)


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
