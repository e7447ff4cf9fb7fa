"""The folder of a study: phase results and measurements by identity and seed, each finished when its manifest is there.

FOLDER/
  study.yaml  plan.json                        what was asked, as given and as resolved
  phases/<id>/seed-<s>/                        last.safetensors  best.safetensors  curve.json  ledger.json
                                               time.json  manifest.json;   .resume.json while it is being trained
  results/<run>/seed-<s>/                      rows.json  norms.json  pictures.safetensors  time.json
                                               manifest.json
  analyses/<name>/<identity>/                  result.json  rows.csv  arrays.safetensors  manifest.json
  report/                                      report.html  report.md  rows.csv  figures/
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from robustlayers.core.errors import Fault, UserError
from robustlayers.core.files import (
    MANIFEST,
    read_json,
    remove_leftovers,
    verify_manifest,
    write_json,
    write_manifest,
)

__all__ = ["Store"]

_FAILED = "failed.json"


class Store:
    """The results of a study on disk."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def phase(self, node: str, seed: int) -> Path:
        """Return the folder of a phase result."""
        return self.root / "phases" / node / f"seed-{seed}"

    def result(self, run: str, seed: int) -> Path:
        """Return the folder of a run's measurements."""
        return self.root / "results" / run / f"seed-{seed}"

    @property
    def report(self) -> Path:
        """The folder of the report."""
        return self.root / "report"

    @property
    def plan(self) -> Path:
        """The file that describes the study as resolved."""
        return self.root / "plan.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; another that runs there is a `UserError` that names it."""
        lock = FileLock(self.root / ".lock")
        owner = self.root / ".owner.json"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            who = ""
            with suppress(UserError):  # the other may not have written its name yet
                facts = read_json(owner)
                who = f" (host {facts.get('host')}, process {facts.get('pid')})"
            raise UserError(Fault(f"another process is running this study{who}", file=str(self.root))) from None
        except OSError as error:
            raise UserError(Fault(f"cannot be written into: {error.strerror}", file=str(self.root))) from None
        try:
            import os
            import socket

            write_json(owner, {"host": socket.gethostname(), "pid": os.getpid()})
            remove_leftovers(self.root)
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()

    def whole(self, folder: Path) -> bool:
        """Tell whether a folder is finished, with every file at its size; nothing is changed."""
        return (folder / MANIFEST).exists() and not verify_manifest(folder)

    def finished(self, folder: Path) -> bool:
        """Tell whether a folder is whole; one that is damaged is set aside, never silently used. For who holds the lock."""
        if not (folder / MANIFEST).exists():
            return False
        if self.whole(folder):
            self._tidy(folder)  # a process may have been killed between the manifest and this
            return True
        self.set_aside(folder)
        return False

    def set_aside(self, folder: Path) -> Path:
        """Move a damaged folder next to itself under a new name and return that."""
        number = 1
        while (target := folder.with_name(f"{folder.name}.damaged-{number}")).exists():
            number += 1
        shutil.move(folder, target)
        return target

    def finish(self, folder: Path, **facts: Any) -> None:
        """Declare a folder finished."""
        write_manifest(folder, facts)
        self._tidy(folder)

    @staticmethod
    def _tidy(folder: Path) -> None:
        """Delete what only a resume would have needed."""
        for path in folder.glob(".*"):
            if path.is_file() and not path.name.startswith(".tmp-"):
                path.unlink()

    def fail(self, folder: Path, status: str, reason: str, trace: str = "") -> None:
        """Note that a phase diverged or failed."""
        write_json(folder / _FAILED, {"status": status, "reason": reason} | ({"trace": trace} if trace else {}))

    def failure(self, folder: Path) -> tuple[str, str] | None:
        """Return (status, reason) of a phase that diverged or failed, None otherwise."""
        path = folder / _FAILED
        if not path.exists():
            return None
        facts = read_json(path)
        return facts["status"], facts["reason"]

    def forget_failure(self, folder: Path) -> None:
        """Forget a failure, to try again."""
        (folder / _FAILED).unlink(missing_ok=True)
