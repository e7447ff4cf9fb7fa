"""One phase of training: epochs of partial steps over data on the device, stoppable and resumable at every step.

for phase in recipe.phases:
    partition = bind(phase.groups, model)            # total, disjoint, non-empty, or an error that lists the tensors
    for x, y in batches:                              # order = f(seed, epoch) only
        with guard(model):                            # restores modes, requires_grad, buffers, .grad, hooks, RNG
            x_adv = attack(forward under policy.craft, x, y)
        with perturbed(weights by ascent):            # if any
            for objective in distinct(signals):       # a forward is shared by all that need the same pass
                grads |= gradient(objective, of only the groups that it trains)
        optimizer.step()                              # one optimizer, fixed groups; frozen: no grad at all
    verify(what was promised frozen is bit-equal, what was promised trained moved)      # the ledger
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustlayers.core.errors import UserError
from robustlayers.core.random import global_draws, stream, stream_seed
from robustlayers.core.ranks import ALONE, Ranks
from robustlayers.data import Augment, Images, batch_sizes, batches
from robustlayers.normalization.policy import NormPolicy
from robustlayers.normalization.precision import Choice
from robustlayers.selection.inventory import is_norm
from robustlayers.selection.partition import Partition
from robustlayers.training.ascent import Ascent
from robustlayers.training.averaging import Average, AverageSettings
from robustlayers.training.distributed import Shards, check_shared
from robustlayers.training.divergence import Diverged, check_finite, finite_loss
from robustlayers.training.ledger import GroupChange, check_promises, compare, snapshot
from robustlayers.training.optimizers import OptimizerSettings
from robustlayers.training.program import Perturbation, Program, Window
from robustlayers.training.rates import apply_rates, average_norms, relative_gradient_norms
from robustlayers.training.schedules import Schedule
from robustlayers.training.state import joined, part
from robustlayers.training.step import Attack, PartialStep, StepLog, Turn
from robustlayers.training.tally import EpochLog, Tally
from robustlayers.training.update import Update

__all__ = ["Diverged", "EpochLog", "PhaseTrainer"]

Progress = Callable[[int, int], None]
"""`progress(batches done, batches of the epoch)`"""


class PhaseTrainer:
    """A phase bound to a model and its data.

    Everything random is a function of (seed, epoch over all phases, step), so a trainer that loads the state of any step
    goes on exactly as one that was never stopped.

    Args:
        model: on `device`; trained in place.
        groups: `{group: selector}`.
        signals: `{group: signal}`.
        images: the training images.
        epochs: of this phase; or
        steps: its length in steps, the last epoch being cut short.
        first_epoch: epochs of earlier phases.
        windows: group -> the part of the phase in which it learns, as fractions: progressive freezing and unfreezing.
        perturbation: schedule of the attack's eps.
        ascent: see `PartialStep`.
        crafting: precision of crafting; what `auto` chose is part of the state.
        precision: of the forwards that are learned from.
        average: of the weights, beside the training: `result()` is then the averaged model.
        ranks: processes that share the batches, each with a trainer like this one; what they know is always the same.
        statistics: of batch norm where there are several, see `Shards`.

    Raises:
        UserError: see `Partition`, `PartialStep`, `build_optimizer`, `check_windows`.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Mapping[str, str],
        signals: Mapping[str, str | Mapping[str, float | str]],
        images: Images,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        attack: Attack | None = None,
        batch_size: int = 128,
        optimizer: OptimizerSettings | None = None,
        schedule: Schedule | None = None,
        policy: NormPolicy | str | None = None,
        augment: Augment | None = None,
        windows: Mapping[str, Window] | None = None,
        perturbation: Perturbation | None = None,
        ascent: Ascent | str | Mapping[str, Any] | None = None,
        average: AverageSettings | None = None,
        crafting: str = "fp32",
        precision: str = "fp32",
        seed: int = 0,
        first_epoch: int = 0,
        device: torch.device | str = "cpu",
        ranks: Ranks = ALONE,
        statistics: str = "sync",
    ) -> None:
        self.model, self.images, self.batch_size, self.device = model, images, batch_size, torch.device(device)
        self.first_epoch, self.seed = first_epoch, seed
        self.augment = augment or Augment()
        self.sizes = batch_sizes(len(images), batch_size)
        if (epochs is None) == (steps is None):
            raise UserError("a phase lasts so many epochs or so many steps: give one of them")
        self.steps = steps if steps is not None else (epochs or 0) * self.batches
        self.epochs = math.ceil(self.steps / self.batches)
        self.partition = Partition(model, groups)
        self.step = PartialStep(
            model,
            self.partition,
            signals,
            attack=attack,
            optimizer=None,
            policy=policy,
            ascent=ascent,
            crafting=crafting,
            precision=precision,
        )
        self.shards = Shards(model, statistics, ranks=ranks, moving=self._learning_buffers())
        if self.shards.several:
            self.step.average = self.shards
            check_shared(self.step, statistics)
        settings = optimizer or OptimizerSettings()
        self.update = Update(self.partition, self.step.signals, settings, schedule or Schedule(), self.steps)
        self.step.optimizer = self.update  # pyright: ignore[reportAttributeAccessIssue]
        self.program = Program(
            self.step,
            self.sizes,
            self.steps,
            windows=windows,
            perturbation=perturbation,
            due=self.update.due if self.update.slow else None,
        )
        self.average = None
        if average is not None:
            self.average = Average(self.partition.inventory, average, self._learning_statistics())
        self.start = snapshot(model)
        self.done = 0  # whole epochs
        self.within = 0  # steps of the epoch that is under way
        self._tally = Tally()
        self._seconds = 0.0

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """Torch's optimizer; None where only buffers learn."""
        return self.update.optimizer

    @property
    def batches(self) -> int:
        """Steps of a whole epoch."""
        return len(self.sizes)

    @property
    def place(self) -> int:
        """Steps done in this phase."""
        return self.done * self.batches + self.within

    def passes(self) -> tuple[int, int]:
        """Return (forward, backward) passes of single images that the whole phase will have made."""
        forward, backward = self.program.passes()
        extra_forward, extra_backward = self._extra_passes()
        return forward + extra_forward, backward + extra_backward

    def train_epoch(self, progress: Progress | None = None) -> EpochLog:
        """Train to the end of the epoch and return its log; a loss that is not finite raises `Diverged` within a step."""
        log = self.run(progress=progress)
        assert log is not None  # nothing stops it before
        return log

    def run(self, steps: int | None = None, progress: Progress | None = None) -> EpochLog | None:
        """Train to the end of the epoch, or for at most so many steps; return the epoch's log if it has ended."""
        if self.done >= self.epochs:
            raise UserError(f"the phase has {self.epochs} epoch(s), all done")
        epoch = self.first_epoch + self.done
        last = min(self.batches, self.steps - self.done * self.batches)
        stop = last if steps is None else min(last, self.within + steps)
        began = time.perf_counter()
        if not self.within and stop:
            self._measure_rates(epoch)
        previous: tuple[StepLog, int, int] | None = None
        for x, y in self._batches(epoch, self.within, stop):
            index, place = self.within, self.place
            turn = self.program.turn(place)
            self.update.begin(place, turn.learning)
            with self._own_draws(epoch, index), self.shards.together():
                generator = self.shards.draws(stream(self.seed, "attack", epoch, index, device=self.device))
                log = self.shards.whole(self.step(x, y, generator=generator, turn=turn))
            self.shards.exchange()
            self.shards.agree(self.step)
            self._tally.add(log, self.program.learned(place))
            self.within += 1
            if self.average is not None:
                self.average.update((place + 1) / self.steps, epoch_ended=self.within == last)
            # The loss is read one step late, so that an accelerator is never waited for while it has nothing queued.
            if previous is not None:
                self._tally.loss += finite_loss(*previous)
            previous = (log, epoch, index)
            if progress is not None:
                progress(self.within, last)
        if previous is not None:
            self._tally.loss += finite_loss(*previous)
        self._seconds += time.perf_counter() - began
        return self._end_of_epoch(epoch) if self.within == last else None

    def _end_of_epoch(self, epoch: int) -> EpochLog:
        began = time.perf_counter()
        check_finite(self.model, epoch)
        if self.average is not None and self.average.stale:
            self._recalibrate(epoch, self.average)
        tally = self._tally
        seconds = self._seconds + time.perf_counter() - began
        log = EpochLog(epoch + 1, tally.loss / max(1, tally.images), seconds, tally.forward, tally.backward)
        self._tally = Tally(learned=tally.learned)
        self._seconds = 0.0
        self.done, self.within = self.done + 1, 0
        return log

    def _batches(
        self, epoch: int, start: int, stop: int, *, augment: bool = True, shared: bool = True
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader = batches(
            self.images,
            self.batch_size,
            seed=self.seed,
            epoch=epoch,
            augment=self.augment if augment else None,
            device=self.device,
            start=start,
            part=self.shards.rows if self.shards.several and shared else None,
        )
        return itertools.islice(loader, stop - start)

    def _measure_rates(self, epoch: int) -> None:
        """Measure the layers' rates on the first batches of an epoch; nothing but the rates changes."""
        optimizer, settings = self.update.optimizer, self.update.settings
        if optimizer is None or settings.rates == "fixed":
            return
        turn = self._measuring(self.done)
        buffers = [(buffer, buffer.detach().clone()) for buffer in self.model.buffers()]
        measured = []
        for index, (x, y) in enumerate(self._batches(epoch, 0, min(settings.rates_batches, self.batches))):
            with self._own_draws(epoch, index), self.shards.together():
                generator = self.shards.draws(stream(self.seed, "rates", epoch, index, device=self.device))
                found = self.step.gradients(x, y, generator=generator, turn=turn)
                self.shards.whole(found.log)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            finite_loss(found.log, epoch, index)
            self._tally.add(found.log, {}, images=False)
            measured.append(relative_gradient_norms(optimizer, found.by_name))
        apply_rates(optimizer, average_norms(measured))

    def _measuring(self, epoch: int) -> Turn:
        """Return the turn that rates are measured in: that of the epoch's first step, with all who learn in the epoch."""
        begins, ends = epoch * self.batches, min((epoch + 1) * self.batches, self.steps)
        turns = [self.program.turn(index) for index in range(begins, ends)]
        groups = [turn.learning for turn in turns if turn.learning is not None]
        learning = frozenset().union(*groups) if len(groups) == len(turns) else None
        return Turn(learning, None, turns[0].eps, turns[0].ascend)

    def _recalibrate(self, epoch: int, average: Average) -> None:
        """Estimate the averaged model's statistics on all training images, as they are without augmentation."""
        attack = self._met_by(average)

        def generator_of(index: int) -> torch.Generator:
            return stream(self.seed, "recalibration", epoch, index, device=self.device)

        average.recalibrate(
            self._batches(epoch, 0, self.batches, augment=False, shared=False),  # by every process for itself
            attack=attack,
            generator_of=None if attack is None else generator_of,
        )
        forward, backward = self._recalibration_passes(average)
        self._tally.forward, self._tally.backward = self._tally.forward + forward, self._tally.backward + backward

    def _met_by(self, average: Average) -> Attack | None:
        """Return the attack on the images that the average's statistics are estimated on."""
        return self.step.attack if average.settings.on == "adversarial" else None

    def _recalibration_passes(self, average: Average) -> tuple[int, int]:
        attack, images = self._met_by(average), sum(self.sizes)
        return images * (1 + getattr(attack, "forward_passes", 0)), images * getattr(attack, "backward_passes", 0)

    def _extra_passes(self) -> tuple[int, int]:
        """Return the passes beside the steps: measuring layer rates, and statistics of the average."""
        forward = backward = 0
        settings = self.update.settings
        if settings.rates != "fixed" and self.update.optimizer is not None:
            for epoch in range(self.epochs):
                one, two = self.step.passes_per_batch(self._measuring(epoch))
                images = sum(self.sizes[: settings.rates_batches])
                forward, backward = forward + one * images, backward + two * images
        average = self.average
        if average is not None and average.settings.statistics == "recalibrate" and self._learning_statistics():
            ends = [min((epoch + 1) * self.batches, self.steps) for epoch in range(self.epochs)]
            times = sum(end / self.steps >= float(average.settings.start or 0) for end in ends)
            one, two = self._recalibration_passes(average)
            forward, backward = forward + times * one, backward + times * two
        return forward, backward

    def _learning_buffers(self) -> list[str]:
        entries, signals = self.partition.inventory.entries, self.step.signals
        groups = [selection for group, selection in self.partition.groups.items() if signals[group]]
        return [name for selection in groups for name in selection if entries[name].buffer]

    def _learning_statistics(self) -> list[str]:
        entries = self.partition.inventory.entries
        return [name for name in self._learning_buffers() if any(map(is_norm, entries[name].owners))]

    @contextmanager
    def result(self) -> Iterator[nn.Module]:
        """Give the model as this phase hands it on: with averaged weights inside the block, if it averages any."""
        if self.average is None:
            yield self.model
        else:
            with self.average.applied():
                yield self.model

    @contextmanager
    def _own_draws(self, epoch: int, index: int) -> Iterator[None]:
        """Give layers that draw from torch's global state, such as dropout, draws of this very step; restore it after."""
        own = (self.shards.ranks.index,) if self.shards.several else ()
        with global_draws(stream_seed(self.seed, "model", epoch, index, *own), [self.device]):
            yield

    def state(self) -> dict[str, Tensor]:
        """Return all that a resume needs, after any step, as named tensors."""
        tally = self._tally
        state = joined(
            {
                "model": snapshot(self.model),
                "update": self.update.state(),
                "average": {} if self.average is None else self.average.state(),
                "learned": {group: torch.tensor(count) for group, count in tally.learned.items()},
                "reached": {name: torch.ones((), dtype=torch.bool) for name in sorted(self.step.reached)},
            }
        )
        if self.step.choice is not None:
            state["crafting"] = torch.tensor(
                list(json.dumps(self.step.choice.plain_data()).encode()), dtype=torch.uint8
            )
        state["place"] = torch.tensor([self.done, self.within])
        state["tally"] = torch.tensor([tally.loss, tally.images, tally.forward, tally.backward], dtype=torch.float64)
        return state

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a state that `state` returned."""
        self.model.load_state_dict(part(tensors, "model"))
        self.update.load_state(part(tensors, "update"))
        if self.average is not None:
            self.average.load_state(part(tensors, "average"))
        self.step.reached = set(part(tensors, "reached"))
        if "crafting" in tensors:
            self.step.choice = Choice.of(json.loads(bytes(tensors["crafting"].tolist())))
        self.done, self.within = (int(value) for value in tensors["place"])
        loss, images, forward, backward = tensors["tally"].tolist()
        learned = {group: int(count) for group, count in part(tensors, "learned").items()}
        self._tally = Tally(loss, int(images), int(forward), int(backward), learned)

    def ledger(self) -> list[GroupChange]:
        """Return what moved since the phase began, in the model that it hands on."""
        if self.average is not None and self.average.stale:  # in the middle of an epoch
            now = snapshot(self.model)
        else:
            with self.result() as model:
                now = snapshot(model)
        return compare(
            self.partition,
            self.step.signals,
            self.start,
            now,
            self.step.reached,
            effective_rates=self.update.effective_rates(),
            learned=self._tally.learned,
        )

    def verify(self) -> list[GroupChange]:
        """Return the ledger; a broken promise raises `UserError` with the tensors' names."""
        ledger = self.ledger()
        if self.done or self.within:
            check_promises(ledger)
        return ledger
