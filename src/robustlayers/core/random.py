"""Random streams: every draw comes from a generator derived from what it is for, never from the global state.

A stream is a pure function of (seed, purpose, position...), so a resume, a change of logging or another order of runs
changes no draw, and arms of a study that share a seed see the same images in the same order: their differences are paired.
"""

from __future__ import annotations

import torch

from robustlayers.core.identity import digest

__all__ = ["stream", "stream_seed"]


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
