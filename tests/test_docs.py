"""What the documents show is true: examples run as written, study files load, names that are promised exist."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

import robustlayers
from robustlayers.core.files import write_tensors
from robustlayers.study.definition import load_study
from robustlayers.study.plan import make_plan

ROOT = Path(__file__).parent.parent


def blocks(name: str, language: str) -> list[str]:
    text = (ROOT / name).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_loop_of_the_readme_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("README.md", "python")
    exec(compile(code, "README.md", "exec"), {})
    assert 0 <= float(capsys.readouterr().out.strip()) <= 1


@pytest.mark.parametrize("name", ["README.md", "docs/study.md"])
def test_study_files_in_documents_are_valid(name: str, tmp_path: Path) -> None:
    text = blocks(name, "yaml")[0]  # what follows are parts of one
    (tmp_path / "study.yaml").write_text(text)
    assert make_plan(load_study(tmp_path / "study.yaml")).trainings > 0


def test_the_study_about_hardening_is_valid_and_its_code_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (text,) = blocks("docs/harden.md", "yaml")
    grey = ("data.name=fashion-mnist-mini", "model.mean=0.5", "model.std=0.5")  # what the package has
    net = robustlayers.models.build("resnet", depth=20, classes=10, channels=1)
    write_tensors(tmp_path / "net.safetensors", net.state_dict())
    (tmp_path / "harden.yaml").write_text(text)
    plan = make_plan(load_study(tmp_path / "harden.yaml", grey))
    assert plan.trainings == 9  # the file is set once for each seed, and two arms go on from there
    assert {arm.name: len(arm.nodes) for arm in plan.arms} == {"none": 1, "norm": 2, "all": 2}
    (code,) = blocks("docs/harden.md", "python")
    compile(code, "harden.md", "exec")


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_studies_are_valid(path: Path) -> None:
    assert make_plan(load_study(path)).trainings > 0


def test_every_public_name_exists() -> None:
    for name in robustlayers.__all__:
        assert getattr(robustlayers, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'PDG'"):
        _ = robustlayers.PDG  # type: ignore[attr-defined]


def test_the_quickstart_compares_as_many_random_entries_as_norm_layers_have() -> None:
    plan = make_plan(load_study(ROOT / "studies" / "quickstart.yaml"))
    from robustlayers.study.describe import describe_plan

    trained = {arm["name"]: arm["trained_parameters"] for arm in describe_plan(plan)["arms"]}
    assert trained["random"] == trained["norm"] > 0
    assert trained["none"] == 0
    assert trained["all but norm"] + trained["norm"] == trained["all"]


def test_the_cut_sweep_trains_its_first_phase_once_for_all_cuts() -> None:
    plan = make_plan(load_study(ROOT / "studies" / "cut-sweep.yaml"))
    firsts = {arm.nodes[0] for arm in plan.arms}
    assert len(plan.arms) == 16
    assert len(firsts) == 2  # natural and adversarial
    assert plan.trainings == (2 + 16) * 3


def test_links_between_documents_lead_somewhere() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_page_about_loops_of_ones_own_runs() -> None:
    found = doctest.testfile(str(ROOT / "docs" / "own-loop.md"), module_relative=False)
    assert found.failed == 0 and found.attempted > 10
