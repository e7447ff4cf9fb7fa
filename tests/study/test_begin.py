"""Starts in a study: where groups begin a phase, what a phase's identity makes of it, and mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from robustlayers.core.errors import UserError
from robustlayers.core.files import read_tensors, write_tensors
from robustlayers.study.begin import begin, start_notes
from robustlayers.study.definition import load_study
from robustlayers.study.plan import make_plan
from robustlayers.study.run import run_plan
from robustlayers.study.semantics import build_model, data_of
from robustlayers.study.store import Store

STUDY = """\
question: Where do groups begin?
data: {name: fashion-mnist-mini, train_images: 60, test_images: 20}
model: {name: small-cnn, width: 4}
threat: {norm: linf, eps: 8/255}
attack: {name: pgd, steps: 1}
phases:
  - {name: first, epochs: 1, train: {all: natural}}
  - {name: second, epochs: 1, train: {all: natural}}
  - {name: third, epochs: 1, train: {norm: frozen, rest: natural}, start: START}
evaluate: {attacks: [fgsm], monitor: {attack: fgsm, images: 20}}
seeds: 1
"""


def study(folder: Path, start: str):
    (folder / "study.yaml").write_text(STUDY.replace("START", start))
    return load_study(folder / "study.yaml")


def test_a_group_goes_back_to_an_earlier_phase_and_stays_there(tmp_path: Path) -> None:
    plan = make_plan(study(tmp_path, "{norm: {from: first}}"))
    outcome = run_plan(plan, tmp_path / "out", workers=1)
    assert outcome.complete and not outcome.diverged
    store, (first, second, third) = Store(tmp_path / "out"), plan.arms[0].nodes
    ends = [read_tensors(store.phase(node, 0) / "last.safetensors") for node in (first, second, third)]
    assert torch.equal(ends[2]["bn1.weight"], ends[0]["bn1.weight"])
    assert torch.equal(ends[2]["bn1.running_mean"], ends[0]["bn1.running_mean"])
    assert not torch.equal(ends[2]["bn1.weight"], ends[1]["bn1.weight"])  # else this shows nothing


@pytest.mark.parametrize("start", ["reinitialize", "{from: initial}"])
def test_a_group_begins_anew(tmp_path: Path, start: str) -> None:
    loaded = study(tmp_path, f"{{rest: {start}}}")
    recipe = loaded.arms[0].recipe
    dataset = data_of(recipe.data)[0]
    initial = build_model(recipe.model, dataset, 0).state_dict()
    model = build_model(recipe.model, dataset, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    shifted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    begin(model, recipe, recipe.phases[2], 0, 2, {})
    after = model.state_dict()
    assert torch.equal(after["bn1.weight"], shifted["bn1.weight"])
    assert torch.equal(after["conv1.weight"], initial["conv1.weight"]) == (start != "reinitialize")
    assert not torch.equal(after["conv1.weight"], shifted["conv1.weight"])
    assert after["conv1.weight"].std() == pytest.approx(initial["conv1.weight"].std().item(), rel=0.5)


def test_a_file_counts_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    loaded = study(tmp_path, "{}")
    recipe = loaded.arms[0].recipe
    state = build_model(recipe.model, data_of(recipe.data)[0], 5).state_dict()
    write_tensors(file, {f"net.{name}": tensor for name, tensor in state.items() if "num_batches" not in name})
    start = f'{{rest: {{load: {file}, map: {{net: ""}}}}}}'
    first = make_plan(study(tmp_path, start)).arms[0].nodes
    recipe = study(tmp_path, start).arms[0].recipe
    model = build_model(recipe.model, data_of(recipe.data)[0], 0)
    begin(model, recipe, recipe.phases[2], 0, 2, {})
    assert torch.equal(model.state_dict()["linear.weight"], state["linear.weight"])
    write_tensors(file, {f"net.{name}": tensor + 1 for name, tensor in state.items() if "num_batches" not in name})
    second = make_plan(study(tmp_path, start)).arms[0].nodes
    assert first[:2] == second[:2] and first[2] != second[2]


def test_a_file_without_an_input_normalization_is_noted(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    recipe = study(tmp_path, "{}").arms[0].recipe
    state = build_model(recipe.model, data_of(recipe.data)[0], 5).state_dict()
    bare = {name: tensor for name, tensor in state.items() if "num_batches" not in name}

    def notes(lacking: tuple[str, ...], start: str, *overrides: str) -> list[str]:
        write_tensors(file, {name: tensor for name, tensor in bare.items() if name not in lacking})
        study(tmp_path, start)
        recipe = load_study(tmp_path / "study.yaml", overrides).arms[0].recipe
        return start_notes(recipe, recipe.phases[2])

    both, start = ("normalize.mean", "normalize.std"), f"{{rest: {{load: {file}}}}}"
    assert notes((), start) == []
    assert notes(both[1:], start) == [
        f"phase {recipe.phases[2].name}, group rest: {file} has no normalize.std; "
        "the model's own are used; give them as options of the model"
    ]
    assert [line.partition(" has no ")[2].partition(";")[0] for line in notes(both, start)] == [", ".join(both)]
    assert notes(both, start, "model.mean=[0.3]", "model.std=[0.2]") == []  # somebody gave them
    assert notes(both, f"{{norm: {{load: {file}}}}}") == []  # which takes none of it


def test_keep_is_the_same_as_nothing(tmp_path: Path) -> None:
    plain = make_plan(study(tmp_path, "{}")).arms[0].nodes
    kept = make_plan(study(tmp_path, "{norm: keep}")).arms[0].nodes
    other = make_plan(study(tmp_path, "{norm: reset-statistics}")).arms[0].nodes
    assert plain == kept != other


@pytest.mark.parametrize(
    ("start", "line"),
    [
        ("{norm: shufle}", "9: phases.2.start.norm: unknown start 'shufle'; nearest: shuffle"),
        ("{nrm: keep}", "9: phases.2.start.nrm: unknown group 'nrm'; nearest: norm"),
        ("{norm: {from: frist}}", "9: phases.2.start.norm: unknown earlier phase 'frist'; nearest: first"),
        ("{norm: {from: third}}", "9: phases.2.start.norm: unknown earlier phase 'third'"),
        ("{norm: {form: first}}", "9: phases.2.start.norm.form: unknown key 'form'; nearest: from"),
        (
            "{norm: {}}",
            "9: phases.2.start.norm: a start is a word, {load: FILE}, {from: PHASE}, {rewind: EPOCH} or {run: FOLDER}",
        ),
        ("{norm: {load: gone.safetensors}}", "9: phases.2.start.norm: gone.safetensors: no such file"),
        ("{rest: scale-one}", "9: phases.2.start.rest: start 'scale-one' concerns no tensor of the group"),
        ("{rest: [keep]}", "9: phases.2.start.rest: a list is not allowed; allowed: text or a mapping"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, start: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        study(tmp_path, start)
    (fault,) = error.value.faults
    assert str(fault).startswith(f"{tmp_path}/study.yaml:{line}")


OPTIMIZED = STUDY.replace(", start: START", ", optimizer: OPTIMIZER")


@pytest.mark.parametrize(
    ("optimizer", "line"),
    [
        ("{groups: {nrm: {lr: 1}}}", "9: phases.2.optimizer: unknown group 'nrm'; nearest: norm"),
        ("{groups: {norm: {lr: 1}}}", "9: phases.2.optimizer: group 'norm' is frozen"),
        ("{groups: {rest: {lr: -1}}}", "9: phases.2.optimizer.groups.rest.lr: -1 is not allowed; allowed: more than 0"),
        ("{groups: {rest: {lrr: 1}}}", "9: phases.2.optimizer.groups.rest.lrr: unknown key 'lrr'; nearest: lr"),
        ("{decay: norm}", "9: phases.2.optimizer.decay: unknown value 'norm'; allowed: all, weights"),
    ],
)
def test_mistakes_in_optimizers_are_one_line(tmp_path: Path, optimizer: str, line: str) -> None:
    (tmp_path / "study.yaml").write_text(OPTIMIZED.replace("OPTIMIZER", optimizer))
    with pytest.raises(UserError) as error:
        load_study(tmp_path / "study.yaml")
    (fault,) = error.value.faults
    assert str(fault).startswith(f"{tmp_path}/study.yaml:{line}")


def test_settings_of_a_group_are_part_of_the_identity(tmp_path: Path) -> None:
    found = []
    for optimizer in ("{}", "{groups: {rest: {lr: 0.01}}}", "{decay: weights}"):
        (tmp_path / "study.yaml").write_text(OPTIMIZED.replace("OPTIMIZER", optimizer))
        found.append(make_plan(load_study(tmp_path / "study.yaml")).arms[0].nodes)
    assert len({nodes[2] for nodes in found}) == 3
    assert len({nodes[:2] for nodes in found}) == 1
