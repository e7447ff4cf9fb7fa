"""The strict YAML reader: what it reads, what it refuses, and the exact lines that it says about it."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml as pyyaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from robustlayers.core.errors import UserError
from robustlayers.study.yaml import DEEPEST, LARGEST, parse, parse_value, path_text, read


def attempt(call: Callable[[], Any]) -> Any:
    """What the call returns, or the `UserError` that it raises; anything else that it raises fails the test."""
    try:
        return call()
    except UserError as error:
        return error


def lines_of(text: str, file: str = "s.yaml") -> list[str]:
    with pytest.raises(UserError) as caught:
        parse(text, file)
    return str(caught.value).splitlines()


SCALARS = [
    ("true", True),
    ("True", True),
    ("FALSE", False),
    ("tRUE", "tRUE"),
    ("null", None),
    ("NULL", None),
    ("~", None),
    ("", None),
    ("0", 0),
    ("-0", 0),
    ("+3", 3),
    ("18446744073709551615", 2**64 - 1),
    ("-9223372036854775808", -(2**63)),
    ("1e-3", 1e-3),
    ("1E3", 1000.0),
    (".5", 0.5),
    ("5.", 5.0),
    ("-.5e+1", -5.0),
    ("8/255", "8/255"),
    ("off", "off"),
    ("no", "no"),
    ("Yes", "Yes"),
    ("12:30", "12:30"),
    ("2024-01-01", "2024-01-01"),
    ("0x1f", "0x1f"),
    ("0o17", "0o17"),
    ("1_000", "1_000"),
    ("1e", "1e"),
    (".", "."),
    ("=", "="),
    ("'1'", "1"),
    ('"true"', "true"),
    ("''", ""),
    ('"a\\tb\\u00e9"', "a\tb\u00e9"),
    ("conv | linear", "conv | linear"),
    ("norm & stage(4)", "norm & stage(4)"),
]


@pytest.mark.parametrize(("text", "value"), SCALARS, ids=[text for text, _ in SCALARS])
def test_a_scalar_has_the_type_of_the_core_schema(text: str, value: object) -> None:
    for document in (f"key: {text}\n", f"key:\n  - {text}\n"):
        read_value = parse(document, "s.yaml").value["key"]
        read_value = read_value[0] if isinstance(read_value, list) else read_value
        assert read_value == value
        assert type(read_value) is type(value)
    assert parse_value(text, "--set") == value


def test_the_study_of_the_design_is_read_whole() -> None:
    text = (
        "threat: {norm: linf, eps: 8/255}\n"
        "phases:\n"
        "  - {name: pretrain, epochs: 10, train: {all: natural}}\n"
        "  - name: adapt\n"
        "    train: {norm: adversarial, rest: frozen}\n"
        "factors:\n"
        "  group:\n"
        "    none:   {phases.adapt.epochs: 0}\n"
        '    random: {phases.adapt.train: {"random(like=norm, seed=0)": adversarial, rest: frozen}}\n'
        "  width: {1: {model.width: 16}, 2.5: {}, true: {}}\n"
        "note: |\n"
        "  two\n"
        "  lines\n"
    )
    document = parse(text, "s.yaml")
    assert document.value["factors"]["group"]["random"]["phases.adapt.train"] == {
        "random(like=norm, seed=0)": "adversarial",
        "rest": "frozen",
    }
    assert list(document.value["factors"]["width"]) == ["1", "2.5", "true"]
    assert document.value["note"] == "two\nlines\n"
    assert document.file == "s.yaml"
    assert document.line(()) == 1
    assert document.line(("threat", "eps")) == 1
    assert document.line(("phases",)) == 2
    assert document.line(("phases", 0)) == 3
    assert document.line(("phases", 1, "train")) == 5
    assert document.line(("phases", 1, "train", "rest")) == 5
    assert document.line(("factors", "group", "random")) == 9
    # a path that is not there: the nearest part of it that is
    assert document.line(("phases", 1, "optimizer", "name")) == 4
    assert document.line(("phases", 7)) == 2
    assert document.line(("modle", "name")) == 1


FAULTS = [
    ("", ["s.yaml: is empty"]),
    ("# only a comment\n", ["s.yaml: is empty"]),
    ("---\n", ["s.yaml: is empty"]),
    ("- 1\n", ["s.yaml:1: the top level must be a mapping (key: value), not a list"]),
    ("\nresnet\n", ["s.yaml:2: the top level must be a mapping (key: value), not a single value"]),
    ("a: 1\nb: 2\n'a': 3\n", ["s.yaml:3: a: duplicate key, first on line 1"]),
    ("m:\n  1: x\n  '1': y\n", ["s.yaml:3: m.1: duplicate key, first on line 2"]),
    (
        "a: 012\nb: -007\nc: 00\n",
        [
            "s.yaml:1: a: 012 has a leading zero; write 12, or quote it as text",
            "s.yaml:2: b: -007 has a leading zero; write -7, or quote it as text",
            "s.yaml:3: c: 00 has a leading zero; write 0, or quote it as text",
        ],
    ),
    ("a: [1, .inf]\n", ["s.yaml:1: a.1: .inf is not finite"]),
    ("a: -.INF\nb: .NaN\n", ["s.yaml:1: a: -.INF is not finite", "s.yaml:2: b: .NaN is not finite"]),
    ("a: 1e999\n", ["s.yaml:1: a: 1e999 is not finite"]),
    ("a: 18446744073709551616\n", ["s.yaml:1: a: 18446744073709551616 does not fit into 64 bits"]),
    ("a: !!python/object:os.system x\n", ["tag !!python/object:os.system: tags are not read; "]),
    ("a: !mine [1]\n", ["s.yaml:1: a: tag !mine: tags are not read; quote a text that begins with !"]),
    ("!!str a: 1\n", ["s.yaml:1: tag !!str: tags are not read; quote a text that begins with !"]),
    (
        "a: &base {b: 1}\nc: *base\nd:\n  <<: x\n",
        [
            "s.yaml:1: a: anchor &base: anchors are not read; share settings by a factor's patch, "
            "or quote text that begins with &",
            "s.yaml:2: c: alias *base: aliases are not read; share settings by a factor's patch, "
            "or quote text that begins with *",
            "s.yaml:4: d: merge keys (<<) are not read; share settings by a factor's patch",
        ],
    ),
    ("train: {*bn1: frozen}\n", ["alias *bn1"]),
    ("train: {*.bn1: frozen}\n", ["s.yaml:1: not valid YAML: quote text that begins with * or &"]),
    ("a: 1\n---\nb: 1\n", ["s.yaml:2: a second document begins here; a file holds one"]),
    ("%YAML 1.1\n---\na: 1\n", ["s.yaml:1: directives (%YAML, %TAG) are not read; remove them"]),
    ("? [1, 2]\n: 3\n", ["s.yaml:1: a key must be text, not a list; quote it"]),
    ("x:\n  {a: 1}: 3\n", ["s.yaml:2: x: a key must be text, not a mapping; quote it"]),
    ("'': 1\n", ["s.yaml:1: a key is empty"]),
    ('"a\\nb": 1\n', ["s.yaml:1: key 'a\\nb' holds a line break or a tab"]),
    ("a:\n\tb: 1\n", ["s.yaml:2: not valid YAML: a tab where only spaces may stand"]),
    ("a: {b: 1,\n\tc: 1}\n", ["s.yaml:2: not valid YAML: a tab where only spaces may stand"]),
    ("a: 'x\nb: 1\n", ["s.yaml:1: not valid YAML: a quote is opened and never closed"]),
    ("a: {b: 1\n", ["s.yaml:1: not valid YAML: a bracket is opened and never closed"]),
    ("a:\n  b: 1\n c: 2\n", ["s.yaml:3: not valid YAML: the indentation does not match the lines above"]),
    ("a: 'x' y\n", ["s.yaml:1: not valid YAML: text after the end of a value; quote the whole text"]),
    ("{a: 1}}\n", ["s.yaml:1: not valid YAML: text after the end of a value; quote the whole text"]),
    (
        "say: Norm: it gains\n",
        [
            "s.yaml:1: not valid YAML: a ': ' where none may stand; "
            "quote text that holds a colon, or look for a missing colon above"
        ],
    ),
    ("a: 1\nbc\n", ["s.yaml:2: not valid YAML: a key without a colon"]),
    (
        "claim: {that: robust[a=b] > 1}\n",
        ["s.yaml:1: not valid YAML: expected ',' or '}', but got '['; quote text that holds , [ ] { or }"],
    ),
    ("a: @x\n", ["s.yaml:1: not valid YAML: found character '@' that cannot start any token; quote the text"]),
    (
        "train: {random(like=norm, seed=0): adversarial}\n",
        ["s.yaml:1: train: 'random(like=norm' ends inside a parenthesis; quote text that holds a comma"],
    ),
    ("a: 1\r\nb: \x07\r\nc: \x00\r\n", ["s.yaml:2: unprintable character U+0007, and 1 more; remove it"]),
    ("a: x\u2028b: 1\n", ["s.yaml:1: unprintable character U+2028; remove it"]),
    ("a: \ud800\n", ["s.yaml:1: unprintable character U+D800; remove it"]),
    ('a: "\\x1b[31m"\n', ["s.yaml:1: a: the text holds the unprintable character U+001B"]),
    ('a: "\\ud800"\n', ["s.yaml:1: a: the text holds the unprintable character U+D800"]),
    ('a: 1\nb: "\\UFFFFFFFF"\n', ["s.yaml:2: the escape \\UFFFFFFFF is no character"]),
    ("a: " + "[" * 60 + "\n", [f"s.yaml:1: nested deeper than {DEEPEST} levels"]),
]


@pytest.mark.parametrize(("text", "expected"), FAULTS, ids=[repr(text[:30]) for text, _ in FAULTS])
def test_a_fault_says_where_and_what(text: str, expected: list[str]) -> None:
    found = lines_of(text)
    assert len(found) == len(expected)
    for line, part in zip(found, expected, strict=True):
        assert part in line if not part.startswith("s.yaml") else part == line


def test_all_faults_come_at_once_and_in_order_even_before_a_syntax_error() -> None:
    text = "a: 01\nb: {a: 1, a: 2}\nc: !x 1\nd: [.nan, &q 5]\ne: 'open\n"
    assert [line.split(": ")[0] for line in lines_of(text)] == [f"s.yaml:{n}" for n in (1, 2, 3, 4, 4, 5)]


def test_depth_is_allowed_up_to_the_limit() -> None:
    deep = "a: " + "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1)
    assert parse(deep, "s.yaml").value["a"] is not None
    assert lines_of("a: " + "[" * DEEPEST + "]" * DEEPEST) == [f"s.yaml:1: nested deeper than {DEEPEST} levels"]
    assert lines_of("a: " + "{x: " * 20_000)  # neither a stack overflow nor a wait


def test_a_value_of_the_command_line_is_one_scalar_or_flow_value() -> None:
    assert parse_value("[1, {a: 2/255}]", "--set x") == [1, {"a": "2/255"}]
    for text, message in [
        ("a: b", "'a: b' is not one value; write {a: b} for a mapping, [a, b] for a list, or quote it"),
        ("- a", "'- a' is not one value; write {a: b} for a mapping, [a, b] for a list, or quote it"),
        ("---", "'---' is not one value; write {a: b} for a mapping, [a, b] for a list, or quote it"),
        ("is it #1 or #2 ?", "'#1 or #2 ?' would be a comment; quote text that holds ' #'"),
        ("{a: 1, a: 2}", "a: duplicate key, first on line 1"),
    ]:
        with pytest.raises(UserError) as caught:
            parse_value(text, "--set x")
        assert str(caught.value) == f"--set x: {message}"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            read(path)
        return str(caught.value).replace(f"{tmp_path}/", "")

    (tmp_path / "bn-adapt.yaml").write_text("a: 1\n")
    assert message(tmp_path / "bn-adpat.yaml") == "bn-adpat.yaml: no such file; nearest: bn-adapt.yaml"
    assert message(tmp_path / "nowhere" / "x.yaml") == "nowhere/x.yaml: no such file"
    (tmp_path / "folder.yaml").mkdir()
    assert message(tmp_path / "folder.yaml") == "folder.yaml: is a folder, not a YAML file"
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: caf\xe9\n")
    assert message(tmp_path / "latin.yaml") == "latin.yaml:2: is not UTF-8 text: byte 0xe9"
    (tmp_path / "big.yaml").write_bytes(b"a: " + b"x" * LARGEST)
    assert message(tmp_path / "big.yaml") == "big.yaml: is larger than 1 MB; a study file is a page of text"
    assert message(Path("/dev/null")) == "/dev/null: is not a regular file"
    assert message(tmp_path / ("x" * 5000)).endswith((": cannot be read: File name too long", ": no such file"))


def test_a_file_with_a_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb:\r\n  - x\r\n")
    document = read(tmp_path / "s.yaml")
    assert document.value == {"a": 1, "b": ["x"]}
    assert document.line(("b", 0)) == 3


printable = st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"])
texts = st.text(printable | st.sampled_from("\n\t #:-?,[]{}&*!|>'\"%@`~="), max_size=20)
keys = st.text(printable | st.sampled_from(" #:-?,[]{}&*!|>'\"%@`~=."), min_size=1, max_size=12)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
plain = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4))


class QuotingDumper(pyyaml.SafeDumper):
    """Quotes every text: YAML 1.1 writes some texts bare that are numbers in 1.2, such as 1e-3."""

    def ignore_aliases(self, data: object) -> bool:
        return True


QuotingDumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(keys, plain, min_size=1, max_size=4), st.booleans(), st.booleans())
def test_what_safe_dump_writes_is_read_back(value: dict, flow: bool, sort: bool) -> None:
    text = pyyaml.dump(value, Dumper=QuotingDumper, default_flow_style=flow, sort_keys=sort, allow_unicode=True)
    document = parse(text, "s.yaml")
    assert repr_sorted(document.value) == repr_sorted(value)
    for path in paths(value):
        assert path in document.lines


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(keys, st.lists(st.text(string.ascii_letters + string.digits + " .:-/", max_size=10), max_size=3))
)
def test_text_that_is_dumped_bare_stays_text_unless_it_is_a_number(value: dict) -> None:
    assume(value)
    bare = pyyaml.safe_dump(value)
    found = attempt(lambda: parse(bare, "s.yaml"))
    if isinstance(found, UserError):
        allowed = ("has a leading zero", "does not fit into 64 bits", "is not finite")
        assert all(any(text in fault.message for text in allowed) for fault in found.faults)
        return
    for key, items in value.items():
        for item, back in zip(items, found.value[key], strict=True):
            assert back == item or (isinstance(back, int | float) and float(item) == back)


def repr_sorted(value: object) -> str:
    """Text that tells 1 from 1.0 and True, whatever the order of keys."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {repr_sorted(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(repr_sorted, value)) + "]"
    return repr(value)


def paths(value: object, above: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [above] + [path for key, item in items for path in paths(item, (*above, key))]


yaml_like = st.text(st.sampled_from("ab01.:-?,[]{}&*!|>'\"%@`~=<\\uUx# \n\t\r") | st.characters(), max_size=60)


@settings(max_examples=400, deadline=None)
@given(yaml_like)
def test_random_text_is_read_or_refused(text: str) -> None:
    document = attempt(lambda: parse(text, "s.yaml"))
    if isinstance(document, UserError):
        for fault in document.faults:
            assert str(fault).startswith("s.yaml")
            assert fault.line is None or 1 <= fault.line <= text.count("\n") + text.count("\r") + 1
    else:
        assert isinstance(document.value, dict)
    value = attempt(lambda: parse_value(text, "--set x"))
    if isinstance(value, UserError):
        assert all(fault.path is not None and fault.path.startswith("--set x") for fault in value.faults)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_random_bytes_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "s.yaml").write_bytes(data)
    found = attempt(lambda: read(tmp_path / "s.yaml"))
    assert found.faults if isinstance(found, UserError) else found.value


def test_a_path_is_written_with_quotes_where_it_needs_them() -> None:
    assert path_text(("a", 1, "b.c", 'd"e', "f=g", " h", "")) == 'a.1."b.c"."d\\"e"."f=g"." h".""'
