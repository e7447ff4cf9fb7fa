"""Dotted-path overrides: where they land, what they leave alone, and which of them collide."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustlayers.core.errors import UserError
from robustlayers.study.patches import apply, conflicts, parse_assignment, split_path
from robustlayers.study.yaml import path_text

STUDY: dict[str, Any] = {
    "model": {"name": "resnet", "width": 16},
    "data": None,
    "attacks": ["pgd-20", "apgd-ce"],
    "phases": [
        {"name": "pretrain", "epochs": 10, "train": {"all": "natural"}},
        {"name": "adapt", "epochs": 5, "train": {"norm": "adversarial", "rest": "frozen"}},
    ],
}


def attempt(call: Callable[[], Any]) -> Any:
    """What the call returns, or the `UserError` that it raises; anything else that it raises fails the test."""
    try:
        return call()
    except UserError as error:
        return error


def changed(*keys: str | int, to: Any) -> dict[str, Any]:
    """The study with one value set by plain indexing."""
    study = copy.deepcopy(STUDY)
    box: Any = study
    for key in keys[:-1]:
        box = box[key]
    box[keys[-1]] = to
    return study


@pytest.mark.parametrize(
    ("path", "keys", "new"),
    [
        ("model.width", ("model", "width"), 32),
        ("model.depth", ("model", "depth"), 8),
        ("phases.adapt.epochs", ("phases", 1, "epochs"), 0),
        ("phases.0.epochs", ("phases", 0, "epochs"), 1),
        ("phases.adapt.train", ("phases", 1, "train"), {"head": "adversarial", "rest": "frozen"}),
        ('phases.adapt.train."norm.weight"', ("phases", 1, "train", "norm.weight"), "frozen"),
        ("phases.adapt", ("phases", 1), {"name": "other"}),
        ("attacks.1", ("attacks", 1), "square"),
        ("seeds", ("seeds",), [0, 1]),
    ],
)
def test_a_patch_changes_one_place_of_a_copy(path: str, keys: tuple[str | int, ...], new: Any) -> None:
    before = copy.deepcopy(STUDY)
    assert apply(STUDY, path, new, where="w") == changed(*keys, to=new)
    assert before == STUDY


def test_the_copy_shares_nothing_with_what_it_came_from() -> None:
    new = {"head": "adversarial"}
    first = apply(STUDY, "phases.adapt.train", new, where="w")
    first["phases"][1]["train"]["head"] = "frozen"
    first["model"]["width"] = 0
    assert new == {"head": "adversarial"}
    assert STUDY["model"]["width"] == 16


def test_missing_and_empty_mappings_on_the_way_are_made() -> None:
    assert apply(STUDY, "data.augment.flip", True, where="w")["data"] == {"augment": {"flip": True}}
    assert apply({}, "a.b.c", 1, where="w") == {"a": {"b": {"c": 1}}}
    assert apply({"a": [None]}, "a.0.b", 1, where="w") == {"a": [{"b": 1}]}


def test_a_name_goes_before_a_position() -> None:
    items = {"items": [{"name": "1", "x": 0}, {"name": "b", "x": 0}, {"name": 7, "x": 0}]}
    assert apply(items, "items.1.x", 9, where="w")["items"][0]["x"] == 9
    assert apply(items, "items.7.x", 9, where="w")["items"][2]["x"] == 9
    assert apply(items, "items.2.x", 9, where="w")["items"][2]["x"] == 9


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("phases.adpat.epochs", "unknown item of phases 'adpat'; nearest: adapt; allowed: adapt, pretrain"),
        ("phases.2.epochs", "phases has no item 2: it has 2 items, counted from 0"),
        ("phases.-1.epochs", "unknown item of phases '-1'; allowed: adapt, pretrain"),
        ("attacks.pgd", "attacks is a list without named items: use a position from 0, not 'pgd'"),
        ("model.name.depth", "model.name is 'resnet', not a mapping: it has no 'depth'"),
        ("phases.adapt.epochs.x", "phases.adapt.epochs is 5, not a mapping: it has no 'x'"),
        ("model..width", "path 'model..width' has an empty part; write a.b.c"),
        ("", "path '' has an empty part; write a.b.c"),
        ('model."width', "path 'model.\"width' has a quote that does not close or a stray \" or \\; write a.b.c"),
        ("model .width", "path 'model .width' has spaces around 'model'; write a.b.c"),
        ('"a"b', "path '\"a\"b': a dot is missing before 'b'; write a.\"b.c\""),
    ],
)
def test_a_path_that_does_not_fit_is_refused_where_it_was_written(path: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        apply(STUDY, path, 1, where="factors.group.norm")
    assert str(caught.value) == f"factors.group.norm: {message}"


def test_items_of_one_name_need_a_position() -> None:
    twins = {"phases": [{"name": "adapt"}, {"name": "adapt"}]}
    with pytest.raises(UserError, match=r"w: phases has several items named 'adapt'; use a position: 0, 1"):
        apply(twins, "phases.adapt.epochs", 1, where="w")


def test_assignments_of_the_command_line() -> None:
    assert parse_assignment("seeds=5") == ("seeds", 5)
    assert parse_assignment("threat.eps = 8/255") == ("threat.eps", "8/255")
    assert parse_assignment("phases.adapt.train={norm: adversarial, rest: frozen}") == (
        "phases.adapt.train",
        {"norm": "adversarial", "rest": "frozen"},
    )
    assert parse_assignment('train."random(like=norm)"=a=b') == ('train."random(like=norm)"', "a=b")
    assert parse_assignment("data=") == ("data", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds", "--set: 'seeds' is not path=value, such as seeds=5"),
        ('"a=1', "--set: '\"a=1' is not path=value, such as seeds=5"),
        ("=5", "--set: path '' has an empty part; write a.b.c"),
        ("seeds=05", "--set seeds: 05 has a leading zero; write 5, or quote it as text"),
        ("a={b: 1, b: 2}", "--set a: b: duplicate key, first on line 1"),
        ("a=[1, 2", "--set a: not valid YAML: a bracket is opened and never closed"),
    ],
)
def test_a_bad_assignment_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_assignment(text)
    assert str(caught.value) == message


def test_conflicts_of_two_factors() -> None:
    def found(first: dict[str, Any], second: dict[str, Any], document: Any = None) -> list[str]:
        return [str(fault) for fault in conflicts([("factors.a.x", first), ("factors.b.y", second)], document)]

    assert found({"model.width": 1, "seeds": 1}, {"model.depth": 1, "seed": 1}) == []
    assert found({"model.width": 1}, {"model.width": 1}) == [
        "factors.b.y: sets model.width, but factors.a.x sets model.width; one setting, one factor"
    ]
    assert found({"model.width": 1}, {"model": {}}) == [
        "factors.b.y: sets model, but factors.a.x sets model.width; one setting, one factor"
    ]
    assert found({"a.b": 1}, {"a.bc": 1}) == []  # a prefix of the text is no prefix of the path
    assert found({'a."b"': 1}, {"a.b": 1}) == [
        'factors.b.y: sets a.b, but factors.a.x sets a."b"; one setting, one factor'
    ]
    assert found({"a": {}, "a.b": 1}, {}) == ["factors.a.x: sets a.b, and a as well; one of them overwrites the other"]
    assert found({"a..b": 1}, {}) == ["factors.a.x: path 'a..b' has an empty part; write a.b.c"]


def test_a_position_and_a_name_are_one_place_where_the_document_says_so() -> None:
    patches = [("p", {"phases.1.epochs": 1}), ("q", {"phases.adapt.epochs": 2}), ("r", {"phases.pretrain.epochs": 2})]
    assert conflicts(patches) == []
    assert [str(fault) for fault in conflicts(patches, STUDY)] == [
        "q: sets phases.adapt.epochs, but p sets phases.1.epochs; one setting, one factor"
    ]


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=8)


@given(st.lists(names, min_size=1, max_size=5))
def test_a_written_path_is_split_into_its_keys(keys: list[str]) -> None:
    assert split_path(path_text(tuple(keys))) == tuple(keys)


@given(st.lists(names, min_size=1, max_size=5), st.integers())
def test_what_was_set_is_found_and_the_rest_is_kept(keys: list[str], new: int) -> None:
    old = {"other": [1, {"name": "x"}]}
    keys = [key + "!" for key in keys]  # none of them is "other"
    patched = apply(old, path_text(tuple(keys)), new, where="w")
    assert patched.pop(keys[0]) is not None
    assert patched == old == {"other": [1, {"name": "x"}]}
    box: Any = apply(old, path_text(tuple(keys)), new, where="w")
    for key in keys:
        box = box[key]
    assert box == new


@given(st.lists(st.tuples(names, st.integers()), min_size=2, max_size=2, unique_by=lambda item: item[0]))
def test_patches_without_conflict_commute(pair: list[tuple[str, int]]) -> None:
    (first, a), (second, b) = ((path_text(("top", key)), value) for key, value in pair)
    assert conflicts([("f", {first: a}), ("g", {second: b})]) == []
    one = apply(apply({}, first, a, where="w"), second, b, where="w")
    assert one == apply(apply({}, second, b, where="w"), first, a, where="w")


@settings(max_examples=300)
@given(st.text(st.sampled_from('ab.="\\ 01') | st.characters(), max_size=15))
def test_random_text_is_applied_or_refused(text: str) -> None:
    for action in (
        lambda: apply(STUDY, text, 1, where="w"),
        lambda: parse_assignment(text),
        lambda: conflicts([("p", {text: 1})], STUDY),
    ):
        found = attempt(action)
        assert not isinstance(found, UserError) or found.faults
