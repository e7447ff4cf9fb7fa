"""AutoAttack: its label is earned, its budgets are the standard's, and its verdict is that of its strongest part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from robustlayers.attacks import L1, L2, PGD, Linf
from robustlayers.core.errors import UserError
from robustlayers.evaluation.autoattack import autoattack, autoattack_label, standard
from robustlayers.evaluation.cascade import cascade

QUICK: dict[str, Any] = {"steps": 8, "targets": 2, "queries": 60}


def test_the_standard_is_that_of_the_paper():
    attacks, notes = standard(Linf("8/255"))
    assert notes == ()
    assert {name: attack.describe() for name, attack in attacks.items()} == {
        "apgd-ce": "apgd-ce-100, linf 8/255, 1 restart, best iterate, stops when broken",
        "apgd-t": "apgd-t-100, linf 8/255, 9 targets, 1 restart, loss dlr, stops when broken",
        "fab-t": "fab-t-100, linf 8/255, 9 targets, stops when broken",
        "square-5000": "square-5000, linf 8/255, p 0.8, stops when broken",
    }


def test_the_label_has_to_be_earned():
    threat = L2(0.5)
    assert autoattack_label(standard(threat)[0], 10000, whole=True) == "AutoAttack"
    assert autoattack_label(standard(threat)[0], 500, whole=False) == "APGD-CE+T+FAB-T+Square, n=500"
    rest = standard(threat)[0]
    del rest["fab-t"]
    assert autoattack_label(rest, 10000, whole=True) == "APGD-CE+T+Square, n=10000"
    short = standard(threat, steps=20)[0]
    assert autoattack_label(short, 50, whole=True) == "apgd-ce-20+apgd-t-20+fab-t-20+Square, n=50"
    few = standard(threat, targets=3)[0]
    assert autoattack_label(few, 50, whole=True) == "APGD-CE+apgd-t (3 targets)+fab-t (3 targets)+Square, n=50"
    assert autoattack_label(standard(threat, queries=100)[0], 50, whole=True) == "APGD-CE+T+FAB-T+square-100, n=50"
    assert autoattack_label(standard(threat, 3)[0], 50, whole=True).startswith("APGD-CE+apgd-t-margin+")


def test_what_a_norm_lacks_is_said(trained):
    model, x, y = trained
    found = autoattack(model, x[:8], y[:8], threat=L1(1.5), **QUICK)
    assert "square is left out: it is not offered for l1" in found.notes and "square" not in found.label


@pytest.mark.parametrize("threat", [Linf(0.12), L2(0.5)], ids=str)
def test_it_leaves_no_more_than_pgd(trained, threat):
    model, x, y = trained
    found = autoattack(model, x, y, threat=threat, steps=15, queries=100)
    pgd = cascade(model, x, y, {"pgd-20x2": PGD(threat, steps=20, restarts=2)})
    assert found.robust.sum() <= pgd.robust.sum()
    assert (found.table[0].attacked, found.table[-1].robust) == (115, int(found.robust.sum()))
    assert "fab-t-15" in found.label
    with torch.no_grad():
        assert torch.equal(model(found.x_adv).argmax(1) == y, found.robust)


def test_on_a_linear_model_the_verdict_is_exact():
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    linear = nn.Linear(12, 4, bias=False)
    model = nn.Sequential(nn.Flatten(), linear)
    with torch.no_grad():
        linear.weight.copy_(weight)
    x = torch.rand(60, 3, 2, 2, generator=torch.Generator().manual_seed(1)) * 0.6 + 0.2
    with torch.no_grad():
        logits = model(x)
    y = logits.argmax(1)
    gaps = logits.gather(1, y[:, None]) - logits
    distances = (gaps / (weight[y][:, None] - weight[None]).abs().sum(2)).scatter(1, y[:, None], torch.inf).amin(1)
    eps = float(distances.median())
    far = (distances / eps - 1).abs() > 1e-3
    found = autoattack(model, x, y, threat=Linf(eps), **{**QUICK, "targets": 3})
    assert torch.equal(found.robust[far], (distances > eps)[far]) and 25 < found.robust.sum() < 35


def test_two_and_three_classes(trained):
    for classes in (2, 3):
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
        x = torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(classes))
        y = net(x).argmax(1)
        found = autoattack(net, x, y, threat=Linf(0.5), **QUICK)
        assert found.clean.all() and not found.robust.all()
    with pytest.raises(UserError, match=r"must return logits \[n, classes\]"):
        autoattack(lambda images: images.mean((1, 2, 3)), x, y, threat=Linf(0.1))
