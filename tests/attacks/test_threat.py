import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustlayers.attacks import L1, L2, Linf, Threat
from robustlayers.core.errors import UserError

TOLERANCE = 1e-6

threats = st.builds(Threat, st.sampled_from(["linf", "l2", "l1"]), st.sampled_from([0.0, 1e-4, 8 / 255, 0.5, 1.0, 3.0]))
shapes = st.sampled_from([(1, 1, 1, 1), (1, 3, 4, 4), (5, 1, 3, 2), (3, 7), (2, 2, 5, 5, 2)])
dtypes = st.sampled_from([torch.float32, torch.float64])
seeds = st.integers(0, 2**31)


def images(shape, seed, dtype=torch.float32):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return (x * 1.2 - 0.1).clamp(0, 1)  # some pixels exactly on the box's faces


@pytest.mark.parametrize(
    ("threat", "text"),
    [
        (Linf("8/255"), "Linf(8/255)"),
        (L2(0.5), "L2(0.5)"),
        (Linf(0.3), "Linf(0.3)"),
        (L2(1), "L2(1)"),
        (L1(12), "L1(12)"),
    ],
)
def test_a_threat_reads_as_it_is_written(threat, text):
    assert repr(threat) == text
    assert (
        eval(text, {"Linf": lambda value: Linf(value), "L2": lambda value: L2(value), "L1": lambda value: L1(value)})
        == threat
    )


def test_threats_are_values():
    assert Linf("8/255") == Threat("linf", 8 / 255) != L2("8/255")
    assert len({Linf("8/255"), Linf(8 / 255)}) == 1
    assert copy.deepcopy(Linf(0.1)) == Linf(0.1)
    with pytest.raises(AttributeError):
        Linf(0.1).eps = 0.2  # pyright: ignore


@pytest.mark.parametrize("eps", [-0.1, "-8/255", float("nan"), float("inf"), "8/0", "eight", None, True])
def test_an_impossible_eps_is_refused(eps):
    with pytest.raises(UserError):
        Linf(eps)


@pytest.mark.parametrize("eps", [8, 1.01, "16", "300/255"])
def test_an_eps_of_linf_in_units_of_bytes_is_refused(eps):
    with pytest.raises(UserError, match=r"at most 1, in pixel units .* write 8/255"):
        Linf(eps)
    assert Linf(1).eps == 1 and L2(8).eps == 8 == L1(8).eps  # the whole box; other norms may be longer


def test_an_unknown_norm_names_the_nearest():
    with pytest.raises(UserError, match="nearest: linf"):
        Threat("linff", 0.1)


@given(threats, shapes, seeds, dtypes, st.floats(0.01, 100))
@settings(max_examples=60, deadline=None)
def test_projection_ends_in_ball_and_box_and_is_idempotent(threat, shape, seed, dtype, spread):
    x = images(shape, seed, dtype)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1), dtype=dtype)
    projected = threat.project(x + spread * noise, x)
    assert threat.size(projected.double() - x.double()).max() <= threat.eps + TOLERANCE
    assert projected.min() >= 0 and projected.max() <= 1
    threat.check(projected, x)
    torch.testing.assert_close(threat.project(projected, x), projected, atol=1e-6, rtol=0)
    assert projected.dtype == dtype


@given(st.sampled_from(["linf", "l2", "l1"]), seeds)
@settings(max_examples=30, deadline=None)
def test_projection_leaves_points_inside_alone(norm, seed):
    x = images((4, 1, 3, 3), seed)
    inside = Threat(norm, 0.2).random_start(x, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(Threat(norm, 0.25).project(inside, x), inside, atol=1e-7, rtol=0)


def test_linf_projection_is_the_nearest_point():
    x = images((3, 1, 4, 4), 0)
    far = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.minimum(torch.maximum(far, (x - 0.1).clamp(min=0)), (x + 0.1).clamp(max=1))
    assert torch.equal(Linf(0.1).project(far, x), expected)


@given(threats, shapes, seeds, dtypes)
@settings(max_examples=60, deadline=None)
def test_random_starts_are_in_ball_and_box(threat, shape, seed, dtype):
    x = images(shape, seed, dtype)
    start = threat.random_start(x, torch.Generator().manual_seed(seed))
    threat.check(start, x)
    assert start.dtype == dtype and start.min() >= 0 and start.max() <= 1


def test_linf_random_starts_are_uniform_in_the_ball():
    x = torch.full((200, 1, 10, 10), 0.5)
    delta = (Linf(0.1).random_start(x, torch.Generator().manual_seed(0)) - x) / 0.1
    # Moments of the uniform distribution on [-1, 1]: 20,000 draws put them within 4 standard errors of 0 and 1/3.
    assert abs(delta.mean()) < 4 * (1 / 3 / 20_000) ** 0.5
    assert abs(delta.square().mean() - 1 / 3) < 4 * (4 / 45 / 20_000) ** 0.5
    assert delta.abs().max() > 0.999


def test_l2_random_starts_are_uniform_in_the_ball():
    x = torch.full((4000, 3), 0.5)
    delta = (L2(0.1).random_start(x, torch.Generator().manual_seed(0)) - x) / 0.1
    radius = delta.norm(dim=1)
    # In 3 dimensions the share of the ball within radius r is r^3.
    for r in (0.3, 0.5, 0.8):
        share = float((radius <= r).float().mean())
        assert abs(share - r**3) < 4 * (r**3 * (1 - r**3) / 4000) ** 0.5
    assert delta.mean(0).abs().max() < 4 * (0.2 / 4000) ** 0.5


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5), L1(4)], ids=str)
def test_one_generator_for_each_image_makes_draws_independent_of_the_batch(threat):
    x = images((5, 2, 3, 3), 0)
    each = lambda rows: [torch.Generator().manual_seed(row) for row in rows]  # noqa: E731
    whole = threat.random_start(x, each(range(5)))
    torch.testing.assert_close(threat.random_start(x[[3, 1]], each([3, 1])), whole[[3, 1]], atol=1e-7, rtol=0)
    threat.check(whole, x)
    assert len({round(float(size), 6) for size in threat.size(whole - x)}) == 5


def test_draws_do_not_depend_on_the_memory_format():
    x = images((3, 4, 5, 5), 0)
    last = x.contiguous(memory_format=torch.channels_last)
    for threat in (Linf(0.1), L2(0.5), L1(4)):
        plain = threat.random_start(x, torch.Generator().manual_seed(1))
        other = threat.random_start(last, torch.Generator().manual_seed(1))
        torch.testing.assert_close(plain, other, atol=1e-7, rtol=0)
        assert other.is_contiguous(memory_format=torch.channels_last)


def test_a_step_is_the_steepest_of_its_length():
    x = images((4, 1, 3, 3), 0)
    slope = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for threat, dual in (
        (Linf(1), lambda g: g.abs().sum((1, 2, 3))),
        (L2(1), lambda g: g.square().sum((1, 2, 3)).sqrt()),
    ):
        move = threat.ascend(x, slope, 0.25) - x
        torch.testing.assert_close(threat.size(move), torch.full((4,), 0.25))
        # Hoelder: the largest possible inner product with a step of that length is the dual norm times the length.
        torch.testing.assert_close((move * slope).sum((1, 2, 3)), 0.25 * dual(slope), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e30])
def test_the_length_of_a_step_does_not_depend_on_that_of_the_gradient(scale):
    slope = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(1)).clamp(-3, 3) * scale
    for threat in (Linf(1), L2(1)):
        move = threat.ascend(torch.zeros_like(slope), slope, 0.5)
        torch.testing.assert_close(threat.size(move), torch.full((2,), 0.5), rtol=1e-3, atol=0)


def test_zero_and_undefined_gradients_do_not_move():
    x = images((2, 1, 3, 3), 0)
    for threat in (Linf(1), L2(1), L1(1)):
        assert torch.equal(threat.ascend(x, torch.zeros_like(x), 0.5), x)
        assert torch.equal(threat.ascend(x, torch.full_like(x, torch.nan), 0.5), x)


def test_steps_can_differ_by_image():
    x = torch.full((3, 1, 2, 2), 0.5)
    sizes = torch.tensor([0.0, 0.1, 0.2])
    for threat in (Linf(1), L2(1), L1(1)):
        move = threat.ascend(x, torch.ones_like(x), sizes.view(3, 1, 1, 1)) - x
        torch.testing.assert_close(threat.size(move), sizes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x + 2e-6, "left the ball"),
        (lambda x: torch.full_like(x, torch.nan), "left the ball"),
        (lambda x: x[:1], "shape"),
        (lambda x: (x * 255).to(torch.uint8), "floating point"),
    ],
)
def test_check_sees_what_leaves_the_threat(change, words):
    x = torch.full((2, 1, 3, 3), 0.5)
    for threat in (Linf("8/255"), L2("8/255"), L1("8/255")):
        start = threat.ascend(x, torch.ones_like(x), threat.eps)
        threat.check(start, x)
        with pytest.raises(UserError, match=words):
            threat.check(change(start), x)


def test_check_sees_what_leaves_the_box():
    x = torch.ones(2, 1, 3, 3)
    with pytest.raises(UserError, match="left the box"):
        Linf(0.1).check(x + 0.01, x)
    with pytest.raises(UserError, match="left the box"):
        Linf(0.1).check(x - 1.01, x - 1)


def test_an_empty_batch_is_in_every_threat():
    Linf(0.1).check(torch.empty(0, 1, 2, 2), torch.empty(0, 1, 2, 2))
