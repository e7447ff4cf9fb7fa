"""`robustlayers verify` on a study: what the plan needs and what is not there is told, and is no fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from robustlayers.cli.main import main

Call = Callable[..., tuple[int, str, str]]
STUDY = """\
question: Does it run?
data: {name: fashion-mnist-mini, validation: 0.01, train_images: 40, test_images: 20}
model: {name: small-cnn, width: 2, stem_stride: 2}
threat: {norm: linf, eps: 8/255}
attack: pgd-1
phases: [{name: before, epochs: 1, train: {all: natural}}, {name: adapt, epochs: 1, train: {all: adversarial}}]
factors: {group: {norm: {phases.adapt.train: {norm: adversarial, rest: frozen}}, all: {}}}
seeds: 2
evaluate: {attacks: [pgd-1], monitor: {attack: pgd-1, images: 10}}
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole study: six phases and four measurements."""
    place = tmp_path_factory.mktemp("ran")
    (place / "s.yaml").write_text(STUDY)
    with pytest.raises(SystemExit) as stop:
        main(["run", str(place / "s.yaml"), "--out", str(place / "out"), "--workers", "1", "--threads", "1"])
    assert stop.value.code == 0
    return place / "out"


@pytest.fixture
def study(ran: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ran, tmp_path / "copy"))


def _folders(study: Path) -> list[str]:
    """Return the folders of one seed in the order in which a plan needs them."""
    arms = json.loads((study / "plan.json").read_text())["arms"]
    places = [(*(f"phases/{node}/seed-1" for node in arm["nodes"]), f"results/{arm['run']}/seed-1") for arm in arms]
    return list(dict.fromkeys(place for some in places for place in some))


def test_a_whole_study_misses_nothing(study: Path, call: Call) -> None:
    assert call("verify", study) == (0, "10 finished results, 0 fault(s)\n", "")


@pytest.mark.parametrize("what", range(5))
def test_one_that_is_missing_is_named_and_is_no_fault(what: int, study: Path, call: Call) -> None:
    folder = _folders(study)[what]
    shutil.rmtree(study / folder)
    line = f"1 result is missing: {folder}; run again to make it\n"
    assert call("verify", study) == (0, line + "9 finished results, 0 fault(s), 1 missing\n", "")


def test_an_unfinished_one_is_missing_and_of_many_the_first_are_named(study: Path, call: Call) -> None:
    folders = _folders(study)
    for folder in folders:
        (study / folder / "manifest.json").unlink()
    lines = call("verify", study)[1].splitlines()
    assert lines[0] == f"5 results are missing: {', '.join(folders[:3])} and 2 more; run again to make them"
    assert lines[1] == "5 finished results, 0 fault(s), 5 missing"


def test_damage_beside_it_is_still_a_fault(study: Path, call: Call) -> None:
    first, *_, last = _folders(study)
    shutil.rmtree(study / first)
    with (study / last / "rows.json").open("a") as stream:
        stream.write(" ")
    code, out, _ = call("verify", study)
    assert code == 1 and out.endswith("9 finished results, 1 fault(s), 1 missing\n") and "rows.json" in out


def test_nothing_is_missing_after_a_phase_that_diverged(study: Path, call: Call) -> None:
    _, adapt, result, *_ = _folders(study)
    shutil.rmtree(study / result)
    shutil.rmtree(study / adapt)
    (study / adapt).mkdir()
    (study / adapt / "failed.json").write_text('{"status": "diverged", "reason": "the loss is nan"}')
    assert call("verify", study) == (0, "8 finished results, 0 fault(s)\n", "")
