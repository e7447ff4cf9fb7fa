"""What the system refuses, as on a full disk or in a folder without permission: a line with the path, never a traceback."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from robustlayers.core import files
from robustlayers.study.local import Event, Task, perform

Call = Callable[..., tuple[int, str, str]]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a full disk names no file


@pytest.fixture
def fill(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the disk be full for every file whose path holds a text."""
    real = files.write_bytes

    def start(text: str) -> None:
        def full(handle: int) -> None:
            raise FULL

        def write(path: Path, data: bytes) -> Path:
            with monkeypatch.context() as context:
                if text in str(path):
                    context.setattr(os, "fsync", full)
                return real(path, data)

        monkeypatch.setattr(files, "write_bytes", write)

    return start


def _run(call: Call, base: str) -> tuple[int, str, str]:
    Path("s.yaml").write_text(base)
    return call("run", "s.yaml", "--out", "out", "--workers", "1", "--threads", "1")


def test_a_disk_that_is_full_from_the_start(base: str, call: Call, fill: Callable[[str], None]) -> None:
    fill("out")
    assert _run(call, base) == (1, "", "out/.owner.json: No space left on device\n")


def test_a_disk_that_fills_up_ends_all_jobs_with_the_line_of_the_first(
    base: str, call: Call, fill: Callable[[str], None]
) -> None:
    fill("seed-")
    code, out, err = _run(call, base)
    assert code == 1 and "Traceback" not in out + err and "report:" not in out
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("failed: ") and lines[0].count("No space left on device") == 1
    assert "out/phases/" in lines[0] and ".tmp-" not in lines[0]


def test_a_report_that_cannot_be_written(base: str, call: Call, fill: Callable[[str], None]) -> None:
    assert _run(call, base.replace("200", "64").replace("seeds: 2", "seeds: 1"))[0] == 0
    fill("report")
    code, out, err = call("report", "out")
    assert (code, out) == (1, "") and err == "out/report/rows.csv: No space left on device\n"


def test_a_folder_without_permission(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(store: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "out/report")

    Path("out").mkdir()
    monkeypatch.setattr("robustlayers.study.collect.collect", refused)
    assert call("report", "out") == (1, "", "out/report: Permission denied\n")


def test_an_error_of_a_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from robustlayers.cli.main import main

    def wrong(store: object) -> None:
        raise OSError("not what the system says")

    Path("out").mkdir()
    monkeypatch.setattr("robustlayers.study.collect.collect", wrong)
    with pytest.raises(OSError, match="not what the system says"):
        main(["report", "out"])


def test_a_job_that_the_system_stops_fails_with_one_line() -> None:
    def write(report: Callable[..., None]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a")

    def wrong(report: Callable[..., None]) -> None:
        raise OSError("no number")

    events: list[Event] = []
    end = perform(Task("a", write, ()), events.append)
    assert (end.kind, dict(end.facts)) == ("failed", {"reason": "runs/a: No space left on device"})
    assert "Traceback" in perform(Task("a", wrong, ()), events.append).facts["trace"]
