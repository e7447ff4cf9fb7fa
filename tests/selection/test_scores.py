"""`top` and `bottom`: what a file of scores picks, every mistake in one, and what of it identifies a selector."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robustlayers import models
from robustlayers.core.errors import UserError
from robustlayers.selection import Inventory, resolve, select, selector_content
from robustlayers.selection.scores import read_scores

NET = nn.Sequential()
for _name, _module in {
    "a": nn.Linear(5, 1, bias=False),  # 5 parameters
    "b": nn.Linear(9, 1),  # 10
    "c": nn.Linear(9, 1),  # 10
    "d": nn.BatchNorm1d(1),  # 2, and 3 buffer entries
    "relu": nn.ReLU(),
    "e": nn.Linear(73, 1, bias=False),  # 73: 100 in all
}.items():
    NET.add_module(_name, _module)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Work in an empty folder, and write a file of scores there."""
    monkeypatch.chdir(tmp_path)

    def save(text: str, name: str = "s.csv") -> None:
        Path(name).write_text(text)

    return save


def modules(selector: str, model: nn.Module = NET) -> str:
    """The modules that a selector picks tensors of, in registration order."""
    return "".join(dict.fromkeys(name.partition(".")[0] for name in select(model, selector)))


SCORES = "name,score\na,0.5\nb,-1\nc,2\nd,1e-3\ne,0.4\n"


@pytest.mark.parametrize(
    ("arguments", "picked"),
    [
        ("count=1", "c"),
        ("count=2", "ac"),
        ("count=3", "ace"),
        ("count=5", "abcde"),
        ("share=0.05", "c"),  # at least one
        ("share=0.1", "c"),
        ("share=0.14", "c"),
        ("share=0.15", "ac"),  # exactly
        ("share=0.2", "ac"),  # d would still fit, but e comes before it
        ("share=0.88", "ace"),
        ('share="9/10"', "acde"),
        ("share=1", "abcde"),
        ("share=0.5, of=b | d", "d"),  # 2 of 12, b has 10
        ("share=1, of=b | d", "bd"),
        ("count=1, of=e | b", "e"),
        ("count=1, of=bias", "c"),  # of c only the bias
    ],
)
def test_top_takes_the_highest_scores_first(write: Callable[..., None], arguments: str, picked: str) -> None:
    write(SCORES)
    assert modules(f'top("s.csv", {arguments})') == picked


def test_a_share_that_no_float_hits_is_reached(write: Callable[..., None]) -> None:
    write("name,score\na,3\nb,2\nc,1\n")
    assert 0.07 * 100 > 7 and 0.29 * 100 < 29  # what the tolerance is for
    net = nn.Sequential()
    for name, width in (("a", 20), ("b", 9), ("c", 71)):
        net.add_module(name, nn.Linear(width, 1, bias=False))
    assert modules("top('s.csv', share=0.29)", net) == "ab"
    assert modules("top('s.csv', share=0.28)", net) == "a"


def test_bottom_is_the_other_way_round(write: Callable[..., None]) -> None:
    write(SCORES)
    assert modules('bottom("s.csv", count=2)') == "bd"
    assert modules('bottom("s.csv", share=0.12)') == "bd"
    assert modules('bottom("s.csv", share=0.11)') == "b"


def test_equal_scores_go_by_name_in_both_directions(write: Callable[..., None]) -> None:
    write("name,score\nc,1\na,1\nb,1\n")
    assert modules('top("s.csv", count=2)') == modules('bottom("s.csv", count=2)') == "ab"


def test_of_takes_a_part_of_a_module_and_whole_modules_have_their_buffers(write: Callable[..., None]) -> None:
    write("name,score\nb,2\nd,1\n")
    assert select(NET, 'top("s.csv", count=2, of=bias)') == ["b.bias", "d.bias"]
    assert select(NET, 'top("s.csv", count=1, of=d)') == [name for name in NET.state_dict() if name[0] == "d"]
    assert select(NET, 'norm & top("s.csv", share=0.01, of=norm.statistics)')[0] == "d.running_mean"  # no parameters


def test_tensors_are_scored_like_modules_and_names_may_lie_inside_each_other(write: Callable[..., None]) -> None:
    write("name,score\nb.weight,3\nd.running_mean,2\nb,1\n")
    assert select(NET, 'top("s.csv", count=1)') == ["b.weight"]
    assert select(NET, 'top("s.csv", share=0.09)') == ["b.weight", "d.running_mean"]  # a buffer takes no share
    assert select(NET, 'top("s.csv", share=0.1)') == ["b.weight", "b.bias", "d.running_mean"]  # 9 + 1, not 9 + 10


def test_the_column_and_the_order_of_columns_are_free(write: Callable[..., None]) -> None:
    write('\ufeffmrc, name ,"score",note\r\n1,a,9,"x, y"\r\n7,b,1,"two\nlines"\r\n\r\n3,c,2,\r\n')
    assert modules('top("s.csv", count=1)') == "a"
    assert modules('top("s.csv", count=1, column="mrc")') == "b"
    assert modules("top('s.csv', count=2, column=mrc)") == "bc"
    assert [score.line for score in read_scores(Path("s.csv"))] == [2, 3, 6]


def test_json_is_an_object(write: Callable[..., None]) -> None:
    write(json.dumps({"a": 1, "b": 0.5, "c": -2e-3}), "s.json")
    assert modules('top("s.json", count=2)') == "ab"
    assert modules('top(count=1, file="s.json")') == "a"


@given(
    st.dictionaries(st.sampled_from([name for name, _ in NET.named_parameters()]), st.integers(-3, 3), min_size=1),
    st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.9, 1.0]),
)
def test_the_choice_is_the_longest_that_fits(scores: dict[str, int], share: float) -> None:
    ranked = sorted(scores, key=lambda name: (-scores[name], name))
    sizes = {name: parameter.numel() for name, parameter in NET.named_parameters()}
    fits = [n for n in range(1, len(ranked) + 1) if sum(sizes[x] for x in ranked[:n]) <= share * 100 + 1e-6]
    expected = set(ranked[: max(fits, default=1)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.json"
        path.write_text(json.dumps(scores))
        assert set(select(NET, f'top("{path}", share={share})')) == expected


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("", ["s.csv: is empty; it needs a header, name,score"]),
        ("name,score\n", ["s.csv: holds no scores"]),
        ("nam,score\na,1\n", ["s.csv:1: unknown column 'name'; nearest: nam; allowed: nam, score"]),
        ("name,mrc\na,1\n", ["s.csv:1: unknown column 'score'; allowed: mrc, name"]),
        ("name,score,score\na,1,2\n", ["s.csv:1: has 2 columns 'score'"]),
        ("name,score\na\nb,1,2\n", ["s.csv:2: 1 cells, the header has 2", "s.csv:3: 3 cells, the header has 2"]),
        ('name,score\n"a,1\n', ["s.csv:2: not valid CSV: unexpected end of data"]),
        (
            "name,score\na,nan\nb,inf\nc,\nd,x\n,1\n",
            [
                "s.csv:2: score of a: 'nan' is not a number; write 0.03 or 8/255",
                "s.csv:3: score of b: 'inf' is not a number; write 0.03 or 8/255",
                "s.csv:4: score of c: '' is not a number; write 0.03 or 8/255",
                "s.csv:5: score of d: 'x' is not a number; write 0.03 or 8/255",
                "s.csv:6: the name is empty",
            ],
        ),
        (
            "name,score\na,1\nb.weigth,1\n\na,2\nrelu,1\nrel,1\n",
            [
                "s.csv:3: unknown module or tensor 'b.weigth'; nearest: b.weight, e.weight, d.weight",
                "s.csv:5: 'a' is scored a second time, first on line 2",
                "s.csv:6: module 'relu' has no tensors to select",
                "s.csv:7: unknown module or tensor 'rel'; nearest: relu, e",
            ],
        ),
    ],
)
def test_every_mistake_in_a_csv_file_is_told_with_its_line(
    write: Callable[..., None], text: str, faults: list[str]
) -> None:
    write(text)
    with pytest.raises(UserError) as error:
        select(NET, 'top("s.csv", count=1)')
    assert [str(fault) for fault in error.value.faults] == faults


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("{", ["s.json:1: not valid JSON: Expecting property name enclosed in double quotes"]),
        ('{"a": 1,\n"b" 2}', ["s.json:2: not valid JSON: Expecting ':' delimiter"]),
        ("[1]", ["s.json: must be one object {name: score}"]),
        ("{}", ["s.json: holds no scores"]),
        ('{"a": {"mrc": 1}}', ["s.json: score of a: not a number; write {name: score}"]),
        ("[" * 100_000, None),
        (
            '{"a": NaN, "b": true,\n"c": "1",\n\n"d": null, "e": -Infinity}',
            [
                "s.json:1: score of a: nan is not finite",
                "s.json:1: score of b: True is not a number; write 0.03 or 8/255",
                "s.json:2: score of c: '\"1\"' is not a number; write 0.03 or 8/255",
                "s.json:4: score of d: 'null' is not a number; write 0.03 or 8/255",
                "s.json:4: score of e: -inf is not finite",
            ],
        ),
        ('{"a": 1,\n"\\u0061": 2}', ["s.json:2: 'a' is scored a second time, first on line 1"]),
        ('{"a": 1, "x\\": \\\\": 2,\n"zzz": 3}', None),
    ],
)
def test_every_mistake_in_a_json_file_is_told(write: Callable[..., None], text: str, faults: list[str] | None) -> None:
    write(text, "s.json")
    with pytest.raises(UserError) as error:
        select(NET, 'top("s.json", count=1)')
    if faults is not None:
        assert [str(fault) for fault in error.value.faults] == faults
    elif text.startswith("["):
        assert str(error.value).startswith("s.json: not valid JSON: ")
    else:  # a quote and a colon inside of a name
        assert [fault.line for fault in error.value.faults] == [1, 2]


def test_tied_names_count_as_one(write: Callable[..., None]) -> None:
    net = nn.Sequential()
    twice = nn.Linear(2, 2)
    net.add_module("one", twice)
    net.add_module("two", twice)
    write("name,score\none,1\ntwo,2\none.weight,1\ntwo.weight,3\n")
    with pytest.raises(UserError) as error:
        select(net, 'top("s.csv", count=1)')
    assert [str(fault) for fault in error.value.faults] == [
        "s.csv:3: 'two' is scored a second time, first on line 2: it is the same as 'one'",
        "s.csv:5: 'two.weight' is scored a second time, first on line 4: it is the same as 'one.weight'",
    ]
    write("name,score\ntwo,2\n")
    assert select(net, 'top("s.csv", count=1)') == ["one.weight", "one.bias"]


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("top()", "selector function 'top' needs a file in quotes, as in top(\"scores.csv\", share=0.25)"),
        ("bottom(s.csv, count=1)", "selector function 'bottom' needs a file in quotes, as in bottom("),
        ('top("s.csv")', "selector function 'top' needs share or count, as in top("),
        ('top("s.csv", share=0.1, count=1)', "selector function 'top' needs share or count, as in top("),
        ('top("s.csv", share=0)', "selector function 'top': share must be more than 0"),
        ('top("s.csv", share=2)', "selector function 'top': share must be from 0 to 1, as in 0.25 or"),
        ('top("s.csv", count=0)', "selector function 'top': count must be a whole number of at least 1"),
        ('top("s.csv", count=9)', "selector function 'top': 9 wanted, s.csv scores 5 of them"),
        ('top("s.csv", count=2, of=d)', "selector function 'top': 2 wanted, s.csv scores 1 of them"),
        ('top("s.csv", shares=1)', "unknown argument of top() 'shares'; nearest: share; allowed: "),
        ('top("s.csv", count=1, column=3)', "selector function 'top': column must be a name, as in column="),
        ('top("s.csv", count=1, column="mrc")', "s.csv:1: unknown column 'mrc'; allowed: name, score"),
        ('top("t.csv", count=1)', "t.csv: no such file; nearest: s.csv"),
        ('top("no/t.csv", count=1)', "no/t.csv: no such file"),
        ('top("s.txt", count=1)', "s.txt: is neither .csv nor .json"),
        ('top("s.json", count=1, column=mrc)', "s.json: column= is for CSV files; a JSON file is one object"),
        ('top("part.csv", count=1, of=e)', "part.csv: scores nothing that of= picks"),
        ('top("folder.csv", count=1)', "folder.csv: cannot be read: Is a directory"),
        ('top("bytes.csv", count=1)', "bytes.csv: is not UTF-8 text"),
    ],
)
def test_a_mistake_in_the_selector_is_told(write: Callable[..., None], selector: str, message: str) -> None:
    write(SCORES)
    write("{}", "s.json")
    write("name,score\na,1\n", "part.csv")
    Path("folder.csv").mkdir()
    Path("bytes.csv").write_bytes(b"name,score\n\xff,1\n")
    with pytest.raises(UserError) as error:
        resolve(Inventory(NET), selector)
    assert str(error.value).startswith(message)


def test_it_combines_with_everything_and_stays_what_it_is(write: Callable[..., None]) -> None:
    net = models.build("resnet", seed=0, depth=8, width=4, channels=1, classes=3)
    convolutions = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    write("name,score\n" + "".join(f"{name},{place}\n" for place, name in enumerate(convolutions)))
    whole = select(net, 'top("s.csv", share=1)')
    assert whole == select(net, "conv")
    assert select(net, 'conv - top("s.csv", count=2)') == whole[:-2]
    assert select(net, 'channels(top("s.csv", count=1), 0.5)') == whole[-1:]
    assert select(net, 'top("s.csv", share=0.5, of=conv) | bottom("s.csv", share=0.5, of=conv)') != whole


def test_a_selector_is_identified_by_its_text_and_the_files_content(write: Callable[..., None]) -> None:
    assert selector_content(" conv | ~(norm & stage(2)) ") == "conv | ~(norm & stage(2))"  # as before there were files
    assert selector_content("rest") == "rest"
    write(SCORES)
    write('{"a": 1}', "t.json")
    deep = 'channels(~(norm | random(like=top("s.csv", count=1), of=all - bottom(count=1, file="t.json"))), 0.5)'
    digests = {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in ("s.csv", "t.json")}
    assert selector_content(f"{deep} ") == {"selector": deep, "files": digests}
    before = selector_content('top("s.csv", count=1)')
    write(SCORES + "# other\n")
    assert selector_content('top("s.csv", count=1)') != before
    assert json.loads(json.dumps(before)) == before


def test_a_file_that_cannot_identify_is_told(write: Callable[..., None]) -> None:
    write(SCORES)
    for selector, message in (
        ('norm - top("r.csv", count=1)', "r.csv: no such file; nearest: s.csv"),
        ("top(3)", "selector function 'top' needs a file in quotes"),
        ("top(", "selector 'top(': something is missing"),
    ):
        with pytest.raises(UserError) as error:
            selector_content(selector)
        assert str(error.value).startswith(message)
