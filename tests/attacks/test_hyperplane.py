"""The nearest point of a hyperplane inside the box, against bisection and the optimality conditions."""

import pytest
import torch

from robustlayers.attacks import NORMS
from robustlayers.attacks._hyperplane import to_hyperplane

NORM = {"linf": lambda m: m.abs().amax(1), "l2": lambda m: m.norm(dim=1), "l1": lambda m: m.abs().sum(1)}


def problem(n=40, d=30, seed=0):
    """Points of the box, some on its faces, hyperplanes that pass near and far, and which of them it reaches."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    points = (torch.rand(n, d, **draw) * 1.4 - 0.2).clamp(0, 1)
    normal = torch.randn(n, d, **draw)
    normal[:, ::7] = 0
    toward = torch.where(normal > 0, 1 - points, points)
    reach = (normal.abs() * toward).sum(1)
    share = torch.linspace(0.01, 1.2, n, dtype=torch.float64)
    return points, normal, -share * reach, share


def by_bisection(points, normal, value, norm):
    """The move by the conditions of the optimum, its multiplier found by halving: for values below zero."""
    slope, room = normal.abs(), torch.where(normal > 0, 1 - points, points)
    low, high = torch.zeros(len(points), 1, dtype=points.dtype), torch.full((len(points), 1), 1e9, dtype=points.dtype)
    for _ in range(200):
        middle = (low + high) / 2
        lengths = torch.minimum(middle * (torch.ones_like(slope) if norm == "linf" else slope), room)
        enough = (slope * lengths).sum(1, keepdim=True) >= -value[:, None]
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    lengths = torch.minimum(high * (torch.ones_like(slope) if norm == "linf" else slope), room)
    return normal.sign() * lengths


@pytest.mark.parametrize("norm", NORMS)
def test_it_reaches_the_hyperplane_inside_the_box(norm):
    points, normal, value, share = problem()
    for sign in (1, -1):  # from the one side and from the other
        move = to_hyperplane(points, sign * normal, sign * value, norm)
        reached = value + (normal * move).sum(1)
        assert reached[share < 1].abs().max() < 1e-9
        assert torch.allclose(reached[share > 1], (value + value.abs() / share)[share > 1])
        assert (points + move).min() >= -1e-12 and (points + move).max() <= 1 + 1e-12
        assert torch.all(move[normal == 0] == 0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_is_the_move_of_the_optimality_conditions(norm):
    points, normal, value, share = problem()
    move = to_hyperplane(points, normal, value, norm)
    within = share < 1
    torch.testing.assert_close(move[within], by_bisection(points, normal, value, norm)[within], atol=1e-8, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_no_other_move_to_the_hyperplane_is_shorter(norm):
    points, normal, value, share = problem(d=4)
    generator = torch.Generator().manual_seed(1)
    own = NORM[norm](to_hyperplane(points, normal, value, norm))
    found = 0
    for _ in range(3000):
        other = torch.rand(points.shape, generator=generator, dtype=torch.float64) - points
        change = (normal * other).sum(1)
        scale = -value / change
        there = (change > 0) & (scale <= 1) & (share < 1)
        found += int(there.sum())
        shorter = NORM[norm](other * scale[:, None]) < own - 1e-9
        assert not bool((shorter & there).any())
    assert found > 1000


def test_a_point_on_the_hyperplane_stays_and_no_slope_leads_nowhere():
    points = torch.full((4, 3), 0.5)
    normal = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [float("nan"), 1.0, 0.0], [1e-38, 2e-38, 0.0]])
    value = torch.tensor([0.0, -1.0, -0.1, -2e-39])
    for norm in NORMS:
        move = to_hyperplane(points, normal, value, norm)
        assert torch.all(move[:2] == 0) and torch.isfinite(move).all()
        assert torch.equal(move[2].sign(), torch.tensor([0.0, 1.0, 0.0])) and move[2, 1].item() == pytest.approx(0.1)
        assert move[3].abs().max() > 0.05


@pytest.mark.parametrize("norm", NORMS)
def test_a_batch_is_its_images_one_by_one(norm):
    points, normal, value, _ = problem()
    points, normal, value = points.float(), normal.float(), value.float()
    together = to_hyperplane(points, normal, value, norm)
    alone = [to_hyperplane(points[i : i + 1], normal[i : i + 1], value[i : i + 1], norm) for i in range(len(points))]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-7, rtol=0)
