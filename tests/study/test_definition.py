"""From a file to arms: factors, overrides, what phases inherit, and where each fault is said to stand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from robustlayers.core.errors import Fault, UserError
from robustlayers.study.definition import Study, load_study
from robustlayers.study.schema import Recipe, StudyConfig
from robustlayers.study.semantics import build_attack, data_of, training_attack
from robustlayers.study.validate import check, shown

Write = Callable[..., Path]
Load = Callable[..., Study]


def _lines(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as refused:
        load_study(path, overrides)
    return [str(fault).replace(str(path), "FILE") for fault in refused.value.faults]


def test_arms_are_every_combination_of_levels_in_the_order_of_the_file(study: Load) -> None:
    loaded = study("factors.width={narrow: {model.width: 2}, wide: {model.width: 6}}", "claims=[]")
    names = [f"{group}, {width}" for group in ("none", "norm", "all") for width in ("narrow", "wide")]
    assert [arm.name for arm in loaded.arms] == names
    assert [arm.recipe.model.options["width"] for arm in loaded.arms] == [2, 6] * 3
    assert dict(loaded.arms[1].levels) == {"group": "none", "width": "wide"}
    assert loaded.factors == {"group": ("none", "norm", "all"), "width": ("narrow", "wide")}
    assert [arm.recipe.phases[1].epochs for arm in loaded.arms] == [0, 0, 2, 2, 2, 2]


def test_a_study_without_factors_has_one_arm_of_its_name(study: Load) -> None:
    loaded = study("factors={}", "claims=[]")
    assert [(arm.name, dict(arm.levels)) for arm in loaded.arms] == [("tiny", {})]


def test_the_name_is_the_file_s_unless_given(write: Write) -> None:
    assert load_study(write(("name: tiny\n", ""), name="of the file.yaml")).name == "of the file"


@pytest.mark.parametrize(("written", "seeds"), [("3", (0, 1, 2)), ("[4, 2]", (4, 2)), ("[0]", (0,))])
def test_seeds(written: str, seeds: tuple[int, ...], study: Load) -> None:
    assert study(f"seeds={written}").seeds == seeds


def test_overrides_apply_in_order_and_are_remembered(study: Load) -> None:
    loaded = study("seeds=5", "phases.adapt.epochs=7", "seeds=6", "phases.1.epochs=8")
    assert loaded.seeds == tuple(range(6)) and loaded.arms[1].recipe.phases[1].epochs == 8
    assert loaded.overrides == ("seeds=5", "phases.adapt.epochs=7", "seeds=6", "phases.1.epochs=8")
    assert loaded.document["seeds"] == 6
    assert study("phases.adapt.name=late", "factors={}", "claims=[]").arms[0].recipe.phases[1].name == "late"


def test_the_training_settings_are_inherited_key_by_key(study: Load) -> None:
    loaded = study(
        "training.optimizer={name: sgd, lr: 0.2, momentum: 0.5}",
        "training.schedule={name: cosine, warmup: 0.1}",
        "training.normalization={craft: {by: batch}}",
        "phases.pretrain.optimizer={lr: 0.3}",
        "phases.pretrain.batch_size=8",
        "phases.adapt.optimizer={name: adam, lr: 0.01}",
        "phases.adapt.schedule={name: linear}",
        "phases.adapt.normalization={clean: {by: running}}",
    )
    first, second = loaded.arms[1].recipe.phases
    assert (first.optimizer.lr, first.optimizer.momentum, first.batch_size) == (0.3, 0.5, 8)
    assert (first.schedule.name, first.schedule.warmup) == ("cosine", 0.1)
    # Another kind of optimizer or schedule starts from its own defaults.
    assert (second.optimizer.name, second.optimizer.lr, second.optimizer.momentum) == ("adam", 0.01, 0.9)
    assert (second.schedule.name, second.schedule.warmup, second.batch_size) == ("linear", 0.0, 16)
    assert (second.normalization.craft.by, second.normalization.clean.by) == ("batch", "running")


def test_a_factor_may_change_what_phases_inherit(study: Load) -> None:
    loaded = study("factors.group.norm={training.optimizer.lr: 0.01}", "phases.adapt.optimizer={momentum: 0}")
    assert [phase.optimizer.lr for phase in loaded.arms[1].recipe.phases] == [0.01, 0.01]
    assert [phase.optimizer.lr for phase in loaded.arms[2].recipe.phases] == [0.05, 0.05]


def test_attacks_that_train_keep_the_last_iterate_and_those_that_measure_the_best(study: Load) -> None:
    threat = study().arms[0].recipe.threat
    assert training_attack("pgd-3", threat).describe().endswith("last iterate")
    assert build_attack("pgd-3", threat).describe().endswith("best iterate")
    assert training_attack({"name": "pgd", "keep": "best"}, threat) == build_attack("pgd", threat)
    assert training_attack("pgd-3x2", threat) == build_attack("pgd-3x2", threat)
    assert training_attack("fgsm", threat) == build_attack("fgsm", threat)


def test_the_data_are_cut_as_the_recipe_says(study: Load) -> None:
    config = study("data.train_images=40", "data.test_images=10", "data.validation=0.25").arms[0].recipe.data
    dataset, train, validation, test = data_of(config)
    assert (len(train), len(validation), len(test)) == (40, 20, 10)
    assert train.labels.bincount().tolist() == [10] * 4 and validation.labels.bincount().tolist() == [5] * 4
    assert test.images.equal(dataset.test.images[:10])
    seen = {image.numpy().tobytes() for image in validation.images}
    assert not any(image.numpy().tobytes() in seen for image in train.images)


def test_claims_are_bound_to_the_arms(study: Load) -> None:
    ((say, claim),) = study().claims
    assert say == "norm layers gain"
    assert [dict(term.levels) for _, term in claim.difference.terms] == [{"group": "norm"}, {"group": "none"}]


def test_a_fault_in_a_patch_stands_on_the_line_of_the_patch(write: Write) -> None:
    path = write(
        (
            "    norm: {}\n",
            "    norm:\n      model.width: 5\n      phases.adapt.train:\n        norm: natural\n        had: frozen\n",
        )
    )
    assert _lines(path) == [
        "FILE:18: factors.group.norm.\"phases.adapt.train\".had: unknown selector 'had'; nearest: head",
    ]


def test_an_override_of_a_patch_is_where_its_faults_stand(write: Write) -> None:
    assert _lines(write(), "factors.group.norm={model.width: no}") == [
        "--set factors.group.norm.\"model.width\": 'no' is not a whole number; allowed: at least 1"
    ]
    assert _lines(write(), "factors.group.norm={seeds: 1}", "factors.f={a: {phases.adapt.epochs: 1}}", "claims=[]") == [
        "--set factors.f.a: sets phases.adapt.epochs, but factors.group.none sets phases.adapt.epochs; "
        "one setting, one factor",
        "--set factors.group.norm.seeds: 'seeds' is the same for all arms; "
        "allowed: data, model, threat, attack, groups, training, phases, evaluate",
    ]


def test_a_fault_of_the_base_is_told_once_for_all_arms(write: Write) -> None:
    assert len(_lines(write(("{norm: adversarial, rest: frozen}", "{nrom: adversarial, rest: frozen}")))) == 1


def test_a_fault_that_some_arms_have_names_them(write: Write) -> None:
    path = write(
        ("    norm: {}\n", "    norm: {model: {name: preact-resnet, depth: 18}}\n"), ("train: {norm: ", "train: {bn1: ")
    )
    (line,) = _lines(path)
    assert line.startswith("FILE:10: phases.1.train.bn1: unknown selector 'bn1'") and line.endswith(" (in arm 'norm')")


def test_every_fault_is_told_once_however_many_arms_have_it(write: Write) -> None:
    path = write(
        ("seeds: 2", "  f: {a: {}, b: {model.width: 1}, c: {model.width: 2}}\nseeds: 0"),
        ("attack: pgd-1\n", "attack: pgd-x\n"),
    )
    lines = _lines(path)
    assert [line.partition(": ")[0] for line in lines] == ["FILE:6", "FILE:17", "FILE:22", "FILE:22"]
    assert "leaves free: f (a, b, c)" in lines[-1]


def test_the_schema_is_closed_at_every_level(text: str) -> None:
    """Put a key that nobody knows into every mapping of the study that the schema describes."""
    import yaml

    document = yaml.safe_load(text)
    places = [(), ("data",), ("threat",), ("training",), ("training", "optimizer"), ("phases", 0), ("phases", 1)]
    places += [("evaluate",), ("evaluate", "monitor"), ("claims", 0)]
    for place in places:
        changed = yaml.safe_load(text)
        box = changed
        for key in place:
            box = box[key]
        box["nobody"] = 1
        config, faults = check(StudyConfig, changed, lambda path: Fault(""))
        assert config is None and list(faults) == [(*place, "nobody")]
    assert check(StudyConfig, document, lambda path: Fault(""))[0] is not None


def test_every_field_of_a_recipe_can_be_told_from_its_default(text: str) -> None:
    """Recipes are compared and written out by their fields: none may be left out of equality."""
    import yaml

    document = {key: value for key, value in yaml.safe_load(text).items() if key in Recipe.model_fields}
    first, second = Recipe.model_validate(document), Recipe.model_validate(document)
    assert first == second
    document["model"] = {**document["model"], "width": 5}
    assert Recipe.model_validate(document) != first


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "nothing"),
        (True, "true"),
        (1.5, "1.5"),
        ("a", "'a'"),
        ({}, "a mapping"),
        ([1], "a list"),
        ("x" * 99, None),
    ],
)
def test_values_are_shown_as_they_are_written(value: object, text: str | None) -> None:
    assert shown(value) == text if text is not None else len(shown(value)) == 40
