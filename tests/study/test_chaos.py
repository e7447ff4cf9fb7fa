"""A study that is killed at random moments and repeated ends with the same weights, bit for bit, and the same rows."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from robustlayers.cli.main import main

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="kills whole process groups"),
    pytest.mark.timeout(900),  # it starts torch thirty times, beside other tests
]

STUDY = """\
question: Does it end the same?
data: {name: "npz:chaos.npz", validation: 0.2, augment: {crop: 2, flip: true}}
model: {name: small-cnn, width: 8}
threat: {norm: linf, eps: 8/255}
attack: pgd-2
training: {batch_size: 32, optimizer: {lr: 0.05}, schedule: {name: one-cycle}}
phases:
  - {name: pretrain, epochs: 16, train: {all: natural}}
  - {name: adapt, epochs: 16, train: {norm: adversarial, rest: frozen}}
factors:
  group:
    none: {phases.adapt.epochs: 0}
    norm: {}
    all: {phases.adapt.train: {all: {adversarial: 0.5, natural: 0.5}}, phases.adapt.optimizer: {name: adam, lr: 0.002}}
seeds: 2
evaluate: {attacks: [pgd-3], monitor: {attack: pgd-2, images: 60}}
"""
# Lines of progress to wait for (of LINES in all) before each kill, the number of workers, and whether they are killed too or
# only their parent. With 0 lines the kill may hit the imports, the plan, the lock or the start of the workers.
LINES = 2 * (16 + 2 * 16) + 2 * 3  # two seeds: epochs of shared and own phases, three measurements
KILLS = [
    (1, 2, False),
    (0, 1, False),
    (2, 1, False),
    (1, 2, True),
    (0, 2, False),
    (3, 1, False),
    (0, 1, False),
    (2, 2, False),
    (2, 1, False),
    (1, 1, False),
]
# Whoever runs the tests in the background of a shell ignores Ctrl-C, and so would everything that they start.
HEARS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
COMMAND = [sys.executable, "-c", HEARS + "from robustlayers.cli.main import main; main()"]


class _Run:
    """`robustlayers run` in a process group of its own; what it prints goes to files, which orphans cannot block."""

    def __init__(self, out: str, workers: int = 2) -> None:
        self.out, self.err = (Path(f"{kind}-{time.monotonic_ns()}.txt") for kind in ("out", "err"))
        with self.out.open("wb") as out_stream, self.err.open("wb") as err_stream:
            self.process = subprocess.Popen(
                [*COMMAND, "run", "chaos.yaml", "--out", out, "--workers", str(workers), "--threads", "1"],
                stdout=out_stream,
                stderr=err_stream,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    @property
    def lines(self) -> list[str]:
        return self.out.read_text().splitlines()

    @property
    def progress(self) -> int:
        return sum(": epoch " in line or ", measuring: " in line for line in self.lines)

    def wait_for(self, lines: int) -> None:
        """Wait until so many lines of progress are there, or the process has ended."""
        ends = time.monotonic() + 60
        while self.progress < lines and self.process.poll() is None:
            assert time.monotonic() < ends, "no progress within a minute"
            time.sleep(0.01)

    def leave_alone(self, seconds: float, lines: int) -> None:
        """Wait, but no longer than until so many lines of progress are there: the machine may be faster than it was."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and self.progress < lines and self.process.poll() is None:
            time.sleep(0.005)

    def stop(self, number: int, group: bool) -> tuple[int, str]:
        """Send a signal; return the exit code and what stands on standard error."""
        (os.killpg if group else os.kill)(self.process.pid, number)
        return self.end()

    def end(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and what stands on standard error."""
        return self.process.wait(120), self.err.read_text()

    def alive(self) -> list[str]:
        """Return the processes of the group that still live."""
        table = subprocess.run(["ps", "-A", "-o", "pgid=,pid=,stat=,args="], capture_output=True, text=True, check=True)
        rows = [line.split(None, 3) for line in table.stdout.splitlines()]
        return [" ".join(row) for row in rows if int(row[0]) == self.process.pid and not row[2].startswith("Z")]

    def assert_orphans_end(self) -> None:
        ends = time.monotonic() + 10
        while orphans := self.alive():
            assert time.monotonic() < ends, f"still alive without their parent: {orphans}"
            time.sleep(0.05)


def _result(out: Path) -> dict[str, str]:
    found = {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.glob("phases/*/seed-*/*.safetensors")
    }
    rows = subprocess.run([*COMMAND, "rows", str(out)], capture_output=True, text=True, check=True)
    return found | {"rows": rows.stdout}


def test_killed_at_any_moment_it_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (240, 16, 16), dtype=np.uint8), np.arange(240) % 5
    np.savez("chaos.npz", train_images=images, train_labels=labels, test_images=images[:60], test_labels=labels[:60])
    Path("chaos.yaml").write_text(STUDY)
    moments = random.Random(1)

    # How fast this machine is decides how long a run is left alone, so that a fast one does not finish the study meanwhile.
    began = time.monotonic()
    reference = _Run("whole")
    reference.wait_for(1)
    to_first = time.monotonic() - began
    code, error = reference.end()
    pace = (time.monotonic() - began - to_first) / LINES
    assert (code, error, reference.progress) == (0, "", LINES)

    kills, runs = 0, []
    for lines, workers, group in KILLS:
        run = _Run("killed", workers)
        runs.append(run)
        run.wait_for(lines)
        run.leave_alone(moments.uniform(0, 2 * pace if lines else to_first), lines + 3)
        ended = run.process.poll()
        assert ended is None, f"it ended before it could be killed: {ended}, {run.lines[-1:]}, {run.err.read_text()!r}"
        code, _ = run.stop(signal.SIGKILL, group)
        assert code == -signal.SIGKILL
        kills += 1
        if moments.random() < 0.5:  # else the next one starts at once, beside orphans that may still be dying
            run.assert_orphans_end()
    assert kills >= 10

    # Ctrl-C reaches all processes of a terminal, SIGTERM only the one it is sent to; both end cleanly.
    for number, group, expected in ((signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)):
        run = _Run("killed")
        if number == signal.SIGINT:  # while the workers are still importing
            while not run.lines and run.process.poll() is None:
                time.sleep(0.01)
            time.sleep(min(0.5, to_first / 4))
        else:
            run.wait_for(1)
            os.killpg(run.process.pid, signal.SIGSTOP)  # or it might be through before the other one has started
            with pytest.raises(SystemExit) as stop:  # meanwhile nobody else may run in this folder
                main(["run", "chaos.yaml", "--out", "killed"])
            os.killpg(run.process.pid, signal.SIGCONT)
            who = f"process {run.process.pid})\n"
            error = capsys.readouterr().err
            assert stop.value.code == 2 and error.startswith("killed: another process is running this study (host ")
            assert error.endswith(who) and error.count("\n") == 1
        assert run.stop(number, group) == (expected, "stopped; the same command goes on from here\n")
        run.assert_orphans_end()

    last = _Run("killed")
    code, error = last.end()
    assert (code, error) == (0, "") and last.lines[-1] == "report: killed/report/report.html"
    assert 0 < last.progress < LINES, "either nothing was left to do, or nothing had been kept"
    assert not list(tmp_path.rglob(".tmp-*"))
    for run in runs:
        run.assert_orphans_end()
        assert run.err.read_text() == "", "orphans complained"
    assert _result(tmp_path / "killed") == _result(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.damaged-*"))
