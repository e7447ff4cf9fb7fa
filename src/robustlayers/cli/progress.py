"""Progress of a study: bars with time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from robustlayers.cli.plan import duration_text
from robustlayers.study.local import Event
from robustlayers.study.run import Job

__all__ = ["Display", "bars", "fitting", "show"]

_LINE_SECONDS = 15.0  # between lines where nothing can move, at least


def _loss(facts: Mapping[str, Any]) -> str:
    return "" if facts["train_loss"] is None else f"loss {facts['train_loss']:.3f}  "


def _reached(job: Job, facts: Mapping[str, Any]) -> str:
    """Return where a job is: in which batch of which epoch, or in which part of measuring."""
    count = f"{facts['done']}/{facts['of']}"
    if job.epochs:
        return f": epoch {facts['epoch'] + 1}/{job.epochs}, batch {count}"
    what = f" {facts['what']}" if "what" in facts else ""
    return f"{what} {count}" if facts["of"] > 1 else what


class Display:
    """Turns events of a run into lines or bars; the work that is done is counted in passes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.jobs: dict[str, Job] = {}
        self.parts: dict[str, float] = {}  # job -> share done
        self.before = 0.0  # share of the study that was done when we began
        self.given = 0.0  # what of the jobs that are left was done then, in passes
        self.total = 1.0
        self.began = self.told = time.monotonic()

    def start(self, jobs: dict[str, Job], done: float) -> None:
        """Take note of the jobs that are left and the share that is done already."""
        self.jobs, self.before = jobs, done
        self.total = sum(job.size for job in jobs.values())
        self.began = time.monotonic()
        if not jobs:
            self.line(f"{self.name}: all results are there, nothing to train")
        elif done:
            self.line(f"{self.name}: {done:.0%} is there already, {len(jobs)} jobs left")
        else:
            self.line(f"{self.name}: {len(jobs)} jobs")

    def event(self, event: Event) -> None:
        """Show an event."""
        job = self.jobs[event.key]
        facts = event.facts
        if event.kind == "batch":
            share = facts.get("share", facts["done"] / max(1, facts["of"]))
            if job.epochs:
                share = (facts["epoch"] + share) / job.epochs
                if event.key not in self.parts:  # it goes on where another process was stopped
                    self.given += job.size * (share - 1 / max(1, facts["of"]) / job.epochs)
            self.parts[event.key] = max(self.parts.get(event.key, 0.0), min(1.0, share))
            self.now_and_then(f"{job.text}{_reached(job, facts)}  {self.status()}")
        elif event.kind in ("done", "stopped", "failed"):
            self.parts[event.key] = 1.0
        elif event.kind == "epoch":
            self.parts[event.key] = facts["done"] / facts["of"]
            self.line(
                f"{job.text}: epoch {facts['done']}/{facts['of']}  {_loss(facts)}"
                f"validation clean {_percent(facts['validation_clean'])} robust {_percent(facts['validation_robust'])}"
                f"  {self.status()}"
            )
        elif event.kind == "chosen":
            self.line(f"{job.text}: crafts in {facts['text']}")
        elif event.kind == "measured":
            self.line(f"{job.text}: test clean {facts['clean']:.1%} robust {facts['robust']:.1%}  {self.status()}")
        if event.kind == "failed":
            self.line(f"{job.text}: FAILED: {facts['reason']}")
        if event.kind == "stopped":
            self.line(f"{job.text}: DIVERGED: {facts['reason']}")
        self.refresh(event, job)

    @property
    def share(self) -> float:
        """Share of what was left that is done."""
        return sum(self.jobs[key].size * part for key, part in self.parts.items()) / max(self.total, 1e-9)

    def left(self) -> float | None:
        """Return the seconds that are left, None before it can be told."""
        share = self.share
        made = share - self.given / max(self.total, 1e-9)
        if made < 0.01:
            return None
        return (time.monotonic() - self.began) * (1 - share) / made

    def status(self) -> str:
        """Return the share of the whole study that is done and the time left."""
        whole = self.before + (1 - self.before) * self.share
        left = self.left()
        return f"[{whole:.0%}{'' if left is None else f', {duration_text(left)} left'}]"

    def line(self, text: str) -> None:
        """Print a line that stays."""
        self.told = time.monotonic()
        print(text, flush=True)

    def now_and_then(self, text: str) -> None:
        """Print a line where nothing can move, if none was printed for a while."""
        if time.monotonic() - self.told >= _LINE_SECONDS:
            self.line(text)

    def refresh(self, event: Event, job: Job) -> None:
        """Update what moves; lines have nothing that moves."""


class _Bars(Display):
    def __init__(self, name: str, progress: Progress) -> None:
        super().__init__(name)
        self.progress = progress
        self.whole = progress.add_task(name, total=1.0, note="")
        self.bars: dict[str, TaskID] = {}

    def line(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False)

    def now_and_then(self, text: str) -> None:
        pass

    def refresh(self, event: Event, job: Job) -> None:
        if event.kind == "started":
            self.bars[event.key] = self.progress.add_task(f"  {job.text}", total=1.0, note="")
        elif event.key in self.bars:
            if event.kind in ("done", "stopped", "failed"):
                self.progress.remove_task(self.bars.pop(event.key))
            else:
                note = fitting(_reached(job, event.facts).lstrip(" :") if event.kind == "batch" else "", self.progress)
                self.progress.update(self.bars[event.key], completed=self.parts.get(event.key, 0.0), note=note)
        left = self.left()
        note = "" if left is None else f"{duration_text(left)} left"
        self.progress.update(self.whole, completed=self.before + (1 - self.before) * self.share, note=note)


@contextmanager
def show(name: str) -> Iterator[Display]:
    """Return a display for where standard output goes: a terminal or not."""
    console = Console()
    if not (sys.stdout.isatty() and console.is_terminal):
        yield Display(name)
        return
    with bars(console) as progress:
        yield _Bars(name, progress)


def bars(console: Console) -> Progress:
    """Return what shows bars: what is done, how far, and a note beside it."""
    columns: list[Any] = [
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[note]}", markup=False),
    ]
    return Progress(*columns, console=console, transient=True)


def fitting(note: str, progress: Progress) -> str:
    """Return as much of a note as leaves some room for the bars."""
    taken = 20 + max((len(task.description) for task in progress.tasks if task.visible), default=0)
    room = max(10, progress.console.width - taken)
    return note if len(note) <= room else note[: room - 1] + "…"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
