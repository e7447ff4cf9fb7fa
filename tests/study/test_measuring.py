"""How trained nets are measured: by the policy's `evaluate` switch, and branch by branch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from robustlayers.evaluation import worst_case
from robustlayers.report import write
from robustlayers.study import measure
from robustlayers.study.collect import collect, collect_rows
from robustlayers.study.definition import load_study
from robustlayers.study.plan import make_plan
from robustlayers.study.run import run_plan
from robustlayers.study.store import Store

STUDY = """\
question: Measured how?
data: {name: fashion-mnist-mini, validation: 0.1, train_images: 200, test_images: 60}
model: {name: small-cnn, width: 4, norm: MODEL}
threat: {norm: linf, eps: 20/255}
attack: pgd-1
phases:
  - {name: train, epochs: 1, train: {all: {natural: 0.5, adversarial: 0.5}}, normalization: POLICY}
seeds: 1
evaluate: {attacks: [pgd-2], checkpoints: [last], branches: BRANCHES, monitor: {attack: fgsm, images: 30}}
"""
DUAL = (
    "{clean: {branch: main}, adversarial: {branch: auxiliary}, craft: {by: running, update: false, branch: auxiliary}}"
)

Values = Callable[..., dict[str, tuple[float, str, str]]]


@pytest.fixture
def values(tmp_path: Path) -> Values:
    def run(model: str, policy: str, branches: str = "false", name: str = "one") -> dict[str, tuple[float, str, str]]:
        text = STUDY.replace("MODEL", model).replace("POLICY", policy).replace("BRANCHES", branches)
        (tmp_path / f"{name}.yaml").write_text(text)
        outcome = run_plan(make_plan(load_study(tmp_path / f"{name}.yaml")), tmp_path / name, workers=1, threads=1)
        assert outcome.complete, outcome.failed
        rows = collect_rows(Store(tmp_path / name))
        accuracies = [row for row in rows if row.split == "test" and row.total and "lowest" not in row.metric]
        return {row.metric: (row.value, row.normalization, row.flags) for row in accuracies}

    return run


def test_every_branch_is_attacked_through_every_branch(values: Values, tmp_path: Path) -> None:
    found = values("dual", DUAL, "true")
    own = {f"clean@{branch}" for branch in ("main", "auxiliary")}
    crossed = {f"pgd-2@{a}>{b}" for a in ("main", "auxiliary") for b in ("main", "auxiliary")}
    assert set(found) == {"clean", "robust", "pgd-2", *own, *crossed}
    assert found["clean"][0] == found["clean@main"][0]  # the branch that a net has unless told otherwise
    assert found["pgd-2@main>main"][0] == pytest.approx(found["pgd-2"][0], abs=0.05)  # other random starts
    assert found["clean@auxiliary"][1] == "running, branch auxiliary"
    summary = collect(Store(tmp_path / "one"))
    page = write(summary, tmp_path / "report").read_text()
    assert "pgd-2 on auxiliary" in page and "Measured on main" in page


def test_a_policy_says_on_which_branch_and_by_what_a_net_is_measured(values: Values) -> None:
    matrix = values("dual", DUAL, "true", name="matrix")
    auxiliary = values("dual", DUAL.replace("{clean", "{evaluate: {branch: auxiliary}, clean"), name="auxiliary")
    assert auxiliary["clean"][:2] == (matrix["clean@auxiliary"][0], "running, branch auxiliary")
    assert auxiliary["clean"] != matrix["clean"]
    by_batch = values("batch", "batch-at-test", name="batch")
    assert by_batch["clean"][1] == "batch"
    assert by_batch["clean"][2]  # a skeptic is told


def test_nets_without_branches_have_no_such_rows(values: Values) -> None:
    assert set(values("batch", "standard", "true")) == {"clean", "robust", "pgd-2"}


def test_flags_of_a_random_net_do_not_depend_on_which_batches_a_process_has_attacked(
    values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_more(
        forward: torch.nn.Module, x: torch.Tensor, *arguments: Any, **options: Any
    ) -> dict[str, torch.Tensor]:
        found = worst_case(forward, x, *arguments, **options)
        forward.eval()(x[:3] / 255)
        return found

    expected = values("random", "standard")
    assert "random output" in expected["clean"][2]
    monkeypatch.setattr(measure, "worst_case", with_more)
    assert values("random", "standard", name="other") == expected
