"""The folder of a study: damage is found and set aside, never used; only one process at a time runs in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from robustlayers.cli.main import main
from robustlayers.core.errors import UserError
from robustlayers.core.files import MANIFEST, read_tensors, write_json, write_text
from robustlayers.study import work
from robustlayers.study.collect import collect, collect_rows
from robustlayers.study.definition import load_study
from robustlayers.study.plan import Plan, make_plan
from robustlayers.study.run import Outcome
from robustlayers.study.store import Store

Run = Callable[..., Outcome]
Contents = Callable[[Path], dict[str, str]]


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished study, at `out`."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of a weight file a bit of the last tensor: it still can be read
    path.write_bytes(bytes(content))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _code(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_a_folder_is_finished_when_its_manifest_is_there(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = store.phase("0123", 4)
    assert folder == tmp_path / "phases" / "0123" / "seed-4" and store.result("ab", 0).parts[-3:] == (
        "results",
        "ab",
        "seed-0",
    )
    write_text(folder / "a.txt", "a")
    write_text(folder / ".resume.json", "{}")
    assert not store.finished(folder) and not store.whole(folder)
    store.finish(folder, kind="phase")
    assert store.finished(folder) and store.whole(folder)
    assert [path.name for path in sorted(folder.iterdir())] == ["a.txt", MANIFEST]
    assert json.loads((folder / MANIFEST).read_text())["kind"] == "phase"


def test_what_a_kill_left_behind_the_manifest_is_tidied_up(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = store.phase("0123", 4)
    write_text(folder / "a.txt", "a")
    store.finish(folder)
    write_text(folder / ".state-3.safetensors", "big")
    assert store.whole(folder) and (folder / ".state-3.safetensors").exists()  # a reader changes nothing
    assert store.finished(folder) and not (folder / ".state-3.safetensors").exists()


def test_a_damaged_folder_is_set_aside_under_a_new_name_each_time(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = store.phase("0123", 4)
    for number in (1, 2):
        write_text(folder / "a.txt", "abc")
        store.finish(folder)
        _cut(folder / "a.txt")
        assert not store.whole(folder) and folder.exists()
        assert not store.finished(folder) and not folder.exists()
        assert (folder.with_name(f"seed-4.damaged-{number}") / "a.txt").read_text() == "ab"


def test_failures_are_kept_until_they_are_forgotten(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = store.phase("0123", 4)
    assert store.failure(folder) is None
    store.fail(folder, "diverged", "the loss is nan")
    assert store.failure(folder) == ("diverged", "the loss is nan")
    store.forget_failure(folder)
    store.forget_failure(folder)
    assert store.failure(folder) is None


def test_a_second_process_is_refused_and_the_first_one_named(tmp_path: Path) -> None:
    import os

    with Store(tmp_path / "deep" / "er").locked():
        with pytest.raises(UserError) as refused, Store(tmp_path / "deep" / "er").locked():
            pytest.fail("two hold the lock")
        (fault,) = refused.value.faults
        assert str(fault).startswith(f"{tmp_path}/deep/er: another process is running this study (host ")
        assert str(fault).endswith(f", process {os.getpid()})")
    with Store(tmp_path / "deep" / "er").locked():
        assert (tmp_path / "deep" / "er" / ".owner.json").exists()
    assert not (tmp_path / "deep" / "er" / ".owner.json").exists()


def test_the_lock_of_a_process_that_was_killed_does_not_count(tmp_path: Path) -> None:
    write_json(tmp_path / ".owner.json", {"host": "gone", "pid": 1})
    (tmp_path / ".lock").touch()
    write_text(tmp_path / "phases" / "x" / "seed-0" / ".tmp-12-abc", "half")
    with Store(tmp_path).locked():
        assert not list(tmp_path.rglob(".tmp-*"))


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"file/out: cannot be written into: Not a directory"),
        Store(tmp_path / "file" / "out").locked(),
    ):
        pytest.fail("there is no such folder")


@pytest.mark.parametrize("name", ["last.safetensors", "best.safetensors", "curve.json", "ledger.json", "time.json"])
def test_verify_names_a_file_whose_bytes_changed(name: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _code("verify", copy) == 0
    assert capsys.readouterr().out == "12 finished results, 0 fault(s)\n"
    path = next(iter(sorted(copy.glob(f"phases/*/seed-1/{name}"))))
    _flip(path)
    assert _code("verify", copy) == 1
    assert capsys.readouterr().out == (
        f"{path}: content differs from the manifest's SHA-256\n12 finished results, 1 fault(s)\n"
    )


def test_verify_names_what_is_missing_or_cut_off_or_has_no_sense(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, pictures, *_ = sorted(copy.glob("results/*/seed-0/*s.*"), key=lambda path: path.name, reverse=True)
    manifest = next(iter(copy.glob(f"phases/*/seed-0/{MANIFEST}")))
    rows.unlink()
    _cut(pictures)
    manifest.write_text('{"files": 3}')
    assert _code("verify", copy) == 1
    out = capsys.readouterr().out
    assert f"{rows}: listed in the manifest but missing\n" in out
    assert f"{pictures}: " in out and " bytes, manifest says " in out
    assert f"{manifest}: damaged manifest\n" in out and "12 finished results, 3 fault(s)\n" in out


def test_a_result_that_was_cut_off_is_set_aside_and_made_again(
    run: Run, copy: Path, finished: Path, contents: Contents, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_plan(load_study(finished.parent / "tiny.yaml"))
    store = Store(copy)
    _cut(store.phase(made.arms[1].nodes[-1], 0) / "last.safetensors")
    _cut(store.result(made.arms[2].run, 1) / "rows.json")
    before = sorted(copy.rglob("*"))
    assert len(collect_rows(store)) == len(collect_rows(Store(finished))) * 5 // 6  # readers leave it out
    assert collect(store).arms[2].status == {0: "finished", 1: "missing"}
    assert sorted(copy.rglob("*")) == before, "a reader changed the folder"
    outcome = run()
    assert (outcome.trained, outcome.measured, outcome.complete) == (1, 1, True)
    assert contents(copy) == contents(finished)
    assert len(list(copy.glob("*/*/seed-*.damaged-1"))) == 2
    assert _code("verify", copy) == 0  # what was set aside is no longer part of the study
    assert capsys.readouterr().out == "12 finished results, 0 fault(s)\n"


@pytest.mark.parametrize("damage", ["state", "record", "best"])
def test_a_damaged_resume_state_is_set_aside_and_the_phase_starts_anew(
    damage: str, run: Run, tmp_path: Path, finished: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(BaseException):
        pass

    original = work._save

    def save_and_stop(trainer: work.PhaseTrainer, folder: Path, record: dict[str, object]) -> None:
        original(trainer, folder, record)
        if trainer.first_epoch:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(work, "_save", save_and_stop)
        with pytest.raises(Stop):
            run()
    (resume,) = (tmp_path / "out").glob("phases/*/*/.resume.json")
    record = json.loads(resume.read_text())
    path = {"state": resume.parent / record["state"], "record": resume, "best": resume.parent / record["best"]["file"]}[
        damage
    ]
    if damage == "record":
        path.write_text("{")
    else:
        _flip(path)
    assert run().complete
    aside = list((tmp_path / "out").glob("phases/*/*.damaged-1"))
    assert len(aside) == 1
    assert contents(tmp_path / "out") == contents(finished)


def test_a_finished_folder_holds_what_is_documented_and_nothing_else(finished: Path, plan: Callable[..., Plan]) -> None:
    made = plan()
    store = Store(finished)
    phase = {"best.safetensors", "curve.json", "last.safetensors", "ledger.json", MANIFEST, "time.json"}
    result = {MANIFEST, "norms.json", "pictures.safetensors", "rows.json", "time.json"}
    for seed in (0, 1):
        for node in made.nodes:
            assert {path.name for path in store.phase(node, seed).iterdir()} == phase
        for arm in made.arms:
            assert {path.name for path in store.result(arm.run, seed).iterdir()} == result
    assert {path.name for path in finished.iterdir() if not path.name.startswith(".")} == {
        "phases",
        "plan.json",
        "results",
        "study.yaml",
    }
    pictures = read_tensors(store.result(made.arms[1].run, 0) / "pictures.safetensors")
    assert pictures["natural"].shape == pictures["adversarial"].shape == (4, 1, 8, 8)
    assert (pictures["adversarial"] - pictures["natural"]).abs().max() <= 8 / 255 + 1e-6
