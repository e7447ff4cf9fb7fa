"""Presets in study files: the same results as plain phases, patched by factors and overrides, faults where they stand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from robustlayers.core.errors import UserError
from robustlayers.core.files import read_tensors, write_tensors
from robustlayers.study.definition import load_study
from robustlayers.study.describe import describe_plan
from robustlayers.study.plan import Plan, make_plan
from robustlayers.study.presets import expand, preset_text
from robustlayers.study.run import run_plan
from robustlayers.study.semantics import build_model, data_of
from robustlayers.study.store import Store
from robustlayers.study.yaml import read

HEAD = """\
question: What does a preset do?
name: preset
data: {name: "npz:DATA", validation: 0.2}
model: {name: small-cnn, width: 4, stem_stride: 2}
threat: {norm: linf, eps: 8/255}
attack: fgsm
training: {batch_size: 16, optimizer: {lr: 0.05}}
seeds: 1
evaluate: {attacks: [fgsm], monitor: {attack: fgsm, images: 16}}
"""
BAKISKAN = "phases: {bakiskan: {code: A1N2, cut: layer1.0.conv1, epochs: [2, 1]}}"  # line 10
CODES = "factors: {code: {A1N2: {}, N1A2: {phases.bakiskan.code: N1A2}, N2A1: {phases.bakiskan.code: N2A1}}}"

Write = Callable[..., Path]


@pytest.fixture
def write(images: Path, tmp_path: Path) -> Write:
    """Write a study with these lines after the first nine."""

    def save(*lines: str, name: str = "preset.yaml") -> Path:
        (tmp_path / name).write_text(HEAD.replace("DATA", str(images)) + "\n".join(lines) + "\n")
        return tmp_path / name

    return save


def faults(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as error:
        load_study(path, overrides)
    return [str(fault).removeprefix(f"{path}:") for fault in error.value.faults]


def signals(plan: Plan, arm: int = 0) -> list[dict]:
    return [dict(plan.nodes[node].phase.train) for node in plan.arms[arm].nodes]


def test_a_preset_is_its_plain_phases(write: Write, tmp_path: Path) -> None:
    preset = write(BAKISKAN)
    plain = write(preset_text(expand(read(preset).value)), name="plain.yaml")
    one, two = make_plan(load_study(preset)), make_plan(load_study(plain))
    assert one.arms[0].nodes == two.arms[0].nodes and one.arms[0].run == two.arms[0].run
    assert run_plan(one, tmp_path / "out", workers=1, threads=1).trained == 2
    assert run_plan(two, tmp_path / "out", workers=1, threads=1).trained == 0
    assert describe_plan(one)["arms"] == describe_plan(two)["arms"]


def test_a_factor_patches_an_option_and_shares_what_is_alike(write: Write, tmp_path: Path) -> None:
    plan = make_plan(load_study(write(BAKISKAN, CODES)))
    assert [arm.name for arm in plan.arms] == ["A1N2", "N1A2", "N2A1"]
    assert [signals(plan, arm) for arm in range(3)] == [
        [{"all": "adversarial"}, {"early": "frozen", "late": "natural"}],
        [{"all": "natural"}, {"early": "frozen", "late": "adversarial"}],
        [{"all": "adversarial"}, {"early": "natural", "late": "frozen"}],
    ]
    assert len(plan.nodes) == 5 and plan.arms[0].nodes[0] == plan.arms[2].nodes[0] != plan.arms[1].nodes[0]
    outcome = run_plan(plan, tmp_path / "out", workers=1, threads=1)
    assert outcome.complete and outcome.trained == 5
    store = Store(tmp_path / "out")
    whole, part = (read_tensors(store.phase(node, 0) / "last.safetensors") for node in plan.arms[0].nodes)
    kept = [name for name in whole if torch.equal(whole[name], part[name])]
    assert {name for name in kept if name.startswith(("conv1", "bn1"))} == {
        n for n in whole if n.startswith(("conv1", "bn1"))
    }
    assert not any(name.startswith(("layer", "linear")) for name in kept if name.endswith("weight"))


def test_a_cut_is_a_factor_too(write: Write) -> None:
    cuts = (
        "factors: {cut: {stem: {}, stage1: {phases.bakiskan.cut: layer2.0.conv1}, head: {phases.bakiskan.cut: linear}}}"
    )
    plan = make_plan(load_study(write(BAKISKAN, cuts)))
    assert len(plan.nodes) == 1 + 3
    held = [arm["phases"][1]["groups"] for arm in describe_plan(plan)["arms"]]
    assert len({str(groups) for groups in held}) == 3


def test_phases_and_all_take_settings_and_factors_change_them(write: Write) -> None:
    lines = (
        "phases:",
        "  bakiskan:",
        "    code: A1N2",
        "    single: bn1",
        "    all: {attack: pgd-2, optimizer: {lr: 0.02}}",
        "    part: {optimizer: {momentum: 0.5}, ascent: awp}",
        "factors: {steps: {one: {}, three: {phases.bakiskan.all.attack: pgd-3}, sam: {phases.bakiskan.part.ascent: sam}}}",
    )
    plan = make_plan(load_study(write(*lines)))
    first, second = (plan.nodes[node].phase for node in plan.arms[0].nodes)
    assert (first.optimizer.lr, first.optimizer.momentum, first.ascent) == (0.02, 0.9, None)
    assert (second.optimizer.lr, second.optimizer.momentum, second.ascent) == (0.02, 0.5, "awp")
    assert [plan.nodes[arm.nodes[1]].phase.attack for arm in plan.arms] == ["pgd-2", "pgd-3", "pgd-2"]
    assert plan.arms[0].nodes[0] == plan.arms[2].nodes[0] and len(plan.nodes) == 5
    assert first.epochs == second.epochs == 10


def test_overrides_reach_into_a_preset_and_replace_it(write: Write) -> None:
    path = write(BAKISKAN)
    plan = make_plan(load_study(path, ["phases.bakiskan.code=N2A1", "phases.bakiskan.epochs=[1, 0]"]))
    assert signals(plan) == [{"all": "adversarial"}]
    plan = make_plan(load_study(path, ["phases={walter-b: {epochs: 3}}"]))
    assert signals(plan) == [{"norm": "adversarial", "rest": "frozen"}] and len(plan.arms[0].recipe.groups) == 0
    plan = make_plan(load_study(path, ["phases=[{name: a, epochs: 1, train: {all: natural}}]"]))
    assert signals(plan) == [{"all": "natural"}]


@pytest.mark.parametrize(
    ("preset", "trained"),
    [
        ("walter-a: {epochs: 1}", [{"all": "natural"}, {"norm": "adversarial", "rest": "frozen"}]),
        ("walter-b: {epochs: 1}", [{"norm": "adversarial", "rest": "frozen"}]),
        ("frankle: {epochs: 1, initializer: oneone}", None),
        ("frankle: {epochs: 1, train: random}", None),
        ("partial-at: {epochs: 1}", [{"all": "adversarial"}, {"head": "adversarial", "rest": "frozen"}]),
        ("norm-first: {epochs: 1}", None),
        ("norm-last: {epochs: [1, 2], statistics: frozen}", None),
        ("norm-last: {all: {steps: 3}}", None),
    ],
)
def test_each_runs(write: Write, tmp_path: Path, preset: str, trained: list[dict] | None) -> None:
    plan = make_plan(load_study(write(f"phases: {{{preset}}}")))
    outcome = run_plan(plan, tmp_path / "out", workers=1, threads=1)
    assert outcome.complete and not outcome.diverged, outcome.failed
    assert trained is None or signals(plan) == trained


def test_a_pretrained_network_takes_the_place_of_a_first_phase(write: Write, tmp_path: Path) -> None:
    recipe = load_study(write("phases: {walter-b: {}}")).arms[0].recipe
    state = build_model(recipe.model, data_of(recipe.data)[0], 7).state_dict()
    write_tensors(tmp_path / "net.safetensors", state)
    plan = make_plan(load_study(write(f"phases: {{walter-a: {{load: {tmp_path}/net.safetensors, epochs: 1}}}}")))
    assert len(plan.nodes) == 1 and run_plan(plan, tmp_path / "out", workers=1, threads=1).complete
    end = read_tensors(Store(tmp_path / "out").phase(plan.arms[0].nodes[0], 0) / "last.safetensors")
    assert torch.equal(end["conv1.weight"], state["conv1.weight"])
    assert not torch.equal(end["bn1.weight"], state["bn1.weight"])


LINES = (
    "phases:",
    "  bakiskan:",
    "    code: A1N2",
    "    cut: conv1",
    "    epochs: [3, 2]",
    "    part: {batch_size: 8}",
)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("bakiskan", "bakiskn", ["11: phases.bakiskn: unknown preset 'bakiskn'; nearest: bakiskan; allowed: ..."]),
        ("code: A1N2", "code: A1N3", ["12: phases.bakiskan.code: unknown value 'A1N3'; nearest: ..."]),
        ("code: A1N2", "cod: A1N2", ["11: phases.bakiskan.code: is missing; allowed: ...",
                                     "12: phases.bakiskan.cod: unknown option of preset bakiskan 'cod'; nearest: code..."]),
        ("cut: conv1", "cut: conv9", ["13: phases.bakiskan.cut: unknown selector 'conv9'; nearest: ..."]),
        ("cut: conv1", "cut: before(", ["13: phases.bakiskan.cut: selector 'before(': something is missing at column 8"]),
        ("    cut: conv1\n", "", ["11: phases.bakiskan.cut: needs cut or single, and only one of them: cut: layer2.1.bn1"]),
        ("[3, 2]", "[3]", ["14: phases.bakiskan.epochs: 1 number; allowed: a whole number, or a list of 2: whole, part"]),
        ("[3, 2]", "[3, -2]", ["14: phases.bakiskan.epochs.1: -2 is not allowed; allowed: ..."]),
        ("[3, 2]", "three", ["14: phases.bakiskan.epochs: 'three' is not allowed; allowed: ..."]),
        ("batch_size: 8", "batch_size: 1", ["15: phases.bakiskan.part.batch_size: 1 is not allowed; allowed: at least 2"]),
        ("batch_size: 8", "batchsize: 8", ["15: phases.bakiskan.part.batchsize: unknown setting of a phase 'batchsize'; ..."]),
        ("batch_size: 8", "train: {all: natural}", ["15: phases.bakiskan.part.train: is for the preset to say; ..."]),
        ("batch_size: 8", "epochs: 8", ["15: phases.bakiskan.part.epochs: stands beside, for all phases: epochs: [3, 2]"]),
        ("batch_size: 8", "attack: pgx-3", ["15: phases.bakiskan.part.attack: unknown attack 'pgx'; nearest: ..."]),
        ("batch_size: 8", "ascent: {name: awp, select: nrm}",
         ["15: phases.bakiskan.part.ascent...: unknown selector 'nrm'; ..."]),
        ("batch_size: 8", "windows: {late: [1, 0]}", ["15: phases.bakiskan.part.windows: window of 'late' is 1 to 0; ..."]),
        ("batch_size: 8", "optimizer: {groups: {early: {lr: 1}}}",
         ["15: phases.bakiskan.part.optimizer: group 'early' is frozen..."]),
        ("part:", "parts:", ["15: phases.bakiskan.parts: unknown option of preset bakiskan 'parts'; nearest: part..."]),
        ("phases:\n", "groups: {early: head}\nphases:\n", ["10: groups.early: preset bakiskan calls 'before(conv1)' so; ..."]),
        ("  bakiskan:\n", "  walter-b: {}\n  bakiskan:\n", ["10: phases: a mapping with 2 names: walter-b, bakiskan; ..."]),
    ],
)  # fmt: skip
def test_a_mistake_is_told_where_it_stands(write: Write, old: str, new: str, expected: list[str]) -> None:
    text = "\n".join(LINES) + "\n"
    assert text.count(old) == 1
    found = faults(write(text.replace(old, new)))
    assert len(found) == len(expected), found
    for line, want in zip(found, expected, strict=True):
        position = 0
        for piece in want.split("..."):
            place = line.find(piece, position)
            assert place == 0 if piece is want.split("...")[0] else place >= 0, (line, want)
            position = place + len(piece)


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        ("{phases.bakiskan.code: A1N9}", """16: factors.f.b."phases.bakiskan.code": unknown value 'A1N9'"""),
        ("{phases.bakiskan.cut: conv9}", """16: factors.f.b."phases.bakiskan.cut": unknown selector 'conv9'"""),
        (
            "{phases.bakiskan.part.attack: pgx}",
            """16: factors.f.b."phases.bakiskan.part.attack": unknown attack 'pgx'""",
        ),
        ("{phases.bakiskan.part.epochs: 0}", """16: factors.f.b."phases.bakiskan.part.epochs": stands beside"""),
        ("{phases.bakiskn.code: A1N2}", "10: phases: a mapping with 2 names: bakiskan, bakiskn; allowed: "),
        ("{phases.part.epochs: 0}", "10: phases: a mapping with 2 names: bakiskan, part; allowed: "),
    ],
)
def test_a_mistake_in_a_factor_is_told_there(write: Write, factor: str, expected: str) -> None:
    (found,) = faults(write(*LINES, f"factors: {{f: {{a: {{}}, b: {factor}}}}}"))
    assert found.startswith(expected) and found.count("arm") == expected.startswith("10"), found


def test_a_mistake_in_an_override_is_told_there(write: Write) -> None:
    path = write(*LINES)
    (one,) = faults(path, "phases.bakiskan.code=X")
    assert one.startswith("--set phases.bakiskan.code: unknown value 'X'")
    (two,) = faults(path, "phases={waltr-a: {}}")
    assert two.startswith("--set phases.waltr-a: unknown preset 'waltr-a'; nearest: walter-a")
