"""`robustlayers run`: train and measure what is missing, show progress, write the report, print its path."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from robustlayers.cli.arguments import Overrides, StudyFile, Trust

if TYPE_CHECKING:
    from robustlayers.core.ranks import Ranks

__all__ = ["run"]


def run(
    study: StudyFile,
    overrides: Overrides = (),
    trust: Trust = False,
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help="where results go; runs/NAME unless given")] = None,
    device: Annotated[str, tyro.conf.arg(help="auto, cpu, cuda, cuda:N or mps")] = "auto",
    workers: Annotated[int | None, tyro.conf.arg(help="processes side by side; one for each core unless given")] = None,
    threads: Annotated[
        int | None,
        tyro.conf.arg(
            help="torch threads of each process; cores / workers unless given; another number changes the last digits"
        ),
    ] = None,
) -> int:
    """Run a study, or what is left of it; kill it at any moment, the same command goes on and ends with the same bits.

    Under `torchrun --nproc-per-node N -m robustlayers run ...` N processes share the batches of every phase and of the attacks.
    """
    from robustlayers.cli.shared import together
    from robustlayers.core.ranks import ALONE, environment

    def work(ranks: Ranks, device: str) -> int:
        return _run(study, overrides, trust, out, device, workers, threads, ranks)

    if environment()[1] == 1:
        return work(ALONE, device)
    return together(device, work)


def _run(
    study: Path,
    overrides: tuple[str, ...],
    trust: bool,
    out: Path | None,
    device: str,
    workers: int | None,
    threads: int | None,
    ranks: Ranks,
) -> int:
    from robustlayers.cli.plan import tell_starts
    from robustlayers.cli.progress import show
    from robustlayers.core.errors import UserError
    from robustlayers.report import write
    from robustlayers.study.collect import collect
    from robustlayers.study.definition import load_study
    from robustlayers.study.plan import make_plan
    from robustlayers.study.run import run_plan
    from robustlayers.study.store import Store

    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise UserError(f"--{name}: {value} is not allowed; allowed: at least 1")
    loaded = load_study(Path(study), overrides, trust=trust)
    made = make_plan(loaded)
    folder = out or Path("runs") / loaded.name
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: {folder} is a file; name a folder")
    command = " ".join(
        [
            "robustlayers",
            "run",
            shlex.quote(str(study)),
            *(f"--set {shlex.quote(s)}" for s in overrides),
            *(["--trust"] if trust else []),
        ]
    )
    if not ranks.main:
        run_plan(made, folder, device=device, workers=workers, threads=threads, ranks=ranks)
        return 0
    tell_starts(made)
    with show(loaded.name) as display:
        outcome = run_plan(
            made,
            folder,
            command=command,
            device=device,
            workers=workers,
            threads=threads,
            ranks=ranks,
            on_start=display.start,
            on_event=display.event,
        )
    for key, reason in outcome.diverged.items():
        print(f"diverged: {outcome.texts[key]}: {reason}", file=sys.stderr)
    for key, reason in outcome.failed.items():
        print(f"failed: {outcome.texts[key]}: {reason}", file=sys.stderr)
    store = Store(folder)
    summary = collect(store)
    page = write(summary, store.report)
    for claim in summary.claims:
        if claim.checkpoint == summary.checkpoints[0]:
            print(f"{claim.verdict}: {claim.say} ({claim.reason})")
    print(f"report: {page}")
    return 0 if outcome.complete else 1
