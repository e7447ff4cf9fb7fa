"""Selector functions that pick by a file of scores: `top` and `bottom`, and what of that file identifies a selector.

A file scores modules or tensors by their exact names. As CSV it has a header with the columns `name` and `score`, or
another one that `column` names, in any order and beside any others; as JSON it is one object {name: score}.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustlayers.core.errors import Fault, UserError, nearest, one_of
from robustlayers.core.files import file_digest
from robustlayers.core.quantities import number
from robustlayers.selection.arguments import Arguments
from robustlayers.selection.grammar import Binary, Call, Name, Node, Not, parse
from robustlayers.selection.inventory import Inventory
from robustlayers.selection.selection import Selection

__all__ = ["Score", "bottom", "read_scores", "selector_content", "top"]

_FUNCTIONS = ("top", "bottom")


@dataclass(frozen=True)
class Score:
    """The score of one module or tensor, and the line of the file (from 1) that it stands on."""

    name: str
    value: float
    line: int


def top(arguments: Arguments) -> Selection:
    """`top("FILE", share=0.25, of=S, column="score")`: the modules and tensors with the highest scores in a file.

    Names are taken in descending order of score, equal scores in order of name: with `count=n` the first n, with `share`
    the most of them, but at least one, whose parameters together are no more than that share of the parameters of S. They
    end at the first name that goes over the share, even if a later one would still fit. S is all tensors unless given;
    names outside of it are passed over, and of a module that is partly in S only that part is taken.

    Layers in the order of a criticality are such files: RiFT's module robust criticality (ICCV 2023, arXiv 2308.02533),
    or the index of CLAT (Gopal et al. 2025, arXiv 2408.10204), which takes about 5 % of the parameters.
    """
    return _first(arguments, -1)


def bottom(arguments: Arguments) -> Selection:
    """`bottom("FILE", share=0.25)`: as `top`, in ascending order of score."""
    return _first(arguments, 1)


def _first(arguments: Arguments, sign: int) -> Selection:
    function = arguments.call.name
    bound = arguments.bind("file", named=("share", "count", "of", "column"))
    inventory = arguments.inventory
    path = _file(function, bound.get("file"))
    if ("share" in bound) == ("count" in bound):
        raise UserError(
            f'selector function {function!r} needs share or count, as in {function}("scores.csv", share=0.25)'
        )
    count = arguments.whole_number(bound, "count", 1) if "count" in bound else None
    share = arguments.fraction(bound, "share") if "share" in bound else 1.0
    if share == 0:
        raise UserError(f"selector function {function!r}: share must be more than 0")
    column = None
    if "column" in bound:
        node = bound["column"]
        if not isinstance(node, Name):
            raise UserError(f'selector function {function!r}: column must be a name, as in column="score"')
        column = node.text
    pool = (
        arguments.evaluate(bound["of"], inventory) if "of" in bound else Selection(inventory, list(inventory.entries))
    )

    scores = read_scores(path, column)
    found = _selections(inventory, scores, path)
    ranked = [(score, found[score.name] & pool) for score in sorted(scores, key=lambda s: (sign * s.value, s.name))]
    ranked = [(score, selection) for score, selection in ranked if selection]
    if not ranked:
        raise UserError(Fault("scores nothing that of= picks", file=str(path)))
    if count is not None:
        if count > len(ranked):
            raise UserError(f"selector function {function!r}: {count} wanted, {path} scores {len(ranked)} of them")
        ranked = ranked[:count]
    limit = share * pool.parameters * (1 + 1e-9)  # 0.29 * 100 is a little less than 29
    taken = ranked[0][1]
    for _, selection in ranked[1:]:
        more = taken | selection
        if count is None and more.parameters > limit:
            break
        taken = more
    return taken


def _selections(inventory: Inventory, scores: list[Score], path: Path) -> dict[str, Selection]:
    """Return what each scored name stands for; names that the model does not have, or has twice over, are faults."""
    modules = inventory.modules()
    found: dict[str, Selection] = {}
    lines: dict[object, Score] = {}
    faults = []

    def fault(score: Score, message: str) -> None:
        faults.append(Fault(message, file=str(path), line=score.line))

    for score in scores:
        name = score.name
        if name in inventory.canonical:
            key: object = inventory.canonical[name]
            found[name] = Selection(inventory, [inventory.canonical[name]])
        elif name in modules and name:
            key = id(modules[name])
            found[name] = Selection(
                inventory, [e.name for e in inventory if any(alias.startswith(f"{name}.") for alias in e.names)]
            )
        else:
            fault(score, one_of("module or tensor", name, [*filter(None, modules), *inventory.canonical]))
            continue
        if key in lines:
            other = lines[key]
            same = "" if other.name == name else f": it is the same as {other.name!r}"
            fault(score, f"{name!r} is scored a second time, first on line {other.line}{same}")
        elif not found[name]:
            fault(score, f"module {name!r} has no tensors to select")
        lines.setdefault(key, score)
    if faults:
        raise UserError(faults)
    return found


def read_scores(path: Path, column: str | None = None) -> list[Score]:
    """Return the scores in a CSV or JSON file, in its order; names may repeat. `column` is the CSV's, `score` by default.

    Raises `UserError` with the line of each fault: what is missing, is no finite number, or does not fit the format.
    """
    name = str(path)
    kind = path.suffix.lower()
    if kind not in (".csv", ".json"):
        raise UserError(Fault("is neither .csv nor .json", file=name))
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        folder = path.parent if path.parent.is_dir() else None
        close = nearest(
            path.name, [p.name for p in folder.iterdir() if p.suffix in (".csv", ".json")] if folder else []
        )
        raise UserError(
            Fault("no such file" + (f"; nearest: {', '.join(close)}" if close else ""), file=name)
        ) from None
    except UnicodeDecodeError:
        raise UserError(Fault("is not UTF-8 text", file=name)) from None
    except OSError as error:
        raise UserError(Fault(f"cannot be read: {error.strerror or error}", file=name)) from None
    if kind == ".json" and column is not None:
        raise UserError(Fault("column= is for CSV files; a JSON file is one object {name: score}", file=name))
    found: list[Score] = []
    faults: list[Fault] = []
    for key, value, line in _json(text, name) if kind == ".json" else _csv(text, name, column or "score"):
        try:
            if not key:
                raise UserError("the name is empty")
            found.append(Score(key, number(value, f"score of {key}"), line))
        except UserError as error:
            faults += [fault.at(file=name, line=line) for fault in error.faults]
    if not found and not faults:
        faults.append(Fault("holds no scores", file=name))
    if faults:
        raise UserError(faults)
    return found


def _csv(text: str, file: str, column: str) -> Iterator[tuple[str, Any, int]]:
    """Yield (name, score as it is written, line) of a CSV file."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    faults: list[Fault] = []
    rows: list[tuple[list[str], int]] = []
    start = 1
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append(([cell.strip() for cell in row], start))
            start = reader.line_num + 1  # a quoted cell may span lines
    except csv.Error as error:
        raise UserError(Fault(f"not valid CSV: {error}", file=file, line=reader.line_num)) from None
    if not rows:
        raise UserError(Fault("is empty; it needs a header, name,score", file=file))
    header, first = rows[0]
    for needed in ("name", column):
        if header.count(needed) != 1:
            what = (
                f"has {header.count(needed)} columns {needed!r}"
                if needed in header
                else one_of("column", needed, header)
            )
            faults.append(Fault(what, file=file, line=first))
    for row, line in rows[1:]:
        if len(row) != len(header):
            faults.append(Fault(f"{len(row)} cells, the header has {len(header)}", file=file, line=line))
    if faults:
        raise UserError(faults)
    for row, line in rows[1:]:
        yield row[header.index("name")], row[header.index(column)], line


_KEY = re.compile(r'"(?:[^"\\]|\\.)*"(\s*:)?', re.DOTALL)


def _json(text: str, file: str) -> Iterator[tuple[str, Any, int]]:
    """Yield (name, score, line) of a JSON file, names that repeat as often as they do."""
    try:
        pairs = json.loads(text, object_pairs_hook=_Pairs, parse_constant=float)
    except json.JSONDecodeError as error:
        raise UserError(Fault(f"not valid JSON: {error.msg}", file=file, line=error.lineno)) from None
    except (ValueError, RecursionError) as error:
        raise UserError(Fault(f"not valid JSON: {error}", file=file)) from None
    if not isinstance(pairs, _Pairs):
        raise UserError(Fault("must be one object {name: score}", file=file))
    for key, value in pairs:
        if isinstance(value, list):
            raise UserError(Fault(f"score of {key}: not a number; write {{name: score}}", file=file))
    # Without objects inside, the texts before a colon are the names, in their order.
    starts = [match.start() for match in _KEY.finditer(text) if match[1]]
    for (key, value), start in zip(pairs, starts, strict=True):
        yield key, value if isinstance(value, int | float) else json.dumps(value), text.count("\n", 0, start) + 1


class _Pairs(list[tuple[str, Any]]):
    """The pairs of a JSON object, also those whose name stands there before."""


def selector_content(text: str) -> Any:
    """Return what decides a selector's meaning on a model: its text, and the SHA-256 of each score file that it names.

    A selector without score files is its text alone, without spaces around it. Otherwise it is
    `{"selector": text, "files": {path: digest}}`.

    >>> selector_content(" norm & stage(2) ")
    'norm & stage(2)'

    Raises `UserError` for a syntax error, and for a file that is missing.
    """
    files: dict[str, str] = {}
    for call in _calls(parse(text)):
        if call.name in _FUNCTIONS:
            path = _file(call.name, call.positional[0] if call.positional else dict(call.named).get("file"))
            if not path.is_file():
                read_scores(path)  # which says what is wrong
            files[str(path)] = file_digest(path)
    return {"selector": text.strip(), "files": files} if files else text.strip()


def _calls(node: Node) -> Iterator[Call]:
    """Yield every call of a function in a selector."""
    if isinstance(node, Call):
        yield node
        for argument in (*node.positional, *(argument for _, argument in node.named)):
            yield from _calls(argument)
    elif isinstance(node, Not):
        yield from _calls(node.operand)
    elif isinstance(node, Binary):
        yield from _calls(node.left)
        yield from _calls(node.right)


def _file(function: str, node: Node | None) -> Path:
    if not isinstance(node, Name) or not node.quoted or not node.text.strip():
        raise UserError(
            f'selector function {function!r} needs a file in quotes, as in {function}("scores.csv", share=0.25)'
        )
    return Path(node.text)
