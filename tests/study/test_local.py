"""The local executor: order, failures, workers that die, and that none of them outlives an exception."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from robustlayers.core.errors import Fault, UserError
from robustlayers.study.local import Event, Stopped, Task, execute

# Workers import what they are to do: a module on the path, unlike this one.
PLANTED = """
import os, signal, time
from pathlib import Path

def note(path, word, report):
    with open(path, "a") as stream:
        stream.write(word + "\\n")
    report("noted", {"word": word})

def die(path, report):
    os.kill(os.getpid(), signal.SIGKILL)

def tell_who(path, report):
    Path(path).write_text(str(os.getpid()))

def kill_who(path, report):
    while not Path(path).exists() or not Path(path).read_text():
        time.sleep(0.01)
    time.sleep(0.2)  # until it has told that it is done
    os.kill(int(Path(path).read_text()), signal.SIGKILL)
    time.sleep(0.2)

def sleep(path, report):
    report("asleep", {})
    time.sleep(60)
"""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "planted_tasks.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("planted_tasks")
    del sys.modules["planted_tasks"]


def _kinds(events: list[Event]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for event in events:
        found.setdefault(event.kind, []).append(event.key)
    return found


def test_in_this_process_needs_go_first_and_long_tasks_before_short_ones(tmp_path: Path, planted: ModuleType) -> None:
    path = str(tmp_path / "log.txt")
    tasks = [
        Task("child", planted.note, (path, "child"), ("parent",), 9.0),
        Task("short", planted.note, (path, "short"), (), 1.0),
        Task("parent", planted.note, (path, "parent"), (), 2.0),
        Task("long", planted.note, (path, "long"), (), 3.0),
    ]
    events: list[Event] = []
    execute(tasks, workers=1, threads=1, on_event=events.append)
    assert Path(path).read_text().split() == ["long", "parent", "child", "short"]
    assert [(event.key, event.kind) for event in events[:3]] == [
        ("long", "started"),
        ("long", "noted"),
        ("long", "done"),
    ]
    assert events[1].facts == {"word": "long"}


def test_in_this_process_what_needs_a_task_without_a_result_is_never_started() -> None:
    def stop(report: object) -> None:
        raise Stopped("diverged")

    def refuse(report: object) -> None:
        raise UserError([Fault("one", file="a"), Fault("two")])

    def fail(report: object) -> None:
        raise ValueError("planted")

    tasks = [Task(name, function, ()) for name, function in (("stop", stop), ("refuse", refuse), ("fail", fail))]
    tasks += [Task(f"after {name}", fail, (), (name,)) for name in ("stop", "refuse", "fail")]
    tasks += [Task("later still", fail, (), ("after fail",))]
    events: list[Event] = []
    execute(tasks, workers=1, threads=1, on_event=events.append)
    reasons = {event.key: (event.kind, event.facts["reason"]) for event in events if event.kind != "started"}
    assert reasons == {
        "stop": ("stopped", "diverged"),
        "refuse": ("failed", "a: one; two"),
        "fail": ("failed", "ValueError: planted"),
    }
    assert "planted" in next(event.facts["trace"] for event in events if event.key == "fail" and event.kind == "failed")


def test_a_worker_that_dies_fails_its_task_and_the_others_go_on(tmp_path: Path, planted: ModuleType) -> None:
    path = str(tmp_path / "log.txt")
    tasks = [
        Task("dies", planted.die, (path,), (), 9.0),
        Task("needs it", planted.note, (path, "never"), ("dies",)),
        *(Task(f"note {index}", planted.note, (path, f"{index}"), ()) for index in range(4)),
    ]
    events: list[Event] = []
    execute(tasks, workers=2, threads=1, on_event=events.append)
    kinds = _kinds(events)
    assert kinds["failed"] == ["dies"] and sorted(kinds["done"]) == [f"note {index}" for index in range(4)]
    assert next(event.facts["reason"] for event in events if event.kind == "failed") == (
        "the worker process died (exit code -9)"
    )
    assert sorted(Path(path).read_text().split()) == ["0", "1", "2", "3"]


def test_without_any_worker_left_the_rest_fails(tmp_path: Path, planted: ModuleType) -> None:
    tasks = [Task(f"dies {index}", planted.die, ("",), ()) for index in range(4)]
    events: list[Event] = []
    execute(tasks, workers=2, threads=1, on_event=events.append)
    kinds = _kinds(events)
    assert sorted(kinds["failed"]) == [f"dies {index}" for index in range(4)] and len(kinds["started"]) == 2
    reasons = [event.facts["reason"] for event in events if event.kind == "failed"]
    assert reasons[2:] == ["no worker process is left"] * 2


def test_a_worker_that_dies_while_idle_loses_no_task(tmp_path: Path, planted: ModuleType) -> None:
    path = str(tmp_path / "who.txt")
    tasks = [
        Task("tells", planted.tell_who, (path,), (), 2.0),
        Task("kills", planted.kill_who, (path,), (), 1.0),
        Task("after", planted.note, (str(tmp_path / "log.txt"), "after"), ("kills",)),
    ]
    events: list[Event] = []
    execute(tasks, workers=2, threads=1, on_event=events.append)
    kinds = _kinds(events)
    assert "failed" not in kinds and kinds["done"] == ["tells", "kills", "after"]


PARENT = """
from planted_tasks import sleep
from robustlayers.study.local import Task, execute

if __name__ == "__main__":
    tasks = [Task(f"sleeps {index}", sleep, ("",), ()) for index in range(2)]
    execute(tasks, workers=2, threads=1, on_event=lambda event: print(event.kind, flush=True))
"""


@pytest.mark.skipif(os.name != "posix", reason="looks at the processes of a group")
def test_workers_end_with_a_parent_that_is_killed_while_they_have_nothing_to_report(
    tmp_path: Path, planted: ModuleType
) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        said = [parent.stdout.readline().strip() for _ in range(4)]
        assert sorted(said) == ["asleep", "asleep", "started", "started"]
        parent.kill()
        parent.wait()
        began = time.monotonic()
        assert (
            parent.stdout.read() == ""
        )  # the pipe closes when the last worker has ended; they would sleep for a minute
        assert time.monotonic() - began < 20


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_workers_leave_ctrl_c_to_their_parent_from_their_very_start(tmp_path: Path, planted: ModuleType) -> None:
    events: list[Event] = []

    def interrupt_workers(event: Event) -> None:
        events.append(event)
        for child in multiprocessing.active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGINT)

    path = str(tmp_path / "log.txt")
    tasks = [Task(f"note {index}", planted.note, (path, f"{index}"), ()) for index in range(4)]
    execute(tasks, workers=2, threads=1, on_event=interrupt_workers)
    assert sorted(_kinds(events)["done"]) == [task.key for task in tasks] and "failed" not in _kinds(events)


def test_an_exception_here_ends_all_workers_at_once(planted: ModuleType) -> None:
    class Interrupt(BaseException):
        pass

    def interrupt(event: Event) -> None:
        if event.kind == "asleep":
            raise Interrupt

    tasks = [Task(f"sleeps {index}", planted.sleep, ("",), ()) for index in range(2)]
    began = time.monotonic()
    with pytest.raises(Interrupt):
        execute(tasks, workers=2, threads=1, on_event=interrupt)
    assert multiprocessing.active_children() == []
    assert time.monotonic() - began < 50
