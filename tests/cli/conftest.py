"""A valid study to break, and the check that every mistake is refused in the same way."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from robustlayers.cli.main import main

BASE = """\
question: Do norm layers alone gain robustness?
name: base
data:
  name: fashion-mnist-mini
  validation: 0.1
  train_images: 200
  test_images: 50
model: {name: small-cnn, width: 8}
threat: {norm: linf, eps: 8/255}
attack: {name: pgd, steps: 2}
training:
  batch_size: 64
  optimizer: {lr: 0.05}
phases:
  - name: pretrain
    epochs: 1
    train: {all: natural}
  - name: adapt
    epochs: 1
    train:
      norm: adversarial
      rest: frozen
factors:
  group:
    none: {phases.adapt.epochs: 0}
    norm: {}
    head:
      phases.adapt.train: {head: adversarial, rest: frozen}
seeds: 2
evaluate:
  attacks: [pgd-3]
  checkpoints: [best, last]
  monitor: {attack: pgd-1, images: 50}
claims:
  - say: norm layers gain
    that: "robust[group=norm] > robust[group=none]"
"""

Edit = tuple[str, str]


@pytest.fixture(scope="session")
def base() -> str:
    """A study without a mistake: its first line is line 1."""
    return BASE


@pytest.fixture(scope="session")
def edited() -> Callable[..., str]:
    """Replace each of some texts, which must stand there exactly once, in the base study."""

    def edit(*edits: Edit) -> str:
        text = BASE
        for old, new in edits:
            assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the base study"
            text = text.replace(old, new)
        return text

    return edit


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in an empty folder; put the handler of SIGTERM back that the command line installs."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process and return (exit code, standard output, standard error)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        code = stop.value.code
        out, err = capsys.readouterr()
        return code if isinstance(code, int) else int(code is not None), out, err

    return run


@pytest.fixture
def refused(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> Callable[..., list[str]]:
    """Ask for a run that is a mistake; return the lines on standard error, after what holds for all mistakes.

    Exit code 2, no traceback, no output, and not a file or folder that was not there before.
    """

    def run(*arguments: str | Path) -> list[str]:
        before = sorted(tmp_path.rglob("*"))
        code, out, err = call(*arguments)
        assert code == 2, err
        assert out == ""
        assert "Traceback" not in err and "pydantic" not in err and err.endswith("\n")
        assert sorted(tmp_path.rglob("*")) == before
        return err.splitlines()

    return run


@pytest.fixture(scope="session")
def agree() -> Callable[[list[str], list[str]], None]:
    """Compare lines with what is expected; an expected line that ends in ... leaves open how a list of names goes on."""

    def compare(lines: list[str], expected: list[str]) -> None:
        shown = [
            line[: len(want) - 3] + "..." if want.endswith("...") else line
            for line, want in zip(lines, expected, strict=False)
        ]
        assert shown + lines[len(shown) :] == expected

    return compare
