import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustlayers.attacks import LOSSES, find_loss, is_correct
from robustlayers.core.errors import UserError


def batch(seed=0, n=7, classes=5):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64) * 3
    return logits, torch.randint(classes, (n,), generator=generator)


def test_cross_entropy_is_minus_the_log_probability():
    logits, y = batch()
    expected = [-torch.log(torch.exp(z[k]) / torch.exp(z).sum()) for z, k in zip(logits, y, strict=True)]
    torch.testing.assert_close(LOSSES["ce"](logits, y), torch.stack(expected))


def test_margin_and_dlr_against_a_loop():
    logits, y = batch()
    for i, (z, k) in enumerate(zip(logits.tolist(), y.tolist(), strict=True)):
        other = max(value for j, value in enumerate(z) if j != k)
        ordered = sorted(z, reverse=True)
        assert LOSSES["margin"](logits, y)[i].item() == pytest.approx(other - z[k])
        assert LOSSES["dlr"](logits, y)[i].item() == pytest.approx((other - z[k]) / (ordered[0] - ordered[2]))


@given(st.integers(0, 1000), st.floats(0.01, 1e3), st.floats(-100, 100))
@settings(max_examples=30, deadline=None)
def test_dlr_ignores_shift_and_scale(seed, scale, shift):
    logits, y = batch(seed)
    torch.testing.assert_close(LOSSES["dlr"](logits * scale + shift, y), LOSSES["dlr"](logits, y), rtol=1e-6, atol=1e-8)


@given(st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_margin_and_dlr_are_positive_exactly_where_misclassified(seed):
    logits, y = batch(seed)
    wrong = ~is_correct(logits, y)
    assert torch.equal(LOSSES["margin"](logits, y) > 0, wrong)
    assert torch.equal(LOSSES["dlr"](logits, y) > 0, wrong)


def test_kl_against_torch_distributions():
    logits, y = batch(0)
    clean, _ = batch(1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=clean), torch.distributions.Categorical(logits=logits)
    )
    torch.testing.assert_close(LOSSES["kl"](logits, y, clean), expected)
    assert LOSSES["kl"](clean, y, clean).abs().max() < 1e-12


def test_targeted_losses_against_a_loop():
    logits, y = batch()
    target = (y + 1 + torch.arange(7) % 4) % 5
    found = {name: LOSSES[name](logits, y, target=target).tolist() for name in ("ce", "margin", "dlr")}
    for i, (z, k, t) in enumerate(zip(logits.tolist(), y.tolist(), target.tolist(), strict=True)):
        top = sorted(z, reverse=True)
        assert found["ce"][i] == pytest.approx(z[t] - torch.tensor(z).logsumexp(0).item(), abs=1e-5)
        assert found["margin"][i] == pytest.approx(z[t] - max(value for j, value in enumerate(z) if j != t))
        assert found["dlr"][i] == pytest.approx((z[t] - z[k]) / (top[0] - (top[2] + top[3]) / 2))
    scaled = LOSSES["dlr"](logits * 30 - 7, y, target=target)
    torch.testing.assert_close(scaled, torch.tensor(found["dlr"], dtype=torch.float64))


def test_half_precision_logits_are_widened():
    logits, y = batch()
    for loss in LOSSES.values():
        assert loss(logits.bfloat16(), y, logits.bfloat16()).dtype == torch.float32


def test_a_nan_among_the_logits_is_never_right():
    nan = float("nan")
    logits = torch.tensor([[nan, 0.0], [0.0, nan], [1.0, 0.0]])
    assert is_correct(logits, torch.tensor([0, 0, 0])).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: find_loss("margn"), "nearest: margin"),
        (lambda: LOSSES["dlr"](torch.zeros(2, 2), torch.zeros(2, dtype=torch.long)), "3 or more classes"),
        (
            lambda: LOSSES["dlr"](torch.zeros(2, 3), torch.tensor([0, 0]), target=torch.tensor([1, 1])),
            "dlr with a target: needs 4 or more",
        ),
        (
            lambda: LOSSES["kl"](torch.zeros(2, 3), torch.tensor([0, 0]), target=torch.tensor([1, 1])),
            "no target class; allowed with a target: ce, margin, dlr",
        ),
        (lambda: LOSSES["ce"](torch.zeros(2), torch.zeros(2, dtype=torch.long)), r"logits \[2, classes\]"),
        (lambda: LOSSES["ce"](torch.zeros(3, 4), torch.zeros(2, dtype=torch.long)), r"returned \[3, 4\]"),
        (lambda: LOSSES["ce"]((torch.zeros(2, 4),), torch.zeros(2, dtype=torch.long)), "returned tuple"),
        (lambda: LOSSES["kl"](torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)), "clean images"),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(UserError, match=words):
        call()
