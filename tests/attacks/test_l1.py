import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustlayers.attacks import L1, Threat, _l1


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def bisection(x_adv, x, eps):
    """The same projection by bisection over the multiplier, image by image, in plain Python."""
    rows = []
    for point, center in zip(x_adv.flatten(1).tolist(), x.flatten(1).tolist(), strict=True):
        delta = [a - b for a, b in zip(point, center, strict=True)]
        room = [1 - c if d > 0 else c for d, c in zip(delta, center, strict=True)]

        def shrunk(t, delta=delta, room=room):
            return [min(max(abs(d) - t, 0.0), r) for d, r in zip(delta, room, strict=True)]

        low, high = 0.0, max(map(abs, delta)) + 1
        if sum(shrunk(0.0)) > eps:
            for _ in range(100):
                middle = (low + high) / 2
                low, high = (middle, high) if sum(shrunk(middle)) > eps else (low, middle)
        else:
            high = 0.0
        sizes = shrunk(high)
        rows.append([c + (s if d > 0 else -s) for c, d, s in zip(center, delta, sizes, strict=True)])
    return torch.tensor(rows, dtype=x.dtype).view(x.shape)


@given(st.sampled_from([0.0, 0.01, 0.5, 2.0, 50.0]), st.integers(0, 2**31), st.floats(0.01, 10))
@settings(max_examples=40, deadline=None)
def test_projection_is_that_of_a_bisection(eps, seed, spread):
    x = (torch.rand(4, 2, 3, 3, generator=generator(seed), dtype=torch.float64) * 1.4 - 0.2).clamp(0, 1)
    x_adv = x + spread * torch.randn(x.shape, generator=generator(seed + 1), dtype=torch.float64)
    x_adv[0, 0] = x[0, 0]  # entries that do not move
    x_adv[1] = x[1] + 0.25  # entries that are equal
    found = L1(eps).project(x_adv, x)
    torch.testing.assert_close(found, bisection(x_adv, x, eps), atol=1e-9, rtol=0)
    L1(eps).check(found, x)


def test_no_point_of_ball_and_box_is_nearer_than_the_projection():
    x = torch.rand(3, 1, 4, 4, generator=generator(), dtype=torch.float64)
    far = x + torch.randn(x.shape, generator=generator(1), dtype=torch.float64)
    threat = L1(1.5)
    nearest = threat.project(far, x)
    for seed in range(200):
        other = (
            threat.random_start(x, generator(seed))
            if seed % 2
            else (nearest + threat.random_start(x, generator(seed))) / 2
        )
        # Of a convex set: the way on from the projection never leads towards the point (obtuse angle).
        inner = ((far - nearest) * (other - nearest)).sum((1, 2, 3))
        assert torch.all(inner <= 1e-9)


def test_a_step_is_the_steepest_of_its_length_inside_the_box():
    x = torch.tensor([[0.5, 0.9, 0.2, 0.4]])
    slope = torch.tensor([[1.0, 5.0, -3.0, 0.0]])
    # First pixel 1 goes to the end of the box (0.1), then pixel 2 (0.2), then what is left to pixel 0.
    torch.testing.assert_close(L1(1).ascend(x, slope, 0.05), torch.tensor([[0.5, 0.95, 0.2, 0.4]]))
    torch.testing.assert_close(L1(1).ascend(x, slope, 0.2), torch.tensor([[0.5, 1.0, 0.1, 0.4]]))
    torch.testing.assert_close(L1(1).ascend(x, slope, 0.5), torch.tensor([[0.7, 1.0, 0.0, 0.4]]))
    torch.testing.assert_close(L1(1).ascend(x, slope, 9.0), torch.tensor([[1.0, 1.0, 0.0, 0.4]]))


@given(st.integers(0, 2**31), st.floats(0.01, 3))
@settings(max_examples=30, deadline=None)
def test_no_step_of_that_length_gains_more(seed, length):
    x = torch.rand(3, 8, generator=generator(seed), dtype=torch.float64)
    slope = torch.randn(3, 8, generator=generator(seed + 1), dtype=torch.float64)
    move = L1(1).ascend(x, slope, length) - x
    assert torch.all(move.abs().sum(1) <= length + 1e-9) and torch.all((x + move).clamp(0, 1) == x + move)
    gain = (move * slope).sum(1)
    for other_seed in range(20):
        other = Threat("l1", length).random_start(x, generator(other_seed)) - x
        assert torch.all((other * slope).sum(1) <= gain + 1e-9)


def test_starts_are_uniform_in_the_ball():
    x = torch.full((4000, 3), 0.5)
    delta = (L1(0.1).random_start(x, generator()) - x) / 0.1
    radius = delta.abs().sum(1)
    for r in (0.3, 0.5, 0.8):  # in 3 dimensions the share of the ball within radius r is r^3
        share = float((radius <= r).float().mean())
        assert abs(share - r**3) < 4 * (r**3 * (1 - r**3) / 4000) ** 0.5
    assert delta.mean(0).abs().max() < 4 * (0.1 / 4000) ** 0.5
    # Given the radius, lengths are uniform on the simplex: each entry's share has mean 1/3 and variance 1/18.
    shares = delta.abs() / radius[:, None]
    assert (shares.mean(0) - 1 / 3).abs().max() < 4 * (1 / 18 / 4000) ** 0.5


@pytest.mark.parametrize("shape", [(5, 3, 32, 32)])
def test_large_images_stay_in_the_ball_after_rounding(shape):
    x = torch.rand(shape, generator=generator())
    for eps in (0.5, 12.0):
        projected = L1(eps).project(x + torch.randn(shape, generator=generator(1)), x)
        L1(eps).check(projected, x)
        torch.testing.assert_close(L1(eps).size(projected - x), torch.full((5,), eps), atol=1e-4, rtol=0)


def test_a_gradient_of_any_scale_and_memory_format():
    x = torch.rand(2, 3, 4, 4, generator=generator())
    slope = torch.randn(x.shape, generator=generator(1))
    expected = _l1.steepest(x, slope, 0.5)
    last = _l1.steepest(x.contiguous(memory_format=torch.channels_last), slope * 1e-35, 0.5)
    torch.testing.assert_close(last, expected)
    assert last.is_contiguous(memory_format=torch.channels_last)
