"""The example of the design runs as written: the study file, and a loop of one's own in Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import robustlayers as rl
from robustlayers.cli.main import main
from robustlayers.core.errors import UserError
from robustlayers.data import load
from robustlayers.study.collect import collect
from robustlayers.study.store import Store

EXAMPLE = Path(__file__).with_name("bn_adapt.yaml")

# Smaller in every number, and of data that are always here; nothing else is changed.
SMALLER = [
    "data.name=fashion-mnist-mini",
    "data.validation=0.02",
    "data.train_images=60",
    "data.test_images=30",
    "model.depth=8",
    "model.width=4",
    "attack.steps=1",
    "phases.pretrain.epochs=2",
    "phases.adapt.epochs=1",
    "training.batch_size=30",
    "seeds=2",
    "evaluate.attacks=[pgd-2, apgd-ce-2]",
    "evaluate.monitor={attack: pgd-1, images: 20}",
]


def _call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_the_study_is_planned_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        load("fashion-mnist")
    except UserError as error:
        pytest.skip(f"the files of Fashion-MNIST are not here: {error}")
    assert _call("plan", str(EXAMPLE), "--no-timing") == 0
    out = capsys.readouterr().out
    assert "fashion-mnist: 54000 train, 6000 validation, 10000 test images, 28x28x1, 10 classes" in out
    assert "resnet depth=20 width=16 norm=batch" in out and "linf 8/255" in out
    assert "pgd-10, linf 8/255, step 2/255, 1 restart, last iterate" in out
    assert "pgd-20, linf 8/255, step 1/255, 1 restart, best iterate" in out and "apgd-ce-" in out
    assert "5 arms x 3 seeds: 15 phase trainings (12 fewer than without sharing)" in out


def test_the_study_runs_to_the_end_and_judges_its_claims(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [part for override in SMALLER for part in ("--set", override)]
    code = _call("run", str(EXAMPLE), *overrides, "--out", str(tmp_path / "out"), "--workers", "1", "--threads", "1")
    out, err = capsys.readouterr()
    assert (code, err) == (0, "") and out.endswith(f"report: {tmp_path}/out/report/report.html\n")
    summary = collect(Store(tmp_path / "out"))
    assert summary.name == "bn_adapt" and [arm.name for arm in summary.arms] == [
        "none",
        "norm",
        "head",
        "random",
        "all",
    ]
    assert all(set(arm.status.values()) == {"finished"} for arm in summary.arms)
    assert [arm.trained_parameters for arm in summary.arms][1] == summary.arms[3].trained_parameters  # norm and random
    verdicts = {(claim.say, claim.checkpoint): claim.verdict for claim in summary.claims}
    says = ["BatchNorm alone gains robustness", "it gains more than as many random ones"]
    assert list(verdicts) == [(say, checkpoint) for checkpoint in ("best", "last") for say in says]
    assert set(verdicts.values()) <= {"supported", "contradicted", "undecided"}
    assert all(len(claim.differences) == 2 for claim in summary.claims)
    assert all(line.kept for arm in summary.arms for line in arm.ledger)
    page = (tmp_path / "out" / "report" / "report.html").read_text()
    assert all(say in page for say in says)


def test_a_loop_of_one_s_own(net: Callable[..., nn.Module], batch: Callable[..., tuple[Tensor, Tensor]]) -> None:
    model = net("resnet")
    loader = [batch(8, seed) for seed in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = rl.snapshot(model)

    partition = rl.Partition(model, {"norm": "norm", "rest": "rest"})
    step = rl.PartialStep(
        model,
        partition,
        signals={"norm": "adversarial", "rest": "natural"},
        attack=rl.PGD(rl.Linf("8/255"), steps=10),
        optimizer=optimizer,
    )
    for x, y in loader:
        log = step(x, y)
        assert (log.forward_passes, log.backward_passes) == (13, 12)  # 11 and 10 to craft, 2 and 2 to learn
        assert torch.isfinite(log.loss) and set(log.losses) == {"natural", "adversarial"}

    changes = rl.compare(partition, step.signals, before, rl.snapshot(model))
    assert [change.group for change in changes] == ["norm", "rest"] and all(change.kept for change in changes)
