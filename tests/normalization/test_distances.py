"""Closed forms against numerical integration, and the properties that a distance has."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robustlayers.core.errors import UserError
from robustlayers.normalization.distances import DRIFTS, l2, lipschitz, norm_drift, relative_norm
from robustlayers.normalization.distances import symmetric_kl as kl
from robustlayers.normalization.distances import wasserstein as w2

PAIRS = [((0.0, 1.0), (0.0, 1.0)), ((0.3, 0.5), (-0.4, 2.0)), ((2.0, 0.1), (2.2, 0.15)), ((-1.0, 4.0), (3.0, 1.0))]


def tensors(p, q) -> Any:
    return [torch.tensor([value], dtype=torch.float64) for value in (*p, *q)]


def normal(mean, variance):
    return torch.distributions.Normal(
        torch.tensor(mean, dtype=torch.float64), torch.tensor(variance**0.5, dtype=torch.float64)
    )


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_symmetric_kl_is_the_integral(p, q):
    a, b = normal(*p), normal(*q)
    x = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    log_a, log_b = a.log_prob(x), b.log_prob(x)
    wanted = torch.trapezoid((log_a.exp() - log_b.exp()) * (log_a - log_b), x)
    assert kl(*tensors(p, q)).item() == pytest.approx(wanted.item(), rel=1e-9, abs=1e-12)
    both = torch.distributions.kl_divergence(a, b) + torch.distributions.kl_divergence(b, a)
    assert kl(*tensors(p, q)).item() == pytest.approx(both.item(), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_wasserstein_is_the_integral_over_quantiles(p, q):
    # In one dimension W2^2 = integral over u of (F^-1(u) - G^-1(u))^2; substituted u = Phi(z).
    z = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    weight = normal(0.0, 1.0).log_prob(z).exp()
    gap = (p[0] + math.sqrt(p[1]) * z) - (q[0] + math.sqrt(q[1]) * z)
    wanted = torch.trapezoid(weight * gap.square(), z).sqrt()
    assert w2(*tensors(p, q)).item() == pytest.approx(wanted.item(), rel=1e-9, abs=1e-9)


finite = st.floats(-5, 5)
positive = st.floats(0.01, 5)


@given(finite, positive, finite, positive, finite, st.floats(0.1, 10))
def test_symmetry_and_what_scaling_does(m, v, n, w, shift, factor):
    one, other = tensors((m, v), (n, w)), tensors((n, w), (m, v))
    assert kl(*one).item() == pytest.approx(kl(*other).item(), rel=1e-9, abs=1e-12)
    assert w2(*one).item() == pytest.approx(w2(*other).item())
    moved = tensors((factor * m + shift, factor**2 * v), (factor * n + shift, factor**2 * w))
    assert kl(*moved).item() == pytest.approx(kl(*one).item(), rel=1e-6, abs=1e-9)
    assert w2(*moved).item() == pytest.approx(factor * w2(*one).item(), rel=1e-6, abs=1e-6)


@given(st.lists(st.tuples(finite, positive), min_size=3, max_size=3))
def test_wasserstein_obeys_the_triangle_inequality(three):
    a, b, c = three
    assert w2(*tensors(a, c)).item() <= w2(*tensors(a, b)).item() + w2(*tensors(b, c)).item() + 1e-9


def test_variances_of_zero():
    zero, one = torch.zeros(1), torch.ones(1)
    assert kl(zero, zero, zero, zero).item() == 0
    assert kl(zero, zero, one, zero).item() == math.inf
    assert kl(zero, zero, zero, one).item() == math.inf
    assert w2(zero, zero, one, zero).item() == 1
    assert kl(zero, zero, zero, one, eps=1.0).item() == kl(zero, one, zero, 2 * one).item()
    assert kl(zero, 1e-200 * one.double(), zero, 2e-200 * one.double()).item() == pytest.approx(0.25)


def test_lipschitz_is_the_stretch_of_torchs_layer():
    layer: Any = nn.BatchNorm1d(3).double().eval()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([-2.0, 0.5, 0.0]))
    layer.running_var.copy_(torch.tensor([4.0, 0.01, 1.0]))
    jacobian: Any = torch.autograd.functional.jacobian(lambda x: layer(x)[0], torch.zeros(1, 3).double())
    found = lipschitz(layer.weight, layer.running_var, layer.eps)
    assert torch.allclose(found, jacobian[:, 0].diagonal().abs(), rtol=1e-12)
    assert torch.equal(lipschitz(None, torch.ones(2)), torch.ones(2).double())


def test_norms():
    assert l2(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 5.0]])) == 3
    assert relative_norm(torch.ones(2), torch.zeros(2)) is None


@pytest.mark.parametrize("measure", [kl, w2])
def test_statistics_that_cannot_be_compared(measure):
    with pytest.raises(UserError, match="different layers"):
        measure(torch.zeros(2), torch.ones(2), torch.zeros(3), torch.ones(3))
    with pytest.raises(UserError, match="negative"):
        measure(torch.zeros(2), torch.ones(2), torch.zeros(2), -torch.ones(2))
    with pytest.raises(UserError, match="negative"):
        lipschitz(None, -torch.ones(1))


def states():
    nets: list[Any] = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.GroupNorm(1, 2)) for _ in range(3)]
    for place, net in enumerate(nets):
        net[1].running_mean.fill_(3.0 * place)
        with torch.no_grad():
            net[2].weight.fill_(1.0 + place)
    return [net.state_dict() for net in nets]


def test_drift_over_checkpoints():
    rows = norm_drift(states(), ["1", "2"])
    found = {(row["layer"], row["checkpoint"], row["since"], row["metric"]): row["value"] for row in rows}
    assert len(found) == len(rows) == 3 * len(DRIFTS) + 3 * 2
    assert {key[1:3] for key in found} == {(1, 0), (2, 1), (2, 0)}
    root = math.sqrt(2)
    for since, steps in (((1, 0), 1), ((2, 1), 1), ((2, 0), 2)):
        assert found["1", *since, "mean_l2"] == pytest.approx(3 * steps * root)
        assert found["1", *since, "variance_l2"] == found["1", *since, "scale_l2"] == 0
        assert found["1", *since, "wasserstein_mean"] == pytest.approx(3 * steps)
        assert found["1", *since, "kl_mean"] == pytest.approx((3 * steps) ** 2, rel=2e-5)
        assert found["2", *since, "scale_l2"] == pytest.approx(steps * root)
    assert ("2", 1, 0, "mean_l2") not in found


def test_drift_of_what_is_not_there():
    with pytest.raises(UserError, match="two or more"):
        norm_drift(states()[:1], ["1"])
    with pytest.raises(UserError, match=r"unknown norm layer 'bn'.*allowed: 0, 1, 2"):
        norm_drift(states(), ["bn"])


def test_drift_of_a_model_that_is_a_norm_layer():
    one, two = nn.BatchNorm1d(1).state_dict(), nn.BatchNorm1d(1).state_dict()
    assert {row["value"] for row in norm_drift([one, two], [""])} == {0.0}
