"""Norm policies: for each pass, which statistics normalize and whether the pass updates the running ones.

The statistics of a norm layer are buffers, and like every tensor they belong to a group with a signal. Left to `auto`, a
pass treats a layer by that signal:

| statistics of the layer | normalizes by | the pass updates them |
|---|---|---|
| frozen | running | no |
| learn from this pass's objective | batch | yes |
| learn from another objective | batch | no |

Nothing updates frozen statistics, whatever a policy says.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

__all__ = ["PASSES", "NormPolicy", "Switch"]

PASSES = ("craft", "clean", "adversarial", "ascent", "evaluate")

By = Literal["auto", "batch", "running"]
Update = Literal["auto"] | bool


@dataclass(frozen=True)
class Switch:
    """What norm layers do in one pass: `by` the statistics of the `batch` or the `running` ones; `update` the latter."""

    by: By = "auto"
    update: Update = "auto"

    def resolve(self, statistics_trained: bool, learns_here: bool) -> tuple[Literal["batch", "running"], bool]:
        """Return (normalizes by, updates) for a layer whose statistics are trained at all, and from this very pass.

        >>> Switch().resolve(statistics_trained=True, learns_here=False)
        ('batch', False)
        >>> Switch("batch", True).resolve(statistics_trained=False, learns_here=False)
        ('batch', False)
        """
        by = self.by if self.by != "auto" else ("batch" if statistics_trained else "running")
        update = learns_here if self.update == "auto" else self.update
        return by, update and statistics_trained

    def __str__(self) -> str:
        update = {"auto": "update by signal", True: "update", False: "no update"}[self.update]
        return f"{'by signal' if self.by == 'auto' else self.by}, {update}"


@dataclass(frozen=True)
class NormPolicy:
    """The switches of every pass; the default crafts by running statistics without a trace.

    `ascent` is for passes at weights that an ascent has perturbed; published code lets them update the running
    statistics, here they do not unless told to.

    Bag of Tricks for Adversarial Training (Pang et al. 2021, section 3) finds crafting in evaluation mode to keep more
    clean accuracy; Rice et al. 2020 craft in train mode, which is `NormPolicy(craft=Switch("batch", True))`.
    """

    craft: Switch = field(default=Switch("running", False))
    clean: Switch = field(default=Switch())
    adversarial: Switch = field(default=Switch())
    ascent: Switch = field(default=Switch("auto", False))
    evaluate: Switch = field(default=Switch("running", False))

    def __getitem__(self, name: str) -> Switch:
        return getattr(self, name)

    def __str__(self) -> str:
        return "; ".join(f"{entry.name}: {getattr(self, entry.name)}" for entry in fields(self))
