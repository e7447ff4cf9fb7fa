"""Attacks in turn: each gets the images that the ones before have not broken, in full batches that are kept on disk."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustlayers.attacks import NamedAttack, Threat, is_correct, is_own
from robustlayers.core.errors import UserError
from robustlayers.core.identity import digest
from robustlayers.core.random import stream
from robustlayers.core.ranks import ALONE, Ranks
from robustlayers.evaluation._meter import Meter, Moment, Outlook, units_of
from robustlayers.evaluation._shards import Shard, Shards
from robustlayers.evaluation._still import Forward, check_labels, device_of, images, still
from robustlayers.evaluation.intervals import interval
from robustlayers.normalization.fold import crafting_forward
from robustlayers.normalization.layers import seed_draws

__all__ = ["Moment", "Outcome", "Turn", "cascade"]

_SCHEMA = 2  # raised when the same evaluation would give other numbers
_BATCH = {"cpu": 64}  # as fast as larger ones there, and a kill loses less
_BATCH_ELSEWHERE = 1000
_WIDE = 32  # pixels from which convolutions on a CPU are faster channels-last


@dataclass(frozen=True)
class Turn:
    """What one attack of a cascade did: images `attacked` and `broken`, those still right after it, and its cost.

    `forwards` and `backwards` are passes of single images, as they were made by all processes that had a part in it.
    """

    attack: str
    text: str
    attacked: int
    broken: int
    robust: int
    forwards: int
    backwards: int
    seconds: float = field(compare=False)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a cascade found, image by image, on the CPU.

    `clean`, `robust`: bool [n], right without an attack, and right under all of them. `x_adv`: [n, ...] an adversarial
    image for each that is broken, the image itself for the others. `broken_by`: the attack that broke it, `clean` where it
    was wrong already, empty where it is robust. `label` says what ran, and may stand in a table. `table`: what each attack
    did. `notes`: what a reader should know. `disagreements`: final images that the model judged otherwise at the end.
    """

    label: str
    threat: Threat
    clean: Tensor
    robust: Tensor
    x_adv: Tensor
    broken_by: tuple[str, ...]
    table: tuple[Turn, ...]
    notes: tuple[str, ...] = ()
    disagreements: int = 0

    @property
    def accuracy(self) -> float:
        """Share of images that are right under all attacks."""
        return int(self.robust.sum()) / len(self.robust)

    def __str__(self) -> str:
        n = len(self.robust)
        lines = [f"{self.label}, {self.threat}"]
        lines.append(_line("clean", int(self.clean.sum()), n, ""))
        lines += [_line(t.attack, t.robust, n, f"  broke {t.broken} of {t.attacked}") for t in self.table]
        low, high = interval(int(self.robust.sum()), n)
        lines.append(f"robust {self.accuracy:.2%}, 95 % interval {low:.2%} to {high:.2%}")
        return "\n".join([*lines, *self.notes])


def _line(name: str, right: int, n: int, rest: str) -> str:
    return f"{name:<16} {right / n:7.2%}  {right} of {n}{rest}"


def cascade(
    forward: Forward,
    x: Tensor,
    y: Tensor,
    attacks: Mapping[str, NamedAttack],
    *,
    directory: Path | str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Callable[[Moment], None] | None = None,
    label: str = "",
    notes: tuple[str, ...] = (),
    ranks: Ranks = ALONE,
) -> Outcome:
    """Run attacks in one threat in turn, each on the images that are still right, and return what they found.

    Arguments, directory and random draws as in `autoattack`; `attacks` by name, in their order. An image is robust that is
    right clean and after every attack it got, by the verdict of `forward` itself. `ranks`: processes with the same model,
    arguments and directory, which take the batches of each attack in turn and all return the same; `progress` is then of this
    process's batches.

    Raises `UserError` for images outside [0, 1], for attacks in several threats, for one that leaves its threat, and for a
    directory that holds another evaluation.
    """
    check_labels(x, y)
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise UserError(f"batch_size: {batch_size!r} is not allowed; allowed: a whole number, 1 or more")
    threats = {attack.threat: None for attack in attacks.values()}
    if len(threats) != 1:
        given = "; ".join(map(str, threats)) or "there is no attack"
        raise UserError(f"attacks: one threat is needed for all of them; got: {given}")
    device = device_of(forward, x)
    batch_size = batch_size or _BATCH.get(device.type, _BATCH_ELSEWHERE)
    foreign = [name for name, attack in attacks.items() if not is_own(attack)]
    if foreign:
        raise UserError(f"attacks: {foreign[0]} is not one of this package; allowed here: its own ones")
    run = _Run(forward, x, y, device, batch_size, seed, Shards(directory), progress, ranks)
    held = (
        run.shards.opened(run.identity(attacks)) if ranks.main else nullcontext()
    )  # the main process holds it for all
    with still(forward, device), held:
        clean = run.clean()
        robust, x_adv = clean.clone(), torch.cat([batch.cpu() for _, batch in run.batches(torch.arange(len(x)))])
        broken_by = ["" if right else "clean" for right in clean.tolist()]
        run.outlook.start([units_of(attack) for attack in attacks.values()])
        turns = []
        for number, (name, attack) in enumerate(attacks.items()):
            attacked = int(robust.sum())
            found = run.of_all(list(run.attack(f"{number:02d}-{name}", name, attack, robust)), x_adv)
            robust[found.places] = False
            x_adv[found.places] = found.x_adv
            for place in found.places.tolist():
                broken_by[place] = name
            cost = found.forwards, found.backwards, found.seconds
            turns.append(Turn(name, attack.describe(), attacked, len(found.places), int(robust.sum()), *cost))
        disagreements = run.judge_again(next(iter(threats)), x_adv, robust)
    if disagreements:
        said = f"{disagreements} of {len(x)} final images" if disagreements > 1 else f"1 of {len(x)} final images"
        notes = (*notes, f"judged once more, {said} got another verdict: the output is random, or ties are close")
    return Outcome(
        label or "+".join(attacks),
        next(iter(threats)),
        clean,
        robust,
        x_adv,
        tuple(broken_by),
        tuple(turns),
        notes,
        disagreements,
    )


class _Run:
    """One evaluation under way: what it reads, what it has kept, and how long it may take."""

    def __init__(
        self,
        forward: Forward,
        x: Tensor,
        y: Tensor,
        device: torch.device,
        batch_size: int,
        seed: int,
        shards: Shards,
        progress: Callable[[Moment], None] | None,
        ranks: Ranks,
    ) -> None:
        self.forward, self.x, self.y, self.device = forward, x, y, device
        self.batch_size, self.seed, self.shards, self.ranks = batch_size, seed, shards, ranks
        self.crafting: Forward = forward
        if isinstance(forward, nn.Module):
            # Faster there, and slower on smaller images and elsewhere; never by a measurement, which could fall otherwise
            # when the evaluation is gone on with.
            wide = device.type == "cpu" and x.ndim == 4 and x.shape[-1] >= _WIDE
            self.crafting = crafting_forward(forward, channels_last=wide)
        self.outlook = Outlook(progress)
        self.keys = [
            hashlib.sha256(image.numpy().tobytes() + bytes(str(int(label)), "ascii")).hexdigest()[:32]
            for batch, natural in self.batches(torch.arange(len(x)))
            for image, label in zip(natural.cpu(), self.labels(batch).cpu(), strict=True)
        ]

    def batches(self, places: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield some places and their images, a batch at a time."""
        for batch in self.cut(places):
            yield batch, self.pixels(batch)

    def cut(self, places: Tensor) -> list[Tensor]:
        return [places[first : first + self.batch_size] for first in range(0, len(places), self.batch_size)]

    def pixels(self, places: Tensor) -> Tensor:
        return images(self.x[places.to(self.x.device)], self.device)

    def labels(self, places: Tensor) -> Tensor:
        return self.y[places.to(self.y.device)].to(self.device).long()

    def identity(self, attacks: Mapping[str, NamedAttack]) -> dict[str, Any]:
        """Return what decides the result, as plain data; a function's content is not known."""
        return {
            "schema": _SCHEMA,
            "images": digest(self.keys),
            "model": _model_digest(self.forward) if isinstance(self.forward, nn.Module) else "a function",
            "attacks": [[name, attack.identity()] for name, attack in attacks.items()],
            "seed": self.seed,
            **({"draws": "by batch"} if self._seed_draws("") else {}),
        }

    def _seed_draws(self, name: str, key: str = "") -> int:
        """Make what random norm layers draw next a function of a batch's first image, by its key; return how many there are."""
        return (
            seed_draws(self.forward, self.seed, "autoattack", name, key) if isinstance(self.forward, nn.Module) else 0
        )

    @torch.no_grad()
    def verdict(self, x: Tensor, places: Tensor) -> Tensor:
        """Return which images the model itself gets right: bool [n], on the CPU."""
        return is_correct(self.forward(x), self.labels(places)).cpu()

    def clean(self) -> Tensor:
        """Return which images are right without an attack; it costs little, and tells whether a function is the same."""
        if not self.ranks.main:
            return self._copy(torch.zeros(len(self.x), dtype=torch.bool))
        return self._copy(self._clean())

    def _copy(self, verdict: Tensor) -> Tensor:
        """Return the main process's verdict in all of them."""
        return self.ranks.copy(verdict.to(torch.uint8)) > 0

    def _clean(self) -> Tensor:
        verdicts = []
        for batch, x in self.batches(torch.arange(len(self.x))):
            self._seed_draws("clean", self.keys[int(batch[0])])
            verdicts.append(self.verdict(x, batch))
        right = torch.cat(verdicts)
        kept = self.shards.clean()
        if kept is None:
            self.shards.write_clean(right)
            return right
        if isinstance(self.forward, nn.Module):
            return kept  # by the digest it is the same model; a tie may fall otherwise in another batch
        if not torch.equal(kept, right):
            count = int((kept != right).sum())
            raise UserError(
                f"{self.shards.folder}: holds another function's evaluation, or its output is random: "
                f"{count} of {len(right)} images are judged otherwise without an attack"
            )
        return kept

    def attack(self, group: str, name: str, attack: NamedAttack, robust: Tensor) -> Iterator[Shard]:
        """Yield this process's shards of an attack on the images that are right: those that are kept, then new ones."""
        standing = robust.clone()
        kept: list[Shard] = []
        for shard in self.shards.read(group) if self.ranks.main else ():
            if bool(standing[shard.places].all()):  # else an earlier one was damaged, and its images attacked again
                standing[shard.places] = False
                kept.append(shard)
        left = self.cut(self._copy(standing).nonzero().squeeze(1))[self.ranks.index :: self.ranks.count]
        self.outlook.begin(name, sum(map(len, (*left, *(shard.places for shard in kept)))), kept)
        yield from kept
        for batch in left:
            began = time.perf_counter()
            natural = self.pixels(batch)
            draws = [stream(self.seed, "autoattack", name, self.keys[place]) for place in batch.tolist()]
            self._seed_draws(name, self.keys[int(batch[0])])
            meter = Meter(self.crafting, self.outlook.tick)
            x_adv = attack(meter, natural, self.labels(batch), generator=draws).detach().to(natural.dtype)
            _check(name, attack.threat, x_adv, natural)
            broken = ~self.verdict(x_adv, batch)
            seconds = time.perf_counter() - began
            shard = Shard(batch, broken, x_adv.cpu()[broken], meter.forwards, meter.backwards, seconds)
            self.shards.write(group, shard)
            self.outlook.add(shard)
            yield shard

    def of_all(self, shards: Sequence[Shard], like: Tensor) -> Shard:
        """Return the images that all processes broke with one attack, and what it cost; `like`: tells their shape and dtype."""
        broken = torch.zeros(len(self.x), dtype=torch.int32)
        x_adv = torch.zeros_like(like)
        cost = torch.zeros(3, dtype=torch.int64)
        for shard in shards:
            places = shard.places[shard.broken]
            broken[places], x_adv[places] = 1, shard.x_adv
            cost += torch.tensor([shard.forwards, shard.backwards, round(shard.seconds * 1e9)])
        for tensor in (broken, x_adv, cost):
            self.ranks.total(tensor)  # an image is one process's only: 0 is added to it
        places = broken.nonzero().squeeze(1)
        forwards, backwards, nanoseconds = cost.tolist()
        every = torch.ones(len(places), dtype=torch.bool)
        return Shard(places, every, x_adv[places], forwards, backwards, nanoseconds / 1e9)

    def judge_again(self, threat: Threat, x_adv: Tensor, robust: Tensor) -> int:
        """Check the final images against the threat and return how many the model now judges otherwise."""
        count = 0
        for batch, natural in self.batches(torch.arange(len(self.x))) if self.ranks.main else ():
            final = x_adv[batch].to(self.device)
            _check("final images", threat, final, natural)
            self._seed_draws("final", self.keys[int(batch[0])])
            count += int((self.verdict(final, batch) != robust[batch]).sum())
        return int(self.ranks.tell(count))


def _check(name: str, threat: Threat, x_adv: Tensor, natural: Tensor) -> None:
    try:
        threat.check(x_adv, natural)
    except UserError as error:
        raise UserError([fault.at(path=name) for fault in error.faults]) from None


def _model_digest(model: nn.Module) -> str:
    """Return a digest of the class and of every tensor, by name, of a module."""
    content = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in model.state_dict().items():
        content.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        content.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
