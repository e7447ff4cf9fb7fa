"""Processes that work on one thing together, as `torchrun` starts them: who is who, and what they exchange.

One process alone is the usual case: then nothing is exchanged, and `torch.distributed` is not imported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from robustlayers.core.errors import UserError

__all__ = ["ALONE", "Lost", "Ranks", "environment", "joined"]

_PATIENCE = timedelta(hours=24)  # for another that works alone meanwhile; torchrun ends the dead


class Lost(Exception):
    """An exchange has failed, most likely because another process has ended."""


@contextmanager
def _noticing() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise Lost("another process has ended, or the connection to it is lost") from error


class Ranks:
    """One of `count` processes, number `index`; `main` is the first of them, which alone writes.

    Every exchange is made by all of them, in the same order. Tensors of the CPU go through gloo, those of a GPU through
    NCCL; results have the same bits in every process. Nothing here waits for a GPU, except `tell`.
    """

    def __init__(self, index: int = 0, count: int = 1, store: Any = None) -> None:
        self.index, self.count, self._store = index, count, store

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.index == 0

    @classmethod
    def of_group(cls) -> Ranks:
        """Return the processes of torch's default group, which must be initialized; without one, this process alone."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def total(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over processes, and return it."""
        if self.count > 1:
            import torch.distributed as dist

            with _noticing():
                dist.all_reduce(tensor)
        return tensor

    def copy(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by that of the main process, and return it."""
        if self.count > 1:
            import torch.distributed as dist

            with _noticing():
                dist.broadcast(tensor, 0)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes, [count, ...], in the order of the processes."""
        together = tensor.new_zeros((self.count, *tensor.shape))
        together[self.index] = tensor
        return self.total(together)

    def tell(self, value: Any = None) -> Any:
        """Return plain data of the main process in all of them; what the others give is not looked at."""
        if self.count == 1:
            return value
        data = json.dumps(value).encode() if self.main else b""
        size = int(self.copy(torch.tensor(len(data))))
        text = torch.tensor(list(data), dtype=torch.uint8) if self.main else torch.zeros(size, dtype=torch.uint8)
        return json.loads(bytes(self.copy(text).tolist()))

    def wait(self) -> None:
        """Wait until all are here."""
        self.total(
            torch.zeros(())
        )  # a sum needs every one; of a broadcast the main process would not wait for the others

    def first(self) -> bool:
        """Tell whether no other process has asked yet: of several that fail of one thing, one says so."""
        if self._store is None:
            return self.main
        try:
            return self._store.add("first", 1) == 1
        except RuntimeError:  # who kept the store is gone: the main process, if torchrun did not keep it
            return self.main


ALONE = Ranks()
"""A process by itself."""


def environment() -> tuple[int, int]:
    """Return (rank, number of processes) as `torchrun` sets them; (0, 1) where it did not start this process."""
    try:
        index, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        raise UserError("RANK and WORLD_SIZE are whole numbers; let torchrun set them") from None
    if not 0 <= index < count:
        raise UserError(f"RANK {index} of WORLD_SIZE {count} is not allowed; let torchrun set them")
    return index, count


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Meet the other processes that `torchrun` started, if there are any, until the end of the block.

    `device` is where this process computes; see `pick_device`. On an exception the others are not waited for.
    """
    index, count = environment()
    if count == 1:
        yield ALONE
        return
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, index, count = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps the store when it starts anew
    group, own = (dist.PrefixStore(f"{name}-{attempt}", store) for name in ("group", "own"))  # pyright: ignore
    dist.init_process_group(backend, store=group, rank=index, world_size=count, timeout=_PATIENCE)
    ranks = Ranks(index, count, own)
    ranks.wait()
    yield ranks
    ranks.wait()
    dist.destroy_process_group()
