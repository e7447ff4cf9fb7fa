"""What a study costs: sums that can be done by hand, and never less than what a run makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from robustlayers.core.files import read_json
from robustlayers.study.cost import measuring_parts, phase_cost, plan_cost, watching_part
from robustlayers.study.definition import load_study
from robustlayers.study.plan import Plan, make_plan
from robustlayers.study.run import run_plan

Plans = Callable[..., Plan]

PHASES = {
    "name: a, epochs: 2, train: {all: natural}": (2 * 64 * 2, 0),
    # Crafted with pgd-3: three forwards and backwards of each image, one of each to learn.
    "name: a, epochs: 2, train: {all: adversarial}, attack: pgd-3": (2 * 64 * 2, 2 * 64 * 6),
    "name: a, epochs: 1, train: {norm: adversarial, rest: natural}, attack: pgd-3": (64 * 4, 64 * 6),
    "name: a, steps: 2, train: {all: adversarial}, attack: fgsm": (32 * 2, 32 * 2),
    "name: a, recalibrate: {}": (64, 0),
    "name: a, recalibrate: {on: adversarial}, attack: pgd-3": (64, 64 * 6),
    "name: a, set: {norm: {from: initial}}": (0, 0),
}


@pytest.fixture
def made(write: Callable[..., Path]) -> Callable[..., Plan]:
    """Plan the study with one phase in the place of both, without factors, and with more to evaluate."""

    def plan(phase: str, more: str = "", *overrides: str) -> Plan:
        path = write(
            ("  - {name: pretrain, epochs: 1, train: {all: natural}}\n", ""),
            ("name: adapt, epochs: 2, train: {norm: adversarial, rest: frozen}", phase),
            ("  attacks: [pgd-2]\n", f"  attacks: [pgd-2]\n{more}"),
        )
        text = path.read_text()
        path.write_text(text[: text.index("factors:")] + text[text.index("seeds:") : text.index("claims:")])
        return make_plan(load_study(path, overrides))

    return plan


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_costs_what_is_learned_and_what_is_crafted(made: Plans, phase: str) -> None:
    (node,) = made(phase).nodes.values()
    cost = phase_cost(node)
    assert (cost.learned, cost.crafted) == pytest.approx(PHASES[phase])
    assert cost.learned + cost.crafted == node.forward_passes + node.backward_passes
    # After each epoch on 16 training and 16 validation images: clean, pgd-1 with the best of two iterates, and its result.
    assert cost.watched == node.epochs * 32 * (1 + 3 + 1)


def test_what_is_measured_is_said_and_counted(made: Plans) -> None:
    more = "  corruptions: {families: [fog, snow], severities: [1, 4], images: 10}\n  sanity: true\n  branches: true\n"
    plan = made("name: a, epochs: 1, train: {all: natural}", more, "model.norm=dual")
    (arm,) = plan.arms
    parts = {part.name: part for part in measuring_parts(arm.recipe)}
    assert list(parts) == ["pgd-2", "corruptions", "sanity", "branches", "besides"]
    # PGD that keeps its best iterate makes a forward more than it has steps.
    assert parts["pgd-2"].passes == 24 * (3 + 2 + 1) and parts["pgd-2"].text.startswith("pgd-2, linf 8/255")
    assert parts["corruptions"].passes == 2 * 2 * 10
    assert parts["corruptions"].text == "snow, fog at severities 1, 4, 10 images each"
    assert parts["branches"].text == "pgd-2 crafted on each of main, auxiliary, measured on each"
    assert parts["branches"].passes == 24 * 2 * (1 + 5 + 2)
    assert "24 images" in parts["sanity"].text and parts["sanity"].passes == 24 * 1600
    assert "flags on 24 images; norm layers on 16 validation images" in parts["besides"].text
    assert watching_part(arm.recipe).text.endswith("on 16 training and 16 validation images")
    cost = plan_cost(plan)
    assert cost.measuring == 2 * 2 * sum(part.passes for part in parts.values())  # two checkpoints, two seeds
    assert cost.total == cost.training + cost.watching + cost.measuring and cost.training == 2 * 64 * 2


def test_without_validation_nothing_is_watched_on_it(made: Plans) -> None:
    plan = made("name: a, epochs: 1, train: {all: natural}", "  checkpoints: [last]\n", "data.validation=0")
    recipe = plan.arms[0].recipe
    assert watching_part(recipe).text.endswith("on 16 training images") and watching_part(recipe).passes == 16 * 5
    assert "validation" not in measuring_parts(recipe)[-1].text


def test_shared_phases_and_runs_cost_once(plan: Plans) -> None:
    every, one = plan_cost(plan()), plan_cost(plan("seeds=1"))
    assert (every.training, every.watching, every.measuring) == (2 * one.training, 2 * one.watching, 2 * one.measuring)
    nodes = plan().nodes.values()
    assert one.training == sum(node.forward_passes + node.backward_passes for node in nodes)
    assert one.watching == sum(node.epochs for node in nodes) * 32 * 5


def test_a_run_makes_no_more_passes_than_that(made: Plans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images through the last layer, by the model or by its equivalent for crafting, and gradients asked of attacks."""
    plan = made("name: a, epochs: 1, train: {all: adversarial}", "  sanity: true\n  checkpoints: [last]\n", "seeds=1")
    counted = {"images": 0}
    linear = torch.nn.functional.linear

    def count(x: torch.Tensor, *arguments: torch.Tensor | None) -> torch.Tensor:
        counted["images"] += len(x)
        return linear(x, *arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(torch.nn.functional, "linear", count)
    assert run_plan(plan, tmp_path / "out", workers=1, threads=1).complete
    cost = plan_cost(plan)
    made_in_training = read_json(next((tmp_path / "out").glob("phases/*/seed-0/ledger.json")))
    assert made_in_training["forward_passes"] + made_in_training["backward_passes"] == cost.training
    assert cost.training / 2 < counted["images"] < cost.total
