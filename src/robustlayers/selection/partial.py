"""Selector functions that pick some entries of tensors: `random`, `channels`, `random_channels`.

An output channel is one index of the first dimension of a parameter: all weights of a filter or of a row, one entry of a
bias or of a norm layer. (For a transposed convolution these are the input channels.) Buffers are never divided.
"""

from __future__ import annotations

import torch

from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.selection.arguments import Arguments
from robustlayers.selection.selection import Selection

__all__ = ["channels", "random_channels", "random_entries"]


def random_entries(arguments: Arguments) -> Selection:
    """`random(like=S, of=T, seed=0)`: as many parameter entries as S has, scattered uniformly over the parameters of T.

    T is every parameter outside of S unless given. The draw depends on the seed and the number of entries to draw from
    only. The control of Frankle et al. 2021 (section 5) for "is it the norm layers or just so many parameters".
    """
    bound = arguments.bind(named=("like", "of", "seed"))
    if "like" not in bound:
        raise UserError("selector function 'random' needs like=SELECTOR, as in random(like=norm, seed=0)")
    inventory = arguments.inventory
    like = arguments.evaluate(bound["like"], inventory)
    seed = arguments.whole_number(bound, "seed", 0, default=0)
    pool = arguments.evaluate(bound["of"], inventory) if "of" in bound else ~like
    pool = Selection(inventory, {name: mask for name, mask in pool.parts.items() if not inventory.entries[name].buffer})
    count, available = like.parameters, pool.parameters
    if count == 0:
        raise UserError("selector function 'random': like= picks no parameters")
    if count > available:
        raise UserError(f"selector function 'random': {count} entries wanted, only {available} to draw from")
    order = torch.randperm(available, generator=stream(seed, "random-selector"))
    drawn = torch.zeros(available, dtype=torch.bool)
    drawn[order[:count]] = True
    parts: dict[str, torch.Tensor | None] = {}
    start = 0
    for name, mask in pool.parts.items():
        shape = inventory.entries[name].tensor.shape
        size = pool.count(name)
        taken = drawn[start : start + size]
        start += size
        full = torch.zeros(shape.numel(), dtype=torch.bool)
        if mask is None:
            full[:] = taken
        else:
            full[mask.flatten()] = taken
        parts[name] = full.view(shape)
    return Selection(inventory, parts)


def channels(arguments: Arguments) -> Selection:
    """`channels(S, share, seed=0)`: of each module with parameters in S, a random `share` of its output channels.

    Of C channels, max(1, share * C rounded, halves up) are drawn, for 0 < share <= 1. Parameters of one module with
    equally many channels share the draw, so that a filter goes with its bias; other modules draw for themselves. The draw
    depends on the seed, the module's name and C only. C counts the channels that S holds whole.
    """
    bound = arguments.bind("selector", "share", named=("seed",))
    whole = arguments.selection(bound, "selector", "channels(conv, 0.25)")
    share = arguments.fraction(bound, "share")
    if share == 0:
        raise UserError("selector function 'channels': share must be more than 0")
    seed = arguments.whole_number(bound, "seed", 0, default=0)
    inventory = arguments.inventory
    parts: dict[str, torch.Tensor | None] = {}
    for name, available in _whole_channels(whole).items():
        count = max(1, int(share * len(available) + 0.5))
        generator = stream(seed, "channels-selector", inventory.entries[name].module_name, len(available))
        drawn = torch.randperm(len(available), generator=generator)[:count]
        parts[name] = _mask(inventory.entries[name].tensor.shape, available[drawn])
    if not parts:
        raise UserError("selector function 'channels': the selector holds no whole channel of a parameter")
    return Selection(inventory, parts)


def random_channels(arguments: Arguments) -> Selection:
    """`random_channels(like=S, of=T, seed=0)`: whole output channels of T with about as many entries as S has parameters.

    All channels of T, by default of every parameter outside of S, are gone through in random order, and each is taken that
    still fits: never more entries than S has, and fewer by less than the smallest channel that was not taken. The control
    of `random`, for selections that are made of whole channels. The draw depends on the seed and the channels of T only.
    """
    bound = arguments.bind(named=("like", "of", "seed"))
    like = arguments.selection(bound, "like", "random_channels(like=norm, seed=0)")
    seed = arguments.whole_number(bound, "seed", 0, default=0)
    inventory = arguments.inventory
    pool = _whole_channels(arguments.evaluate(bound["of"], inventory) if "of" in bound else ~like)
    sizes = {name: inventory.entries[name].tensor[0].numel() for name in pool}
    wanted, available = like.parameters, sum(sizes[name] * len(indices) for name, indices in pool.items())
    if wanted == 0:
        raise UserError("selector function 'random_channels': like= picks no parameters")
    if wanted > available:
        raise UserError(f"selector function 'random_channels': {wanted} entries wanted, only {available} to draw from")
    if wanted < min(sizes.values()):
        raise UserError(
            f"selector function 'random_channels': {wanted} entries wanted, but the smallest channel to draw from has "
            f"{min(sizes.values())}"
        )
    candidates = [(name, int(index)) for name, indices in pool.items() for index in indices]
    taken: dict[str, list[int]] = {}
    for place in torch.randperm(len(candidates), generator=stream(seed, "random-channels-selector")).tolist():
        name, index = candidates[place]
        if sizes[name] <= wanted:
            wanted -= sizes[name]
            taken.setdefault(name, []).append(index)
    parts: dict[str, torch.Tensor | None] = {
        name: _mask(inventory.entries[name].tensor.shape, torch.tensor(indices)) for name, indices in taken.items()
    }
    return Selection(inventory, parts)


def _whole_channels(selection: Selection) -> dict[str, torch.Tensor]:
    """Return, for each parameter, the indices of the first dimension that the selection holds whole."""
    found = {}
    for name, mask in selection.parts.items():
        entry = selection.inventory.entries[name]
        if entry.buffer or entry.tensor.dim() == 0 or entry.size == 0:
            continue
        length = entry.tensor.shape[0]
        indices = torch.arange(length) if mask is None else mask.reshape(length, -1).all(1).nonzero().flatten()
        if len(indices):
            found[name] = indices
    return found


def _mask(shape: torch.Size, indices: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[indices] = True
    return mask
