import pytest
import torch
from torch import nn

from robustlayers.attacks import APGD, FGSM, LOSSES, MIM, PGD, Linf, Noise, Square, Transfer, WorstOf, is_correct
from robustlayers.core.errors import UserError

THREAT = Linf(0.12)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Foreign:
    """An attack that knows nothing of our generators; without our protocol's cost and identity."""

    threat = THREAT

    def __call__(self, forward, x, y, *, generator=None):
        assert isinstance(generator, torch.Generator)
        return self.threat.random_start(x, generator)


def test_transfer_crafts_on_the_source_alone(trained):
    model, x, y = trained

    def never(inputs):
        raise AssertionError("the model under attack must not be called")

    attack = Transfer(MIM(THREAT), model, name="small net")
    assert torch.equal(attack(never, x, y), MIM(THREAT)(model, x, y))
    function = Transfer(PGD(THREAT, steps=3), lambda inputs: model(inputs), name="function")
    assert torch.equal(
        function(never, x, y, generator=generator()), PGD(THREAT, steps=3)(model, x, y, generator=generator())
    )
    assert attack.threat == THREAT and (attack.forward_passes, attack.backward_passes) == (11, 10)
    assert attack.describe().endswith("best iterate, crafted on small net")
    assert attack.identity() == {"attack": MIM(THREAT).identity(), "source": "small net", "kind": "Transfer"}


def test_transfer_leaves_a_source_in_training_mode_as_it_was(trained):
    model, x, y = trained
    expected = MIM(THREAT)(model, x, y)
    source = model.train()
    source[0].eval()
    try:
        before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
        found = Transfer(MIM(THREAT), source)(nn.Identity(), x, y)
        assert source.training and source[1].training and not source[0].training
        assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in source.parameters())
        assert torch.equal(found, expected)  # by running statistics
    finally:
        model.eval()


@pytest.mark.parametrize("early_exit", [True, False])
def test_the_worst_is_at_least_as_bad_as_every_part(trained, early_exit):
    model, x, y = trained
    parts = [
        Noise(THREAT),
        FGSM(THREAT),
        PGD(THREAT, steps=5, random_start=False),
        APGD(THREAT, 10, "dlr", random_start=False),
    ]
    worst = WorstOf(parts, early_exit=early_exit)(model, x, y, generator=generator())
    held = is_correct(model(worst), y)
    for part in parts[1:]:  # those that draw nothing are the same alone
        alone = part(model, x, y)
        assert torch.all(is_correct(model(alone), y) | ~held)
        if not early_exit:
            gain = LOSSES["margin"](model(worst), y) - LOSSES["margin"](model(alone), y)
            assert torch.all((gain >= -1e-5) | ~held)
    assert 0 < held.sum() < len(y)


def test_with_early_exit_broken_images_are_left_out(trained):
    model, x, y = trained
    sizes = []

    class Spy(Foreign):
        def __call__(self, forward, x, y, *, generator=None):
            sizes.append(len(x))
            return super().__call__(forward, x, y, generator=generator)

    left = int(is_correct(model(PGD(THREAT, random_start=False)(model, x, y)), y).sum())
    for early_exit in (True, False):
        WorstOf([PGD(THREAT, random_start=False), Spy()], early_exit=early_exit)(model, x, y)
    assert sizes == [left, len(x)] and left < len(x)


def test_a_foreign_attack_may_take_part_but_cannot_be_described(trained):
    model, x, y = trained
    attack = WorstOf([FGSM(THREAT), Foreign()])
    THREAT.check(attack(model, x, y, generator=generator()), x)
    for use in (attack.describe, attack.identity, lambda: attack.forward_passes):
        with pytest.raises(UserError, match="Foreign: says neither"):
            use()


def test_what_is_said_of_several():
    attack = WorstOf([FGSM(THREAT), Square(THREAT, 50)])
    assert (attack.forward_passes, attack.backward_passes, attack.threat) == (1 + 51 + 2, 1, THREAT)
    assert attack.describe() == f"worst of (fgsm, {THREAT}; square-50, {THREAT}, p 0.8, stops when broken)"
    assert attack.identity() == {
        "attacks": [FGSM(THREAT).identity(), Square(THREAT, 50).identity()],
        "early_exit": True,
        "kind": "WorstOf",
    }
