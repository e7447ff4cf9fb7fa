"""Running a study: phases are trained once, finished work stays, what fails is tried again, what diverges is not."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from robustlayers.core.files import read_json, read_tensors
from robustlayers.study import measure, work
from robustlayers.study.collect import collect, collect_rows
from robustlayers.study.definition import load_study
from robustlayers.study.local import Event
from robustlayers.study.plan import Plan, make_plan
from robustlayers.study.run import Outcome, default_workers, run_plan
from robustlayers.study.store import Store

Run = Callable[..., Outcome]
Plans = Callable[..., Plan]
Contents = Callable[[Path], dict[str, str]]


def _times(folder: Path) -> dict[str, int]:
    return {
        str(path): path.stat().st_mtime_ns
        for kind in ("phases", "results")
        for path in folder.glob(f"{kind}/**/*")
        if path.is_file()
    }


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished study, at `out`."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def test_every_shared_phase_is_trained_once_for_each_seed(
    plan: Plans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: Counter[str] = Counter()
    original = work.PhaseTrainer.run

    def counting(self: Any, **arguments: Any) -> Any:
        trained[f"epoch {self.first_epoch + self.done}, seed {self.seed}"] += 1
        return original(self, **arguments)

    monkeypatch.setattr(work.PhaseTrainer, "run", counting)
    outcome = run_plan(plan(), tmp_path / "out", workers=1, threads=1)
    assert (outcome.trained, outcome.measured) == (6, 6)
    # The first epoch is shared by three arms; the second and third belong to two arms each.
    assert trained == {f"epoch {epoch}, seed {seed}": 1 if epoch == 0 else 2 for epoch in range(3) for seed in range(2)}


def test_a_second_run_does_nothing_and_touches_nothing(run: Run, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _times(copy)
    monkeypatch.setattr(work, "_train", None)  # calling it would fail
    monkeypatch.setattr(measure, "worst_case", None)
    started: list[tuple[dict[str, Any], float]] = []
    outcome = run(on_start=lambda jobs, share: started.append((jobs, share)))
    assert (outcome.trained, outcome.measured, outcome.complete) == (0, 0, True)
    assert started == [({}, 1.0)]
    assert _times(copy) == before


@pytest.mark.parametrize(
    ("override", "trained", "measured"),
    [
        ("seeds=3", 3, 3),
        ("seeds=[1, 5]", 3, 3),
        ("factors.group.head={phases.adapt.train: {head: adversarial, rest: frozen}}", 2, 2),
        ("evaluate.attacks=[pgd-1]", 0, 6),
        ("claims=[]", 0, 0),
        ("phases.adapt.epochs=1", 4, 4),
    ],
)
def test_only_what_is_missing_is_done(override: str, trained: int, measured: int, run: Run, copy: Path) -> None:
    before = _times(copy)
    outcome = run(override)
    assert (outcome.trained, outcome.measured, outcome.complete) == (trained, measured, True)
    assert _times(copy).items() >= before.items()
    rows = collect_rows(Store(copy))
    assert len({(row.run, row.seed, row.checkpoint, row.metric, row.phase, row.group) for row in rows}) == len(rows)


def test_seeds_and_arms_that_come_later_are_those_of_a_study_that_had_them_at_once(
    run: Run, copy: Path, tmp_path: Path, contents: Contents
) -> None:
    run("seeds=3")
    run("seeds=3", out=tmp_path / "fresh")
    assert contents(copy) == contents(tmp_path / "fresh")


def test_one_worker_and_two_workers_make_the_same_bits(
    plan: Plans, tmp_path: Path, finished: Path, contents: Contents
) -> None:
    events: list[Event] = []
    outcome = run_plan(plan(), tmp_path / "two", workers=2, threads=1, on_event=events.append)
    assert (outcome.trained, outcome.measured, outcome.failed) == (6, 6, {})
    assert contents(tmp_path / "two") == contents(finished)
    kinds = Counter(event.kind for event in events)
    assert kinds["started"] == kinds["done"] == 12 and kinds["epoch"] == 10 and kinds["measured"] == 6


def test_seeds_differ_and_pair(finished: Path) -> None:
    weights = {
        path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in finished.glob("phases/*/seed-*/last.safetensors")
    }
    assert weights["seed-0"] != weights["seed-1"]


def test_best_is_the_best_epoch_on_validation_and_last_the_last(run: Run, tmp_path: Path) -> None:
    # The rate of the last phase is so high that its later epochs are worse than its first.
    outcome = run("seeds=1", "phases.adapt.epochs=3", "phases.adapt.optimizer={lr: 2, momentum: 0}")
    assert outcome.complete
    differ = 0
    for folder in (tmp_path / "out").glob("phases/*/seed-0"):
        curve = read_json(folder / "curve.json")
        scores = {point["epoch"]: (point["validation_robust"], point["validation_clean"]) for point in curve["points"]}
        if len(scores) < 3:
            continue
        assert curve["best_epoch"] == max(scores, key=lambda epoch: (scores[epoch], -epoch))
        same = (folder / "best.safetensors").read_bytes() == (folder / "last.safetensors").read_bytes()
        assert same == (curve["best_epoch"] == max(scores))
        differ += not same
    assert differ, "no arm was best before its last epoch: the test shows nothing"
    epochs = {(row.arm, row.checkpoint): row.epoch for row in collect_rows(Store(tmp_path / "out")) if row.checkpoint}
    assert any(epochs[arm, "best"] != epochs[arm, "last"] for arm in ("norm", "all"))


def test_the_test_images_are_never_seen_before_training_has_ended(
    plan: Plans, tmp_path: Path, finished: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: while phases are trained and their best epoch is chosen, the test images are all wrong."""
    original = work.data_of

    def spoiled(config: Any) -> Any:
        dataset, train, validation, test = original(config)
        return dataset, train, validation, type(test)(255 - test.images, (test.labels + 1) % 4)

    monkeypatch.setattr(work, "data_of", spoiled)
    run_plan(plan(), tmp_path / "out", workers=1, threads=1)
    assert contents(tmp_path / "out") == contents(finished)


def test_the_validation_images_do_choose_the_best(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counterpart: with wrong validation labels, weights stay and another epoch is the best."""
    settings = (
        "seeds=1",
        "phases.adapt.epochs=4",
        "factors.group={all: {phases.adapt.train: {all: adversarial}}}",
        "claims=[]",
    )
    run(*settings)
    original = work.data_of

    def spoiled(config: Any) -> Any:
        dataset, train, validation, test = original(config)
        return dataset, train, type(validation)(validation.images, (validation.labels + 1) % 4), test

    monkeypatch.setattr(work, "data_of", spoiled)
    run(*settings, out=tmp_path / "spoiled")
    found = []
    for out in (tmp_path / "out", tmp_path / "spoiled"):
        folders = [path.parent for path in out.glob("phases/*/seed-0/curve.json")]
        last = max(folders, key=lambda folder: len(read_json(folder / "curve.json")["points"]))
        found.append((read_json(last / "curve.json")["best_epoch"], (last / "last.safetensors").read_bytes()))
    assert found[0][0] != found[1][0] and found[0][1] == found[1][1]


def test_a_run_that_diverges_is_a_result_and_the_study_goes_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm = "factors.group.hot={phases.adapt.train: {all: adversarial}, phases.adapt.optimizer: {lr: 1e9}}"
    outcome = run(arm, "seeds=1")
    assert outcome.complete and not outcome.failed and (outcome.trained, outcome.measured) == (3, 3)
    ((key, reason),) = outcome.diverged.items()
    assert outcome.texts[key] == "hot, seed 0, adapt"
    assert "epoch 2" in reason and ("inf" in reason or "nan" in reason or "not finite" in reason)
    summary = collect(Store(tmp_path / "out"))
    hot = summary.arms[-1]
    assert (hot.name, dict(hot.status), dict(hot.reasons)) == ("hot", {0: "diverged"}, {0: reason})
    assert all(arm.status == {0: "finished"} for arm in summary.arms[:-1])
    assert {row.arm for row in summary.rows} == {"none", "norm", "all"}
    assert any("hot seed 0 (diverged)" in note for note in summary.notes)
    monkeypatch.setattr(work, "_train", None)  # it is not tried again
    again = run(arm, "seeds=1")
    assert again.complete and again.diverged == outcome.diverged


@pytest.mark.parametrize("workers", [1, 2])
def test_what_needs_a_diverged_phase_is_left_out_at_once_and_later(workers: int, run: Run, tmp_path: Path) -> None:
    settings = ("phases.pretrain.optimizer={lr: 1e9}", "seeds=1")
    for _ in range(2):
        outcome = run(*settings, workers=workers)
        assert outcome.complete and outcome.failed == {} and (outcome.trained, outcome.measured) == (0, 0)
        assert [outcome.texts[key] for key in outcome.diverged] == ["3 arms, seed 0, pretrain"]
    summary = collect(Store(tmp_path / "out"))
    assert [dict(arm.status) for arm in summary.arms] == [{0: "diverged"}] * 3
    assert [claim.verdict for claim in summary.claims] == ["undecided"] * 2 and summary.rows == []


def test_a_task_that_fails_leaves_the_others_alone_and_is_tried_again(
    run: Run, tmp_path: Path, finished: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = work.PhaseTrainer.run

    def broken(self: Any, **arguments: Any) -> Any:
        if self.seed == 1 and self.done == 1 and self.first_epoch == 1:
            raise RuntimeError("planted")
        return original(self, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(work.PhaseTrainer, "run", broken)
        outcome = run()
    assert not outcome.complete and (outcome.trained, outcome.measured) == (4, 4)
    assert sorted(outcome.texts[key] for key in outcome.failed) == ["all, seed 1, adapt", "norm, seed 1, adapt"]
    assert set(outcome.failed.values()) == {"RuntimeError: planted"}
    summary = collect(Store(tmp_path / "out"))
    assert [arm.status[1] for arm in summary.arms] == ["finished", "failed", "failed"]
    assert summary.arms[1].reasons == {1: "RuntimeError: planted"}
    assert any("planted" in path.read_text() for path in (tmp_path / "out").glob("phases/*/seed-1/failed.json"))
    outcome = run()
    assert outcome.complete and (outcome.trained, outcome.measured) == (2, 2)
    assert contents(tmp_path / "out") == contents(finished)
    assert not list((tmp_path / "out").rglob("failed.json"))


def test_a_measurement_that_fails_is_told_and_tried_again(
    run: Run, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> Mapping[str, torch.Tensor]:
        raise MemoryError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(measure, "worst_case", broken)
        outcome = run("seeds=3")
    assert [outcome.texts[key] for key in outcome.failed] == [
        f"{arm}, seed 2, measuring" for arm in ("none", "norm", "all")
    ]
    assert collect(Store(copy)).arms[0].reasons == {2: "MemoryError: planted"}
    assert run("seeds=3").measured == 3 and collect(Store(copy)).arms[0].reasons == {}


def test_the_ledger_of_a_finished_study_keeps_every_promise(finished: Path) -> None:
    arms = {arm.name: arm for arm in collect(Store(finished)).arms}
    lines = arms["norm"].ledger
    assert all(line.kept for line in lines) and len(lines) == 6
    frozen = [line for line in lines if line.signal == "frozen"]
    assert frozen and all(line.moved_parameters == line.moved_buffers == 0 and line.largest == 0 for line in frozen)
    trained = [line for line in lines if line.signal == "adversarial"]
    assert trained and all(line.moved_parameters > 0 and line.moved_buffers > 0 for line in trained)


def test_rows_say_what_the_weights_do(finished: Path, images: Path) -> None:
    """Clean accuracy of a row is that of its weight file on the test images, computed here by hand."""
    import numpy as np

    from robustlayers import models

    plan = read_json(finished / "plan.json")
    arm = plan["arms"][1]
    arrays = np.load(images)
    x = torch.from_numpy(arrays["test_images"])[:, None].float() / 255
    y = torch.from_numpy(arrays["test_labels"])
    for row in collect_rows(Store(finished)):
        if row.metric != "clean" or row.arm != arm["name"]:
            continue
        model = models.build("small-cnn", seed=0, width=4, stem_stride=2, channels=1, classes=4).eval()
        folder = Store(finished).phase(arm["nodes"][-1], row.seed)
        model.load_state_dict(read_tensors(folder / f"{row.checkpoint}.safetensors"))
        right = int((model(x).argmax(1) == y).sum())
        assert (row.count, row.total, row.value, row.split) == (right, 24, right / 24, "test")


def test_every_metric_of_a_row_is_consistent(finished: Path) -> None:
    found = [row for row in collect_rows(Store(finished)) if not row.phase]  # without the ledger
    rows = {(row.arm, row.seed, row.checkpoint, row.metric): row for row in found}
    assert len(rows) == len(found)
    for (arm, seed, checkpoint, metric), row in rows.items():
        assert row.study == "tiny" and dict(row.levels) == {"group": arm}
        if not metric.startswith("norm_"):
            assert row.normalization == ("running" if checkpoint else "")
        if metric.startswith("norm_"):
            assert row.split in ("", "validation") and math.isfinite(row.value)
            continue
        assert row.split == ("test" if row.total or metric == "ece" else metric.partition("_")[0] if checkpoint else "")
        if metric == "robust":
            assert row.value <= rows[arm, seed, checkpoint, "clean"].value
            assert row.value == rows[arm, seed, checkpoint, "pgd-2"].value  # the only attack
        if row.total:
            assert row.count is not None and row.value == row.count / row.total and math.isfinite(row.value)
    assert rows["none", 0, "", "trained_share"].value == 0 and rows["all", 0, "", "trained_share"].value == 1


def test_workers_and_threads_depend_on_the_plan_and_the_machine_only(
    plan: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert default_workers(plan(), cpu, None, None) == (6, 1)
    assert default_workers(plan("seeds=1"), cpu, None, None) == (3, 2)
    assert default_workers(plan("seeds=9"), cpu, None, None) == (8, 1)
    assert default_workers(plan(), cpu, 2, None) == (2, 4)
    assert default_workers(plan(), cpu, 20, None) == (20, 1)
    assert default_workers(plan(), cpu, None, 3) == (6, 3)
    assert default_workers(plan(), cuda, None, None) == (1, 8)


def test_a_plan_file_tells_how_to_repeat_the_run(write: Callable[..., Path], tmp_path: Path) -> None:
    made = make_plan(load_study(write(), ["seeds=1"]))
    run_plan(made, tmp_path / "out", command="robustlayers run tiny.yaml --set seeds=1", workers=1, threads=1)
    facts = read_json(tmp_path / "out" / "plan.json")
    assert facts["command"] == "robustlayers run tiny.yaml --set seeds=1" and facts["overrides"] == ["seeds=1"]
    assert facts["versions"]["torch"] == torch.__version__ and "1 worker(s) with 1 torch thread(s)" in facts["machine"]
    again = make_plan(load_study(tmp_path / "out" / "study.yaml"))  # as resolved, without the override
    assert list(again.nodes) == list(made.nodes) and again.study.seeds == (0,)
