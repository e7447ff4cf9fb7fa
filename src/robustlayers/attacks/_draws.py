"""Random numbers for a batch, from one generator, or from one for each image: then none depends on the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustlayers.core.errors import UserError
from robustlayers.core.random import stream

__all__ = ["Generators", "Part", "device_of", "normal", "own_generator", "spawn", "uniform"]

Generators = torch.Generator | Sequence[torch.Generator]
"""One generator for a batch, or one for each image: then an image's draws are the same in every batch."""


class Part(torch.Generator):
    """A generator for some images of a batch, `rows` of `of`: it draws for all of them and hands out what is theirs.

    So processes that share a batch draw what one process would, each for its own images.

    >>> whole = uniform((4, 2), torch.Generator().manual_seed(1))
    >>> part = Part.of_batch(torch.Generator().manual_seed(1), slice(1, 3), 4)
    >>> torch.equal(uniform((2, 2), part), whole[1:3])
    True
    """

    rows: slice
    of: int

    @classmethod
    def of_batch(cls, generator: torch.Generator, rows: slice, of: int) -> Part:
        """Return a generator in the same state, for the images at `rows` of a batch of `of`."""
        part = cls(device=generator.device)
        part.set_state(generator.get_state())
        part.rows, part.of = rows, of
        return part


def own_generator(x: Tensor, generator: Generators | None) -> Generators:
    """Return `generator`, or a fresh one that is the same on every call.

    Raises `UserError` for a sequence of another length than the batch.
    """
    if generator is None:
        return stream(0, "attack", device=x.device)
    if not isinstance(generator, torch.Generator) and len(generator) != len(x):
        raise UserError(f"generator: {len(generator)} of them for {len(x)} images; allowed: one, or one for each image")
    return generator


def device_of(generator: Generators) -> torch.device:
    """Return where the draws are made."""
    return (generator if isinstance(generator, torch.Generator) else generator[0]).device


def uniform(shape: Sequence[int], generator: Generators, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw from [0, 1); the first of `shape` is the images of the batch.

    >>> one, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    >>> both = uniform((2, 3), [one, other])
    >>> torch.equal(both[1], uniform((1, 3), [torch.Generator().manual_seed(2)])[0])
    True
    """
    if isinstance(generator, Part):
        whole = (generator.of, *shape[1:])
        return torch.rand(whole, generator=generator, dtype=dtype, device=generator.device)[generator.rows]
    if isinstance(generator, torch.Generator):
        return torch.rand(tuple(shape), generator=generator, dtype=dtype, device=generator.device)
    rest = tuple(shape[1:])
    return torch.stack([torch.rand(rest, generator=one, dtype=dtype, device=one.device) for one in generator])


def normal(shape: Sequence[int], generator: Generators, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw from the standard normal distribution; the first of `shape` is the images of the batch."""
    if isinstance(generator, Part):
        whole = (generator.of, *shape[1:])
        return torch.randn(whole, generator=generator, dtype=dtype, device=generator.device)[generator.rows]
    if isinstance(generator, torch.Generator):
        return torch.randn(tuple(shape), generator=generator, dtype=dtype, device=generator.device)
    rest = tuple(shape[1:])
    return torch.stack([torch.randn(rest, generator=one, dtype=dtype, device=one.device) for one in generator])


def spawn(n: int, generator: Generators) -> list[torch.Generator]:
    """Return `n` new generators, one for each image, seeded by draws of `generator`."""
    if isinstance(generator, torch.Generator):
        drawn = generator.of if isinstance(generator, Part) else n
        seeds = torch.randint(2**62, (drawn,), generator=generator, device=generator.device).tolist()
        seeds = seeds[generator.rows] if isinstance(generator, Part) else seeds
        return [torch.Generator(device=generator.device).manual_seed(seed) for seed in seeds]
    return [spawn(1, one)[0] for one in generator]
