"""Transfer between the arms of a study: one result of all arms, the diagonal of which is the attack on the net itself."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robustlayers.attacks import FGSM, Gaussian, Linf
from robustlayers.core.errors import UserError
from robustlayers.core.files import read_json, read_tensors, write_json, write_tensors
from robustlayers.data import Images
from robustlayers.evaluation import accuracy, interval
from robustlayers.study import analyze
from robustlayers.study._inside_transfer import transfer, transfer_cost, transfer_load
from robustlayers.study._looks import Look, encoded
from robustlayers.study.analyze import Asked, Job, plan_analyses, run_analyses
from robustlayers.study.analyzed import collect_analyses, kept_analyses, rows_of_analysis
from robustlayers.study.definition import load_study
from robustlayers.study.semantics import build_model, build_threat, data_of
from robustlayers.study.store import Store

ASKED = Asked(what=["transfer"], images=12, attack="fgsm")  # without a draw


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Store:
    """A copy of the finished study: two seeds, arms none, norm, all."""
    shutil.copytree(finished, tmp_path / "out")
    return Store(tmp_path / "out")


def look(store: Store, asked: Asked = ASKED, watch: Any = None) -> list[Job]:
    planned = plan_analyses(store, asked)
    run_analyses(store, planned.left, watch or (lambda job, share, what: None), device="cpu")
    return [*planned.left, *planned.done]


def rows(store: Store) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(rows_of_analysis(store, "transfer"))))


def test_the_diagonal_is_the_attack_on_the_net_itself(store: Store) -> None:
    (job,) = look(store)
    found = {(row["crafted_on"], row["measured_on"]): row for row in rows(store)}
    arms = ["none", "norm", "all"]
    assert list(found) == [("", arm) for arm in arms] + [(a, b) for a in arms for b in arms]
    for arm in load_study(store.root / "study.yaml").arms:
        dataset, _, validation, _ = data_of(arm.recipe.data)
        model = build_model(arm.recipe.model, dataset, 0)
        node = next(one["nodes"][-1] for one in read_json(store.plan)["arms"] if one["name"] == arm.name)
        model.load_state_dict(read_tensors(store.phase(node, 0) / "best.safetensors"))
        x, y = validation.first(12).images, validation.first(12).labels
        own = found[arm.name, arm.name]
        assert float(own["accuracy"]) == accuracy(model, x, y, FGSM(build_threat(arm.recipe.threat)))
        assert float(found["", arm.name]["accuracy"]) == accuracy(model, x, y)
        assert (float(own["low"]), float(own["high"])) == interval(int(own["count"]), 12)
    assert {(row["arm"], row["seed"], row["split"], row["images"]) for row in found.values()} == {
        ("", "0", "validation", "12")
    }
    assert job.text == "transfer: 3 arms, seed 0"


def test_a_repeated_command_does_nothing_in_whatever_order_arms_are_named(store: Store) -> None:
    (job,) = look(store)
    for arms in ((), ("all", "none", "norm"), ("norm", "norm", "all", "none")):
        planned = plan_analyses(store, Asked(**{**ASKED.__dict__, "arms": arms}))
        assert not planned.left and [one.identity for one in planned.done] == [job.identity]


@pytest.mark.parametrize(
    "change", [{"arms": ["none", "all"]}, {"images": 14}, {"attack": "pgd-1"}, {"seeds": [1]}, {"checkpoint": "last"}]
)
def test_all_that_decides_it_is_in_its_name(store: Store, change: dict[str, Any]) -> None:
    (one,) = plan_analyses(store, ASKED).left
    (two,) = plan_analyses(store, Asked(**{**ASKED.__dict__, **change})).left
    assert one.identity != two.identity


@pytest.mark.parametrize("arm", ["none", "norm", "all"])
def test_other_weights_of_any_arm_are_another_result(store: Store, arm: str) -> None:
    (one,) = plan_analyses(store, ASKED).left
    node = next(found["nodes"][-1] for found in read_json(store.plan)["arms"] if found["name"] == arm)
    path = store.phase(node, 0) / "best.safetensors"
    write_tensors(path, {name: tensor + 1 for name, tensor in read_tensors(path).items()})
    store.finish(path.parent)
    assert plan_analyses(store, ASKED).left[0].identity != one.identity


def test_a_single_arm_is_one_clear_line(store: Store) -> None:
    with pytest.raises(UserError, match="--what: transfer: is of two arms or more, and there is only norm") as caught:
        plan_analyses(store, Asked(what=["transfer"], arms=["norm"]))
    assert len(caught.value.faults) == 1
    planned = plan_analyses(store, Asked(arms=["norm"]))
    assert "transfer: is of two arms or more, and there is only norm: left out" in planned.notes


def test_arms_that_hold_out_other_images_cannot_be_compared(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analyze, "held_out", lambda net: net.arm)
    with pytest.raises(UserError, match="arms none and norm hold out other images"):
        plan_analyses(store, ASKED)


def test_the_report_shows_the_most_arms_of_the_present_plan(store: Store) -> None:
    look(store)
    look(store, Asked(**{**ASKED.__dict__, "arms": ["none", "all"], "images": 14}))
    plan = read_json(store.plan)
    assert len(kept_analyses(store, plan)) == 2
    (shown,) = collect_analyses(store, plan)
    assert (shown.arm, shown.arms, shown.images, shown.epoch) == ("", ["none", "norm", "all"], 12, None)
    plan["arms"][1]["nodes"][-1] = "0" * 16  # trained otherwise since
    write_json(store.plan, plan)
    assert [one.arms for one in collect_analyses(store, plan)] == [["none", "all"]]


def test_a_killed_run_begins_anew(store: Store) -> None:
    class Killed(Exception):
        pass

    def kill(job: Job, share: float, what: str) -> None:
        if share > 0.5:
            raise Killed

    with pytest.raises(Killed):
        look(store, ASKED, kill)
    assert len(plan_analyses(store, ASKED).left) == 1
    shares: list[float] = []
    look(store, ASKED, lambda job, share, what: shares.append(share))
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) > 3
    assert not plan_analyses(store, ASKED).left


def test_a_net_that_hides_its_gradient_is_worse_against_another_one() -> None:
    """Saturated logits have no gradient: only images that were crafted on the same net without them fool it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        honest, masked = (nn.Sequential(nn.Flatten(), nn.Linear(16, 3)) for _ in range(2))
    masked.load_state_dict({name: 1e6 * tensor for name, tensor in honest.state_dict().items()})
    pixels = torch.randint(60, 200, (60, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = honest(pixels.float() / 255).argmax(1)
    eps = Linf("32/255")
    nets = {"honest": honest, "masked": masked}
    one = Look("", honest, Images(pixels, labels), Images(pixels, labels), FGSM(eps), Gaussian(eps), 0, nets=nets)
    found = transfer(one)
    less = {n["arm"]: n["value"] for n in found.numbers if n["label"] == "worst minus its own"}
    assert less["masked"] < 0 <= less["honest"]
    assert transfer_cost(one) == {"transfer": 60 * (2 * one.crafting + 6)}
    again = transfer_load(encoded(found.payload), {})["transfer"]
    assert [row["count"] for row in again.rows()] == [row["count"] for row in found.rows]
    assert all(module.training for net in nets.values() for module in net.modules())
