"""The language of claims: what is read, what is refused, and what a study must have for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustlayers.core.errors import UserError
from robustlayers.study.claim_syntax import parse, spelled

FACTORS = {"group": ["none", "norm", "all", "a, b"], "width": ["16", "32"]}
METRICS = ["clean", "robust", "pgd-20", "apgd-ce", "trained_share"]
ALLOWED = "allowed: apgd-ce, clean, pgd-20, robust, trained_share"
CHECKPOINTS = ["best", "last"]


def attempt(call: Callable[[], Any]) -> Any:
    """What the call returns, or the `UserError` that it raises; anything else that it raises fails the test."""
    try:
        return call()
    except UserError as error:
        return error


def value(text: str, table: dict[str, float]) -> float:
    """The oriented difference of a claim, each term looked up by metric and levels."""
    difference = parse(text).difference
    return difference.constant + sum(
        factor * table["/".join([term.metric, *(part.level for part in term.parts)])]
        for factor, term in difference.terms
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("robust[norm] > robust[all]", 0.4 - 0.7),
        ("robust[norm] < robust[all]", 0.7 - 0.4),
        ("robust[norm] >= 12 %", 0.4 - 0.12),
        ("robust[norm] <= .5", 0.5 - 0.4),
        ("robust[norm] > 0.5 * robust[all]", 0.4 - 0.35),
        ("robust[norm]>0.5*robust[all]", 0.4 - 0.35),
        ("robust[norm] * 2 - robust[all] > 1e-2", 0.8 - 0.7 - 0.01),
        ("-(robust[norm] - -robust[all]) > -(1 - 2)*3", -1.1 - 3),
        ("2 * (1 - robust[norm]) * 3 > --1", 6 * 0.6 - 1),
        ("pgd-20[all] - robust[all] > 0", 0.8 - 0.7),
        ("pgd-20[all]-robust[all] > 0", 0.8 - 0.7),
        ("clean - 0.1 > 5%", 0.9 - 0.1 - 0.05),
        ("1 - 2 - 3 < clean", 0.9 + 4),
        ('"clean" > robust["norm"]', 0.9 - 0.4),
        ("corrupted:fog:3[all]-clean@main > 0", 0.3 - 0.2),
        ("'pgd-2@main>auxiliary'[all] > 'sanity:eps=8/255'", 0.6 - 0.1),
    ],
)
def test_a_claim_means_what_it_says(text: str, expected: float) -> None:
    table = {"robust/norm": 0.4, "robust/all": 0.7, "pgd-20/all": 0.8, "clean": 0.9}
    table |= {"corrupted:fog:3/all": 0.3, "clean@main": 0.2, "pgd-2@main>auxiliary/all": 0.6, "sanity:eps=8/255": 0.1}
    assert value(text, table) == pytest.approx(expected, abs=1e-12)


def test_a_term_keeps_its_metric_levels_checkpoint_and_columns() -> None:
    claim = parse("apgd-ce[ group = norm , checkpoint=last,width=16] > clean[group=\"a, b\", 'w \\'x\\'']")
    (_, left), (_, right) = claim.difference.terms
    assert (left.metric, left.levels, left.checkpoint) == ("apgd-ce", {"group": "norm", "width": "16"}, "last")
    assert [(part.factor, part.level, part.column) for part in right.parts] == [
        ("group", "a, b", 59),
        (None, "w 'x'", 73),
    ]
    assert (left.column, left.checkpoint_column, right.column) == (1, 25, 53)
    assert claim.text.startswith("apgd-ce[")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "column 1: expected a number, a metric or '(', found the end"),
        ("robust", "column 7: expected one of > < >= <=, found the end"),
        ("robust[norm] = 1", "column 14: expected one of > < >= <=, found '='"),
        ("robust[norm] >", "column 15: expected a number, a metric or '(', found the end"),
        ("a <= b <= c", "column 8: a claim is one comparison; write two claims"),
        ("a > b c", "column 7: expected the end of the claim, or one of + - *, found 'c'"),
        ("a > b / 2", "column 7: expected the end of the claim, or one of + - *, found '/'"),
        ("1 > 0", "column 1: the claim names no metric, such as robust[group=norm]"),
        ("2 * a * b > 1", "column 9: two measured values cannot be multiplied; one of them must be a number"),
        ("a[b > 1", "column 5: expected ',' or ']' (quote a level that holds , = [ or ]), found '>'"),
        ("a[g=r(x=1, y)] > 1", "column 8: expected ',' or ']' (quote a level that holds , = [ or ]), found '='"),
        ("a[] > 1", "column 3: expected a factor or a level, found ']'"),
        ("a[g=] > 1", "column 5: expected a factor or a level, found ']'"),
        ('a["g] > 1', "column 3: a quote is opened and never closed"),
        ('a[""] > 1', "column 3: an empty name"),
        ("(a > 1", "column 4: expected ')', found '>'"),
        ("0.5a > 1", "column 1: '0.5a' is no number; quote a name"),
        ("5 %% > a", "column 1: '5 %%' is no number; quote a name"),
        ("a[checkpoint=x, checkpoint=y] > 1", "column 17: checkpoint is given twice"),
        ("a > 1e999", "column 1: a number is too large"),
        ("1e10 * 1e10 * a > 1", "column 1: a number is too large"),
        ("(" * 60 + "a", "column 51: more than 50 parentheses inside each other"),
    ],
)
def test_a_claim_that_cannot_be_read_says_the_column(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("robust[group=norm, width=16] > 0.5", []),
        ("robust[norm, 16, checkpoint=best] > robust[norm, 16, checkpoint=last]", []),
        ('robust["a, b", 16] > trained_share[16, all]', []),
        (
            "robsut[group=norm, width=16] > 0",
            [
                f"column 1: unknown metric 'robsut'; nearest: robust; {ALLOWED}",
            ],
        ),
        (
            "robust[gruop=norm, width=16] > 0",
            ["column 8: unknown factor 'gruop'; nearest: group; allowed: group, width"],
        ),
        (
            "robust[group=nrom, width=16] > 0",
            ["column 8: unknown level of group 'nrom'; nearest: norm, none; allowed: 'a, b', all, none, norm"],
        ),
        (
            "robust[nrom, width=16] > 0",
            ["column 8: unknown level 'nrom'; nearest: norm, none; allowed: 16, 32, 'a, b', all, none, norm"],
        ),
        (
            "robust[norm, 16, checkpoint=lst] > 0",
            ["column 18: unknown checkpoint 'lst'; nearest: last, best; allowed: best, last"],
        ),
        (
            "robust > 0",
            ["column 1: robust must name one arm, but leaves free: group (none, norm, all, a, b); width (16, 32)"],
        ),
        ("0 < robust[norm]", ["column 5: robust must name one arm, but leaves free: width (16, 32)"]),
        ("robust[norm, group=all, width=16] > 0", ["column 14: factor 'group' is given twice"]),
        (
            "robust[random(like=norm, width=16] > 0",
            ["column 8: unknown factor 'random(like'; allowed: group, width; quote a level that holds a comma or ="],
        ),
        (
            "robust[norm, 16] > robust[width=16, group=norm]",
            ["compares a value with itself: no measured value is left in the difference"],
        ),
        ("robust[norm, 16] > robust[norm, 16, checkpoint=last]", []),
        (
            "clen[norm, width=17] > robust[none, 16]",
            [
                f"column 1: unknown metric 'clen'; nearest: clean; {ALLOWED}",
                "column 12: unknown level of width '17'; nearest: 16; allowed: 16, 32",
            ],
        ),
    ],
)
def test_a_claim_is_checked_against_the_study(text: str, messages: list[str]) -> None:
    claim = parse(text)
    assert [str(fault) for fault in claim.check(FACTORS, METRICS, CHECKPOINTS)] == messages
    if messages:
        with pytest.raises(UserError) as caught:
            claim.bind(FACTORS, METRICS, CHECKPOINTS)
        assert str(caught.value).splitlines() == messages
    else:
        bound = claim.bind(FACTORS, METRICS, CHECKPOINTS)
        assert all(set(term.levels) == set(FACTORS) for _, term in bound.difference.terms)


@pytest.mark.parametrize(
    "name", ["pgd-20", "corrupted:fog:3", "clean@main", "pgd-2@main>auxiliary", "a=b", "it's", "\\"]
)
def test_a_name_is_spelled_as_it_is_read(name: str) -> None:
    """In quotes only where it must be: bare names stay bare."""
    (_, term), *_ = parse(f"{spelled(name)} > 0").difference.terms
    assert term.metric == name
    assert (spelled(name) == name) == (attempt(lambda: parse(f"{name} > 0").metrics) == (name,))


def test_the_study_may_say_more_about_an_unknown_metric() -> None:
    claim = parse("robust[norm, 16] > 2 * ece[norm, 16] - ece[all, 16]")
    assert claim.metrics == ("robust", "ece")
    faults = claim.check(FACTORS, METRICS, CHECKPOINTS, lambda name: f"{name}? Never heard of it")
    assert [str(fault) for fault in faults] == [
        "column 24: ece? Never heard of it",
        "column 40: ece? Never heard of it",
    ]


def test_a_level_of_two_factors_must_name_its_factor() -> None:
    factors = {"model": ["small", "16"], "width": ["16", "32"]}
    faults = parse("robust[small, 16] > 0").check(factors, METRICS, CHECKPOINTS)
    assert str(faults[0]) == "column 15: level '16' belongs to several factors; write model=16 or width=16"


def test_a_study_without_factors_needs_no_brackets() -> None:
    assert parse("robust > 0.3").check({}, METRICS, CHECKPOINTS) == []


def test_a_level_alone_has_no_factor_before_it_is_bound() -> None:
    (_, term), *_ = parse("robust[norm] > 0").difference.terms
    with pytest.raises(UserError, match="column 1: the levels of robust are not bound to factors"):
        _ = term.levels


TOKENS = "robust pgd-20 a:b @ : [ ] ( ) - + * > <= = , group norm checkpoint last 16 0.5 12% / % \" ' \\"
pieces = st.sampled_from([" ", *TOKENS.split()])


@settings(max_examples=500)
@given(st.lists(pieces, max_size=20).map("".join) | st.lists(pieces, max_size=12).map(" ".join) | st.text(max_size=30))
def test_random_text_is_read_or_refused(text: str) -> None:
    claim = attempt(lambda: parse(text))
    if isinstance(claim, UserError):
        (fault,) = claim.faults
        column = int(fault.message.removeprefix("column ").split(":")[0])
        assert 1 <= column <= len(text) + 1
    else:
        for fault in claim.check(FACTORS, METRICS, CHECKPOINTS):
            assert fault.message


levels = st.sampled_from(["none", "norm", "all", "a, b"])
numbers = st.floats(-100, 100).map(lambda number: round(number, 3))


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3, constant: bool = False) -> str:
    """An expression as text that Python can evaluate too, with M("metric", "level") for a term."""
    kind = draw(st.sampled_from(["number", "term"] if depth == 0 else ["number", "term", "sum", "product", "minus"]))
    if kind == "minus":
        return f"-({draw(expressions(depth=depth - 1, constant=constant))})"
    if kind == "sum":
        a, b = (draw(expressions(depth=depth - 1, constant=constant)) for _ in range(2))
        return f"({a} {draw(st.sampled_from('+-'))} {b})"
    if kind == "product":
        a, b = draw(expressions(depth=depth - 1, constant=True)), draw(expressions(depth=depth - 1, constant=constant))
        return f"{a} * {b}"
    if kind == "number" or constant:
        return repr(draw(numbers))
    return f"{draw(st.sampled_from(['clean', 'robust']))}['{draw(levels)}']"


@settings(max_examples=200)
@given(expressions(), expressions(), st.sampled_from(["<", "<=", ">", ">="]))
def test_a_claim_has_the_value_that_python_gives_it(left: str, right: str, operator: str) -> None:
    text = f"robust['norm'] + {left} {operator} {right}"
    table = {name: {level: len(name) + len(level) / 7 for level in FACTORS["group"]} for name in ("clean", "robust")}
    claim = attempt(lambda: parse(text))
    if isinstance(claim, UserError):
        assert "too large" in str(claim)
        return
    difference = claim.difference
    ours = difference.constant + sum(f * table[term.metric][term.parts[0].level] for f, term in difference.terms)
    theirs = eval(f"robust['norm'] + {left} - ({right})", {"__builtins__": {}}, dict(table))
    theirs = theirs if operator.startswith(">") else -theirs
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6 * max(1.0, *(abs(f) for f, _ in difference.terms)))
