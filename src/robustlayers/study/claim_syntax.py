"""The language of claims: `robust[group=norm] > robust[group=none]`, read strictly and checked against a study.

A claim is `EXPR OP EXPR` with OP one of `> < >= <=`. An EXPR adds, subtracts and multiplies numbers (`0.12`, `12 %`)
and terms `metric[factor=level, ...]`, with parentheses. A product of two terms is not read, so every claim is linear:

    expr     = product (("+" | "-") product)*          product = unary ("*" unary)*
    unary    = "-"* (number | term | "(" expr ")")     term    = metric ("[" part ("," part)* "]")?
    part     = factor "=" level | level | "checkpoint" "=" name

A dash, a colon or an @ between letters or digits belongs to the name (`pgd-20`, `corrupted:fog:3`, `clean@main`), so a
minus after a name needs a space. Metrics, factors and levels may be quoted: `robust[group="random(like=norm, seed=0)"]`,
`'pgd-20@main>auxiliary'`. A level alone stands for the one factor that has it. The brackets must fix every factor. A term
is read at the checkpoint that is judged, unless it pins one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from robustlayers.core.errors import Fault, UserError, one_of

__all__ = ["Claim", "Linear", "Part", "Refuse", "Term", "parse", "spelled"]

Refuse = Callable[[str], str]
"""`refuse(metric) -> what is to be said about a metric that the study does not have`"""

_PIN = "checkpoint"
_DEEPEST = 50  # parentheses inside each other
_LARGEST = 1e15
_SIGN = {">": 1.0, ">=": 1.0, "<": -1.0, "<=": -1.0}
_SPACE = re.compile(r"\s*")
_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+(?:[eE][+-]?[0-9]+)?)(\s*%)?", re.ASCII)
_NAME = re.compile(r"[^\W\d]\w*(?:[-.:@]\w+)*")
_QUOTED = re.compile(r"\"((?:[^\"\\]|\\.)*)\"|'((?:[^'\\]|\\.)*)'")
_LEVEL = re.compile(r"[^,\[\]\"'=<>][^,\[\]\"=<>]*")
_OPERATOR = re.compile(r"[<>]=?")


@dataclass(frozen=True)
class Part:
    """One part of a term's brackets: the factor (None if only the level was written), the level, and its column."""

    factor: str | None
    level: str
    column: int


@dataclass(frozen=True)
class Term:
    """One measured value in a claim: a metric of one arm, at one checkpoint."""

    metric: str
    parts: tuple[Part, ...]
    checkpoint: str | None  # None: the checkpoint that is judged
    column: int  # where the term begins, from 1
    checkpoint_column: int = 0

    @property
    def levels(self) -> dict[str, str]:
        """Factor -> level; a `UserError` if a level still stands alone (see `Claim.bind`)."""
        levels = {part.factor: part.level for part in self.parts if part.factor is not None}
        if len(levels) < len(self.parts):
            raise UserError(f"column {self.column}: the levels of {self.metric} are not bound to factors")
        return levels


@dataclass(frozen=True)
class Linear:
    """A linear expression: a constant plus coefficients times terms."""

    constant: float
    terms: tuple[tuple[float, Term], ...]

    def times(self, number: float) -> Linear:
        """Return the expression multiplied by a number."""
        return Linear(self.constant * number, tuple((factor * number, term) for factor, term in self.terms))

    def plus(self, other: Linear) -> Linear:
        """Return the sum of two expressions."""
        return Linear(self.constant + other.constant, self.terms + other.terms)


@dataclass(frozen=True)
class Claim:
    """A claim as read: the text, both sides, and the comparison between them."""

    text: str
    left: Linear
    operator: str
    right: Linear

    @property
    def difference(self) -> Linear:
        """Left minus right for `>` and `>=`, right minus left for `<` and `<=`: positive supports the claim."""
        return self.left.plus(self.right.times(-1.0)).times(_SIGN[self.operator])

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that it names, each once."""
        return tuple(dict.fromkeys(term.metric for _, term in self.difference.terms))

    def check(
        self,
        factors: Mapping[str, Sequence[str]],
        metrics: Collection[str],
        checkpoints: Sequence[str],
        refuse: Refuse | None = None,
    ) -> list[Fault]:
        """Return a fault for everything that the study (factor -> levels, metrics, checkpoints) does not have.

        What is said about an unknown metric is its nearest names and the allowed ones, unless `refuse` knows better.

        >>> print(*parse("robust[group=nrom] > 0.1").check({"group": ["norm", "all"]}, ["clean", "robust"], ["last"]))
        column 8: unknown level of group 'nrom'; nearest: norm; allowed: all, norm
        """
        return self._resolve(factors, metrics, checkpoints, refuse)[1]

    def bind(
        self,
        factors: Mapping[str, Sequence[str]],
        metrics: Collection[str],
        checkpoints: Sequence[str],
        refuse: Refuse | None = None,
    ) -> Claim:
        """Return the claim with the factor of every level filled in; what `check` finds is a `UserError`.

        >>> claim = parse("robust[norm] > robust[all]").bind({"group": ["norm", "all"]}, ["robust"], ["last"])
        >>> [term.levels for _, term in claim.difference.terms]
        [{'group': 'norm'}, {'group': 'all'}]
        """
        claim, faults = self._resolve(factors, metrics, checkpoints, refuse)
        if faults:
            raise UserError(faults)
        return claim

    def _resolve(
        self,
        factors: Mapping[str, Sequence[str]],
        metrics: Collection[str],
        checkpoints: Sequence[str],
        refuse: Refuse | None,
    ) -> tuple[Claim, list[Fault]]:
        faults: list[Fault] = []
        sides: list[Linear] = []
        for side in (self.left, self.right):
            terms = []
            for factor, term in side.terms:
                if term.metric not in metrics:
                    text = one_of("metric", term.metric, metrics) if refuse is None else refuse(term.metric)
                    faults.append(Fault(f"column {term.column}: {text}"))
                terms.append((factor, _bind_term(term, factors, checkpoints, faults)))
            sides.append(Linear(side.constant, tuple(terms)))
        claim = replace(self, left=sides[0], right=sides[1])
        if not faults:
            net: dict[tuple[str, frozenset[tuple[str, str]], str | None], float] = {}
            for factor, term in claim.difference.terms:
                key = (term.metric, frozenset(term.levels.items()), term.checkpoint)
                net[key] = net.get(key, 0.0) + factor
            if not any(net.values()):
                faults.append(Fault("compares a value with itself: no measured value is left in the difference"))
        return claim, faults


def _bind_term(
    term: Term,
    factors: Mapping[str, Sequence[str]],
    checkpoints: Sequence[str],
    faults: list[Fault],
) -> Term:
    """Return the term with every factor filled in, and append what is wrong with it."""

    def fault(column: int, message: str) -> None:
        faults.append(Fault(f"column {column}: {message}"))

    parts: list[Part] = []
    seen: set[str] = set()
    sound = True
    for part in term.parts:
        owners = [name for name, levels in factors.items() if part.level in levels]
        before = len(faults)
        factor = part.factor
        if factor is None:
            if len(owners) == 1:
                factor = owners[0]
            elif owners:
                written = " or ".join(f"{name}={part.level}" for name in owners)
                fault(part.column, f"level {part.level!r} belongs to several factors; write {written}")
            else:
                every = {level for levels in factors.values() for level in levels}
                fault(part.column, one_of("level", part.level, every))
        elif factor not in factors:
            hint = "; quote a level that holds a comma or =" if "(" in factor else ""
            fault(part.column, one_of("factor", factor, factors) + hint)
        elif part.level not in factors[factor]:
            fault(part.column, one_of(f"level of {factor}", part.level, factors[factor]))
        if factor is not None and factor in seen:
            fault(part.column, f"factor {factor!r} is given twice")
        sound = sound and len(faults) == before
        if factor is not None:
            seen.add(factor)
        parts.append(replace(part, factor=factor))
    if term.checkpoint is not None and term.checkpoint not in checkpoints:
        fault(term.checkpoint_column, one_of("checkpoint", term.checkpoint, checkpoints))
    free = [f"{name} ({', '.join(levels)})" for name, levels in factors.items() if name not in seen]
    if free and sound:
        fault(term.column, f"{term.metric} must name one arm, but leaves free: {'; '.join(free)}")
    return replace(term, parts=tuple(parts))


def spelled(name: str) -> str:
    """Return a metric as a claim has to write it: in quotes where it is not a name to the language.

    >>> spelled("corrupted:fog:3"), spelled("sanity:eps=8/255")
    ('corrupted:fog:3', "'sanity:eps=8/255'")
    """
    return name if _NAME.fullmatch(name) else "'" + re.sub(r"(['\\])", r"\\\1", name) + "'"


def parse(text: str) -> Claim:
    """Return the claim in `text`; a `UserError` names the column (from 1) where it cannot be read.

    >>> claim = parse("robust[group=norm] > 0.5 * robust[group=all] - 2 %")
    >>> claim.operator, claim.right.constant, claim.right.terms[0][0], claim.right.terms[0][1].levels
    ('>', -0.02, 0.5, {'group': 'all'})
    >>> parse("robust[group=norm] = 1")
    Traceback (most recent call last):
        ...
    robustlayers.core.errors.UserError: column 20: expected one of > < >= <=, found '='
    """
    return _Parser(text).claim()


class _Parser:
    """Reads a claim by recursive descent; every method leaves `position` after what it read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.depth = 0

    def claim(self) -> Claim:
        left = self.expression()
        operator = self.take(_OPERATOR)
        if operator is None:
            raise self.wrong("one of > < >= <=")
        right = self.expression()
        if self.peek():
            second = self.take(_OPERATOR)
            if second:
                raise self.error("a claim is one comparison; write two claims", second.start() + 1)
            raise self.wrong("the end of the claim, or one of + - *")
        claim = Claim(self.text, left, operator[0], right)
        numbers = [claim.difference.constant, *(factor for factor, _ in claim.difference.terms)]
        if not all(abs(number) <= _LARGEST for number in numbers):
            raise self.error("a number is too large", 1)
        if not claim.difference.terms:
            raise self.error("the claim names no metric, such as robust[group=norm]", 1)
        return claim

    def expression(self) -> Linear:
        total = self.product()
        while sign := self.take_one("+-"):
            total = total.plus(self.product().times(1.0 if sign == "+" else -1.0))
        return total

    def product(self) -> Linear:
        result = self.unary()
        while self.take_one("*"):
            column = self.column()
            other = self.unary()
            if result.terms and other.terms:
                raise self.error("two measured values cannot be multiplied; one of them must be a number", column)
            result = other.times(result.constant) if other.terms else result.times(other.constant)
        return result

    def unary(self) -> Linear:
        sign = 1.0
        while self.take_one("-"):
            sign = -sign
        if self.take_one("("):
            self.depth += 1
            if self.depth > _DEEPEST:
                raise self.error(f"more than {_DEEPEST} parentheses inside each other", self.position)
            inner = self.expression()
            if not self.take_one(")"):
                raise self.wrong("')'")
            self.depth -= 1
            return inner.times(sign)
        number = self.take(_NUMBER)
        if number is not None:
            value = float(number[1]) / 100 if number[2] else float(number[1])
            if self.position < len(self.text) and re.match(r"[\w.%]", self.text[self.position]):
                raise self.error(
                    f"{number[0] + self.text[self.position]!r} is no number; quote a name", number.start() + 1
                )
            return Linear(value * sign, ())
        return Linear(0.0, ((sign, self.term()),))

    def term(self) -> Term:
        column = self.column()
        metric = self.quoted()
        if metric is None:
            name = self.take(_NAME)
            if name is None:
                raise self.wrong("a number, a metric or '('")
            metric = name[0]
        parts: list[Part] = []
        pins: list[Part] = []
        if self.take_one("["):
            while True:
                part = self.part()
                (pins if part.factor == _PIN else parts).append(part)
                if self.take_one("]"):
                    break
                if not self.take_one(","):
                    raise self.wrong("',' or ']' (quote a level that holds , = [ or ])")
        if len(pins) > 1:
            raise self.error("checkpoint is given twice", pins[1].column)
        pin = pins[0] if pins else Part(None, "", 0)
        return Term(metric, tuple(parts), pin.level if pins else None, column, pin.column)

    def part(self) -> Part:
        column = self.column()
        first = self.level()
        if self.take_one("="):
            return Part(first, self.level(), column)
        return Part(None, first, column)

    def level(self) -> str:
        quoted = self.quoted()
        if quoted is not None:
            return quoted
        bare = self.take(_LEVEL)
        if bare is None:
            raise self.wrong("a factor or a level")
        return bare[0].strip()

    def quoted(self) -> str | None:
        start = self.position
        found = self.take(_QUOTED)
        if found is None:
            if self.peek() in ("'", '"'):
                raise self.error("a quote is opened and never closed", self.column())
            return None
        text = re.sub(r"\\(.)", r"\1", found[1] if found[1] is not None else found[2])
        if not text.strip():
            self.position = start
            raise self.error("an empty name", self.column())
        return text

    def peek(self) -> str:
        """Return the next character after spaces; empty at the end."""
        found = _SPACE.match(self.text, self.position)
        self.position = found.end() if found else self.position
        return self.text[self.position : self.position + 1]

    def column(self) -> int:
        self.peek()
        return self.position + 1

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        self.peek()
        found = pattern.match(self.text, self.position)
        if found is not None:
            self.position = found.end()
        return found

    def take_one(self, characters: str) -> str:
        character = self.peek()
        if character and character in characters:
            self.position += 1
            return character
        return ""

    def wrong(self, expected: str) -> UserError:
        character = self.peek()
        return self.error(f"expected {expected}, found {repr(character) if character else 'the end'}", self.column())

    def error(self, message: str, column: int) -> UserError:
        return UserError(f"column {column}: {message}")
