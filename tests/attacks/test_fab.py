import pytest
import torch

from robustlayers.attacks import FAB, L1, L2, LOSSES, Linf, TargetedAPGD, is_correct
from robustlayers.attacks import fab as module
from robustlayers.core.errors import UserError

THREATS = [Linf(0.12), L2(0.5), L1(1.5)]


def test_its_options_and_cost():
    attack = FAB(L2(0.5), steps=20, targets=3)
    assert (attack.forward_passes, attack.backward_passes) == (1 + 3 * 41, 60)
    assert attack.identity() == {"threat": {"norm": "l2", "eps": 0.5}, "steps": 20, "targets": 3, "kind": "FAB"}
    for options in ({"steps": 0}, {"targets": 0}):
        with pytest.raises(UserError, match="allowed: a whole number"):
            FAB(Linf(0.1), **options)


@pytest.mark.parametrize("threat", THREATS, ids=str)
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
    assert other - 2 <= held <= other + 6 < 0.9 * len(y)
    assert sum(passes) <= attack.forward_passes * len(x)
    with torch.no_grad():
        assert torch.equal(attack(model, x, y), x_adv)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_the_reference_breaks_the_same(trained, threat):
    base = pytest.importorskip("pyautoattack.fab_pt", reason="needs pyautoattack")
    model, x, y = trained
    norm = {"linf": "Linf", "l2": "L2", "l1": "L1"}[threat.norm]
    reference = base.FABAttack_PT(
        model, norm=norm, n_iter=30, eps=threat.eps, targeted=True, device=x.device, n_target_classes=3
    )
    mine, theirs = (is_correct(model(found), y) for found in (FAB(threat, 30)(model, x, y), reference.perturb(x, y)))
    assert (mine != theirs).sum() <= 2 and 0 < theirs.sum() < len(y)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_neither_the_batch_nor_which_targets_go_together_decides(trained, threat, monkeypatch):
    """The image that comes back is that of the likeliest class that breaks, as if classes came one by one."""
    model, x, y = trained[0].double(), trained[1][:12].double(), trained[2][:12]
    try:
        attack = FAB(threat, steps=6)
        whole = attack(model, x, y)
        assert 0 < is_correct(model(whole), y).sum() < len(y)
        for width in (1, 10**6):  # one target at a time, and all of them
            monkeypatch.setitem(module._ROWS, "cpu", width)
            for size in (1, 12):
                parts = [attack(model, *part) for part in zip(x.split(size), y.split(size), strict=True)]
                torch.testing.assert_close(torch.cat(parts), whole, atol=1e-9, rtol=0)
    finally:
        model.float()


def test_with_more_targets_it_breaks_what_it_broke_with_fewer(trained):
    model, x, y = trained
    one, three = (is_correct(model(FAB(Linf(0.12), 1, targets)(model, x, y)), y) for targets in (1, 3))
    assert torch.all(one | ~three) and one.sum() > three.sum()


def test_on_a_linear_model_it_finds_the_boundary(linear):
    model = linear((2, 3, 3))
    x = torch.rand(40, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3
    y = model(x).argmax(1)
    weight = model[1].weight.detach()
    ahead, apart = -LOSSES["margin"](model(x), y).detach(), weight[1 - y] - weight[y]
    for make, dual in ((L2, 2), (Linf, 1)):  # in l1, a pixel would have to leave the box
        distance = ahead / apart.norm(dual, dim=1)
        reach = float(distance.median())
        held = is_correct(model(FAB(make(reach), steps=10)(model, x, y)), y)
        clear = (distance - reach).abs() > 0.05 * reach
        assert clear.sum() > 10 and torch.equal(held[clear], (distance > reach)[clear])


def test_images_that_are_wrong_already_come_back_as_they_were(trained):
    model, x, y = trained
    assert torch.equal(FAB(Linf(0.1), 3)(model, x, (y + 1) % 4)[y == 2], x[y == 2])
    with pytest.raises(UserError, match=r"return logits \[4, classes\]"):
        FAB(Linf(0.1), 3)(lambda inputs: inputs, x[:4], y[:4])
