"""`robustlayers analyse`: from a study's folder to rows, files and the report; mistakes end with one line."""

from __future__ import annotations

import csv
import io
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from robustlayers.cli.analyse import _Display
from robustlayers.cli.main import main
from robustlayers.study.definition import load_study
from robustlayers.study.plan import make_plan
from robustlayers.study.run import run_plan

STUDY = """\
question: Do norm layers alone gain robustness?
name: small
data: {name: "npz:DATA", validation: 0.25}
model: {name: small-cnn, width: 3, stem_stride: 2}
threat: {norm: linf, eps: 8/255}
attack: pgd-1
training: {batch_size: 16, optimizer: {lr: 0.05}}
phases:
  - {name: pretrain, epochs: 1, train: {all: natural}}
  - {name: adapt, epochs: 1, train: {norm: adversarial, rest: frozen}}
factors:
  group:
    norm: {}
    all: {phases.adapt.train: {all: adversarial}}
seeds: 2
evaluate: {attacks: [pgd-2], monitor: {attack: pgd-1, images: 12}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two arms and two seeds, run."""
    place = tmp_path_factory.mktemp("analyse")
    draw = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 64), ("test", 12)):
        labels = np.arange(count) % 4
        arrays |= {f"{part}_images": draw.integers(0, 256, (count, 8, 8)).astype(np.uint8), f"{part}_labels": labels}
    np.savez(place / "data.npz", **arrays)
    (place / "small.yaml").write_text(STUDY.replace("DATA", str(place / "data.npz")), encoding="utf-8")
    run_plan(make_plan(load_study(place / "small.yaml")), place / "out", workers=1, threads=1, device="cpu")
    return place / "out"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Run the command line and return code, output, errors."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return int(caught.value.code or 0), said.out, said.err

    yield call
    signal.signal(signal.SIGTERM, before)


Command = Callable[..., tuple[int, str, str]]


def test_from_a_folder_to_the_report(command: Command, folder: Path) -> None:
    asked = ("--what", "signal,overfitting", "--what", "transplant", "--against", "all", "--images", 12)
    code, out, err = command("analyse", folder, *asked)
    assert (code, err) == (0, "")
    assert "signal: norm, seed 0: done (1 of 5)" in out and "[100%]" in out
    assert "transplant: norm against all, seed 0: most robust accuracy won in norm from all" in out
    page = (folder / "report" / "report.html").read_text(encoding="utf-8")
    assert out.strip().endswith("report.html#inside") and 'id="inside"' in page
    assert (folder / "report" / "figures" / "inside-signal-ratio-norm.svg").exists()
    code, out, _ = command("rows", folder, "--analysis", "transplant")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and {(row["host"], row["group"]) for row in rows} >= {
        ("norm", "nothing"),
        ("all", "all statistics"),
    }
    assert {row["factor:group"] for row in rows} == {"norm"} and {row["against"] for row in rows} == {"all"}

    code, out, _ = command("analyze", folder, *asked)  # as it is spelled in America, and a second time
    assert code == 0 and "5 of 5 results are there already" in out and "done (" not in out


def test_all_seeds(command: Command, folder: Path) -> None:
    code, out, _ = command("analyse", folder, "--what", "overfitting", "--arm", "norm", "--seeds", "all")
    assert code == 0 and "overfitting: norm, seed 1: best robust, validation" in out
    code, out, _ = command("rows", folder, "--analysis", "overfitting")
    assert {row["seed"] for row in csv.DictReader(io.StringIO(out))} == {"0", "1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--what", "signl"], "--what: unknown analysis 'signl'; nearest: signal"),
        (["--arm", "nrm"], "--arm: unknown arm 'nrm'; nearest: norm; allowed: all, norm"),
        (["--what", "transplant"], "--against: is missing: transplant is of two nets; allowed: norm, all"),
        (["--seeds", "0,x"], "--seeds: '0,x' is not allowed; allowed: all, or numbers as in 0,1,2"),
        (["--seeds", "4"], "--seeds: 4 is not there; allowed: 0, 1"),
        (["--threads", "0"], "--threads: 0 is not allowed; allowed: at least 1"),
        (["--select", "cnv"], "--select: unknown"),
        (["--device", "gpu"], "device: unknown device 'gpu'"),
    ],
)
def test_a_mistake_ends_with_one_line_and_code_2(
    command: Command, folder: Path, arguments: list[str], message: str
) -> None:
    code, out, err = command("analyse", folder, *arguments)
    assert (code, out) == (2, "") and message in err and len(err.strip().splitlines()) == 1


def test_a_folder_without_a_study(command: Command, tmp_path: Path) -> None:
    code, _, err = command("analyse", tmp_path)
    assert code == 2 and "no study here" in err
    assert command("analyse")[0] == 2


def test_rows_of_an_analysis_that_is_not_there(command: Command, folder: Path, tmp_path: Path) -> None:
    command("analyse", folder, "--what", "overfitting", "--arm", "norm")
    code, out, err = command("rows", folder, "--analysis", "overfit")
    assert (code, out) == (2, "") and "nearest: overfitting" in err
    assert command("rows", tmp_path, "--analysis", "cka")[0] == 2


class _Job:
    size, text = 10.0, "cka: norm, seed 0"


def test_progress_tells_the_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With 4 of 20 passes done after 8 seconds, 32 seconds are left."""
    now = [0.0]
    monkeypatch.setattr("robustlayers.cli.analyse.time.monotonic", lambda: now[0])
    display = _Display([_Job(), _Job()])  # type: ignore[list-item]
    now[0] = 3.0
    display.moment(_Job(), 0.2, "crafting")  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""  # too early for a line
    now[0] = 8.0
    display.moment(_Job(), 0.4, "crafting")  # type: ignore[arg-type]
    assert capsys.readouterr().out == "cka: norm, seed 0: crafting 40% [20%, 32 s left]\n"
    now[0] = 10.0
    display.moment(_Job(), 1.0, "done")  # type: ignore[arg-type]
    assert capsys.readouterr().out == "cka: norm, seed 0: done (1 of 2) [50%, 10 s left]\n"
