"""Recalibration: running statistics estimated anew on given inputs, as a phase of its own in which nothing else moves.

Weights that were changed after their statistics were tracked (averaged, swapped, interpolated, loaded), or that shall run
on another kind of input, need statistics that fit: those of the layers' inputs under the weights as they are now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robustlayers.core.errors import Fault, UserError
from robustlayers.core.quantities import number
from robustlayers.core.random import stream
from robustlayers.normalization.context import inference, normalizing
from robustlayers.selection.inventory import Entry, Inventory, is_norm
from robustlayers.selection.selection import Selection

__all__ = ["Recalibration", "recalibrate"]

Generators = Callable[[int], torch.Generator]
"""Number of the batch, from 0 -> the generator of its attack."""


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    select: Selection | None = None,
    attack: Callable[..., Tensor] | None = None,
    generator_of: Generators | None = None,
    momentum: float | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> int:
    """Estimate running statistics anew on `batches`, each x or (x, y), and return how many there were.

    See `Recalibration`, which this runs from begin to end, for the formula, the arguments and the errors. The model gets
    its new statistics after the last batch; an exception before leaves it as it was.

    >>> layer = nn.BatchNorm1d(1)
    >>> recalibrate(layer, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
    2
    >>> layer.running_mean, layer.running_var, layer.num_batches_tracked
    (tensor([4.]), tensor([2.]), tensor(2))
    """
    recalibration = Recalibration(
        model, select, momentum=momentum, attack=attack, generator_of=generator_of, forward=forward
    )
    for batch in batches:
        parts = batch if isinstance(batch, tuple | list) else (batch,)
        recalibration.update(parts[0], parts[1] if len(parts) > 1 else None)
    recalibration.end()
    return recalibration.batches


class Recalibration:
    """A recalibration batch by batch, which can be stopped and resumed after each; `end` writes into the model.

    Over the T forwards of a layer, with m_t and v_t the mean and unbiased variance of its input at forward t,

        momentum None:   running mean = 1/T sum_t m_t,   running variance = 1/T sum_t v_t,   counter = T
        momentum a:      running = (1 - a) running + a (m_t or v_t) from the present values on,   counter + T

    The first is torch's cumulative average (`momentum=None`, `torch.optim.swa_utils.update_bn`): each batch weighs the
    same, a short last one too, and what the batch means differ by is no part of the variance. Sums are kept in float64.

    Selected layers normalize by the batch, as in training; other norm layers by their running statistics; everything else
    is in evaluation mode, dropout included, since that is how the statistics will be used. Until `end` the model is as it
    was after every call, in modes, buffers, `requires_grad`, `.grad`, hooks and torch's global random state, also after an
    exception. So an attack meets the statistics from before the recalibration on every batch. A layer that no forward
    reaches keeps its statistics.

    Args:
        model: with torch's norm layers, subclasses, or layers of one's own with floating buffers which a training forward
            moves to (1 - momentum) old + momentum new. Their integer buffers are taken for counters.
        select: the statistics to estimate, of whole layers; None is those of every norm layer.
        momentum: None, or more than 0 and at most 1.
        attack: called as `attack(forward, x, y, generator=g)` on each batch first, the model by running statistics: PGD
            for statistics of adversarial inputs, `Noise` for noisy ones.
        generator_of: batch number, from 0 -> generator for the attack; None is a stream of the batch number alone.
        forward: what the attack is given instead of the model; `crafting_forward(model)` is the faster equivalent for
            attacks that only call it.

    Raises:
        UserError: a selection with parameters or with a part of a layer's statistics; nothing to estimate; a layer whose
            update does not follow its `momentum`; an attack without labels; a batch too small to normalize by; no batch;
            statistics that are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        select: Selection | None = None,
        *,
        momentum: float | None = None,
        attack: Callable[..., Tensor] | None = None,
        generator_of: Generators | None = None,
        forward: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if momentum is not None:
            momentum = number(momentum, "momentum")
            if not 0 < momentum <= 1:
                raise UserError(f"momentum: {momentum:g} is not allowed; allowed: more than 0 up to 1, or none")
        if attack is None and (generator_of is not None or forward is not None):
            raise UserError("recalibration: generator_of and forward are for an attack, and there is none")
        self.model, self.momentum, self.attack = model, momentum, attack
        self.generator_of, self.forward = generator_of, forward
        self.batches = 0
        entries = _statistics(model, select)
        self._entries = {entry.name: entry for entry in entries}
        self._layers = _layers(entries)
        with torch.inference_mode(False), torch.no_grad():
            # Under a momentum the present values weigh in; a cumulative average begins with nothing.
            begin = torch.zeros_like if momentum is None else torch.clone
            self._values = {entry.name: begin(_wide(_live(entry))) for entry in entries}
        self._calls = dict.fromkeys(self._entries, 0)
        self._ended = False

    def update(self, x: Tensor, y: Tensor | None = None) -> None:
        """Take one batch in: x as the model takes it, [n, ...]; y int64 [n], which only an attack needs."""
        if self._ended:
            raise UserError("this recalibration has ended; begin another one")
        if len(x) == 0:
            raise UserError(f"recalibration: batch {self.batches + 1} is empty")
        seen: list[tuple[str, Tensor]] = []
        with torch.inference_mode(False):
            if self.attack is not None:
                x = self._craft(x, y)
            settings = dict.fromkeys(self._layers, ("batch", True))
            with (
                _no_trace(self.model),
                torch.no_grad(),
                normalizing(self.model, settings, training=False),
                self._observing(seen),
            ):
                try:
                    self.model(x)
                except ValueError as error:
                    if len(x) > 1:
                        raise
                    raise UserError(f"recalibration: batch {self.batches + 1} has one image: {error}") from error
            with torch.no_grad():
                for name, observed in seen:
                    self._calls[name] += 1
                    if observed.is_floating_point():
                        share = 1 / self._calls[name] if self.momentum is None else self.momentum
                        self._values[name].lerp_(_wide(observed), share)
                    else:
                        self._values[name] += observed
        self.batches += 1

    def state(self) -> dict[str, Tensor]:
        """Return all that a resume needs, as new tensors: `batches`, `calls/...` and `values/...`."""
        state = {"batches": torch.tensor(self.batches)}
        state |= {f"calls/{name}": torch.tensor(calls) for name, calls in self._calls.items()}
        return state | {f"values/{name}": value.clone() for name, value in self._values.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a state that `state` returned for the same model, selection and momentum."""
        expected = self.state()
        if tensors.keys() != expected.keys() or any(tensors[name].shape != expected[name].shape for name in expected):
            raise UserError("the state is not one of a recalibration of these statistics")
        self.batches = int(tensors["batches"])
        self._calls = {name: int(tensors[f"calls/{name}"]) for name in self._calls}
        self._values = {
            name: tensors[f"values/{name}"].detach().to(value.device, value.dtype, copy=True)
            for name, value in self._values.items()
        }

    def end(self) -> list[str]:
        """Write the estimates into the model, in place, and return the names of the statistics that were set."""
        reached = [name for name, calls in self._calls.items() if calls]
        if not self.batches:
            raise UserError("recalibration: there was no batch")
        if not reached:
            raise UserError("recalibration: no batch reached a layer whose statistics are to be estimated")
        faults = [
            Fault(f"recalibration: {name} is not finite after {self.batches} batch(es)")
            for name in reached
            if not bool(torch.isfinite(self._values[name]).all())
        ]
        if faults:
            raise UserError(faults)
        with torch.no_grad():
            for name in reached:
                _live(self._entries[name]).copy_(self._values[name])
        self._ended = True
        return reached

    def _craft(self, x: Tensor, y: Tensor | None) -> Tensor:
        assert self.attack is not None  # checked by the caller
        if y is None:
            raise UserError("recalibration on attacked inputs needs labels: batches of (x, y)")
        if self.generator_of is None:
            generator = stream(0, "recalibration", self.batches, device=x.device)
        else:
            generator = self.generator_of(self.batches)
        with _no_trace(self.model), inference(self.model), torch.enable_grad():
            forward = self.model if self.forward is None else self.forward
            return self.attack(forward, x, y, generator=generator).detach()

    @contextmanager
    def _observing(self, seen: list[tuple[str, Tensor]]) -> Iterator[None]:
        """Note in `seen` the statistics of each forward of each layer: what its own update writes with momentum 1."""
        with ExitStack() as stack:
            for module, names in self._layers.items():
                forward = _ObservedForward(module, names, seen, check=not self.batches and not _is_torchs(module))
                for attribute, value in (("momentum", 1.0), ("track_running_stats", True), ("forward", forward)):
                    if hasattr(module, attribute):
                        stack.callback(_setter(module, attribute))
                        setattr(module, attribute, value)
                for attribute in names:  # of copies: 0 times an infinite old value would be none
                    buffer = module._buffers[attribute]
                    if buffer is not None and buffer.is_floating_point():
                        buffer.nan_to_num_(0, 0, 0)
            yield


class _ObservedForward:
    """A layer's forward that notes what it writes into the layer's buffers: new values, and by how much counters rise."""

    def __init__(
        self, module: nn.Module, names: Mapping[str, str], seen: list[tuple[str, Tensor]], *, check: bool
    ) -> None:
        self.module, self.plain, self.names, self.seen, self.check = module, module.forward, names, seen, check

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        before = self._copies()
        output = self.plain(*inputs, **named)
        after = self._copies()
        for attribute, value in after.items():
            self.seen.append((self.names[attribute], value if value.is_floating_point() else value - before[attribute]))
        if self.check:
            self._check(before, after, *inputs, **named)
        return output

    def _check(self, before: dict[str, Tensor], after: dict[str, Tensor], *inputs: Any, **named: Any) -> None:
        """Run the forward again from other statistics: with momentum 1, what it writes must not depend on them."""
        scale = {attribute: 1 + value.abs() for attribute, value in before.items() if value.is_floating_point()}
        self.module._buffers.update({attribute: before[attribute] + scale[attribute] for attribute in scale})
        self.plain(*inputs, **named)
        again = self._copies()
        self.module._buffers.update(after)
        for attribute in scale:
            if bool(((again[attribute] - after[attribute]).abs() > 1e-3 * scale[attribute]).any()):
                kind = type(self.module).__name__
                raise UserError(f"recalibration: the update of {self.names[attribute]} by {kind} ignores its momentum")

    def _copies(self) -> dict[str, Tensor]:
        buffers = {attribute: self.module._buffers[attribute] for attribute in self.names}
        return {attribute: buffer.detach().clone() for attribute, buffer in buffers.items() if buffer is not None}


def _statistics(model: nn.Module, select: Selection | None) -> list[Entry]:
    """Return the statistics to estimate; `UserError` for a selection that is not the statistics of whole layers."""
    inventory = Inventory(model)
    allowed = {entry.name: entry for entry in inventory if entry.buffer and any(map(is_norm, entry.owners))}
    if not allowed:
        raise UserError(f"recalibration: no norm layer of {type(model).__name__} has running statistics")
    chosen = allowed
    if select is not None:
        if select.inventory.model is not model:
            raise UserError("the selection was bound to another model")
        if not select:
            raise UserError("recalibration: the selection is empty")
        others = [name for name in select if name not in allowed]
        if others:
            raise UserError(
                f"recalibration estimates running statistics, and the selection has {_listed(others)}; "
                "allowed: norm.statistics, or a part such as norm.statistics & stage(2)"
            )
        chosen = {name: allowed[name] for name in select}
    lacking = {
        name: None
        for module, names in _layers(chosen.values()).items()
        for name in _names(module, allowed.values()).values()
        if name not in names.values()
    }
    divided = [name for name in select or () if select is not None and select.parts[name] is not None]
    if lacking or divided:
        what = f"leaves out {_listed(list(lacking))}" if lacking else f"divides {_listed(divided)}"
        raise UserError(f"recalibration: a layer's statistics belong together, and the selection {what}")
    unknown = [
        Fault(f"recalibration: {_listed(list(names.values()))}: {type(module).__name__} has no momentum to set")
        for module, names in _layers(chosen.values()).items()
        if not isinstance(getattr(module, "momentum", ""), float | int | None)
    ]
    if unknown:
        raise UserError(unknown)
    return list(chosen.values())


def _layers(entries: Iterable[Entry]) -> dict[nn.Module, dict[str, str]]:
    """Return, for each layer that owns any of the entries, attribute -> tensor name."""
    entries = list(entries)
    modules = dict.fromkeys(module for entry in entries for module in entry.owners if is_norm(module))
    return {module: _names(module, entries) for module in modules}


def _names(module: nn.Module, entries: Iterable[Entry]) -> dict[str, str]:
    names = {id(entry.tensor): entry.name for entry in entries}
    return {attribute: names[id(buffer)] for attribute, buffer in module._buffers.items() if id(buffer) in names}


def _live(entry: Entry) -> Tensor:
    # Looked up anew, since moving a model to another device puts new tensors in the place of its buffers.
    buffer = entry.module._buffers[entry.attribute]
    return entry.tensor if buffer is None else buffer


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor.detach()


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _setter(module: nn.Module, attribute: str) -> Callable[[], None]:
    """Return what gives the module's own attribute its present value, or takes it away if it has none of its own."""
    own = vars(module)
    return (
        partial(setattr, module, attribute, own[attribute]) if attribute in own else partial(_drop, module, attribute)
    )


def _drop(module: nn.Module, attribute: str) -> None:
    vars(module).pop(attribute, None)


def _listed(names: list[str], most: int = 4) -> str:
    text = ", ".join(names[:most])
    return f"{text} and {len(names) - most} more" if len(names) > most else text


# Everything a bare module keeps in dictionaries and sets: parameters, buffers, children and every kind of hook.
_CONTAINERS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set))


@contextmanager
def _no_trace(model: nn.Module) -> Iterator[None]:
    """Lend the model copies of its buffers, freeze its parameters, and put back on exit what is not a mode.

    Not covered, as with an attack's `guard`: values written into a parameter in place, and plain attributes of modules.
    """
    modules = list(model.modules())
    containers = [
        (module, name, value, value.copy())
        for module in modules
        for name in _CONTAINERS
        if (value := vars(module).get(name)) is not None
    ]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    copies = {buffer: buffer.detach().clone() for buffer in model.buffers()}  # shared ones stay shared
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            for module in modules:
                own = module._buffers
                own.update({name: copies[buffer] for name, buffer in own.items() if buffer is not None})
            for parameter, *_ in parameters:
                parameter.grad = None
                parameter.requires_grad_(False)
            yield
        finally:
            for module, name, container, copy in containers:
                vars(module)[name] = container
                if container or copy:  # in place: handles of hooks hold a reference to their dictionary
                    container.clear()
                    container.update(copy)
            for parameter, requires_grad, grad in parameters:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad
