"""Random streams: every draw comes from a generator derived from what it is for, never from the global state.

A stream is a pure function of (seed, purpose, position...), so a resume, a change of logging or another order of runs
changes no draw, and arms of a study that share a seed see the same images in the same order: their differences are paired.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from robustlayers.core.identity import digest

__all__ = ["global_draws", "stream", "stream_place", "stream_seed"]


def stream_seed(seed: int, purpose: str, *position: int | str) -> int:
    """Return the 63-bit seed of the stream for `purpose` at `position` (epoch, step, rank, ...).

    >>> stream_seed(0, "attack", 3, 7) == stream_seed(0, "attack", 3, 7)
    True
    >>> stream_seed(0, "attack", 3, 7) == stream_seed(0, "attack", 37)
    False
    """
    return int(digest([seed, purpose, *position], 16), 16) >> 1


def stream(seed: int, purpose: str, *position: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator on `device` for `purpose` at `position`; see `stream_seed`."""
    return torch.Generator(device=device).manual_seed(stream_seed(seed, purpose, *position))


def stream_place(generator: torch.Generator) -> int:
    """Return a 56-bit number that tells where a generator stands, which is left there.

    >>> one, two = stream(0, "attack"), stream(0, "attack")
    >>> _ = torch.rand(3, generator=two)
    >>> stream_place(one) == stream_place(stream(0, "attack")), stream_place(one) == stream_place(two)
    (True, False)
    """
    state = hashlib.sha256(generator.get_state().cpu().numpy().tobytes()).digest()
    return int.from_bytes(state[:7], "big")


@contextmanager
def global_draws(seed: int, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Let torch's global generators, of the CPU and of `devices`, begin at `seed` inside, and put them back.

    For code that draws from nowhere else, such as dropout and the initialization of torch's layers.

    >>> with global_draws(3):
    ...     one = torch.rand(2)
    >>> with global_draws(3):
    ...     bool((torch.rand(2) == one).all())
    True
    """
    cuda = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for device in cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
