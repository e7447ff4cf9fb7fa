import copy
import pickle
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustlayers.core.errors import Fault, UserError, nearest, one_of, system_text


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ({}, "wrong"),
        ({"file": "s.yaml"}, "s.yaml: wrong"),
        ({"file": "s.yaml", "line": 3}, "s.yaml:3: wrong"),
        ({"path": "a.b"}, "a.b: wrong"),
        ({"file": "s.yaml", "line": 3, "path": "a.b"}, "s.yaml:3: a.b: wrong"),
        ({"line": 3}, "wrong"),  # a line of no file says nothing
    ],
)
def test_a_fault_tells_its_place_first(place, expected):
    assert str(Fault("wrong", **place)) == expected


@given(st.text())
def test_a_fault_is_one_line_whatever_the_text(text):
    assert len(str(Fault(text, file="f", line=1)).splitlines()) == 1


def test_at_fills_in_what_is_missing_and_no_more():
    fault = Fault("wrong", file="own.yaml")
    assert fault.at(file="other.yaml", line=7, path="x") == Fault("wrong", "own.yaml", 7, "x")
    assert fault == Fault("wrong", file="own.yaml")


class _Own(UserError):
    """A kind of its own, as a library on top might have."""


@pytest.mark.parametrize(
    ("kind", "faults", "crossing"),
    list(
        product(
            [UserError, _Own],
            ["one", Fault("two", "f.yaml", 3, "a"), [Fault("x", "f", 1), Fault("y", path="b.c")], []],
            [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy],
        )
    ),
)
def test_an_error_crosses_processes_with_the_places_of_all_its_faults(kind, faults, crossing):
    error = kind(faults)
    other = crossing(error)
    assert type(other) is kind
    assert other.faults == error.faults and all(isinstance(fault, Fault) for fault in other.faults)
    assert str(other) == str(error) == "\n".join(str(fault) for fault in error.faults)


def test_nearest_ignores_case_and_puts_the_best_first():
    names = ["layer1.0.conv1", "layer1.0.bn1", "Linear", "head"]
    assert nearest("LAYER1.0.BN1", names)[0] == "layer1.0.bn1"
    assert nearest("linear", names) == ["Linear"]
    assert nearest("zzzz", names) == []
    assert len(nearest("layer", [f"layer{i}" for i in range(20)])) == 3


def test_one_of_lists_few_names_and_not_many():
    assert one_of("model", "rsnet", ["b", "resnet", "a"]) == (
        "unknown model 'rsnet'; nearest: resnet; allowed: a, b, resnet"
    )
    many = [f"tensor{i}" for i in range(13)]
    assert "allowed" not in one_of("tensor", "tensor1x", many)
    assert "allowed" in one_of("tensor", "tensor1x", many[:12])
    assert one_of("group", "x", []) == "unknown group 'x'"


def test_names_that_hold_a_comma_are_told_apart():
    assert one_of("arm", "norm", ["norm, rice", "head, rice"]) == (
        "unknown arm 'norm'; nearest: 'norm, rice'; allowed: 'head, rice', 'norm, rice'"
    )


def test_what_the_system_says_is_one_line_with_the_path():
    assert system_text(OSError(28, "No space left on device")) == "No space left on device"
    assert system_text(OSError(13, "Permission denied", b"runs/a")) == "runs/a: Permission denied"
    assert system_text(OSError(9, "Bad file descriptor", 3)) == "Bad file descriptor"
    assert system_text(OSError("of a program")) is None
