"""`robustlayers analyse`: look inside the trained nets of a study; rows, CSV and figures go into its report."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from robustlayers.cli.arguments import Trust

if TYPE_CHECKING:
    from rich.progress import Progress

    from robustlayers.study.analyze import Job

__all__ = ["analyse"]

_FIRST_SECONDS, _LINE_SECONDS = (
    5.0,
    20.0,
)  # until the first line of progress of a job where there is no terminal, and on


def analyse(
    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN", help="folders that studies were run into"),
    ],
    what: Annotated[
        tuple[str, ...],
        tyro.conf.UseAppendAction,
        tyro.conf.arg(
            metavar="NAME,...",
            help="cka, signal, criticality, norms, transplant, interpolation, overfitting, probes, pictures, transfer, rift; "
            "all that train nothing unless given",
        ),
    ] = (),
    arm: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(help="only this arm; several times; all unless given")
    ] = (),
    against: Annotated[
        str | None,
        tyro.conf.arg(metavar="ARM", help="compare each arm with this one too: cka, transplant, interpolation"),
    ] = None,
    seeds: Annotated[str | None, tyro.conf.arg(metavar="SEED,...", help="or all; the first one unless given")] = None,
    images: Annotated[
        int, tyro.conf.arg(help="how many validation images to look at, or all where there are fewer")
    ] = 500,
    select: Annotated[
        str | None,
        tyro.conf.arg(metavar="SELECTOR", help="of layers or groups, module by module, as in 'norm & stage(2)'"),
    ] = None,
    checkpoint: Annotated[str, tyro.conf.arg(help="best or last")] = "best",
    attack: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help="as pgd-20; the study's monitor unless given")
    ] = None,
    trust: Trust = False,
    device: Annotated[str, tyro.conf.arg(help="auto, cpu, cuda, cuda:N or mps")] = "auto",
    threads: Annotated[int | None, tyro.conf.arg(help="torch threads")] = None,
) -> int:
    """Look inside the nets of a study, on held-out images; kill it at any moment, the same command does what is left."""
    import torch

    from robustlayers.core.device import pick_device
    from robustlayers.core.errors import Fault, UserError
    from robustlayers.core.files import read_json
    from robustlayers.report import write
    from robustlayers.study.analyze import Asked, plan_analyses, run_analyses
    from robustlayers.study.analyzed import kept_analyses
    from robustlayers.study.collect import collect
    from robustlayers.study.store import Store

    if threads is not None and threads < 1:
        raise UserError(Fault(f"{threads} is not allowed; allowed: at least 1", path="--threads"))
    if threads is not None:
        torch.set_num_threads(threads)
    if not runs:
        raise UserError(Fault("is missing: name the folder that a study was run into", path="RUN"))
    pick_device(device)
    stores = [Store(run) for run in dict.fromkeys(runs)]
    planned = []
    for store in stores:
        asked = Asked(
            what=[name.strip() for text in what for name in text.split(",") if name.strip()],
            arms=arm,
            seeds=_seeds(seeds, store),
            against=against,
            images=images,
            select=select,
            checkpoint=checkpoint,
            attack=attack,
            trust=trust,
        )
        planned.append(plan_analyses(store, asked))
    left = [job for one in planned for job in one.left]
    for note in dict.fromkeys(note for one in planned for note in one.notes):
        print(note)
    done = sum(len(one.done) for one in planned)
    if done:
        print(f"{done} of {done + len(left)} results are there already")
    elif left:
        print(f"{len(left)} results to make", flush=True)
    with _display(left) as display:
        for store, one in zip(stores, planned, strict=True):
            run_analyses(store, one.left, display.moment, device=device)
    for store, one in zip(stores, planned, strict=True):
        wanted = {job.identity for job in (*one.left, *one.done)}
        summary = collect(store)
        _show(
            [
                (folder, record)
                for folder, record in kept_analyses(store, read_json(store.plan))
                if folder.name in wanted
            ]
        )
        print(f"report: {write(summary, store.report)}#inside")
    return 0


def _seeds(text: str | None, store: Any) -> tuple[int, ...]:
    from robustlayers.core.errors import Fault, UserError
    from robustlayers.core.files import read_json

    if text is None or not store.plan.exists():
        return ()
    if text.strip() == "all":
        return tuple(read_json(store.plan)["seeds"])
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            Fault(f"{text!r} is not allowed; allowed: all, or numbers as in 0,1,2", path="--seeds")
        ) from None


def _show(results: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """Print the headline numbers of each result, and where nets lie that it made."""
    from robustlayers.study.analyses import ANALYSES
    from robustlayers.study.analyzed import number_text

    for name in ANALYSES:
        for folder, record in results:
            if record["analysis"] != name:
                continue
            other = f" against {record['against']}" if record["against"] else ""
            for arm in dict.fromkeys(one.get("arm", record["arm"]) for one in record["numbers"]):
                numbers = "; ".join(
                    f"{one['label']} {number_text(one)}" + (f" ({one['note']})" if one["note"] else "")
                    for one in record["numbers"]
                    if one.get("arm", record["arm"]) == arm
                )
                print(f"{name}: {arm}{other}, seed {record['seed']}: {numbers}")
            for file in record.get("weights", ()):
                print(f"{name}: {record['arm']}, seed {record['seed']}: weights in {folder / file}")


class _Display:
    """Tells how far all jobs together are, by lines: when one is done, and now and then while it is not."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.total = sum(job.size for job in jobs)
        self.finished = 0.0
        self.count = 0
        self.of = len(jobs)
        self.began = time.monotonic()
        self.told = self.began
        self.first = True

    def moment(self, job: Job, share: float, what: str) -> None:
        """Take note of how far a job is."""
        now = time.monotonic()
        whole = (self.finished + job.size * share) / max(self.total, 1e-9)
        left = self._left(whole)
        status = f"[{min(whole, 1):.0%}{left and ', '}{left}]"
        self.refresh(job, share, what, whole, left)
        if what == "done":
            self.finished += job.size
            self.count += 1
            self.told, self.first = now, True
            self.line(f"{job.text}: done ({self.count} of {self.of}) {status}")
        elif now - self.told >= (_FIRST_SECONDS if self.first else _LINE_SECONDS):
            self.told, self.first = now, False
            self.now_and_then(f"{job.text}: {what} {share:.0%} {status}")

    def _left(self, share: float) -> str:
        """Return the time left in words, empty before it can be told."""
        from robustlayers.cli.plan import duration_text

        if share >= 1 or share < 0.002:
            return ""
        return f"{duration_text((time.monotonic() - self.began) * (1 - share) / share)} left"

    def line(self, text: str) -> None:
        """Print a line that stays."""
        print(text, flush=True)

    def now_and_then(self, text: str) -> None:
        """Print a line of progress where nothing can move."""
        self.line(text)

    def refresh(self, job: Job, share: float, what: str, whole: float, left: str) -> None:
        """Show what moves; lines have nothing that moves."""


class _Bars(_Display):
    def __init__(self, jobs: Sequence[Job], progress: Progress) -> None:
        super().__init__(jobs)
        self.progress = progress
        self.whole = progress.add_task("analyse", total=1.0, note="")
        self.one = progress.add_task("", total=1.0, note="", visible=False)

    def line(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False)

    def now_and_then(self, text: str) -> None:
        pass

    def refresh(self, job: Job, share: float, what: str, whole: float, left: str) -> None:
        from robustlayers.cli.progress import fitting

        self.progress.update(self.whole, completed=whole, note=left)
        self.progress.update(self.one, description=f"  {job.text}", completed=share, visible=what != "done")
        self.progress.update(self.one, note=fitting(what, self.progress))


@contextmanager
def _display(jobs: Sequence[Job]) -> Iterator[_Display]:
    from rich.console import Console

    from robustlayers.cli.progress import bars

    console = Console()
    if not jobs or not (sys.stdout.isatty() and console.is_terminal):
        yield _Display(jobs)
        return
    with bars(console) as progress:
        yield _Bars(jobs, progress)
