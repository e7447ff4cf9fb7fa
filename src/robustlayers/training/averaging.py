"""Averages of the weights along training, EMA and SWA, of any selection, with statistics of norm layers that fit them.

A running statistic belongs to the weights before its layer. Averaged weights with the live model's statistics, copied or
worse shared, are a published fault: the average is then measured with statistics of another network.
"""

# torch has its operations on lists of tensors under private names only
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustlayers.attacks.registry import is_own
from robustlayers.core.errors import UserError, one_of
from robustlayers.core.quantities import number
from robustlayers.normalization import crafting_forward, recalibration
from robustlayers.selection.inventory import Entry, Inventory, is_norm
from robustlayers.selection.selectors import resolve
from robustlayers.training.state import joined, part

__all__ = ["AVERAGES", "Average", "AverageSettings"]

AVERAGES = ("ema", "swa")
_EVERY = ("epoch", "step")
_STATISTICS = ("average", "live", "recalibrate")
_INPUTS = ("adversarial", "clean")
_DEFAULTS = {"ema": (0.0, "step"), "swa": (0.5, "epoch")}  # start, every


@dataclass(frozen=True)
class AverageSettings:
    """Which average of the weights, when they are taken in, and where its statistics come from.

    Args:
        name: `ema`, an exponential moving average with `decay`, or `swa`, the plain mean (Izmailov et al. 2018).
        decay: of `ema` alone, in (0, 1); None is 0.999.
        start: share of the phase, in [0, 1], that must be over; None is 0 for `ema`, 0.5 for `swa`.
        every: `step` or `epoch`; None is `step` for `ema`, `epoch` for `swa`.
        select: selector of the entries that are averaged; parameters alone count, the others are as in the live model.
        statistics: of norm layers: `recalibrate` (estimated anew under the averaged weights), `average` (by the same
            formula as the weights) or `live`.
        on: `clean` or `adversarial` inputs for recalibration.

    Raises `UserError` for values that are not allowed and for those that would do nothing.

    >>> print(AverageSettings())
    ema, decay 0.999, each step, of all, statistics recalibrated on clean inputs
    >>> print(AverageSettings("swa", select="norm", statistics="average"))
    swa, each epoch from 0.5 of the phase, of norm, statistics averaged
    """

    name: str = "ema"
    decay: float | str | None = None
    start: float | str | None = None
    every: str | None = None
    select: str = "all"
    statistics: str = "recalibrate"
    on: str = "clean"

    def __post_init__(self) -> None:
        for field, allowed in (("name", AVERAGES), ("statistics", _STATISTICS), ("on", _INPUTS)):
            if getattr(self, field) not in allowed:
                what = {"name": "average", "on": "inputs to recalibrate on"}.get(field, field)
                raise UserError(one_of(what, str(getattr(self, field)), allowed))
        if self.decay is not None and self.name != "ema":
            raise UserError(f"decay: only ema has one, and this is {self.name}")
        if self.on != "clean" and self.statistics != "recalibrate":
            raise UserError(f"on: {self.on} inputs are for statistics: recalibrate, and they are {self.statistics}")
        start, every = _DEFAULTS[self.name]
        object.__setattr__(self, "every", every if self.every is None else self.every)
        object.__setattr__(self, "start", start if self.start is None else number(self.start, "start"))
        if self.every not in _EVERY:
            raise UserError(one_of("every", str(self.every), _EVERY))
        if not 0 <= float(self.start or 0) <= 1:
            raise UserError(f"start: {self.start} is not allowed; allowed: 0 to 1, a share of the phase")
        if self.name == "ema":
            object.__setattr__(self, "decay", 0.999 if self.decay is None else number(self.decay, "decay"))
            if not 0 < float(self.decay or 0) < 1:
                raise UserError(f"decay: {self.decay} is not allowed; allowed: more than 0, less than 1")

    def __str__(self) -> str:
        parts = [self.name] + ([f"decay {self.decay:g}"] if self.name == "ema" else [])
        start = f" from {self.start:g} of the phase" if self.start else ""
        parts += [f"each {self.every}{start}", f"of {self.select}"]
        how = {
            "average": "averaged",
            "live": "as in the live model",
            "recalibrate": f"recalibrated on {self.on} inputs",
        }
        return ", ".join([*parts, f"statistics {how[self.statistics]}"])


class Average:
    """The average of a model's parameters along training, kept beside the model.

    With w_t the live parameters at update t,

        ema:  a_1 = w_1,   a_t = decay a_(t-1) + (1 - decay) w_t
        swa:  a_1 = w_1,   a_t = a_(t-1) + (w_t - a_(t-1)) / t,   the mean of w_1 ... w_t

    as in `torch.optim.swa_utils.AveragedModel`. The ema begins with weights, not with zeros, so there is no bias to
    correct. What does not move stays bit-equal. Before the first update the average is the live model. Halves are
    averaged in float32.

    `tensors` and `applied` give the whole averaged model: selected entries averaged (also where they are a part of a
    tensor), all others, counters and other buffers included, as in the live model at that time, and the statistics of
    norm layers by the settings. Those that are recalibrated belong to one state of the average: after an update and
    before the next `recalibrate`, asking for the averaged model is an error rather than a model with foreign statistics.

    Args:
        inventory: of the live model, such as `partition.inventory`.
        settings: see `AverageSettings`.
        learning: statistics of norm layers that learn, by name; the others are frozen and stay. None: all of them.

    Raises:
        UserError: a selector that picks no parameter.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> average = Average(Inventory(net), AverageSettings("swa", start=0))
    >>> for value in (1.0, 2.0, 6.0):
    ...     _ = nn.init.constant_(net.weight, value)
    ...     _ = average.update(progress=1.0, epoch_ended=True)
    >>> average.tensors(), net.weight.item()
    ({'weight': tensor([[3.]])}, 6.0)
    """

    def __init__(
        self, inventory: Inventory, settings: AverageSettings, learning: Collection[str] | None = None
    ) -> None:
        self.inventory, self.settings = inventory, settings
        self.updates = 0
        self._parts = {
            name: mask
            for name, mask in resolve(inventory, settings.select).parts.items()
            if not inventory.entries[name].buffer and inventory.entries[name].tensor.is_floating_point()
        }
        if not self._parts:
            raise UserError(f"average: selector {settings.select!r} picks no parameter")
        self._statistics = [
            entry
            for entry in inventory
            if entry.buffer and any(map(is_norm, entry.owners)) and (learning is None or entry.name in learning)
        ]
        self._follows = list(self._parts)
        # Attacks on the averaged model, whose statistics are not estimated yet, meet averaged ones: the nearest there are.
        if settings.statistics == "average" or settings.on == "adversarial":
            self._follows += [entry.name for entry in self._statistics if entry.tensor.is_floating_point()]
        self._averages: dict[str, Tensor] = {}
        self._recalibrated: dict[str, Tensor] = {}
        self._applied = 0

    @property
    def stale(self) -> bool:
        """Whether the averaged model waits for `recalibrate`."""
        wanted = self.settings.statistics == "recalibrate" and bool(self._statistics)
        return wanted and self.updates > 0 and not self._recalibrated

    @torch.no_grad()
    def update(self, progress: float, *, epoch_ended: bool) -> bool:
        """Take the live parameters in where the settings say so; return whether they did.

        To be called after every step: `progress` is the share of the phase that is done, in (0, 1], and `epoch_ended`
        tells whether the step was an epoch's last.
        """
        if self._applied:
            raise UserError("average: no update while the average is applied, since it would average itself")
        if progress < float(self.settings.start or 0) or (self.settings.every == "epoch" and not epoch_ended):
            return False
        live = {name: self._live(self.inventory.entries[name]) for name in self._follows}
        if not self.updates:
            self._averages = {name: _wide(tensor).clone() for name, tensor in live.items()}
        else:
            weight = 1 / (self.updates + 1) if self.settings.name == "swa" else 1 - float(self.settings.decay or 0)
            # lerp, unlike decay * a + (1 - decay) * w, leaves what is equal bit-equal.
            torch._foreach_lerp_(
                [self._averages[name] for name in live], [_wide(tensor) for tensor in live.values()], weight
            )
        self.updates += 1
        self._recalibrated = {}
        return True

    def recalibrate(
        self,
        batches: Iterable[Any],
        *,
        attack: Callable[..., Tensor] | None = None,
        generator_of: Callable[[int], torch.Generator] | None = None,
    ) -> int:
        """Estimate the average's statistics on `batches` of x or (x, y); return how many batches there were.

        `attack` is used, and needed, with `on: adversarial`: it meets the averaged weights with the average of the live
        statistics. The live model is as before afterwards. See `recalibrate` of `robustlayers.normalization`. Where
        entries that are not averaged go on moving, the statistics fit those of the time of this call.
        """
        if self.settings.statistics != "recalibrate":
            raise UserError(f"average: its statistics are set to {self.settings.statistics}, not to recalibrate")
        adversarial = self.settings.on == "adversarial"
        if adversarial and attack is None:
            raise UserError("average: recalibration on adversarial inputs needs an attack")
        model = self.inventory.model
        with self._holding(self._values(provisional=True)):
            count = recalibration.recalibrate(
                model,
                batches,
                attack=attack if adversarial else None,
                generator_of=generator_of if adversarial else None,
                forward=crafting_forward(model) if adversarial and is_own(attack) else None,
            )
            found = {entry.name: self._live(entry).clone() for entry in self._statistics}
        self._recalibrated = found
        return count

    def tensors(self) -> dict[str, Tensor]:
        """Return the averaged model as a `state_dict()`, in new tensors under all names.

        Raises `UserError` while the average is `stale`.
        """
        values = self._values()
        return {
            name: values[self.inventory.canonical[name]].clone()
            for name in self.inventory.model.state_dict()
            if name in self.inventory.canonical
        }

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Give the live model the averaged values inside the block; on exit, every tensor is back in every bit.

        Values are written into the model's own tensors, which keep their identity, and what the block writes into them is
        undone too, also after an exception. Raises `UserError` while the average is `stale`.
        """
        with self._holding(self._values()):
            yield self.inventory.model

    def state(self) -> dict[str, Tensor]:
        """Return all that a resume needs, as new tensors: `updates`, `average/...` and `recalibrated/...`."""
        parts = joined({"average": self._averages, "recalibrated": self._recalibrated})
        return {"updates": torch.tensor(self.updates), **{name: tensor.clone() for name, tensor in parts.items()}}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a state that `state` returned for the same model and settings."""
        updates = int(tensors["updates"]) if "updates" in tensors else -1
        averages, recalibrated = part(tensors, "average"), part(tensors, "recalibrated")
        expected = {entry.name for entry in self._statistics}
        entries = self.inventory.entries
        fits = (
            averages.keys() == (set(self._follows) if updates > 0 else set())
            and recalibrated.keys() in (set(), expected)
            and len(tensors) == 1 + len(averages) + len(recalibrated)
            and all(t.shape == entries[name].tensor.shape for name, t in [*averages.items(), *recalibrated.items()])
        )
        if updates < 0 or not fits:
            raise UserError("the state is not one of this average: another model, or other settings")
        self.updates = updates
        self._averages = {name: self._like(name, tensor) for name, tensor in averages.items()}
        self._recalibrated = {name: self._like(name, tensor) for name, tensor in recalibrated.items()}

    def _like(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self._live(self.inventory.entries[name]).device, copy=True)

    def _values(self, *, provisional: bool = False) -> dict[str, Tensor]:
        """Return the averaged model by first names; tensors may be the live ones or the average's own."""
        if self.stale and not provisional:
            raise UserError("average: its statistics belong to other weights; call recalibrate after the last update")
        values = {entry.name: self._live(entry) for entry in self.inventory}
        for name, average in self._averages.items():
            live, mask = values[name], self._parts.get(name)
            average = average.to(live.dtype)
            values[name] = average if mask is None else torch.where(mask.to(live.device), average, live)
        return values | self._recalibrated

    @contextmanager
    def _holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        before = {name: self._live(entry).clone() for name, entry in self.inventory.entries.items()}
        self._applied += 1
        try:
            self._write(values)
            yield
        finally:
            self._applied -= 1
            self._write(before)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, entry in self.inventory.entries.items():
            self._live(entry).copy_(values[name])

    @staticmethod
    def _live(entry: Entry) -> Tensor:
        # Looked up anew, since moving a model to another device puts new tensors in the place of its buffers.
        tensor = (entry.module._buffers if entry.buffer else entry.module._parameters)[entry.attribute]
        return entry.tensor.detach() if tensor is None else tensor.detach()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
