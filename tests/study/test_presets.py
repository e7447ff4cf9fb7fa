"""Presets expand to exactly the phases that a person would write, and every mistake in their options is told."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml

from robustlayers.core.errors import UserError
from robustlayers.models import build
from robustlayers.selection import Inventory, Partition, resolve, select
from robustlayers.study.definition import load_study
from robustlayers.study.plan import make_plan
from robustlayers.study.presets import EPOCHS, expand, preset_lines, preset_text, written
from robustlayers.study.published import PRESETS
from robustlayers.study.yaml import parse, read
from robustlayers.training import start_group

SWEEP = Path(__file__).parents[2] / "studies" / "cut-sweep.yaml"
CODES = ("A1N2", "N1A2", "N2A1", "A2N1")


def phases(preset: str, **options: Any) -> list[dict[str, Any]]:
    return expand({"phases": {preset: options}})["phases"]


def trained(preset: str, **options: Any) -> list[dict[str, str]]:
    return [phase["train"] for phase in phases(preset, **options)]


def faults(document: Mapping[str, Any]) -> list[str]:
    with pytest.raises(UserError) as error:
        expand(document)
    return [str(fault) for fault in error.value.faults]


def test_the_cut_sweep_has_the_same_phases_as_the_file_written_by_hand(tmp_path: Path) -> None:
    by_hand = make_plan(load_study(SWEEP))
    document = copy.deepcopy(read(SWEEP).value)
    cuts = {"stem": "layer1", "stage1": "layer2", "stage2": "layer3", "stage3": "linear"}
    levels: dict[str, dict[str, Any]] = {}
    for code, cut in itertools.product(CODES, cuts):
        options = {"code": code, "cut": cuts[cut], "epochs": [3, 2]}
        expanded = expand({"phases": {"bakiskan": options}})
        levels[f"{code}, {cut}"] = {"phases": expanded["phases"], "groups": expanded["groups"]}
    document |= {"factors": {"arm": levels}, "claims": [], "name": "cut-sweep"}
    file = tmp_path / "presets.yaml"
    file.write_text(yaml.safe_dump(document))
    ours = make_plan(load_study(file))
    assert {arm.name: arm.nodes for arm in ours.arms} == {arm.name: arm.nodes for arm in by_hand.arms}
    assert {arm.name: arm.run for arm in ours.arms} == {arm.name: arm.run for arm in by_hand.arms}
    assert len(ours.nodes) == 2 + 16  # the first phase of all cuts is trained once for each objective


@pytest.mark.parametrize(
    ("code", "whole", "early", "late", "anew"),
    [
        ("A1N2", "adversarial", "frozen", "natural", "late"),
        ("N1A2", "natural", "frozen", "adversarial", "late"),
        ("A2N1", "natural", "adversarial", "frozen", "early"),
        ("N2A1", "adversarial", "natural", "frozen", "early"),
        ("A1A2", "adversarial", "frozen", "adversarial", "late"),
        ("N1N2", "natural", "frozen", "natural", "late"),
        ("A2A1", "adversarial", "adversarial", "frozen", "early"),
        ("N2N1", "natural", "natural", "frozen", "early"),
    ],
)
def test_every_code_of_bakiskan(code: str, whole: str, early: str, late: str, anew: str) -> None:
    document = expand({"phases": {"bakiskan": {"code": code, "cut": "layer2.1.bn1", "epochs": [3, 2]}}})
    assert document["groups"] == {"early": "before(layer2.1.bn1)", "late": "after(layer2.1.bn1)"}
    assert document["phases"] == [
        {"name": "whole", "epochs": 3, "train": {"all": whole}},
        {"name": "part", "epochs": 2, "train": {"early": early, "late": late}, "start": {anew: "reinitialize"}},
    ]
    # In the single-layer form the layer is in the early place.
    document = expand({"phases": {"bakiskan": {"code": code, "single": "layer2.1.bn1"}}})
    assert document["groups"] == {"single": "layer2.1.bn1"}
    names = {"early": "single", "late": "rest"}
    assert document["phases"] == [
        {"name": "whole", "epochs": EPOCHS, "train": {"all": whole}},
        {
            "name": "part",
            "epochs": EPOCHS,
            "train": {"single": early, "rest": late},
            "start": {names[anew]: "reinitialize"},
        },
    ]


ONLY_NORM = {"norm": "adversarial", "rest": "frozen"}


def test_the_other_presets_with_two_phases() -> None:
    assert phases("walter-a", epochs=[4, 2]) == [
        {"name": "pretrain", "epochs": 4, "train": {"all": "natural"}},
        {"name": "adapt", "epochs": 2, "train": ONLY_NORM},
    ]
    assert phases("walter-a", load="net.safetensors", epochs=2) == [
        {
            "name": "adapt",
            "epochs": 2,
            "train": ONLY_NORM,
            "start": {"norm": {"load": "net.safetensors"}, "rest": {"load": "net.safetensors"}},
        }
    ]
    assert phases("walter-b") == [{"name": "adapt", "epochs": EPOCHS, "train": ONLY_NORM}]
    scenarios = {"st": ("natural", "natural"), "at": ("adversarial", "natural"), "partial-at": ("adversarial",) * 2}
    for scenario, (first, head) in scenarios.items():
        assert trained("partial-at", scenario=scenario) == [{"all": first}, {"head": head, "rest": "frozen"}]
    assert trained("partial-at", scenario="full-at")[1] == {"head": "adversarial", "rest": "adversarial"}
    assert phases("partial-at")[1]["start"] == {"head": "reinitialize"}
    assert trained("partial-at") == trained("partial-at", scenario="partial-at")
    affine = {"norm.affine": "frozen", "rest": "natural"}
    assert trained("norm-first", second="natural") == [ONLY_NORM, affine]
    assert trained("norm-last", first="natural") == [affine, ONLY_NORM]
    assert trained("norm-last", statistics="frozen")[0] == {"norm": "frozen", "rest": "adversarial"}
    assert [phase["name"] for phase in phases("norm-last")] == ["others", "norm"]


@pytest.mark.parametrize(
    ("options", "train", "start"),
    [
        ({}, {"norm": "natural", "rest": "frozen"}, {"norm": "scale-uniform"}),
        (
            {"initializer": "one", "objective": "adversarial"},
            {"norm": "adversarial", "rest": "frozen"},
            {"norm": "scale-one"},
        ),
        ({"initializer": "signs"}, {"norm": "natural", "rest": "frozen"}, {"norm": "scale-signs"}),
        (
            {"initializer": "oneone"},
            {"norm.weight": "natural", "norm - norm.weight": "natural", "rest": "frozen"},
            {"norm.weight": "scale-one", "norm - norm.weight": "shift-one"},
        ),
        (
            {"train": "head"},
            {"norm.affine": "frozen", "norm.statistics": "natural", "head": "natural", "rest": "frozen"},
            {"norm.affine": "scale-uniform"},
        ),
        (
            {"train": "head", "statistics": "frozen"},
            {"norm": "frozen", "head": "natural", "rest": "frozen"},
            {"norm": "scale-uniform"},
        ),
        (
            {"train": "norm+head"},
            {"norm": "natural", "head": "natural", "rest": "frozen"},
            {"norm": "scale-uniform"},
        ),
        (
            {"train": "random", "initializer": "oneone"},
            {
                "norm.weight": "frozen",
                "norm.bias": "frozen",
                "norm.statistics": "natural",
                "random(like=norm, of=conv)": "natural",
                "rest": "frozen",
            },
            {"norm.weight": "scale-one", "norm.bias": "shift-one"},
        ),
        (
            {"train": "all-but-norm"},
            {"norm.affine": "frozen", "norm.statistics": "natural", "rest": "natural"},
            {"norm.affine": "scale-uniform"},
        ),
        ({"train": "all"}, {"norm": "natural", "rest": "natural"}, {"norm": "scale-uniform"}),
    ],
)
def test_frankle(options: dict[str, str], train: dict[str, str], start: dict[str, str]) -> None:
    assert phases("frankle", epochs=5, **options) == [{"name": "part", "epochs": 5, "train": train, "start": start}]


def test_the_random_control_has_as_many_entries_as_the_norm_layers() -> None:
    net = Inventory(build("resnet", seed=0, depth=8, width=4))
    chosen = resolve(net, next(key for key in trained("frankle", train="random")[0] if key.startswith("random")))
    assert chosen.parameters == resolve(net, "norm").parameters


def combinations(preset: str) -> list[dict[str, Any]]:
    """All settings of the options that have a few words to choose from."""
    hints = get_type_hints(PRESETS[preset].make)
    words = {key: get_args(hint) for key, hint in hints.items() if get_origin(hint) is Literal}
    made = [dict(zip(words, values, strict=True)) for values in itertools.product(*words.values())]
    if preset == "bakiskan":
        return [{**options, part: "layer2.0.bn1"} for options in made for part in ("cut", "single")]
    return made


@pytest.mark.parametrize("preset", PRESETS)
def test_every_setting_of_every_preset_is_a_partition_of_a_network(preset: str) -> None:
    model = build("resnet", seed=0, depth=8, width=4, shortcut="B")
    for options in combinations(preset):
        document = expand({"phases": {preset: options}})
        assert set(options) <= set(get_type_hints(PRESETS[preset].make))
        assert [phase["name"] for phase in document["phases"]] == list(PRESETS[preset].phases)
        for phase in document["phases"]:
            groups = {group: document.get("groups", {}).get(group, group) for group in phase["train"]}
            partition = Partition(model, groups)
            assert set(phase.get("start", {})) <= set(partition.groups)
            assert any(signal != "frozen" for signal in phase["train"].values())


def test_every_preset_is_a_study_that_can_be_planned(write: Callable[..., Path]) -> None:
    by_hand = write()
    document = read(by_hand).value
    for preset in PRESETS:
        options = {"code": "N1A2", "cut": "bn1"} if preset == "bakiskan" else {}
        plain = expand({**document, "phases": {preset: {"epochs": 1, **options}}, "factors": {}, "claims": []})
        text = yaml.safe_dump({key: value for key, value in plain.items() if key not in ("phases", "groups")})
        by_hand.write_text(text + preset_text(plain))
        plan = make_plan(load_study(by_hand))
        assert [node.phase.name for node in plan.nodes.values()] == list(PRESETS[preset].phases)


def test_the_start_oneone_begins_with_ones() -> None:
    (phase,) = phases("frankle", initializer="oneone", train="head")
    model = build("small-cnn", seed=0, width=4, channels=1, classes=4, stem_stride=2)
    before = copy.deepcopy(model.state_dict())
    partition = Partition(model, {group: group for group in phase["train"]})
    for group, start in phase["start"].items():
        start_group(partition[group], start, 0)
    norms = select(model, "norm.affine")
    assert norms
    for name, value in model.state_dict().items():
        assert torch.equal(value, torch.ones_like(value) if name in norms else before[name]), name


def test_a_document_with_plain_phases_comes_back_equal_and_nothing_given_is_changed() -> None:
    for document in ({"phases": [{"name": "a"}]}, {"question": "?"}, {"phases": None}, {"phases": "x"}):
        before = copy.deepcopy(document)
        after = expand(document)
        assert after == document == before and after is not document
    document = {
        "groups": {"mine": "head"},
        "phases": {"bakiskan": {"code": "A1N2", "cut": "x", "all": {"optimizer": {"lr": 0.1}}, "part": {}}},
    }
    before = copy.deepcopy(document)
    after = expand(document)
    after["phases"][0]["optimizer"]["lr"] = 7
    after["groups"]["mine"] = "?"
    assert document == before and after["phases"][1]["optimizer"] == {"lr": 0.1}


def test_settings_of_all_phases_and_of_one() -> None:
    shared = {
        "attack": "pgd-5",
        "optimizer": {"name": "sgd", "lr": 0.1},
        "schedule": {"name": "piecewise", "factor": 0.5},
    }
    own = {"attack": "pgd-7", "optimizer": {"lr": 0.01}, "schedule": {"name": "cosine"}, "batch_size": 64}
    first, second = phases("walter-a", all=shared, adapt=own)
    assert first == {"name": "pretrain", "epochs": EPOCHS, "train": {"all": "natural"}, **shared}
    assert second == {
        "name": "adapt",
        "epochs": EPOCHS,
        "train": ONLY_NORM,
        "attack": "pgd-7",
        "optimizer": {"name": "sgd", "lr": 0.01},  # key by key
        "schedule": {"name": "cosine"},  # another kind
        "batch_size": 64,
    }


GROUPS = {"early": "stem"}


@pytest.mark.parametrize(
    ("chosen", "messages"),
    [
        ({}, ["phases: a mapping with no name; allowed: one preset, bakiskan, walter-a, ..."]),
        (
            {"walter-a": {}, "frankle": {}},
            ["phases: a mapping with 2 names: walter-a, frankle; allowed: one preset, ..."],
        ),
        (
            {"bakiskn": {}},
            ["phases.bakiskn: unknown preset 'bakiskn'; nearest: bakiskan; allowed: bakiskan, frankle, ..."],
        ),
        ({"walter-b": 3}, ["phases.walter-b: 3 is not allowed; allowed: a mapping of options"]),
        ({"bakiskan": {"cut": "a"}}, ["phases.bakiskan.code: is missing; allowed: A1N2, N1A2, ..."]),
        ({"bakiskan": {"code": "A1N2"}}, ["phases.bakiskan.cut: needs cut or single, and only one of them: cut: ..."]),
        (
            {"bakiskan": {"code": "A1N2", "cut": "a", "single": "b"}},
            ["phases.bakiskan.cut: needs cut or single, and only one of them: cut: ..."],
        ),
        (
            {"bakiskan": {"code": "A1N3", "cut": "a &", "epoch": 3}},
            [
                "phases.bakiskan.code: unknown value 'A1N3'; nearest: A1N2, ...",
                "phases.bakiskan.cut: selector 'a &': something is missing at column 4",
                "phases.bakiskan.epoch: unknown option of preset bakiskan 'epoch'; nearest: epochs; allowed: all, ...",
            ],
        ),
        (
            {"bakiskan": {"code": 12, "cut": 3}},
            [
                "phases.bakiskan.code: 12 is not allowed; allowed: A1N2, ...",
                "phases.bakiskan.cut: 3 is not allowed; allowed: a module, a tensor or a selector",
            ],
        ),
        ({"bakiskan": {"code": ["A1N2"], "cut": "a"}}, ["phases.bakiskan.code: a list is not allowed; allowed: ..."]),
        ({"walter-a": {"load": 3}}, ["phases.walter-a.load: 3 is not allowed; allowed: the name of a file"]),
        (
            {"walter-a": {"epochs": [3]}},
            ["phases.walter-a.epochs: 1 number; allowed: a whole number, or a list of 2: pretrain, adapt"],
        ),
        (
            {"walter-a": {"epochs": [3, -1]}},
            ["phases.walter-a.epochs.1: -1 is not allowed; allowed: a whole number, or a list of 2: pretrain, adapt"],
        ),
        (
            {"walter-a": {"epochs": True}},
            ["phases.walter-a.epochs: true is not allowed; allowed: a whole number, or ..."],
        ),
        (
            {"walter-a": {"epochs": "3"}},
            ["phases.walter-a.epochs: '3' is not allowed; allowed: a whole number, or ..."],
        ),
        (
            {"walter-a": {"load": "f", "pretrain": {}}},
            ["phases.walter-a.pretrain: there is no such phase with these options; there is: adapt"],
        ),
        (
            {"walter-a": {"all": 3, "adapt": {"train": {}, "epochs": 3, "atack": "pgd", "start": {}}}},
            [
                "phases.walter-a.adapt.atack: unknown setting of a phase 'atack'; nearest: attack",
                "phases.walter-a.adapt.epochs: stands beside, for all phases: epochs: [3, 2]",
                "phases.walter-a.adapt.start: is for the preset to say; write the phases out as a list to change it",
                "phases.walter-a.adapt.train: is for the preset to say; write the phases out as a list to change it",
                "phases.walter-a.all: 3 is not allowed; allowed: a mapping of settings",
            ],
        ),
        (
            {"bakiskan": {"code": "A1N2", "cut": "a"}},
            ["groups.early: preset bakiskan calls 'before(a)' so; give your group another name"],
        ),
    ],
)
def test_every_mistake_is_told_at_its_option(chosen: Any, messages: list[str]) -> None:
    document: dict[str, Any] = {"phases": chosen}
    if messages[0].startswith("groups"):
        document["groups"] = GROUPS
    found = faults(document)
    assert len(found) == len(messages), found
    for line, message in zip(found, messages, strict=True):
        assert line.startswith(message.removesuffix("...")) and (line == message or message.endswith("...")), line


def test_a_group_that_means_the_same_or_is_not_named_may_stand_there() -> None:
    document = {"groups": {"norm": " norm ", "mine": "stem"}, "phases": {"walter-b": None}}
    assert expand(document)["groups"] == document["groups"]
    assert faults({"groups": {"norm": "batchnorm"}, "phases": {"walter-b": {}}}) == [
        "groups.norm: preset walter-b calls 'norm' so; give your group another name"
    ]


def test_an_option_may_be_switched_off_by_nothing() -> None:
    assert phases("bakiskan", code="A1N2", cut=None, single="conv1")[1]["train"] == {
        "single": "frozen",
        "rest": "natural",
    }
    assert faults({"phases": {"bakiskan": {"code": None, "cut": "a"}}}) == [
        "phases.bakiskan.code: empty; allowed: A1N2, N1A2, N2A1, A2N1, A1A2, A2A1, N1N2, N2N1"
    ]


def test_a_length_in_steps_takes_the_place_of_the_default_in_epochs() -> None:
    first, second = phases("walter-a", adapt={"steps": 9})
    assert first["epochs"] == EPOCHS and second["steps"] == 9 and "epochs" not in second
    assert phases("walter-b", epochs=2, all={"steps": 9})[0].keys() >= {"epochs", "steps"}  # which the schema refuses


def test_where_a_setting_is_written() -> None:
    document = {
        "groups": {"mine": "head"},
        "phases": {
            "bakiskan": {
                "code": "A1N2",
                "single": "conv1",
                "epochs": 3,
                "all": {"optimizer": {"lr": 0.1}, "attack": "pgd"},
                "part": {"optimizer": {"momentum": 2}},
            }
        },
    }
    top = ("phases", "bakiskan")
    for path, where in {
        ("phases",): top,
        ("phases", 0): top,
        ("phases", 7, "epochs"): top,
        ("phases", 0, "epochs"): (*top, "epochs"),
        ("phases", 0, "optimizer", "lr"): (*top, "all", "optimizer", "lr"),
        ("phases", 1, "optimizer", "lr"): (*top, "all", "optimizer", "lr"),
        ("phases", 1, "optimizer", "momentum"): (*top, "part", "optimizer", "momentum"),
        ("phases", 1, "optimizer", "nesterov"): (*top, "part", "optimizer", "nesterov"),
        ("phases", 1, "attack", "steps"): (*top, "all", "attack", "steps"),
        ("phases", 1, "train", "single"): (*top, "single"),
        ("phases", 1, "train", "rest"): top,
        ("groups", "single"): (*top, "single"),
        ("groups", "mine"): ("groups", "mine"),
        ("model", "name"): ("model", "name"),
    }.items():
        assert written(document, path) == where, path
    assert written({"phases": []}, ("phases", 0, "epochs")) == ("phases", 0, "epochs")
    loaded = {"phases": {"walter-a": {"load": "f"}}}
    assert written(loaded, ("phases", 0, "start", "norm")) == ("phases", "walter-a", "load")
    assert written({"phases": {"walter-a": {"code": 1}}}, ("phases", 0, "train")) == ("phases", "walter-a")


@pytest.mark.parametrize(
    "options",
    [
        {"code": "A1N2", "cut": "block(2, 1) | 'a b'"},
        {"code": "N1A2", "single": "regex('layer[12], .*')"},
        {
            "code": "A1N2",
            "cut": "1e3",
            "all": {"attack": {"eps": "8/255", "x": "off", "y": "1e-3", "z": "null", "t": True}},
        },
        {
            "code": "A1N2",
            "cut": "* - a: b#",
            "all": {"batch_size": 7, "optimizer": {"lr": 1e-05, "betas": [0.9, 0.99]}},
        },
    ],
)
def test_the_text_is_read_back_as_it_was(options: dict[str, Any]) -> None:
    try:
        document = expand({"phases": {"bakiskan": options}})
    except UserError:  # what no selector is
        document = {"groups": {"early": options["cut"]}, "phases": [{"name": "x", **options["all"]}]}
    text = preset_text(document)
    assert parse(text, "printed").value == document
    assert "&id" not in text and len(text.splitlines()) == 2 + len(document["phases"])


def test_every_preset_says_what_it_is_and_what_it_makes() -> None:
    lines = preset_lines()
    assert list(lines) == list(PRESETS)
    for name, preset in PRESETS.items():
        documentation = preset.make.__doc__ or ""
        assert all(f"{phase}:" in documentation for phase in preset.phases), name
        assert "\n" not in lines[name] and len(lines[name]) < 150
        assert lines[name].startswith(documentation.split("\n")[0])
