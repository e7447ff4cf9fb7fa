"""Habits: norm policies of published training code, each by one name.

Updates of the running statistics that one step makes of a layer whose statistics are trained, with k forwards of the
attack (PGD with k steps that keeps its last iterate):

| habit | training on adversarial images | on clean and adversarial ones | on clean ones |
|---|---|---|---|
| `standard` | 1 | 2 | 1 |
| `rice` | k + 3 | k + 4 | 1 |
| `trades` | 2 | 3 | 1 |
| `mart` | 1 | 2 | 1 |
| `clean-statistics` | 1, of an added clean pass | 1 | 1 |
| `adversarial-statistics` | 1 | 1 | 1 |
| `frozen` | 0 | 0 | 0 |
| `batch-at-test` | 1 | 2 | 1 |

Frozen statistics are never updated, and layers that have them are normalized by them where a habit says nothing else. A
step on clean images alone has no other passes than that.
"""

from __future__ import annotations

from robustlayers.core.errors import UserError, one_of
from robustlayers.normalization.policy import NormPolicy, Switch

__all__ = ["HABITS", "habit"]

_TRAINS = Switch("auto", True)
"""Train mode: by the batch, with an update, whatever the images."""

HABITS: dict[str, NormPolicy] = {
    # Ours. Crafting in evaluation mode: Bag of Tricks (Pang et al. 2021, section 3). Passes that are trained on update the
    # statistics that learn from them: one update by each kind of images.
    "standard": NormPolicy(name="standard"),
    # Rice, Wong and Kolter 2020 (arXiv 2002.11569), train_cifar.py: train mode throughout. k crafting forwards, one that
    # scores what was crafted, the training forward, and after the update a forward of the clean images for the log: with
    # PGD-10, 11 + 1 + 1. Of the running statistics, momentum 0.1, the clean images are 0.1 / (1 - 0.9^13) = 13 %.
    "rice": NormPolicy(
        craft=_TRAINS,
        clean=_TRAINS,
        adversarial=_TRAINS,
        ascent=_TRAINS,  # of AWP (Wu et al. 2020), whose code is built on it
        score=_TRAINS,
        log=_TRAINS,
        name="rice",
    ),
    # Zhang et al. 2019 (arXiv 1901.08573), trades.py: crafted in evaluation mode (a version of the file without `eval()` is
    # about, too); then in train mode forwards of the clean, the adversarial and once more the clean images, for the two
    # places of the loss that need the latter.
    "trades": NormPolicy(clean=_TRAINS, adversarial=_TRAINS, again=_TRAINS, name="trades"),
    # Wang et al. 2020 (MART), mart.py: crafted in evaluation mode; then in train mode the clean and the adversarial images.
    "mart": NormPolicy(clean=_TRAINS, adversarial=_TRAINS, name="mart"),
    # The running statistics are those of one kind of images; each pass normalizes by its own batch. Zhang et al. 2024 (arXiv
    # 2403.19150) ask which of the two a network should be given at test.
    "clean-statistics": NormPolicy(statistics="clean", name="clean-statistics"),
    "adversarial-statistics": NormPolicy(statistics="adversarial", name="adversarial-statistics"),
    # Every pass by the running statistics that the phase begins with: FixBN, the frozen wing of TWINS (Liu et al. 2023).
    "frozen": NormPolicy(
        clean=Switch("running", False),
        adversarial=Switch("running", False),
        ascent=Switch("running", False),
        name="frozen",
    ),
    # BNwoT of RobustNorm (Awais et al. 2020, arXiv 2006.11007): by the batch in every pass, also when crafting and measuring.
    # The running statistics are kept up all the same, so that measuring by them remains possible.
    "batch-at-test": NormPolicy(craft=Switch("batch", False), evaluate=Switch("batch", False), name="batch-at-test"),
}


def habit(name: str) -> NormPolicy:
    """Return the norm policy of a published habit by its name; the module's table says what each does.

    >>> habit("mart").craft == habit("standard").craft
    True
    """
    if name not in HABITS:
        raise UserError(one_of("habit of normalization", name, HABITS))
    return HABITS[name]
