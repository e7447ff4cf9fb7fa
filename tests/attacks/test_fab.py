import sys

import pytest
import torch

from robustlayers.attacks import FAB, L2, LOSSES, Linf, TargetedAPGD, is_correct
from robustlayers.core.errors import UserError


def test_without_the_package_one_line_says_what_to_install(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    monkeypatch.setitem(sys.modules, "pyautoattack.fab_base", None)
    with pytest.raises(UserError, match=r"pip install \"robustlayers\[autoattack\]\""):
        FAB(Linf(0.1))(*trained)


def test_its_options_and_cost():
    attack = FAB(L2(0.5), steps=20, targets=3)
    assert (attack.forward_passes, attack.backward_passes) == (1 + 3 * 43, 60)
    assert attack.identity() == {"threat": {"norm": "l2", "eps": 0.5}, "steps": 20, "targets": 3, "kind": "FAB"}
    for options in ({"steps": 0}, {"targets": 0}):
        with pytest.raises(UserError, match="allowed: a whole number"):
            FAB(Linf(0.1), **options)


@pytest.fixture
def _installed():
    pytest.importorskip("pyautoattack", reason="needs the extra [autoattack]")


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("threat", [Linf(0.12), L2(0.5)], ids=str)
def test_it_breaks_nearly_what_apgd_t_breaks_without_a_trace(trained, threat):
    model, x, y = trained
    before = torch.get_rng_state()
    passes = []

    def forward(inputs):
        passes.append(len(inputs))
        return model(inputs)

    attack = FAB(threat, steps=30)
    x_adv = attack(forward, x, y)
    threat.check(x_adv, x)
    assert torch.equal(torch.get_rng_state(), before) and all(p.grad is None for p in model.parameters())
    assert torch.equal(attack(model, x, y), x_adv)
    held, other = is_correct(model(x_adv), y).sum(), is_correct(model(TargetedAPGD(threat, 30)(model, x, y)), y).sum()
    assert other - 1 <= held <= other + 6 < 0.9 * len(y)
    assert sum(passes) <= attack.forward_passes * len(x)
    with torch.no_grad():
        assert torch.equal(attack(model, x, y), x_adv)


@pytest.mark.usefixtures("_installed")
def test_on_a_linear_model_it_finds_the_boundary(linear):
    model = linear((2, 3, 3))
    x, y = (
        torch.rand(40, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3,
        torch.zeros(40, dtype=torch.long),
    )
    y = model(x).argmax(1)
    weight = model[1].weight.detach()
    distance = -LOSSES["margin"](model(x), y).detach() / (weight[1 - y] - weight[y]).norm(dim=1)
    reach = float(distance.median())
    held = is_correct(model(FAB(L2(reach), steps=10)(model, x, y)), y)
    clear = (distance - reach).abs() > 0.05 * reach
    assert torch.equal(held[clear], (distance > reach)[clear])
