"""Stopped and run again: a phase goes on after its last finished epoch and ends with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robustlayers import models
from robustlayers.core.files import read_tensors
from robustlayers.study import work
from robustlayers.study.plan import Plan
from robustlayers.study.run import Outcome, run_plan
from robustlayers.study.store import Store

Contents = Callable[[Path], dict[str, str]]


class Stop(BaseException):
    """Stands for a kill."""


_save = work._save


def _save_and_stop(*arguments: Any) -> None:
    _save(*arguments)
    raise Stop


def test_a_resume_after_any_epoch_ends_with_the_same_bits(
    run: Callable[..., Outcome], tmp_path: Path, finished: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after every single epoch, and between the state and the record that points to it."""

    def stop_before_record(*arguments: Any) -> None:
        raise Stop

    stops = 0
    for attempt in range(60):
        with monkeypatch.context() as patch:
            if attempt % 3 == 2:
                patch.setattr(work, "write_json", stop_before_record)
            else:
                patch.setattr(work, "_save", _save_and_stop)
            try:
                run()
                break
            except Stop:
                stops += 1
    assert stops > 10
    assert run().complete
    assert contents(tmp_path / "out") == contents(finished)
    hidden = [path.name for path in (tmp_path / "out").glob("*/*/*/.*")]
    assert hidden == []


def test_a_group_starts_where_the_study_says_also_after_a_resume(
    plan: Callable[..., Plan], tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan("factors.group={new: {phases.adapt.start: {rest: {from: initial}}}}", "claims=[]", "seeds=1")
    run_plan(made, tmp_path / "whole", workers=1, threads=1)
    last = Store(tmp_path / "whole").phase(made.arms[0].nodes[-1], 0) / "last.safetensors"
    initial = models.build("small-cnn", seed=0, width=4, stem_stride=2, channels=1, classes=4).state_dict()
    weights = read_tensors(last)
    equal = {name for name, tensor in weights.items() if tensor.equal(initial[name])}
    assert "conv1.weight" in equal and "linear.weight" in equal and "bn1.running_mean" not in equal  # rest is frozen

    with monkeypatch.context() as patch:
        patch.setattr(work, "_save", _save_and_stop)
        for _ in range(3):
            with pytest.raises(Stop):
                run_plan(made, tmp_path / "stopped", workers=1, threads=1)
    run_plan(made, tmp_path / "stopped", workers=1, threads=1)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_a_resume_after_the_last_epoch_keeps_the_ledger_s_evidence(
    run: Callable[..., Outcome], tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was reached by a gradient is known only from steps: a process that takes none must have been told."""
    seen: dict[tuple[int, int], set[str]] = {}
    original = work.PhaseTrainer.verify

    def noting(self: work.PhaseTrainer) -> Any:
        seen[self.first_epoch, self.seed] = set(self.step.reached)
        return original(self)

    monkeypatch.setattr(work.PhaseTrainer, "verify", noting)
    settings = ("factors={}", "claims=[]", "seeds=1")
    run(*settings, out=tmp_path / "whole")
    whole = dict(seen)
    with monkeypatch.context() as patch:
        patch.setattr(work, "_save", _save_and_stop)
        for _ in range(3):
            with pytest.raises(Stop):
                run(*settings)
    assert run(*settings).complete
    assert seen == whole and all(seen.values())
