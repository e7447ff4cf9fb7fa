import pytest
import torch

from robustlayers.attacks import APGD, L2, LOSSES, Linf, TargetedAPGD, is_correct
from robustlayers.attacks.targeted import likeliest_targets
from robustlayers.core.errors import UserError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def right(model, attack, x, y, seed=0):
    return is_correct(model(attack(model, x, y, generator=generator(seed))), y)


def test_targets_are_the_likeliest_classes_beside_the_label():
    logits, y = torch.randn(20, 7, generator=generator()), torch.arange(20) % 7
    found = likeliest_targets(logits, y, 4)
    for row, label, targets in zip(logits.tolist(), y.tolist(), found.tolist(), strict=True):
        assert targets == sorted((k for k in range(7) if k != label), key=lambda k: -row[k])[:4]
    assert likeliest_targets(logits, y, 9).shape == (20, 6)


def test_each_target_has_its_run_of_apgd(trained):
    """An image that nothing breaks sees, target after target, the iterates of APGD towards that target."""
    model, x, y = trained[0].double(), trained[1][:8].double(), trained[2][:8]
    try:
        seen = []

        def forward(inputs):
            seen.append(inputs.detach().clone())
            return model(inputs)

        threat = Linf(0.001)
        TargetedAPGD(threat, steps=10)(forward, x, y, generator=generator())
        taken, seen = seen, []
        assert torch.equal(taken[0], x) and len(taken) == 1 + 3 * 11
        draws = generator()
        for target in likeliest_targets(model(x), y, 9).unbind(1):
            APGD(threat, 10, "dlr")(forward, x, y, generator=draws, target=target)
        torch.testing.assert_close(torch.cat(taken[1:]), torch.cat(seen))
    finally:
        model.float()


@pytest.mark.parametrize("threat", [Linf(0.12), L2(0.5)], ids=str)
def test_it_breaks_at_least_as_many_as_apgd(trained, threat):
    model, x, y = trained
    targeted = right(model, TargetedAPGD(threat, 30), x, y)
    assert targeted.sum() <= min(right(model, APGD(threat, 30, loss), x, y).sum() for loss in ("ce", "dlr")) < len(y)


def test_more_targets_and_restarts_never_help_the_defender(trained):
    model, x, y = trained
    options = ({"targets": 1}, {"targets": 3}, {"targets": 1, "restarts": 4})
    one, three, again = (right(model, TargetedAPGD(Linf(0.15), 1, **option), x, y) for option in options)
    assert torch.all(one | ~three) and torch.all(one | ~again)
    assert one.sum() > three.sum() and one.sum() > again.sum()


def test_images_that_are_wrong_already_come_back_as_they_were(trained):
    model, x, y = trained
    wrong = (y + 1) % 4
    assert torch.equal(TargetedAPGD(Linf(0.1), 3)(model, x, wrong)[y == 2], x[y == 2])


def test_a_scale_of_the_logits_does_not_hide_anything(trained):
    """Where cross-entropy saturates in float32, its gradient vanishes; the ratio of logits is the same."""
    model, x, y = trained[0], *(part[is_correct(trained[0](trained[1]), trained[2])] for part in trained[1:])
    huge = lambda inputs: model(inputs) * 1e5  # noqa: E731
    ce, targeted = APGD(Linf(0.15), 20), TargetedAPGD(Linf(0.15), 20)
    assert right(huge, ce, x, y).sum() > right(huge, targeted, x, y).sum() + 5
    assert abs(int(right(huge, targeted, x, y).sum() - right(model, targeted, x, y).sum())) <= 2


def test_few_classes_need_another_loss(linear):
    x, y = torch.rand(4, 1, 3, 3, generator=generator()), torch.arange(4) % 2
    with pytest.raises(UserError, match="dlr with a target: needs 4 or more classes"):
        TargetedAPGD(Linf(0.1), 3)(linear((1, 3, 3), classes=3), x, y)
    model = linear((1, 3, 3), classes=2)
    better = TargetedAPGD(Linf(0.1), 3, loss="margin")(model, x, y)
    assert torch.all(LOSSES["margin"](model(better), y) >= LOSSES["margin"](model(x), y))
    with pytest.raises(UserError, match=r"return logits \[4, classes\]"):
        TargetedAPGD(Linf(0.1), 3)(lambda inputs: inputs, x, y)
