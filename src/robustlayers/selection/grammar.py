"""The text of a selector and its syntax tree.

    expression := term (("|" | "-") term)*
    term       := factor ("&" factor)*
    factor     := "~" factor | "(" expression ")" | name | "quoted name" | name "(" arguments ")"
    arguments  := (argument ("," argument)*)?        argument := [key "="] expression-or-number

`|` and `-` bind alike, from the left; `&` binds tighter; `~` tightest. A name may hold dots and the wild cards of a glob
(`*`, `?`, `[...]`). A quoted name is always a name, never a keyword.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from robustlayers.core.errors import UserError

__all__ = ["Binary", "Call", "Name", "Node", "Not", "Number", "parse"]


@dataclass(frozen=True)
class Name:
    """A keyword, an exact name or a glob; `quoted` names are never keywords."""

    text: str
    quoted: bool = False


@dataclass(frozen=True)
class Number:
    """A number, as an argument of a call."""

    value: float


@dataclass(frozen=True)
class Call:
    """A function of arguments, such as `stage(2)` or `random(like=norm, seed=0)`."""

    name: str
    positional: tuple[Node, ...]
    named: tuple[tuple[str, Node], ...]


@dataclass(frozen=True)
class Not:
    """The complement of a selection."""

    operand: Node


@dataclass(frozen=True)
class Binary:
    """`left | right`, `left & right` or `left - right`."""

    operator: str
    left: Node
    right: Node


Node = Name | Number | Call | Not | Binary

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<quoted>"[^"]*"|'[^']*')
      | (?P<number>[0-9]+(?:\.[0-9]+)?(?![\w.*?\[]))
      | (?P<name>[\w*?](?:[\w.*?]|\[[^\]\s]*\])*)
      | (?P<mark>[()&|~,=-])
    )""",
    re.VERBOSE,
)


def parse(text: str) -> Node:
    """Parse a selector; a `UserError` says what is wrong and at which column.

    >>> parse("norm & ~head")
    Binary(operator='&', left=Name(text='norm', quoted=False), right=Not(operand=Name(text='head', quoted=False)))
    """
    return _Parser(text).whole()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        self.place = 0
        position = 0
        stripped = text.rstrip()
        if not stripped:
            raise UserError("empty selector")
        while position < len(stripped):
            match = _TOKEN.match(stripped, position)
            if match is None:
                position += len(stripped[position:]) - len(stripped[position:].lstrip())
                raise self.error(f"unexpected {stripped[position]!r}", position)
            kind = match.lastgroup or ""
            self.tokens.append((kind, match[kind], match.start(kind)))
            position = match.end()

    def error(self, message: str, position: int | None = None) -> UserError:
        if position is None:
            position = self.tokens[self.place][2] if self.place < len(self.tokens) else len(self.text)
        return UserError(f"selector {self.text!r}: {message} at column {position + 1}")

    def peek(self, *marks: str) -> bool:
        if self.place >= len(self.tokens):
            return False
        kind, text, _ = self.tokens[self.place]
        return kind == "mark" and text in marks

    def take(self) -> tuple[str, str, int]:
        if self.place >= len(self.tokens):
            raise self.error("something is missing")
        self.place += 1
        return self.tokens[self.place - 1]

    def expect(self, mark: str) -> None:
        if not self.peek(mark):
            raise self.error(f"expected {mark!r}")
        self.place += 1

    def whole(self) -> Node:
        node = self.expression()
        if self.place < len(self.tokens):
            raise self.error(f"unexpected {self.tokens[self.place][1]!r}")
        return node

    def expression(self) -> Node:
        node = self.term()
        while self.peek("|", "-"):
            _, operator, _ = self.take()
            node = Binary(operator, node, self.term())
        return node

    def term(self) -> Node:
        node = self.factor()
        while self.peek("&"):
            self.take()
            node = Binary("&", node, self.factor())
        return node

    def factor(self, argument: bool = False) -> Node:
        if self.peek("~"):
            self.take()
            return Not(self.factor())
        if self.peek("("):
            self.take()
            node = self.expression()
            self.expect(")")
            return node
        kind, text, position = self.take()
        if kind == "quoted":
            return Name(text[1:-1], quoted=True)
        if kind == "number":
            if argument:
                return Number(float(text))
            return Name(text)  # the first module of an nn.Sequential is called "0"
        if kind == "mark":
            raise self.error(f"unexpected {text!r}", position)
        if self.peek("("):
            self.take()
            return self.call(text)
        return Name(text)

    def call(self, name: str) -> Call:
        positional: list[Node] = []
        named: list[tuple[str, Node]] = []
        while not self.peek(")"):
            if positional or named:
                if not self.peek(","):
                    raise self.error("expected ',' or ')'")
                self.take()
            kind, text, position = self.tokens[self.place] if self.place < len(self.tokens) else ("", "", 0)
            follows = self.tokens[self.place + 1][:2] if self.place + 1 < len(self.tokens) else ("", "")
            if kind == "name" and follows == ("mark", "="):
                if text in dict(named):
                    raise self.error(f"{text!r} is given twice", position)
                self.place += 2
                named.append((text, self.argument()))
            elif named:
                raise self.error("an argument without a name follows one with a name")
            else:
                positional.append(self.argument())
        self.expect(")")
        return Call(name, tuple(positional), tuple(named))

    def argument(self) -> Node:
        if self.place < len(self.tokens) and self.tokens[self.place][0] == "number":
            return self.factor(argument=True)
        return self.expression()
