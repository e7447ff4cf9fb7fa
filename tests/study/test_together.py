"""A study in two processes: killed and gone on with, its rows are those of one process; a failure ends both with one line."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from robustlayers.cli import shared
from robustlayers.core.errors import UserError
from robustlayers.core.files import read_json, read_tensors
from robustlayers.core.ranks import Ranks
from robustlayers.study.collect import collect_rows
from robustlayers.study.definition import load_study
from robustlayers.study.local import Apart, Event, Stopped, Task
from robustlayers.study.plan import Plan, make_plan
from robustlayers.study.run import run_plan
from robustlayers.study.schema import PhaseConfig
from robustlayers.study.store import Store
from robustlayers.study.together import Ended, follow, lead
from robustlayers.study.work import _check_count

Write = Callable[..., Path]

ONE_SEED = ("--set", "seeds=1")
TWO_ARMS = (("    none: {phases.adapt.epochs: 0}\n", ""), ("robust[group=none]", "robust[group=all]"))

# One process fails in the middle of an epoch, while the other waits for it in an exchange.
FAILING = """
import sys
from robustlayers.cli.main import main
from robustlayers.training import distributed
from robustlayers.core.ranks import environment

def whole(self, log):
    raise RuntimeError("out of memory")

if environment()[0] == 1:
    distributed.Shards.whole = whole
main(sys.argv[1:])
"""


def start(*command: str) -> list[subprocess.Popen[str]]:
    """Start a command in two processes, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **common, "RANK": str(index), "LOCAL_RANK": str(index), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]


def end(running: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    found = []
    for process in running:
        out, errors = process.communicate(timeout=200)
        found.append((process.returncode, out, errors))
    return found


def layout(folder: Path) -> set[str]:
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in files if not name.startswith(("report/", ".lock"))}


def test_a_study_that_was_killed_ends_with_the_rows_of_one_process(write: Write, tmp_path: Path) -> None:
    study, one, two = write(*TWO_ARMS), tmp_path / "one", tmp_path / "two"
    killed = start("-m", "robustlayers", "run", str(study), "--out", str(two), *ONE_SEED)
    deadline = time.monotonic() + 150
    while not list(two.glob("phases/*/*/.resume.json")) and time.monotonic() < deadline:
        assert all(process.poll() is None for process in killed), end(killed)
        time.sleep(0.01)
    for process in killed:
        process.send_signal(signal.SIGKILL)
    end(killed)
    assert not list(two.glob("results/*/*/rows.json"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "robustlayers", "run"]
    done = subprocess.run(
        [*command, str(study), "--out", str(two), *ONE_SEED], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1 and (two / "report" / "report.html").exists()
    run_plan(make_plan(load_study(study, ["seeds=1"])), one, workers=1, threads=1)
    assert layout(one) == layout(two)
    mine, theirs = (
        {(row.run, row.checkpoint, row.metric, row.phase, row.group): row.value for row in collect_rows(Store(folder))}
        for folder in (one, two)
    )
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert theirs[key] == (value if value is None else pytest.approx(value, rel=1e-3, abs=1e-5)), key
    for path in one.glob("phases/*/seed-0/last.safetensors"):
        other = read_tensors(two / path.relative_to(one))
        for name, tensor in read_tensors(path).items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    assert {read_json(path)["processes"] for path in two.glob("phases/*/*/ledger.json")} == {2}
    assert "2 processes that share batches" in read_json(two / "plan.json")["machine"]


def test_a_failure_in_one_process_ends_both_with_one_line(write: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = start("-c", FAILING, "run", str(write()), "--out", str(out), *ONE_SEED)
    (first, shown, silent), (second, _, errors) = end(running)
    assert (first, second) == (1, 1)
    assert "FAILED" not in shown and silent == ""
    assert errors.count("\n") == 1 and "RuntimeError: out of memory (process 1 of 2)" in errors
    assert not list(out.glob("phases/*/*/failed.json"))  # it was not this process's failure


# AutoAttack is made in shards of two images, the rest in batches of five.
ATTACKED = (
    (
        "attacks: [pgd-2]",
        "attacks: [pgd-2, square-10, {name: autoattack, steps: 3, targets: 2, queries: 10}]\n"
        "  batch_size: 5\n  corruptions: {families: [fog, shot-noise], severities: [2]}",
    ),
)

# One process is killed when it has made its second shard.
KILLED = """
import os, signal, sys
from robustlayers.cli.main import main
from robustlayers.core.ranks import environment
from robustlayers.evaluation import _shards
import robustlayers.evaluation.cascade

sys.modules["robustlayers.evaluation.cascade"]._BATCH = {"cpu": 2}
write, made = _shards.Shards.write, []

def last(self, group, shard):
    write(self, group, shard)
    made.append(group)
    if len(made) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

if sys.argv.pop() == "kill" and environment()[0] == 1:
    _shards.Shards.write = last
main(sys.argv[1:])
"""


def test_a_measurement_of_two_processes_of_which_one_was_killed_has_the_numbers_of_one(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, one, two = write(*TWO_ARMS, *ATTACKED), tmp_path / "one", tmp_path / "two"
    monkeypatch.setattr(sys.modules["robustlayers.evaluation.cascade"], "_BATCH", {"cpu": 2})
    run_plan(make_plan(load_study(study, ["seeds=1"])), one, workers=1, threads=1)
    shutil.copytree(one, two)
    shutil.rmtree(two / "results")
    command = ("-c", KILLED, "run", str(study), "--out", str(two), *ONE_SEED)
    (main, shown, _), (other, _, _) = end(start(*command, "kill"))
    assert (main, other) == (1, -signal.SIGKILL)
    assert shown.count("FAILED: Lost: another process has ended") == 1
    assert len(list(two.glob("results/*/seed-0/.shards/*/*/0*/*.safetensors"))) >= 3  # two of the one that was killed
    assert not list(two.glob("results/*/seed-0/rows.json"))
    found = end(start(*command, "go"))
    assert [code for code, _, _ in found] == [0, 0], found
    results = [path.relative_to(one) for path in one.glob("results/*/seed-0/*.json") if path.name != "time.json"]
    assert len(results) == 6
    for path in results:
        if path.name != "manifest.json":
            assert (two / path).read_text() == (one / path).read_text(), path
        assert (two / path.with_name("pictures.safetensors")).read_bytes() == (
            one / path.with_name("pictures.safetensors")
        ).read_bytes()


class Left(BaseException):
    """In the place of the end of the process."""


@pytest.mark.parametrize(
    ("error", "first", "code", "text"),
    [
        (UserError("no such file"), True, 2, "no such file\n"),
        (UserError("no such file"), False, 1, ""),
        (Ended("train a: it broke"), True, 1, "failed: train a: it broke\n"),
        (Ended(""), False, 1, ""),
        (RuntimeError("connection closed"), False, 1, ""),
    ],
)
def test_of_processes_that_fail_the_first_one_says_why(
    error: Exception,
    first: bool,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @contextmanager
    def joined(device: torch.device) -> Iterator[Ranks]:
        yield ranks

    def leave(code: int) -> None:
        raise Left(code)

    def work(ranks: Ranks, device: str) -> int:
        raise error

    ranks = Told(1)
    ranks.first = lambda: first
    monkeypatch.setattr(shared, "joined", joined)
    monkeypatch.setattr(shared.os, "_exit", leave)
    monkeypatch.setattr(shared.signal, "signal", lambda number, action: None)
    with pytest.raises(Left) as left:
        shared.together("cpu", work)
    assert left.value.args == (code,) and capsys.readouterr().err == text


def test_all_processes_end_with_the_main_ones_code(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def joined(device: torch.device) -> Iterator[Ranks]:
        yield Told(1, "3")

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(shared, "joined", joined)
    monkeypatch.setattr(shared.os, "_exit", leave)
    monkeypatch.setattr(shared.signal, "signal", lambda number, action: None)
    with pytest.raises(Left) as left:
        shared.together("cpu", lambda ranks, device: 0)
    assert left.value.args == (3,)


# -- one process, and what it would hear -----------------------------------------------------------------------------


class Told(Ranks):
    """Ranks whose exchanges are kept, or given."""

    def __init__(self, index: int, *given: str) -> None:
        super().__init__(index, 2)
        self.given, self.told = list(given), []

    def tell(self, value: object = None) -> object:
        self.told.append(value)
        return value if self.main else self.given.pop(0)

    def wait(self) -> None:
        """All are here."""


def task(key: str, made: list[str], error: Exception | None = None, needs: tuple[str, ...] = ()) -> Task:
    def function(report: object) -> None:
        made.append(key)
        if error is not None:
            raise error

    return Task(key, function, (), needs)


def test_the_main_process_names_every_task_and_goes_on_after_a_failure_of_its_own() -> None:
    made: list[str] = []
    events: list[Event] = []
    tasks = [
        task("train a", made),
        task("measure a", made, Apart(ValueError("no")), ("train a",)),
        task("train b", made, Stopped("diverged")),
        task("train c", made, needs=("train b",)),
        task("train d", made),
    ]
    ranks = Told(0)
    lead(tasks, ranks, threads=1, on_event=events.append)
    assert set(made) == {"train a", "measure a", "train b", "train d"}
    assert ranks.told == [*made, ""]
    ends = {event.key: event.kind for event in events if event.kind != "started"}
    assert ends == {"train a": "done", "measure a": "failed", "train b": "stopped", "train d": "done"}
    (failed,) = (event.facts for event in events if event.kind == "failed")
    assert failed["reason"] == "ValueError: no" and "ValueError: no" in failed["trace"]


def test_a_failure_for_which_others_wait_ends_the_main_process() -> None:
    events: list[Event] = []
    with pytest.raises(Ended):
        lead(
            [task("train a", [], ValueError("no")), task("train b", [])],
            Told(0),
            threads=1,
            on_event=events.append,
        )
    assert [event.kind for event in events] == ["started", "failed"]


def test_the_others_do_what_they_are_told_until_they_are_told_nothing() -> None:
    made: list[str] = []
    tasks = {key: task(key, made, Stopped("diverged") if key == "b" else None) for key in "abc"}
    follow(tasks, Told(1, "c", "b", "a", ""), threads=1)
    assert made == ["c", "b", "a"]
    with pytest.raises(Ended, match=r"^x: ValueError: no \(process 1 of 2\)$"):
        follow({"x": task("x", made, ValueError("no"))}, Told(1, "x"), threads=1)


@pytest.mark.parametrize(("statistics", "fails"), [("sync", False), ("mean", True), ("none", True)])
def test_only_a_synchronized_phase_goes_on_in_another_number_of_processes(statistics: str, fails: bool) -> None:
    phase = PhaseConfig.model_validate(
        {"name": "a", "epochs": 1, "train": {"all": "natural"}, "statistics": statistics}
    )
    fresh: dict[str, object] = {}
    _check_count(fresh, phase, Ranks(0, 4), Path("f"))
    assert fresh == {"processes": 4}
    begun = {"state": "s", "processes": 4}
    _check_count(begun, phase, Ranks(0, 4), Path("f"))
    if fails:
        with pytest.raises(
            UserError, match=rf"^statistics: {statistics}: .* begun by 4 .* by 1; use as many, or delete f"
        ):
            _check_count(begun, phase, Ranks(0, 1), Path("f"))
    else:
        _check_count(begun, phase, Ranks(0, 1), Path("f"))


def test_what_processes_cannot_share_is_told_before_anything_is_trained(write: Write, tmp_path: Path) -> None:
    study = write(("width: 4, ", "width: 4, norm: robust, "))
    with pytest.raises(UserError) as told:
        run_plan(make_plan(load_study(study, ["seeds=1"])), tmp_path / "out", ranks=Told(0))
    texts = [str(fault) for fault in told.value.faults]
    assert len(texts) == 3 and not (tmp_path / "out").exists()
    assert texts[0].startswith("none; norm; all: pretrain: statistics: sync is known for batch norm only, not for")


def test_workers_make_no_sense_there(plan: Callable[..., Plan], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--workers: processes that torchrun started"):
        run_plan(plan(), tmp_path / "out", workers=2, ranks=Told(0))


def test_statistics_count_in_the_identity_where_they_are_not_those_of_the_whole_batch(write: Write) -> None:
    def phases(*overrides: str) -> set[str]:
        return set(make_plan(load_study(write(), overrides)).nodes)

    assert phases("training.statistics=sync") == phases()
    assert not phases("training.statistics=mean") & phases()
    assert not phases("training.statistics=none") & phases("training.statistics=mean")
    with pytest.raises(UserError, match="statistics"):
        phases("training.statistics=some")
