"""The reference implementation as one attack: verdicts beside ours, no trace, and one line where it is not installed."""

import importlib.util
import random

import pytest
import torch
from torch import nn

from robustlayers.attacks import L2, Linf, Reference, is_correct, is_own, label, parse
from robustlayers.core.errors import UserError

installed = importlib.util.find_spec("pyautoattack") is not None


def test_it_has_a_name_and_an_identity():
    attack = parse("autoattack-reference", Linf("8/255"))
    assert attack == Reference(Linf("8/255")) and label(attack) == "autoattack-reference" and is_own(attack)
    assert attack.identity() == {"threat": {"norm": "linf", "eps": 8 / 255}, "kind": "Reference"}
    with pytest.raises(UserError, match="not understood"):
        parse("autoattack-reference-20", Linf("8/255"))


@pytest.mark.skipif(installed, reason="pyautoattack is installed")
def test_one_line_where_it_is_not_installed():
    with pytest.raises(UserError, match=r"robustlayers\[autoattack\]"):
        Reference(Linf(0.1))(nn.Flatten(), torch.rand(2, 1, 2, 2), torch.zeros(2, dtype=torch.long))


@pytest.mark.skipif(not installed, reason="needs pyautoattack")
@pytest.mark.parametrize("threat", [Linf(0.05), L2(0.3)], ids=str)
def test_it_attacks_without_a_trace(threat):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(300, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    x = torch.rand(4, 3, 10, 10)
    y = model(x).argmax(1)
    before = torch.get_rng_state(), random.getstate()
    x_adv = Reference(threat)(model, x, y, generator=torch.Generator().manual_seed(1))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    threat.check(x_adv, x)
    assert is_correct(model(x_adv), y).sum() < len(y) and all(p.grad is None for p in model.parameters())
    assert torch.equal(Reference(threat)(model, x, y, generator=torch.Generator().manual_seed(1)), x_adv)
