"""Which images training sees when: the validation split, and each epoch's order as a function of seed and epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from robustlayers.core.errors import UserError
from robustlayers.core.quantities import number
from robustlayers.core.random import stream
from robustlayers.data.augment import Augment
from robustlayers.data.images import Images, to_float

__all__ = ["batch_count", "batch_sizes", "batches", "split"]


def split(train: Images, share: float | str, seed: int = 0) -> tuple[Images, Images]:
    """Return (training, validation) images: disjoint, complete, each class in proportion, both in the old order.

    Of a class with n images, `share` * n, rounded (halves up), are validation, but never all of them. `seed` is the
    split's own, so that runs that differ in their seed still choose on the same images. `share` is in [0, 1); 0 gives
    an empty validation part. Raises `UserError` for another share, or for one that takes no image at all.
    """
    part = number(share, "validation")
    if not 0 <= part < 1:
        raise UserError(f"validation: a share of {share}; allowed: from 0 to less than 1")
    labels = train.labels.cpu()
    chosen = torch.zeros(len(train), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        count = min(int(part * len(members) + 0.5), len(members) - 1)
        order = torch.randperm(len(members), generator=stream(seed, "validation split", label))
        chosen[members[order[:count]]] = True
    if part > 0 and not chosen.any():
        raise UserError(f"validation: a share of {share} of {len(train)} images takes none; enlarge it or set it to 0")
    return train.take((~chosen).nonzero().flatten()), train.take(chosen.nonzero().flatten())


def batch_count(n: int, batch_size: int) -> int:
    """Return the number of batches in an epoch over `n` images; see `batches` for the last one.

    >>> batch_count(10, 5), batch_count(11, 5), batch_count(12, 5)
    (2, 2, 3)
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 2:
        raise UserError(f"batch_size: {batch_size!r}; allowed: a whole number, at least 2")
    if n < 2:
        raise UserError(f"{n} training image(s); allowed: at least 2, so that batch statistics have a variance")
    whole, left = divmod(n, batch_size)
    return whole + (left > 1)


def batch_sizes(n: int, batch_size: int) -> list[int]:
    """Return the number of images in each batch of an epoch over `n` images.

    >>> batch_sizes(10, 5), batch_sizes(11, 5), batch_sizes(12, 5)
    ([5, 5], [5, 6], [5, 5, 2])
    """
    count = batch_count(n, batch_size)
    return [batch_size] * (count - 1) + [n - batch_size * (count - 1)]


def batches(
    images: Images,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    augment: Augment | None = None,
    device: torch.device | str | None = None,
    start: int = 0,
    part: Callable[[int], slice] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch of (x, y): x float32 [b, c, h, w] in [0, 1], y int64 [b], each image exactly once.

    Order and augmentation are a function of `seed` and `epoch` (and of `augment`) only, not of the device, since they
    are drawn on the CPU. `start` leaves out the first batches without changing the others: for a resume. The last batch
    is short where `batch_size` does not divide the number of images; a single image that is left over joins the batch
    before it, since batch statistics of one image are degenerate. Results lie on `device` (default: where the images
    are); to be fast, move the images there once with `Images.to`. `part`: size of a batch -> the places of it that are
    yielded, for processes that share a batch; their images are those of the whole batch.

    Raises `UserError` at once (not at the first batch) for a batch size or a number of images below 2.
    """
    count = batch_count(len(images), batch_size)
    if not 0 <= start <= count:
        raise UserError(f"start: batch {start}; allowed: 0 to {count}")
    own = augment or Augment()
    return _batches(images, batch_size, count, seed, epoch, own, device or images.device, start, part)


def _batches(
    images: Images,
    batch_size: int,
    count: int,
    seed: int,
    epoch: int,
    augment: Augment,
    device: torch.device | str,
    start: int,
    part: Callable[[int], slice] | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    n = len(images)
    order = torch.randperm(n, generator=stream(seed, "order", epoch)).to(images.device)
    # One transfer per epoch: a draw for each place in the order.
    draws = augment.draw(n, stream(seed, "augmentation", epoch)).to(device) if augment.active else None
    for step in range(start, count):
        here = slice(step * batch_size, n if step == count - 1 else (step + 1) * batch_size)
        if part is not None:
            own = part(here.stop - here.start)
            here = slice(here.start + own.start, here.start + own.stop)
        index = order[here]
        x = images.images[index].to(device, non_blocking=True)
        if draws is not None:
            x = augment.at(x, draws[here])
        yield to_float(x), images.labels[index].to(device, non_blocking=True)
