"""What the analyses of weights share: named groups, a model that is put back bit for bit, one way of measuring it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustlayers.attacks import Attack, guard, is_correct, is_own, label
from robustlayers.core.errors import Fault, UserError
from robustlayers.core.random import stream
from robustlayers.data import batch_sizes
from robustlayers.evaluation import Progress, worst_case
from robustlayers.evaluation._still import check_labels, device_of, images
from robustlayers.normalization import crafting_forward, inference, recalibrate
from robustlayers.selection import REST, Inventory, Selection, order_of, resolve

__all__ = [
    "KEPT",
    "RE_ESTIMATED",
    "Bench",
    "Group",
    "Groups",
    "Quality",
    "attacked",
    "bind_groups",
    "check_batch_size",
    "finite_row",
    "held",
    "put_back",
    "right_answers",
    "slices",
]

Groups = Mapping[str, str] | str
"""`{name: selector}`, which may overlap; or one selector, which is taken apart by module, in order of execution."""

KEPT, RE_ESTIMATED = "kept", "re-estimated"
"""What was done about running statistics after the change: nothing, or all of them were estimated anew."""


@dataclass(frozen=True)
class Group:
    """Some entries of a model, under a name; `selector` picks them again."""

    name: str
    selector: str
    selection: Selection
    names: tuple[str, ...]  # of the modules or tensors that it is made of; () where it holds a part of a tensor


def bind_groups(model: nn.Module, groups: Groups, example: Tensor | None = None) -> dict[str, Group]:
    """Return the groups by name; all that is wrong with the selectors is one `UserError`.

    A single selector gives one group for each module that owns tensors of it, named after the module; modules that the
    forward of `example` does not reach come last.
    """
    inventory = Inventory(model)
    if example is not None:
        example = images(example, device_of(model, example))
    if isinstance(groups, str):
        return _by_module(inventory, groups, example)
    if example is not None and groups:
        order_of(inventory, example)  # for selectors of execution order
    rests = [name for name, selector in groups.items() if selector.strip() == REST]
    faults = [Fault("'rest' may be given to one group only", path=name) for name in rests[1:]]
    found: dict[str, Selection] = {}
    taken = Selection(inventory, {})
    for name, selector in groups.items():
        if name not in rests:
            try:
                found[name] = resolve(inventory, selector)
            except UserError as error:
                faults += [fault.at(path=name) for fault in error.faults]
            else:
                taken = taken | found[name]
    if rests and not ~taken:
        faults.append(Fault("picks nothing: the other groups hold every tensor already", path=rests[0]))
    if not groups:
        faults.append(Fault("there is no group to look at"))
    if faults:
        raise UserError(faults)
    found |= dict.fromkeys(rests, ~taken)
    named = {}
    for name, selector in groups.items():
        tensors = () if _divided(found[name]) else tuple(found[name])
        text = _either(tensors) if name in rests and tensors else selector
        named[name] = Group(name, text, found[name], tensors)
    return named


def _by_module(inventory: Inventory, selector: str, example: Tensor | None) -> dict[str, Group]:
    selection = resolve(inventory, selector)
    order = order_of(inventory, example)
    parts: dict[str, dict[str, Tensor | None]] = {name: {} for name in (*order.modules, *order.unused)}
    for name, mask in selection.parts.items():
        parts.setdefault(order.holders.get(name, inventory.entries[name].module_name), {})[name] = mask
    whole: dict[str, list[str]] = {}
    for entry in inventory:
        for alias in entry.names:
            whole.setdefault(alias.rpartition(".")[0], []).append(entry.name)
    children = {name.rpartition(".")[0] for name in whole if name}
    groups = {}
    for module, found in parts.items():
        if not found:
            continue
        own = Selection(inventory, found)
        entire = bool(module) and module not in children and not _divided(own) and set(whole[module]) == set(own)
        names = (module,) if entire else () if _divided(own) else tuple(own)
        text = _either(names) if names else f"({_either(tuple(own))}) & ({selector})"
        title = module or type(inventory.model).__name__
        groups[title] = Group(title, text, own, names)
    return groups


def _divided(selection: Selection) -> bool:
    return any(mask is not None for mask in selection.parts.values())


def _either(names: tuple[str, ...]) -> str:
    return " | ".join(f'"{name}"' for name in names)


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Lend the model to a block that changes it; on exit all that `guard` covers and every parameter is as it was."""
    values = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    try:
        with guard(model):
            yield
    finally:
        with torch.no_grad():
            for parameter, value in values:
                parameter.data.copy_(value)


@contextmanager
def held(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run a block in evaluation mode, by running statistics, recording gradients, and leave no trace of it."""
    with (
        torch.inference_mode(False),
        put_back(model),
        inference(model),
        torch.autocast(device.type, enabled=False),
        torch.enable_grad(),
    ):
        yield


def slices(count: int, size: int) -> Iterator[slice]:
    """Yield the slices of `count` images in batches of `size`."""
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


@dataclass(frozen=True)
class Quality:
    """How good a model is: accuracies in [0, 1], mean cross-entropies in nats; robust ones are None without an attack.

    `robust_accuracy` is that of `evaluation.accuracy`. `robust_loss` is the mean over all images of the cross-entropy at
    the attack's output, those that are wrong clean included.
    """

    clean_accuracy: float
    clean_loss: float
    robust_accuracy: float | None = None
    robust_loss: float | None = None


class Bench:
    """Measures models on fixed images: `bench(model, what)` as they are, `bench.changed(...)` after a change.

    `recalibrate_on`: images to estimate all running statistics on after each change, or None; `changes` is how many
    changes there will be, for the progress, which counts images.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        attack: Attack | None,
        *,
        recalibrate_on: Tensor | None = None,
        batch_size: int = 500,
        seed: int = 0,
        progress: Progress | None = None,
        changes: int = 1,
    ) -> None:
        check_labels(x, y)
        check_batch_size(batch_size)
        self.x, self.y, self.attack, self.batch_size, self.seed = x, y, attack, batch_size, seed
        self.recalibrate_on, self.progress = recalibrate_on, progress
        self.done, self.total = 0, changes * len(self.kinds) * self._units

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is done about running statistics, each with a measurement of its own."""
        return (KEPT,) if self.recalibrate_on is None else (KEPT, RE_ESTIMATED)

    @property
    def _units(self) -> int:
        return len(self.x) * (1 if self.attack is None else 2)

    def changed(self, model: nn.Module, what: str, change: Callable[[], object]) -> dict[str, Quality]:
        """Return the quality after `change()`, for each of `kinds`; the model is put back."""
        found = {}
        with put_back(model), torch.inference_mode(False):
            change()
            found[KEPT] = self(model, what)
            if self.recalibrate_on is not None:
                device = device_of(model, self.recalibrate_on)
                sizes = batch_sizes(len(self.recalibrate_on), self.batch_size)
                parts = self.recalibrate_on.detach().split(sizes)
                recalibrate(model, (images(part, device) for part in parts))
                found[RE_ESTIMATED] = self(model, f"{what}, {RE_ESTIMATED}")
        return found

    def __call__(self, model: nn.Module, what: str) -> Quality:
        """Return the quality of the model as it is; it is left without a trace."""
        count, begun = len(self.x), self.done

        def report(done: int) -> None:
            self.done = begun + done
            if self.progress is not None:
                self.progress(what, self.done, self.total)

        attacks: dict[str, Any] = {}
        recording = None
        if self.attack is not None:
            recording = _Recording(self.attack, model)
            attacks[f"attack {recording.name}"] = recording
        verdicts = worst_case(
            model,
            self.x,
            self.y,
            attacks,
            self.batch_size,
            seed=self.seed,
            progress=lambda name, done, _: report(done if name == "clean" else count + done),
        )
        clean = verdicts["clean"]
        device = device_of(model, self.x)
        with held(model, device):
            clean_loss = self._loss(model, self.x, self.y, device)
            if recording is None:
                return Quality(int(clean.sum()) / count, clean_loss)
            right, wrong = (each.nonzero().squeeze(1) for each in (clean, ~clean))
            labels = self.y[right.to(self.y.device)].to(device)
            total = sum(self._sum(model, part, labels[s]) for part, s in recording.seen)
            for part in slices(len(wrong), self.batch_size):
                index = wrong[part].to(self.x.device)
                natural, labels = images(self.x[index], device), self.y[wrong[part].to(self.y.device)].to(device)
                generator = stream(self.seed, "analysis", recording.name, part.start)
                with guard(model):
                    adversarial = recording.craft(natural, labels, generator)
                total += self._sum(model, adversarial, labels)
                report(count + len(right) + part.stop)
        self.done = begun + self._units
        robust = int(verdicts["robust"].sum()) / count
        return Quality(int(clean.sum()) / count, clean_loss, robust, total / count)

    def skip(self, what: str) -> None:
        """Count a change as done whose result is known."""
        self.done += len(self.kinds) * self._units
        if self.progress is not None:
            self.progress(what, self.done, self.total)

    def _loss(self, model: nn.Module, x: Tensor, y: Tensor, device: torch.device) -> float:
        parts = slices(len(x), self.batch_size)
        return sum(self._sum(model, images(x[s], device), y[s].to(device)) for s in parts) / len(x)

    @staticmethod
    @torch.no_grad()
    def _sum(model: nn.Module, x: Tensor, y: Tensor) -> float:
        logits = model(x)
        return functional.cross_entropy(logits.double(), y.long(), reduction="sum").item()


class _Recording:
    """An attack that remembers its outputs, under the name that gives it the draws of the attack itself."""

    def __init__(self, attack: Attack, model: nn.Module) -> None:
        self.attack, self.threat = attack, attack.threat
        # The cheaper equivalent, as the evaluation gives it to our own attacks.
        self.forward = crafting_forward(model) if is_own(attack) else model
        plain: Any = attack
        if is_dataclass(plain) and "restarts" in {field.name for field in fields(plain)}:
            plain = replace(plain, restarts=1)  # type: ignore[type-var]
        self.name = label(plain)
        self.seen: list[tuple[Tensor, slice]] = []  # outputs, and which of the attacked images they are of

    def __call__(self, forward: Any, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        adversarial = self.craft(x, y, generator)
        first = self.seen[-1][1].stop if self.seen else 0
        self.seen.append((adversarial.detach(), slice(first, first + len(x))))
        return adversarial

    def craft(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return self.attack(self.forward, x, y, generator=generator)


def attacked(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack | None,
    *,
    batch_size: int,
    seed: int,
    report: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return all images as the attack changes them, and their labels, on the model's device; as they are without one.

    Draws are those of a stream of (seed, attack, first image of the batch). Every output is checked against the threat.
    """
    check_labels(x, y)
    check_batch_size(batch_size)
    device = device_of(model, x)
    with torch.inference_mode(False):  # tensors from inference mode could not take part in a backward
        x, y = (
            tensor.clone() if tensor.is_inference() else tensor for tensor in (images(x, device), y.to(device).long())
        )
    if attack is None:
        return x, y
    crafting = crafting_forward(model) if is_own(attack) else model
    parts = []
    with held(model, device):
        for part in slices(len(x), batch_size):
            with guard(model):
                generator = stream(seed, "analysis", label(attack), part.start)
                parts.append(attack(crafting, x[part], y[part], generator=generator).detach())
            try:
                attack.threat.check(parts[-1], x[part])
            except UserError as error:
                raise UserError([fault.at(path=label(attack)) for fault in error.faults]) from None
            if report is not None:
                report(part.stop)
        return torch.cat(parts).to(x.dtype), y


def check_batch_size(size: object) -> None:
    """Raise `UserError` unless `size` is a whole number from 2 on, as statistics of a batch need."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 2:
        raise UserError(f"batch_size: {size!r} is not allowed; allowed: a whole number, 2 or more")


@torch.no_grad()
def right_answers(logits: Tensor, y: Tensor) -> int:
    """Return how many predictions are right."""
    return int(is_correct(logits, y).sum())


def finite_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as JSON takes it: numbers that are not finite are None, tuples are lists."""
    return {key: _plain(value) for key, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return list(value) if isinstance(value, tuple) else value
