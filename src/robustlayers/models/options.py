"""Options of an architecture: what each may be, its default, and one clear sentence for a value that is not allowed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from robustlayers.core.errors import Fault, UserError, one_of
from robustlayers.core.quantities import number

__all__ = ["Choice", "Integer", "Number", "Option", "PerChannel", "check_options", "resolve_options"]


class Option(ABC):
    """One option of an architecture."""

    default: Any

    @abstractmethod
    def problem(self, value: Any) -> str | None:
        """Return what is wrong with `value` and what is allowed, or None."""

    def allowed(self) -> str:
        """Return in a few words what is allowed; empty where only `problem` says it."""
        return ""

    def resolve(self, value: Any, resolved: Mapping[str, Any]) -> Any:
        """Return the allowed `value` in its one canonical form; `resolved` holds the options listed before this one."""
        return value


@dataclass(frozen=True)
class Integer(Option):
    """A whole number: `least`, `least + step`, `least + 2 step`, ..., up to `most`; or one of `among`.

    >>> Integer(20, least=8, step=6).problem(21)
    '21 is not allowed; nearest: 20; allowed: 8, 14, 20, ...'
    """

    default: int
    least: int = 1
    step: int = 1
    most: int | None = None
    among: tuple[int, ...] = ()

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with `value`, or None."""
        if isinstance(value, bool) or not isinstance(value, int):
            return f"{value!r} is not a whole number; allowed: {self.allowed()}"
        close = self._nearest(value)
        return None if close == value else f"{value} is not allowed; nearest: {close}; allowed: {self.allowed()}"

    def _nearest(self, value: int) -> int:
        if self.among:
            return min(self.among, key=lambda allowed: abs(allowed - value))
        close = self.least + self.step * max(0, round((value - self.least) / self.step))
        return close if self.most is None else min(close, self.most)

    def allowed(self) -> str:
        """Return the numbers that are allowed."""
        if self.among:
            return ", ".join(str(value) for value in self.among)
        if self.step == 1:
            return f"at least {self.least}" if self.most is None else f"{self.least} to {self.most}"
        return ", ".join(str(self.least + self.step * index) for index in range(3)) + ", ..."


@dataclass(frozen=True)
class Number(Option):
    """A number above 0, as YAML writes it or as a fraction: `0.2` or `"1/5"`.

    >>> Number(0.2).problem(0)
    '0 is not allowed; it must be positive'
    """

    default: float

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with `value`, or None."""
        try:
            positive = number(value) > 0
        except UserError as error:
            return error.faults[0].message
        return None if positive else f"{value!r} is not allowed; it must be positive"

    def allowed(self) -> str:
        """Return `above 0`."""
        return "above 0"

    def resolve(self, value: Any, resolved: Mapping[str, Any]) -> float:
        """Return the number as a float."""
        return number(value)


@dataclass(frozen=True)
class Choice(Option):
    """One of some names; `names` is asked at each check, since norm kinds may be registered later."""

    kind: str
    default: str
    names: Callable[[], Iterable[str]]

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with `value`, or None."""
        names = list(self.names())
        if isinstance(value, str):
            return None if value in names else one_of(self.kind, value, names)
        return f"{value!r} is not a name; allowed: {self.allowed()}"

    def allowed(self) -> str:
        """Return the names, in alphabetical order."""
        return ", ".join(sorted(self.names()))


@dataclass(frozen=True)
class PerChannel(Option):
    """A number for all input channels, or a list of one for each; None stands for `fill`."""

    fill: float
    positive: bool = False
    default: None = None

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with `value`, or None."""
        if value is None:
            return None
        try:
            numbers = _numbers(value)
        except UserError as error:
            return error.faults[0].message
        if not numbers:
            return f"an empty list; allowed: {self.allowed()}"
        if self.positive and min(numbers) <= 0:
            return f"{value!r} is not allowed; it must be positive"
        return None

    def allowed(self) -> str:
        """Return `a number, or one for each channel`."""
        return "a number, or one for each channel"

    def resolve(self, value: Any, resolved: Mapping[str, Any]) -> list[float]:
        """Return one float per channel; a list whose length is not `channels` is a `UserError`."""
        channels = resolved["channels"]
        numbers = [self.fill] if value is None else _numbers(value)
        if isinstance(value, list | tuple) and len(numbers) != channels:
            raise UserError(
                f"{len(numbers)} values for {channels} channel(s); allowed: a number, or a list of {channels}"
            )
        return numbers if len(numbers) == channels else numbers * channels


def check_options(model: str, known: Mapping[str, Option], given: Mapping[str, Any]) -> list[Fault]:
    """Return every mistake in `given`, with the option's name as the fault's path; nothing if all is well."""
    return _resolve(model, known, given)[1]


def resolve_options(model: str, known: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options in canonical form with defaults filled in; the mistakes, if any, are one `UserError`."""
    resolved, faults = _resolve(model, known, given)
    if faults:
        raise UserError(faults)
    return resolved


def _resolve(model: str, known: Mapping[str, Option], given: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    faults = [
        Fault(one_of(f"option of model {model}", str(name), known), path=str(name))
        for name in given
        if name not in known
    ]
    resolved: dict[str, Any] = {}
    for name, option in known.items():
        value = given.get(name, option.default)
        problem = option.problem(value)
        if problem is not None:
            faults.append(Fault(problem, path=name))
            value = option.default
        try:
            resolved[name] = option.resolve(value, resolved)
        except UserError as error:
            faults.extend(fault.at(path=name) for fault in error.faults)
    return resolved, faults


def _numbers(value: Any) -> list[float]:
    values = value if isinstance(value, list | tuple) else [value]
    return [number(item, "one value per channel") for item in values]
