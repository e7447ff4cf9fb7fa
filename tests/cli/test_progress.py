"""What a person sees while a study runs: share and time left that move while a run is measured, and lines in between."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from robustlayers.cli.progress import Display, _Bars, bars
from robustlayers.study.local import Event
from robustlayers.study.run import Job

TRAIN = Job("train a 0", "norm, seed 0, adapt", 100.0, 4)
MEASURE = Job("measure a 0", "norm, seed 0, measuring", 300.0)

Clock = list[float]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    now = [0.0]
    monkeypatch.setattr("robustlayers.cli.progress.time.monotonic", lambda: now[0])
    return now


def measuring(what: str, done: int, of: int, share: float) -> Event:
    return Event(MEASURE.key, "batch", {"what": what, "done": done, "of": of, "share": share})


def training(epoch: int, done: int, of: int = 10) -> Event:
    return Event(TRAIN.key, "batch", {"done": done, "of": of, "epoch": epoch})


def begun(*jobs: Job, done: float = 0.0) -> Display:
    display = Display("s")
    display.start({job.key: job for job in jobs}, done)
    return display


def test_what_is_measured_counts_in_share_and_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    display = begun(TRAIN, MEASURE, done=0.5)
    display.event(Event(TRAIN.key, "done", {}))
    clock[0] = 10.0
    display.event(measuring("best, pgd-20", 1500, 2000, 0.5))  # 100 + 150 of 400 passes in 10 s
    assert display.share == 0.625 and display.left() == pytest.approx(6.0)
    assert display.status() == "[81%, 6 s left]"
    display.event(measuring("best, pgd-20", 0, 2000, 0.4))
    assert display.share == 0.625  # never back
    display.event(measuring("last, flags", 0, 1, 1.2))
    assert display.share == 1.0
    assert capsys.readouterr().out.count("\n") == 1  # it has begun: nothing else for so short a while


def test_a_line_now_and_then_says_what_is_measured(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    display = begun(MEASURE)
    capsys.readouterr()
    for second in range(1, 41):
        clock[0] = float(second)
        display.event(measuring("best, pgd-20", 50 * second, 2000, second / 100))
    assert capsys.readouterr().out.splitlines() == [
        "norm, seed 0, measuring best, pgd-20 750/2000  [15%, 85 s left]",
        "norm, seed 0, measuring best, pgd-20 1500/2000  [30%, 70 s left]",
    ]
    clock[0] = 60.0
    display.event(measuring("best, flags", 0, 1, 0.6))
    assert capsys.readouterr().out == "norm, seed 0, measuring best, flags  [60%, 40 s left]\n"


def test_a_long_epoch_has_lines_too(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    display = begun(TRAIN)
    capsys.readouterr()
    for second in (10, 20, 30, 40):
        clock[0] = float(second)
        display.event(training(0, second // 10))
    assert capsys.readouterr().out.splitlines() == [
        "norm, seed 0, adapt: epoch 1/4, batch 2/10  [5%, 6 min 20 s left]",
        "norm, seed 0, adapt: epoch 1/4, batch 4/10  [10%, 6 min 0 s left]",
    ]


def test_what_an_earlier_process_trained_makes_no_hope(clock: Clock) -> None:
    """Half was there; 4 of the 20 batches that are left took 8 s, so 32 s are left, not 7."""
    display = begun(TRAIN)
    clock[0] = 2.0
    display.event(training(2, 1))
    clock[0] = 8.0
    display.event(training(2, 4))
    assert display.share == pytest.approx(0.6) and display.left() == pytest.approx(32.0)


@pytest.mark.parametrize("width", [80, 120])
def test_bars_keep_to_one_line_each(width: int, clock: Clock) -> None:
    shown = io.StringIO()
    with bars(Console(file=shown, force_terminal=True, width=width, color_system=None)) as progress:
        display = _Bars("quickstart", progress)
        display.start({job.key: job for job in (TRAIN, MEASURE)}, 0.0)
        display.event(Event(MEASURE.key, "started", {}))
        clock[0] = 100.0
        display.event(measuring("best, sanity: pgd-20 at 20/255", 1500, 2000, 0.5))
        table = progress.make_tasks_table(progress.tasks)
        lines = progress.console.render_lines(table)
        texts = ["".join(segment.text for segment in line) for line in lines]
    assert len(texts) == 2 and all(len(text) <= width for text in texts)
    assert "38%" in texts[0] and "2 min 47 s left" in texts[0]
    assert "50%" in texts[1] and "measuring" in texts[1]
    assert all(text.index("%") - text.index("━") >= 12 for text in texts)  # the bar, and a number beside it
    assert texts[1].rstrip().endswith("20/255 150…" if width == 80 else "20/255 1500/2000")


def test_what_auto_chose_is_told_once_it_is_known(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    display = begun(TRAIN)
    display.event(Event(TRAIN.key, "chosen", {"text": "bf16: 1.60 times as fast as the model"}))
    assert capsys.readouterr().out.splitlines()[-1] == (
        "norm, seed 0, adapt: crafts in bf16: 1.60 times as fast as the model"
    )
