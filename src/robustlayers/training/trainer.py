"""One phase of training: epochs of partial steps over data on the device, stoppable and resumable at every epoch.

for phase in recipe.phases:
    partition = bind(phase.groups, model)            # total, disjoint, non-empty, or an error that lists the tensors
    for x, y in batches:                              # order = f(seed, epoch) only
        with guard(model):                            # restores modes, requires_grad, buffers, .grad, hooks, RNG
            x_adv = attack(forward under policy.craft, x, y)
        for objective in distinct(signals):           # a forward is shared by all that need the same pass
            grads |= gradient(objective, of only the groups that it trains)
        optimizer.step()                              # one optimizer, fixed groups; frozen: no grad at all
    verify(what was promised frozen is bit-equal, what was promised trained moved)      # the ledger
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustlayers.core.errors import Fault, UserError
from robustlayers.core.random import stream, stream_seed
from robustlayers.data import Augment, Images, batch_count, batches
from robustlayers.normalization.policy import NormPolicy
from robustlayers.selection.partition import Partition
from robustlayers.training.ledger import GroupChange, compare, snapshot
from robustlayers.training.optimizers import OptimizerSettings, build_optimizer, load_optimizer, optimizer_tensors
from robustlayers.training.schedules import Schedule
from robustlayers.training.step import Attack, PartialStep, StepLog

__all__ = ["Diverged", "EpochLog", "PhaseTrainer"]

Progress = Callable[[int, int], None]
"""`progress(batches done, batches of the epoch)`"""


class Diverged(Exception):
    """The loss or a tensor stopped being finite; the text says which and at which step."""


@dataclass(frozen=True)
class EpochLog:
    """What one epoch cost and saw."""

    epoch: int  # from 1, over all phases
    loss: float  # mean over images of the sum of all objectives
    seconds: float
    forward_passes: int  # of single images
    backward_passes: int


class PhaseTrainer:
    """A phase bound to a model and its data.

    Everything random is a function of (seed, epoch over all phases, step), so a trainer that loads the state of epoch k
    goes on exactly as one that was never stopped.

    Args:
        model: on `device`; trained in place.
        groups: `{group: selector}`.
        signals: `{group: signal}`.
        images: the training images.
        epochs: of this phase.
        first_epoch: epochs of earlier phases.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Mapping[str, str],
        signals: Mapping[str, str | Mapping[str, float | str]],
        images: Images,
        *,
        epochs: int,
        attack: Attack | None = None,
        batch_size: int = 128,
        optimizer: OptimizerSettings | None = None,
        schedule: Schedule | None = None,
        policy: NormPolicy | None = None,
        augment: Augment | None = None,
        seed: int = 0,
        first_epoch: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model, self.images, self.batch_size, self.device = model, images, batch_size, torch.device(device)
        self.epochs, self.first_epoch, self.seed = epochs, first_epoch, seed
        self.schedule = schedule or Schedule()
        self.augment = augment or Augment()
        self.partition = Partition(model, groups)
        self.step = PartialStep(self.model, self.partition, signals, attack=attack, optimizer=None, policy=policy)
        self.optimizer = build_optimizer(self.partition, self.step.signals, optimizer or OptimizerSettings())
        # With only statistics to learn there is nothing for an optimizer to do, but the passes still move them.
        self.step.optimizer = self.optimizer or _Nothing()
        self.start = snapshot(model)
        self.done = 0
        self.batches = batch_count(len(images), batch_size)

    def train_epoch(self, progress: Progress | None = None) -> EpochLog:
        """Train one epoch and return its log; a loss that is not finite raises `Diverged` within a step."""
        if self.done >= self.epochs:
            raise UserError(f"the phase has {self.epochs} epoch(s), all done")
        epoch = self.first_epoch + self.done
        began = time.perf_counter()
        total, images, forward, backward = 0.0, 0, 0, 0
        previous: tuple[int, StepLog] | None = None
        loader = batches(
            self.images, self.batch_size, seed=self.seed, epoch=epoch, augment=self.augment, device=self.device
        )
        for index, (x, y) in enumerate(loader):
            if self.optimizer is not None:
                self.schedule.apply(self.optimizer, self.done * self.batches + index, self.epochs * self.batches)
            with self._own_draws(epoch, index):
                log = self.step(x, y, generator=stream(self.seed, "attack", epoch, index, device=self.device))
            images += log.size
            forward += log.forward_passes * log.size
            backward += log.backward_passes * log.size
            # The loss is read one step late, so that an accelerator is never waited for while it has nothing queued.
            if previous is not None:
                total += self._finite(epoch, *previous)
            previous = (index, log)
            if progress is not None:
                progress(index + 1, self.batches)
        if previous is not None:
            total += self._finite(epoch, *previous)
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise Diverged(f"{name} is not finite after epoch {epoch + 1}")
        self.done += 1
        return EpochLog(epoch + 1, total / max(1, images), time.perf_counter() - began, forward, backward)

    @contextmanager
    def _own_draws(self, epoch: int, index: int) -> Iterator[None]:
        """Give layers that draw from torch's global state, such as dropout, draws of this very step; restore it after."""
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            seed = stream_seed(self.seed, "model", epoch, index)
            torch.default_generator.manual_seed(seed)
            for device in cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield

    @staticmethod
    def _finite(epoch: int, index: int, log: StepLog) -> float:
        for name, loss in log.losses.items():
            if not bool(torch.isfinite(loss)):
                raise Diverged(f"the {name} loss is {loss.item()} at epoch {epoch + 1}, step {index + 1}")
        return float(log.loss) * log.size

    def state(self) -> dict[str, Tensor]:
        """Return all that a resume needs beside the epoch: `model/...`, `optimizer/...` and `reached/...` tensors."""
        state = {f"model/{name}": tensor for name, tensor in snapshot(self.model).items()}
        state |= {f"optimizer/{name}": tensor for name, tensor in optimizer_tensors(self.optimizer).items()}
        return state | {f"reached/{name}": torch.ones((), dtype=torch.bool) for name in sorted(self.step.reached)}

    def load_state(self, tensors: Mapping[str, Tensor], epochs_done: int) -> None:
        """Go on after `epochs_done` epochs of this phase from a state that `state` returned."""
        model = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
        optimizer = {name.removeprefix("optimizer/"): t for name, t in tensors.items() if name.startswith("optimizer/")}
        self.model.load_state_dict(model)
        load_optimizer(self.optimizer, optimizer)
        self.step.reached = {name.removeprefix("reached/") for name in tensors if name.startswith("reached/")}
        self.done = epochs_done

    def ledger(self) -> list[GroupChange]:
        """Return what moved since the phase began."""
        return compare(self.partition, self.step.signals, self.start, snapshot(self.model), self.step.reached)

    def verify(self) -> list[GroupChange]:
        """Return the ledger; a broken promise raises `UserError` with the tensors' names."""
        ledger = self.ledger()
        faults = [
            Fault(
                f"group {change.group!r} was promised {'frozen' if change.signal == 'frozen' else 'trained'}, but "
                f"{', '.join(change.broken[:4])} {'moved' if change.signal == 'frozen' else 'did not move'}"
            )
            for change in ledger
            if not change.kept
        ]
        if faults and self.done:
            raise UserError(faults)
        return ledger


class _Nothing(torch.optim.SGD):
    """An optimizer without parameters."""

    def __init__(self) -> None:
        super().__init__([torch.zeros(())], lr=0.0)
