"""What every attack promises, over all of them: ball and box, own draws, no trace, cost, targets, any batch."""

import json
import random
from dataclasses import asdict
from typing import ClassVar

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from robustlayers.attacks import (
    APGD,
    FAB,
    FGSM,
    L1,
    L2,
    MIM,
    NFGSM,
    PGD,
    RFGSM,
    Gaussian,
    Linf,
    Noise,
    Square,
    TargetedAPGD,
    Threat,
    Transfer,
    WorstOf,
    is_correct,
)
from robustlayers.core.errors import UserError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def generators(rows, seed=0):
    return [generator(1000 * seed + int(row)) for row in rows]


ATTACKS = [
    FGSM(L1(4)),
    RFGSM(Linf(0.1)),
    RFGSM(L2(0.5), loss="dlr"),
    RFGSM(L1(4)),
    NFGSM(Linf(0.1)),
    NFGSM(L2(0.5), noise=0.5),
    PGD(L1(4), steps=4),
    PGD(Linf(0.1), steps=4, momentum=0.9),
    PGD(Linf(0.1), steps=4, start="gaussian", loss="kl"),
    PGD(Linf(0.1), steps=4, restarts=2, early_exit=True),
    PGD(L2(0.5), steps=4, momentum=0.5, early_exit=True, random_start=False),
    MIM(Linf(0.1), steps=4),
    MIM(L2(0.5), steps=4, loss="margin"),
    MIM(L1(4), steps=4),
    APGD(Linf(0.1), steps=12, early_exit=True),
    APGD(L2(0.5), steps=12, loss="dlr", restarts=2, early_exit=True),
    TargetedAPGD(Linf(0.1), steps=8, targets=2),
    TargetedAPGD(L2(0.5), steps=8, targets=9, loss="margin"),
    APGD(L1(4), steps=8),
    APGD(L1(4), steps=8, loss="dlr", early_exit=True),
    TargetedAPGD(L1(4), steps=3, targets=2),
    FAB(Linf(0.1), steps=4, targets=2),
    FAB(L2(0.5), steps=3, targets=9),
    FAB(L1(4), steps=3, targets=1),
    Square(Linf(0.1), queries=15),
    Square(L2(0.5), queries=15, loss="ce"),
    Noise(L1(4), draws=3),
    Gaussian(Linf(0.1)),
    Gaussian(L2(0.5), sigma=0.2, draws=3),
    Gaussian(L1(4)),
    WorstOf([FGSM(Linf(0.1)), PGD(Linf(0.1), steps=3), Square(Linf(0.1), queries=5)]),
    WorstOf([Noise(L2(0.5)), APGD(L2(0.5), steps=3)], early_exit=False),
]
every_attack = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.describe())
DETERMINISTIC = [
    attack
    for attack in ATTACKS
    if isinstance(attack, FAB | FGSM | MIM) or getattr(attack, "random_start", True) is False
]


@every_attack
def test_results_are_in_ball_and_box_of_the_input_and_keep_its_form(trained, attack):
    model, x, y = trained
    for batch in (x, x.contiguous(memory_format=torch.channels_last), x[:1], x[:0]):
        x_adv = attack(model, batch, y[: len(batch)], generator=generator())
        attack.threat.check(x_adv, batch)
        assert x_adv.shape == batch.shape and not x_adv.requires_grad
    double = attack(lambda inputs: model(inputs.float()), x.double(), y, generator=generator())
    assert double.dtype == torch.float64
    attack.threat.check(double, x.double())


@every_attack
def test_channels_last_stays_channels_last(attack):
    weight = torch.randn(27, 5, generator=generator(1))
    x = torch.rand(6, 3, 3, 3, generator=generator(2))
    plain = attack(lambda inputs: inputs.flatten(1) @ weight, x, torch.arange(6) % 5, generator=generator())
    last = x.contiguous(memory_format=torch.channels_last)
    x_adv = attack(lambda inputs: inputs.flatten(1) @ weight, last, torch.arange(6) % 5, generator=generator())
    assert x_adv.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x_adv, plain, atol=1e-6, rtol=0)


@every_attack
def test_the_generator_decides_and_no_global_state_is_touched(trained, attack):
    model, x, y = trained
    before = torch.get_rng_state(), random.getstate()
    first, again, other = (attack(model, x, y, generator=generator(seed)) for seed in (1, 1, 2))
    unseeded = attack(model, x, y), attack(model, x, y)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert torch.equal(first, again) and torch.equal(*unseeded)
    assert torch.equal(first, other) == (attack in DETERMINISTIC)


@every_attack
def test_nothing_of_the_model_is_touched_and_autograd_may_be_off(trained, attack):
    model, x, y = trained
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = attack(model, x, y)
    with torch.no_grad():
        assert torch.equal(attack(model, x, y), expected)
    with torch.inference_mode():
        result = attack(model, x.clone(), y.clone())
    assert torch.equal(result, expected)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(attack(model, x.clone().requires_grad_(), y.to(torch.uint8)), expected)


class Passes(torch.autograd.Function):
    """The identity, counting the images that pass forwards and backwards."""

    seen: ClassVar[dict[str, int]] = {"forward": 0, "backward": 0}

    @staticmethod
    def forward(ctx, inputs):
        Passes.seen["forward"] += len(inputs)
        return inputs.clone()

    @staticmethod
    def backward(ctx, *slopes):
        Passes.seen["backward"] += len(slopes[0])
        return slopes[0]


@every_attack
def test_the_cost_is_what_the_attack_says(trained, attack):
    model, x, y = trained

    # A class that no attack reaches: every image costs the most that it can.
    def stubborn(inputs):
        return torch.cat([model(Passes.apply(inputs)), inputs.new_full((len(inputs), 1), 1e4)], 1)

    for forward, label in ((stubborn, torch.full_like(y, 4)), (lambda inputs: model(Passes.apply(inputs)), y)):
        Passes.seen = {"forward": 0, "backward": 0}
        attack(forward, x, label)
        most = {"forward": attack.forward_passes * len(x), "backward": attack.backward_passes * len(x)}
        if forward is stubborn and not isinstance(attack, TargetedAPGD | FAB):
            assert Passes.seen == most
        else:
            assert all(Passes.seen[kind] <= most[kind] for kind in most)
    assert attack.backward_passes == 0 or Passes.seen["backward"] > 0


@pytest.mark.parametrize("attack", DETERMINISTIC, ids=lambda attack: attack.describe())
def test_an_image_is_attacked_the_same_whatever_else_is_in_the_batch(trained, attack):
    model, x, y = trained[0], trained[1][:20], trained[2][:20]
    whole = attack(model, x, y)
    alone = torch.cat([attack(model, x[i : i + 1], y[i : i + 1]) for i in range(20)])
    torch.testing.assert_close(whole, alone, atol=1e-6, rtol=0)


@every_attack
def test_with_a_generator_for_each_image_no_image_depends_on_the_others(trained, attack):
    model, x, y = trained[0].double(), trained[1].double(), trained[2]
    try:
        rows = torch.randperm(len(x), generator=generator(3))[:24]
        whole = attack(model, x, y, generator=generators(range(len(x))))
        some = attack(model, x[rows], y[rows], generator=generators(rows))
        other = attack(model, x, y, generator=generators(range(len(x)), seed=1))
    finally:
        model.float()
    torch.testing.assert_close(some, whole[rows], atol=1e-6, rtol=0)
    assert torch.equal(other, whole) == (attack in DETERMINISTIC)
    if attack not in DETERMINISTIC:
        with pytest.raises(UserError, match="one for each image"):
            attack(model, x.float()[:3], y[:3], generator=generators(range(2)))


@every_attack
def test_the_identity_is_plain_data_that_tells_attacks_apart(attack):
    text = json.dumps(attack.identity(), sort_keys=True)
    assert [json.dumps(other.identity(), sort_keys=True) for other in ATTACKS].count(text) == 1
    assert attack.identity()["kind"] == type(attack).__name__


@pytest.mark.parametrize(
    "attack",
    [PGD(Linf("8/255"), steps=20, restarts=5), APGD(L2(0.5), loss="dlr"), FGSM(Linf(0.1)), Noise(Linf(0.1), draws=3)],
    ids=lambda attack: attack.describe(),
)
def test_options_that_came_later_are_in_no_identity_that_was_stored_before(attack):
    later = {"start", "momentum", "early_exit"}
    before = {key: value for key, value in asdict(attack).items() if key not in later}
    if isinstance(attack, PGD):
        before["step_size"] = attack.step
    assert attack.identity() == {**before, "kind": type(attack).__name__}


def test_options_that_came_later_are_in_the_identity_where_they_are_used():
    plain = PGD(Linf(0.1)).identity()
    for option in ({"start": "gaussian"}, {"momentum": 0.5}, {"early_exit": True}):
        assert PGD(Linf(0.1), **option).identity() == plain | option
    assert APGD(Linf(0.1), early_exit=True).identity() == APGD(Linf(0.1)).identity() | {"early_exit": True}


TARGETED = [
    FGSM(Linf(0.6)),
    RFGSM(Linf(0.6)),
    PGD(Linf(0.6), steps=20),
    PGD(Linf(0.6), steps=20, loss="margin", early_exit=True),
    PGD(L2(4.0), steps=20, loss="margin", keep="last"),
    MIM(Linf(0.6), steps=20),
    APGD(L2(4.0), steps=20, loss="dlr"),
    APGD(Linf(0.6), steps=20, early_exit=True),
    Square(Linf(0.6), queries=300),
    Square(L2(4.0), queries=600, loss="ce"),
    Noise(Linf(0.6), draws=20),
]


@pytest.mark.parametrize("attack", TARGETED, ids=lambda attack: attack.describe())
def test_a_target_is_led_to(trained, attack):
    model, x, y = trained[0], trained[1][:40], trained[2][:40]
    target = (y + 1 + torch.arange(len(y)) % 3) % 4
    hits = is_correct(model(attack(model, x, y, generator=generator(), target=target)), target)
    weak = isinstance(attack, FGSM | RFGSM | Noise)
    assert hits.float().mean() > (0.3 if weak else 0.95)
    untargeted = is_correct(model(attack(model, x, y, generator=generator())), target)
    assert hits.sum() > untargeted.sum()
    attack.threat.check(attack(model, x, y, target=target), x)
    for wrong, words in ((y, "cannot be its target"), (target[:3], "one class"), (target.float(), "one class")):
        with pytest.raises(UserError, match=words):
            attack(model, x, y, target=wrong)


def test_kl_knows_no_target(trained):
    model, x, y = trained
    with pytest.raises(UserError, match="no target"):
        PGD(Linf(0.1), loss="kl")(model, x, y, target=(y + 1) % 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: PGD(Linf(0.12), steps=20, restarts=2, **o),
        lambda **o: PGD(L2(0.5), steps=20, momentum=0.5, **o),
        lambda **o: APGD(Linf(0.12), steps=30, restarts=2, **o),
        lambda **o: APGD(L2(0.5), steps=30, loss="dlr", **o),
    ],
)
def test_early_exit_breaks_the_same_images_at_a_lower_cost(trained, make):
    model, x, y = trained[0].double(), trained[1].double(), trained[2]
    costs, broken, found = [], [], []
    try:
        for option in ({}, {"early_exit": True}):
            Passes.seen = {"forward": 0, "backward": 0}
            found.append(make(**option)(lambda inputs: model(Passes.apply(inputs)), x, y, generator=generator()))
            broken.append(~is_correct(model(found[-1]), y))
            costs.append(Passes.seen["forward"])
    finally:
        model.float()
    assert torch.equal(*broken) and 20 < broken[0].sum() < len(y)
    assert costs[1] < 0.95 * costs[0]
    # Images that hold to the end are attacked to the end: there the results are the same.
    torch.testing.assert_close(found[0][~broken[0]], found[1][~broken[0]], atol=1e-9, rtol=0)


@pytest.mark.parametrize("make", [lambda t: PGD(t, early_exit=True), lambda t: APGD(t, 20, early_exit=True), Square])
def test_early_exit_stops_where_everything_is_broken(trained, make):
    model, x, y = trained
    Passes.seen = {"forward": 0, "backward": 0}
    x_adv = make(Linf(0.1))(lambda inputs: model(Passes.apply(inputs)), x, (y + 1) % 4)  # broken from the start
    assert Passes.seen["forward"] < 3 * len(x)
    assert not is_correct(model(x_adv), (y + 1) % 4).all()


KINDS = {
    "r-fgsm": RFGSM,
    "n-fgsm": NFGSM,
    "pgd": lambda threat: PGD(threat, steps=4, momentum=0.5, early_exit=True),
    "mim": lambda threat: MIM(threat, steps=3),
    "apgd": lambda threat: APGD(threat, steps=6, early_exit=True),
    "apgd-t": lambda threat: TargetedAPGD(threat, steps=4, targets=2, loss="margin"),
    "square": lambda threat: Square(threat, queries=6),
    "gaussian": lambda threat: Gaussian(threat, draws=2),
}


@given(
    st.sampled_from(["linf", "l2", "l1"]),
    st.sampled_from([0.0, 8 / 255, 0.5, 2.0]),
    st.integers(0, 2**31),
    st.sampled_from(["smooth", "constant", "undefined", "infinite", "saturated"]),
    st.sampled_from(list(KINDS)),
)
@settings(max_examples=100, deadline=None)
def test_every_result_is_in_ball_and_box_whatever_the_model(norm, eps, seed, kind, name):
    threat, n = Threat(norm, eps), 4
    assume(norm != "l1" or name != "square")
    x = (torch.rand(n, 2, 3, 3, generator=generator(seed)) * 1.4 - 0.2).clamp(0, 1)
    weight = torch.randn(18, 3, generator=generator(seed))

    def forward(inputs):
        z = inputs.flatten(1) @ weight
        if kind == "constant":
            return z * 0
        if kind == "undefined":
            return z * torch.sqrt(inputs.sum((1, 2, 3)) * 0)[:, None]  # value 0, gradient NaN
        if kind == "infinite":
            return z * 1e38
        return z * 1e4 if kind == "saturated" else torch.tanh(z)

    x_adv = KINDS[name](threat)(forward, x, torch.arange(n) % 3, generator=generator(seed))
    threat.check(x_adv, x)
    assert x_adv.min() >= 0 and x_adv.max() <= 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PGD(Linf(0.1), momentum=-1), "momentum"),
        (lambda: PGD(Linf(0.1), start="gausian"), "nearest: gaussian"),
        (lambda: PGD(Linf(0.1), start="gaussian", random_start=False), "needs random_start"),
        (lambda: PGD(Linf(0.1), early_exit=1), "early_exit"),
        (lambda: PGD(Linf(0.1), early_exit=True, keep="last"), 'keep="best"'),
        (lambda: APGD(Linf(0.1), early_exit=None), "early_exit"),
        (lambda: MIM(Linf(0.1), steps=0), "steps"),
        (lambda: MIM(Linf(0.1), decay=0), "without momentum"),
        (lambda: MIM(Linf(0.1), step_size=0), "step_size"),
        (lambda: MIM(Linf(0.1), loss="kl"), "zero at the clean image"),
        (lambda: RFGSM(Linf(0.1), step_size="-1/255"), "step_size"),
        (lambda: RFGSM(Linf(0.1), loss="kl"), "not offered"),
        (lambda: NFGSM(Linf(0.1), noise=-1), "noise"),
        (lambda: NFGSM(Linf(0.1), project="yes"), "project"),
        (lambda: TargetedAPGD(Linf(0.1), targets=0), "targets"),
        (lambda: TargetedAPGD(Linf(0.1), steps=0), "steps"),
        (lambda: TargetedAPGD(Linf(0.1), loss="kl"), "allowed: ce, dlr, margin"),
        (lambda: Square(Linf(0.1), queries=-1), "queries"),
        (lambda: Square(Linf(0.1), p=0), "p: 0"),
        (lambda: Square(Linf(0.1), loss="dlr"), "allowed: ce, margin"),
        (lambda: Square(Linf(0.1), loss="mragin"), "nearest: margin"),
        (lambda: Square(L1(0.1)), "not offered for l1"),
        (lambda: Gaussian(Linf(0.1), sigma=0), "sigma"),
        (lambda: Gaussian(Linf(0.1), draws=0), "draws"),
        (lambda: WorstOf([]), "there is none"),
        (lambda: WorstOf([FGSM(Linf(0.1)), FGSM(L2(0.1))]), "threats differ"),
        (lambda: WorstOf([FGSM(Linf(0.1))], early_exit=2), "early_exit"),
        (lambda: Transfer(FGSM(Linf(0.1)), nn.Identity(), " "), "name"),
    ],
)
def test_impossible_settings_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_impossible_batches_are_refused(trained):
    model, x, y = trained
    for attack in ATTACKS:
        with pytest.raises(UserError, match="inside the model"):
            attack(model, x + 2, y)
        with pytest.raises(UserError, match="one integer label"):
            attack(model, x, y[:3])
        if attack.backward_passes:
            with pytest.raises(UserError, match="no gradient"):
                attack(lambda inputs: model(inputs).detach(), x, y)
