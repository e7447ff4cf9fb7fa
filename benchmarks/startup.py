"""How long until a study does its first useful step? From the command to the first batch, imports and planning included.

Each round runs `robustlayers run` on a study in a fresh process and folder, and ends it after the first step of training.
Files are warm after the first round, which is not counted:

    python benchmarks/startup.py --write
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import measuring

STUDY = Path(__file__).resolve().parent.parent / "studies" / "quickstart.yaml"
LEAST = 6.0  # seconds that are promised
CHILD = """
import os, sys
from robustlayers.training.step import PartialStep
whole = PartialStep.__call__
def first(self, *given, **named):
    log = whole(self, *given, **named)
    os._exit(42)
PartialStep.__call__ = first
from robustlayers.cli.main import main
main(["run", sys.argv[1], "--out", sys.argv[2], "--workers", "1", "--threads", sys.argv[3]])
"""


def main() -> None:
    """Measure and print."""
    parser = measuring.options(__doc__)
    parser.add_argument("--study", type=Path, default=STUDY)
    arguments = parser.parse_args()
    head = measuring.machine(arguments)

    def start() -> None:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", CHILD, str(arguments.study), folder, str(arguments.threads)]
            found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode != 42:
            raise ValueError(f"no step was made: {found.stderr[-300:]}")

    seconds = measuring.spread(measuring.interleaved({"start": start}, arguments.rounds)["start"])
    verdict = "met" if seconds.median <= LEAST else "not met"
    rows = [[arguments.study.name, seconds.text(1), f"{LEAST:g} {verdict}"]]
    text = f"{head}\n\n{measuring.table(['study', 's to the first step (quartiles)', 'at most'], rows)}"
    measuring.publish("startup", text, write=arguments.write)


if __name__ == "__main__":
    main()
