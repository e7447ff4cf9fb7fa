from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from robustlayers.core.errors import UserError
from robustlayers.selection.grammar import Binary, Call, Name, Not, Number, parse

a, b, c = Name("a"), Name("b"), Name("c")


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("a", a),
        (" a ", a),
        ("a | b & c", Binary("|", a, Binary("&", b, c))),
        ("a & b | c", Binary("|", Binary("&", a, b), c)),
        ("a - b | c", Binary("|", Binary("-", a, b), c)),
        ("a | b - c", Binary("-", Binary("|", a, b), c)),
        ("a - b - c", Binary("-", Binary("-", a, b), c)),
        ("a - (b - c)", Binary("-", a, Binary("-", b, c))),
        ("~a & b", Binary("&", Not(a), b)),
        ("~~a", Not(Not(a))),
        ("~(a|b)", Not(Binary("|", a, b))),
        ("((a))", a),
        ('"a"', Name("a", quoted=True)),
        ("'a b|c'", Name("a b|c", quoted=True)),
        ("layer1.*.bn?", Name("layer1.*.bn?")),
        ("layer[1-3].0", Name("layer[1-3].0")),
        ("*", Name("*")),
        ("0", Name("0")),
        ("1.0", Name("1.0")),
        ("0.weight", Name("0.weight")),
        ("1.0.weight", Name("1.0.weight")),
        ("10x", Name("10x")),
        ("0-1", Binary("-", Name("0"), Name("1"))),
        ("stage(2)", Call("stage", (Number(2.0),), ())),
        ("block(1, block=2)", Call("block", (Number(1.0),), (("block", Number(2.0)),))),
        ("random(like=a|b, seed=3)", Call("random", (), (("like", Binary("|", a, b)), ("seed", Number(3.0))))),
        ("f()", Call("f", (), ())),
        ("f(g(1), a)", Call("f", (Call("g", (Number(1.0),), ()), a), ())),
        ('f("1")', Call("f", (Name("1", quoted=True),), ())),
    ],
)
def test_a_selector_has_the_tree_that_the_grammar_says(text, tree):
    assert parse(text) == tree


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty selector"),
        (" \t", "empty selector"),
        ("norm &", "selector 'norm &': something is missing at column 7"),
        ("norm conv", "selector 'norm conv': unexpected 'conv' at column 6"),
        ("(norm", "selector '(norm': expected ')' at column 6"),
        ("norm)", "selector 'norm)': unexpected ')' at column 5"),
        ("& norm", "selector '& norm': unexpected '&' at column 1"),
        ("norm || conv", "selector 'norm || conv': unexpected '|' at column 7"),
        ("norm $ conv", "selector 'norm $ conv': unexpected '$' at column 6"),
        ("()", "selector '()': unexpected ')' at column 2"),
        ("'norm", "selector \"'norm\": unexpected \"'\" at column 1"),
        ("stage(", "selector 'stage(': something is missing at column 7"),
        ("stage(1", "selector 'stage(1': expected ',' or ')' at column 8"),
        ("stage(1,)", "selector 'stage(1,)': unexpected ')' at column 9"),
        ("stage(1 2)", "selector 'stage(1 2)': expected ',' or ')' at column 9"),
        ("stage(-1)", "selector 'stage(-1)': unexpected '-' at column 7"),
        ("block(stage=1, stage=2)", "selector 'block(stage=1, stage=2)': 'stage' is given twice at column 16"),
        ("block(stage=1, 2)", "selector 'block(stage=1, 2)': an argument without a name follows one with a name at "
         "column 16"),
        ("a = b", "selector 'a = b': unexpected '=' at column 3"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_column(text, message):
    with pytest.raises(UserError) as error:
        parse(text)
    assert str(error.value) == message


@given(st.text(max_size=30) | st.text("ab01.*?[]()&|~-=,'\" ", max_size=20))
@example("a\x1fb")
@example("stage(1²)")
def test_any_text_is_a_selector_or_an_error_of_the_user(text):
    with suppress(UserError):
        parse(text)
