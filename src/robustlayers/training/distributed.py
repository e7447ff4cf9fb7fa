"""Batches shared by several processes: who takes which images, the average of their gradients, and their statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robustlayers.attacks import FGSM, MIM, NFGSM, PGD, RFGSM, Gaussian, Noise, is_own, label
from robustlayers.attacks._draws import Part
from robustlayers.core.errors import UserError, one_of
from robustlayers.core.ranks import Ranks
from robustlayers.normalization.precision import Choice
from robustlayers.normalization.synchronized import Shared, check_layers, sharing
from robustlayers.selection.inventory import Inventory, is_norm
from robustlayers.training.step import PartialStep, StepLog

__all__ = ["STATISTICS", "Shards", "check_shared", "shard_sizes"]

STATISTICS = ("sync", "mean", "none")


def shard_sizes(n: int, count: int) -> list[int]:
    """Return how many of a batch's `n` images each of `count` processes takes, at least two, since batch statistics of one
    are degenerate; where that leaves none for some, those get 0.

    >>> shard_sizes(10, 4), shard_sizes(5, 4)
    ([3, 3, 2, 2], [3, 2, 0, 0])
    """
    takers = max(1, min(count, n // 2))
    whole, left = divmod(n, takers)
    return [whole + (index < left) if index < takers else 0 for index in range(count)]


class Shards:
    """One process's part of every batch, the average of gradients over processes, and what becomes of statistics.

    Every process holds the whole data and the same weights, sees the same batches in the same order, and computes with a
    contiguous part of each. With n_r images in process r and N in all, a gradient is

        g = sum_r (n_r / N) g_r,

    that of the mean loss over all images: given to a step as `average`, it is taken by name, for every tensor that the step
    trains, so that a frozen tensor is no exchange and one without a gradient in some process is a 0 there. Where no process
    has a gradient for a tensor there is none. A process without images computes along with the first ones, at weight 0.

    `statistics` that batch norm normalizes by, and what becomes of the running ones:

    | value | normalizes by | running statistics after a step |
    |---|---|---|
    | `sync` | the whole batch, forward and backward | of the whole batch |
    | `mean` | the process's part (ghost batch norm: Hoffer et al. 2017) | mean over processes, by their images |
    | `none` | the process's part | those of the first process |

    After a step all processes hold the same buffers. The mean of the parts' variances lacks what their means differ by.

    Args:
        model: of all processes alike.
        statistics: one of `STATISTICS`.
        ranks: the processes; those of torch's default group unless given.
        moving: buffers that a step may move; all that belong to norm layers unless given.

    Raises `UserError` for an unknown value, and for `sync` on norm layers that have no such form.

    >>> shards = Shards(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    >>> with shards.of(torch.rand(4, 2), torch.arange(4) % 2) as (x, y):
    ...     print(len(x))
    4
    """

    def __init__(
        self,
        model: nn.Module,
        statistics: str = "sync",
        *,
        ranks: Ranks | None = None,
        moving: Sequence[str] | None = None,
    ) -> None:
        if statistics not in STATISTICS:
            raise UserError(one_of("statistics", str(statistics), STATISTICS))
        self.model, self.statistics = model, statistics
        self.ranks = Ranks.of_group() if ranks is None else ranks
        if self.several and statistics == "sync":
            check_layers(model)
        entries = [entry for entry in Inventory(model) if entry.buffer and entry.tensor.is_floating_point()]
        if moving is None:
            moving = [entry.name for entry in entries if any(map(is_norm, entry.owners))]
        # Batch norm's are equal already where it is synchronized; instance norm's are a mean over images.
        batch = nn.modules.batchnorm._BatchNorm
        self._buffers = [
            (entry.module, entry.attribute)
            for entry in entries
            if entry.name in moving and not (statistics == "sync" and isinstance(entry.module, batch))
        ]
        self.sizes: list[int] = []
        self._before: list[Tensor] = []
        self._agreed = False

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return self.ranks.count > 1

    @property
    def share(self) -> float:
        """How much the present batch's images of this process weigh; processes weigh alike before there was a batch."""
        return self.sizes[self.ranks.index] / sum(self.sizes) if self.sizes else 1 / self.ranks.count

    def rows(self, n: int) -> slice:
        """Return the places of a batch of `n` that this process computes with; what follows is about that batch."""
        self.sizes = shard_sizes(n, self.ranks.count)
        own = self.sizes[self.ranks.index]
        if not own:
            return slice(0, min(2, n))
        start = sum(self.sizes[: self.ranks.index])
        return slice(start, start + own)

    @contextmanager
    def of(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Give this process's part of a batch, of which a step is taken inside; running statistics are exchanged after it.

        All processes enter and leave the block with the same batch.
        """
        rows = self.rows(len(x))
        with self.together():
            yield x[rows], y[rows]
        self.exchange()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let batch norm normalize by the whole batch inside, where it is to; what `exchange` does is about this block."""
        synchronized = self.several and self.statistics == "sync"
        if self.several:
            self._before = [torch.cat([tensor.reshape(-1) for tensor in own]) for own in self._moving()]
        with sharing(Shared(self.ranks, tuple(self.sizes)) if synchronized else None):
            yield

    def _moving(self) -> list[list[Tensor]]:
        """Return the buffers to exchange, those of one kind together; looked up anew, since a model may have been moved."""
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for module, name in self._buffers:
            tensor = module._buffers[name]
            if tensor is not None:
                kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach())
        return list(kinds.values())

    def draws(self, generator: torch.Generator) -> torch.Generator:
        """Return a generator of our own attacks' draws: those that one process would make, for the images of this one."""
        if not self.several:
            return generator
        n = sum(self.sizes)
        return Part.of_batch(generator, self.rows(n), n)

    def __call__(self, gradients: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the average of gradients over processes; `wanted` are the tensors that may have one, in all of them alike."""
        if not self.several:
            return dict(gradients)
        averaged: dict[str, Tensor] = {}
        kinds: dict[tuple[torch.device, torch.dtype], list[str]] = {}
        for name in sorted(wanted):
            tensor = wanted[name]
            kinds.setdefault((tensor.device, torch.promote_types(tensor.dtype, torch.float32)), []).append(name)
        for (device, dtype), names in kinds.items():
            # One exchange for all tensors of a kind, each laid out as its parameter is, in every process alike; behind
            # them, in how many processes each has a gradient.
            values = sum(wanted[name].numel() for name in names)
            flat = torch.zeros(values + len(names), dtype=dtype, device=device)
            views = dict(zip(names, _views(flat, [wanted[name] for name in names]), strict=True))
            for name in names:
                if name in gradients and self.share:
                    views[name].copy_(gradients[name]).mul_(self.share)
            here = [float(name in gradients) for name in names]
            flat[values:].copy_(torch.tensor(here, dtype=dtype), non_blocking=True)
            self.ranks.total(flat)
            # Looked at only where one is missing here, since that waits for the device.
            found = here if all(here) else flat[values:].tolist()
            averaged |= {n: views[n].to(wanted[n].dtype) for n, count in zip(names, found, strict=True) if count}
        return averaged

    def whole(self, log: StepLog) -> StepLog:
        """Return a step's log for the whole batch, in all processes alike; nothing waits for the device."""
        if not self.several:
            return log
        scalars = [loss.double() * self.share for loss in log.losses.values()]
        scalars += [correct.double() * bool(self.share) for correct in log.correct.values()]
        if scalars:
            sums = self.ranks.total(torch.stack(scalars))
            log.losses = {name: sums[place] for place, name in enumerate(log.losses)}
            log.correct = {name: sums[len(log.losses) + place].long() for place, name in enumerate(log.correct)}
        log.size = sum(self.sizes) or log.size * self.ranks.count
        return log

    @torch.no_grad()
    def exchange(self) -> None:
        """Make the running statistics of all processes the same; those that have not moved in any stay bit for bit."""
        if not self.several:
            return
        for own, before in zip(self._moving(), self._before, strict=True):
            flat = torch.cat([tensor.reshape(-1) for tensor in own])
            if self.statistics == "none":
                self.ranks.copy(flat)
            else:
                flat = before + self.ranks.total((flat - before) * self.share)
            for tensor, value in zip(own, flat.split([tensor.numel() for tensor in own]), strict=True):
                tensor.copy_(value.view_as(tensor))

    def agree(self, step: PartialStep) -> None:
        """Let all processes craft in the precision that the first one chose, once it has."""
        if self._agreed or not self.several or step.choice is None:
            return
        own = step.choice.plain_data()
        told = self.ranks.tell(own)
        if told != own:
            step.choice = Choice.of(told)
        self._agreed = True


def check_shared(step: PartialStep, statistics: str) -> None:
    """Raise `UserError` for what a step over a shared batch cannot do: processes would make passes of different numbers."""
    if statistics != "sync":
        return
    binding = step.binding()
    crafts = is_own(step.attack) and "adversarial" in binding.passes
    untracked = [
        name
        for name, module in step.model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
    ]
    if crafts and untracked:
        raise UserError(
            f"statistics: sync: {untracked[0]} has no running statistics, so that each process crafts by those of its own "
            "images; allowed: none, mean"
        )
    if any(setting.by == "mixture" for settings in binding.settings.values() for setting in settings.values()):
        raise UserError("statistics: sync has no mixture of batch and running statistics; allowed: none, mean")
    still = all(setting.still for setting in binding.settings["craft"].values())
    regular = isinstance(step.attack, _REGULAR) and not getattr(step.attack, "early_exit", False)
    if crafts and not still and not regular:
        raise UserError(
            f"statistics: sync: {label(step.attack)} drops images that are done with, so that it cannot craft by the "
            "statistics of a batch that processes share; allowed: none, mean, or craft: {by: running}"
        )


_REGULAR = (FGSM, RFGSM, NFGSM, MIM, PGD, Noise, Gaussian)  # as many passes whatever becomes of the images


def _views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return views of a buffer, one behind the other, with the shapes and memory layouts of other tensors."""
    views, place = [], 0
    for tensor in like:
        strides = torch.empty_like(tensor, device="meta").stride()
        views.append(flat.as_strided(tensor.shape, strides, place))
        place += tensor.numel()
    return views
