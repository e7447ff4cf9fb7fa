"""An evaluation that is killed at random moments and repeated ends like one that was left alone, to the last bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from robustlayers.core.files import read_json, read_tensors

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="kills processes"),
    pytest.mark.timeout(600),  # on a machine that is busy otherwise
]

# A linear model, so that a process takes little time beside its imports. It says when it has begun, and writes the outcome.
SCRIPT = """\
import sys
from pathlib import Path

import torch

from robustlayers.attacks import Linf
from robustlayers.core.files import write_json, write_tensors
from robustlayers.evaluation.autoattack import autoattack

torch.set_num_threads(1)
draw = torch.Generator().manual_seed(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw))
x = torch.rand(96, 3, 4, 4, generator=draw)
with torch.no_grad():
    y = model(x).argmax(1)
folder = Path(sys.argv[1])
print("begun", flush=True)
found = autoattack(
    model, x, y, threat=Linf(0.05), directory=folder, steps=12, targets=4, queries=200,
    batch_size=int(sys.argv[2]),
    progress=lambda moment: print(moment.attack, moment.done, flush=True),
)
write_json(folder / "outcome.json", [list(found.broken_by), found.label, [vars(t) | {"seconds": 0} for t in found.table]])
write_tensors(folder / "outcome.safetensors", {"x_adv": found.x_adv, "robust": found.robust, "clean": found.clean})
"""


class _Run:
    """The script in a process of its own; what it prints goes to a file."""

    def __init__(self, folder: Path, script: Path, batch: int) -> None:
        self.folder = folder
        self.out, self.err = (script.with_name(f"{kind}-{time.monotonic_ns()}.txt") for kind in ("out", "err"))
        with self.out.open("wb") as out, self.err.open("wb") as err:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, str(script), str(folder), str(batch)]
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)

    @property
    def shards(self) -> int:
        return len(list(self.folder.glob("0*/[0-9]*.safetensors")))

    def wait_for(self, shards: int) -> None:
        """Wait until it has begun and so many shards are there, or it has ended."""
        ends = time.monotonic() + 120
        while self.process.poll() is None and (not self.out.read_bytes() or self.shards < shards):
            assert time.monotonic() < ends, f"no shard within two minutes: {self.err.read_text()}"
            time.sleep(0.002)

    def end(self) -> int:
        return self.process.wait(300)


def _outcome(folder: Path) -> tuple[object, dict[str, bytes]]:
    tensors = read_tensors(folder / "outcome.safetensors")
    return read_json(folder / "outcome.json"), {name: value.numpy().tobytes() for name, value in tensors.items()}


@pytest.mark.parametrize(("kills", "batch"), [(4, 4), pytest.param(20, 1, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_ends_the_same(tmp_path: Path, kills: int, batch: int) -> None:
    script, moments = tmp_path / "script.py", random.Random(kills)
    script.write_text(SCRIPT)
    # How fast this machine makes shards decides how long a process is left alone, so that none is through meanwhile.
    began = time.monotonic()
    whole = _Run(tmp_path / "whole", script, batch)
    whole.wait_for(1)
    to_first, began = time.monotonic() - began, time.monotonic()
    assert whole.end() == 0, whole.err.read_text()
    pace = (time.monotonic() - began) / whole.shards
    assert whole.shards > 6 * kills, "too few shards for kills to fall between them"

    folder, kept = tmp_path / "killed", 0
    for number in range(kills):
        run = _Run(folder, script, batch)
        if number % 4:
            run.wait_for(kept + moments.randint(0, 3))
            time.sleep(moments.uniform(0, 2 * pace))
        else:  # it may hit the imports, the lock, or the reading of what is there
            time.sleep(moments.uniform(0, to_first))
        ended = run.process.poll()
        assert ended is None, f"it ended before it could be killed: {ended}, {run.err.read_text()!r}"
        run.process.send_signal(signal.SIGKILL)
        assert run.end() == -signal.SIGKILL and run.err.read_text() == ""
        assert run.shards >= kept, "a shard was lost"
        kept = run.shards
    last = _Run(folder, script, batch)
    assert last.end() == 0, last.err.read_text()
    first = last.out.read_text().splitlines()[1].split()  # name of an attack, images that are done
    assert kept > 0 and (first[0] != "apgd-ce-12" or int(first[1]) > 0), "nothing had been kept"
    assert _outcome(folder) == _outcome(tmp_path / "whole")
    assert not list(folder.rglob(".tmp-*")) and not list(folder.rglob("*.damaged"))
    assert 0 < sum(_outcome(folder)[1]["robust"]) < 96
