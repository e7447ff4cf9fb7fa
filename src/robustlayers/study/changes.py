"""Phases that do not train: statistics estimated anew, and tensors set. Each looks like a trainer of one epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import nan

import torch
from torch import Tensor, nn

from robustlayers.attacks import is_own
from robustlayers.core.random import stream
from robustlayers.data import Images, batch_sizes, batches
from robustlayers.normalization import crafting_forward
from robustlayers.normalization.recalibration import Recalibration
from robustlayers.selection import Partition
from robustlayers.study.begin import start_text
from robustlayers.study.phases import group_texts, input_attack, phase_partition
from robustlayers.study.plan import PhaseNode
from robustlayers.training import EpochLog, GroupChange, check_promises, compare, snapshot
from robustlayers.training.state import joined, part

__all__ = ["Changed", "Recalibrated"]

Progress = Callable[[int, int], None]


class Changed:
    """A phase that sets tensors: the model has the new values already, `before` has the old ones."""

    epochs = 1

    def __init__(self, node: PhaseNode, model: nn.Module, before: Mapping[str, Tensor]) -> None:
        self.node, self.model, self.before = node, model, before
        self.partition = phase_partition(model, node.recipe, node.phase)
        self.done = 0

    @property
    def place(self) -> int:
        """What was done so far, for the name of a state."""
        return self.done

    def run(self, steps: int | None = None, progress: Progress | None = None) -> EpochLog | None:
        """Count the change as an epoch of its own, so that its result is measured as all others."""
        self.done = 1
        return EpochLog(self.node.first_epoch + 1, nan, 0.0, 0, 0)

    @contextmanager
    def result(self) -> Iterator[nn.Module]:
        """Give the model as this phase hands it on."""
        yield self.model

    def state(self) -> dict[str, Tensor]:
        """Return what a resume needs: nothing but the place, since the change is made anew in no time."""
        return {"place": torch.tensor(self.done)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        self.done = int(tensors["place"])

    def verify(self) -> list[GroupChange]:
        """Return what moved; what is not set did not move, or `UserError` tells which tensors did."""
        return _ledger(self.node, self.partition, self.before, self.model)


class Recalibrated:
    """A phase that estimates running statistics on all training images once, without augmentation."""

    epochs = 1

    def __init__(self, node: PhaseNode, model: nn.Module, images: Images, seed: int) -> None:
        self.node, self.model, self.images, self.seed = node, model, images, seed
        self.partition = phase_partition(model, node.recipe, node.phase)
        self.before = snapshot(model)
        self.attack = input_attack(node.recipe, node.phase)
        own = node.phase.recalibrate
        assert own is not None  # the kind of the phase
        generator_of = None if self.attack is None else self._generator
        forward = crafting_forward(model) if self.attack is not None and is_own(self.attack) else None
        self.estimate = Recalibration(
            model,
            self.partition["statistics"],
            momentum=own.momentum,
            attack=self.attack,
            generator_of=generator_of,
            forward=forward,
        )
        self.sizes = batch_sizes(len(images), node.phase.batch_size)
        self.done = 0

    def _generator(self, index: int) -> torch.Generator:
        return stream(self.seed, "recalibration", self.node.first_epoch, index, device=self.images.device)

    @property
    def place(self) -> int:
        """Batches done, and one more at the end."""
        return self.estimate.batches + self.done

    def run(self, steps: int | None = None, progress: Progress | None = None) -> EpochLog | None:
        """Take in the rest of the images, or so many batches; return the log when all were seen."""
        began = time.perf_counter()
        loader = batches(
            self.images,
            self.node.phase.batch_size,
            seed=self.seed,
            epoch=self.node.first_epoch,
            start=self.estimate.batches,
        )
        last = len(self.sizes) if steps is None else min(len(self.sizes), self.estimate.batches + steps)
        for x, y in loader:
            self.estimate.update(x, y)
            if progress is not None:
                progress(self.estimate.batches, len(self.sizes))
            if self.estimate.batches >= last:
                break
        if self.estimate.batches < len(self.sizes):
            return None
        self.estimate.end()
        self.done = 1
        images = sum(self.sizes)
        forward = images * (1 + getattr(self.attack, "forward_passes", 0))
        backward = images * getattr(self.attack, "backward_passes", 0)
        return EpochLog(self.node.first_epoch + 1, nan, time.perf_counter() - began, forward, backward)

    @contextmanager
    def result(self) -> Iterator[nn.Module]:
        """Give the model as this phase hands it on."""
        yield self.model

    def state(self) -> dict[str, Tensor]:
        """Return all that a resume needs."""
        state = joined({"estimate": self.estimate.state(), "model": snapshot(self.model)})
        return {**state, "done": torch.tensor(self.done)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        self.model.load_state_dict(part(tensors, "model"))
        self.estimate.load_state(part(tensors, "estimate"))
        self.done = int(tensors["done"])

    def verify(self) -> list[GroupChange]:
        """Return what moved: the chosen statistics and nothing else, or `UserError` tells which tensors."""
        return _ledger(self.node, self.partition, self.before, self.model)


def _ledger(node: PhaseNode, partition: Partition, before: Mapping[str, Tensor], model: nn.Module) -> list[GroupChange]:
    """Return the ledger of a change: groups that are set may move, all others may not."""
    texts = group_texts(node.phase, partition.selectors, start_text)
    changes = compare(partition, {group: {} for group in partition.groups}, before, snapshot(model))
    found = [
        replace(change, signal=texts[change.group], broken=change.broken if texts[change.group] == "frozen" else ())
        for change in changes
    ]
    check_promises(found)
    return found
