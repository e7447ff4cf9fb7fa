"""`robustlayers presets`: the list, the plain phases of one, and mistakes."""

from __future__ import annotations

import pytest

from robustlayers.study.presets import expand
from robustlayers.study.published import PRESETS
from robustlayers.study.yaml import parse


def test_the_list_has_a_line_for_each(call):
    code, out, err = call("presets")
    assert (code, err) == (0, "")
    *lines, footer = out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert lines[0].endswith("with the second objective. (code, cut, single)")
    assert footer.startswith("Each also takes epochs")


def test_one_is_printed_as_it_would_be_written(call):
    code, out, err = call("presets", "bakiskan", "code=A1N2", "cut=layer2.1.bn1")
    assert (code, err) == (0, "")
    assert out == (
        "groups: {early: before(layer2.1.bn1), late: after(layer2.1.bn1)}\n"
        "phases:\n"
        "  - {name: whole, epochs: 10, train: {all: adversarial}}\n"
        "  - {name: part, epochs: 10, train: {early: frozen, late: natural}, start: {late: reinitialize}}\n"
    )


def test_values_are_read_like_those_of_a_study(call):
    given = ["epochs=[3, 2]", "all.attack={name: pgd, steps: 7}", "adapt.optimizer.lr=1e-3", "adapt.batch_size=64"]
    code, out, _ = call("presets", "walter-a", *given)
    options = {
        "epochs": [3, 2],
        "all": {"attack": {"name": "pgd", "steps": 7}},
        "adapt": {"optimizer": {"lr": 0.001}, "batch_size": 64},
    }
    assert code == 0
    assert parse(out, "printed").value == expand({"phases": {"walter-a": options}})


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["bakiskn"], ["unknown preset 'bakiskn'; nearest: bakiskan; allowed: bakiskan, frankle, ..."]),
        (["bakiskan"], ["code: is missing; allowed: A1N2, ..."]),
        (["bakiskan", "code=A1N3", "cut=a", "epochs=[1]"], ["code: unknown value 'A1N3'; nearest: A1N2, ..."]),
        (["walter-b", "adapt.attak=fgsm"], ["adapt.attak: unknown setting of a phase 'attak'; nearest: attack"]),
        (["walter-b", "epochs"], ["walter-b: 'epochs' is not NAME=VALUE, such as epochs=5"]),
        (
            ["walter-b", "epochs=[", "a..b=1"],
            ["epochs: not valid YAML: ...", "a..b: path 'a..b' has an empty part; ..."],
        ),
    ],
)
def test_a_mistake_is_told_at_its_option(refused, agree, arguments, lines):
    agree(refused("presets", *arguments), lines)
