import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from robustlayers.attacks import APGD, FGSM, L2, LOSSES, MIM, PGD, RFGSM, Linf, Noise, Threat, guard, is_correct
from robustlayers.core.errors import UserError
from robustlayers.core.random import stream


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n, shape=(3, 6, 5), seed=0, dtype=torch.float32, low=0.0, high=1.0):
    return torch.rand((n, *shape), generator=generator(seed), dtype=dtype) * (high - low) + low


def direction(model, y):
    """The gradient of (other logit - own logit) of a linear model with two classes, for each image."""
    weight = model[1].weight.detach()
    return torch.stack([weight[1 - k] - weight[k] for k in y.tolist()])


def optimum(model, x, y, eps):
    """The worst image of a linear model with two classes in the linf ball and the box: every pixel at its best end."""
    toward = direction(model, y).view(x.shape)
    return torch.where(toward > 0, (x + eps).clamp(0, 1), (x - eps).clamp(0, 1))


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("n", [1, 2, 17, 64])
def test_linf_reaches_the_optimum_of_a_linear_model(linear, n, last, dtype, loss):
    model, x, y = linear((3, 6, 5), dtype=dtype), images(n, dtype=dtype), torch.arange(n) % 2
    model[1].weight.data *= 0.1  # a cross-entropy that is not saturated
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    for attack in (PGD(Linf("8/255"), loss=loss), PGD(Linf(0.3), steps=7, loss=loss, keep="last")):
        x_adv = attack(model, x, y, generator=generator())
        assert torch.equal(x_adv, optimum(model, x, y, attack.threat.eps))
        assert x_adv.dtype == dtype and not x_adv.requires_grad
        assert x_adv.is_contiguous(memory_format=torch.channels_last) == x.is_contiguous(
            memory_format=torch.channels_last
        )


@pytest.mark.parametrize("n", [1, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_l2_reaches_the_optimum_of_a_linear_model(linear, n, dtype):
    model, x, y = linear((3, 6, 5), dtype=dtype), images(n, low=0.4, high=0.6, dtype=dtype), torch.arange(n) % 2
    toward, margin = direction(model, y), LOSSES["margin"]
    for eps in (0.05, 0.3):
        best = eps * toward.norm(dim=1)  # Cauchy-Schwarz; no pixel comes near the box
        for attack, share in (
            (PGD(L2(eps), loss="margin", random_start=False), 1 - 1e-5),
            (PGD(L2(eps), steps=40, step_size=eps / 4, loss="margin"), 0.99),
            (PGD(L2(eps), steps=40, step_size=eps / 4, loss="ce"), 0.99),
            *((PGD(L2(eps), steps=steps), 0.99) for steps in (5, 10, 20, 40)),  # as it comes
        ):
            x_adv = attack(model, x, y, generator=generator())
            gain = margin(model(x_adv), y) - margin(model(x), y)
            assert torch.all(gain >= share * best) and torch.all(gain <= best * (1 + 1e-4))


def test_of_several_classes_no_attack_passes_the_bound(linear):
    model, x, y = linear((1, 4, 4), classes=4), images(32, (1, 4, 4)), torch.arange(32) % 4
    weight = model[1].weight.detach()
    bounds = []
    for j in range(4):
        toward = (weight[j] - weight[y]).view(x.shape)
        worst = torch.where(toward > 0, (x + 0.05).clamp(0, 1), (x - 0.05).clamp(0, 1))
        z = model(worst).detach()
        gap = z[:, j] - z.gather(1, y[:, None]).squeeze(1)
        bounds.append(torch.where(y == j, torch.tensor(-torch.inf), gap))
    bound = torch.stack(bounds).amax(0)
    for attack in (PGD(Linf(0.05), loss="margin", restarts=3), APGD(Linf(0.05), 20, "margin"), FGSM(Linf(0.05))):
        reached = LOSSES["margin"](model(attack(model, x, y, generator=generator())), y)
        assert torch.all(reached <= bound + 1e-5)
    reached = LOSSES["margin"](model(PGD(Linf(0.05), loss="margin", restarts=3)(model, x, y)), y)
    assert (reached >= bound - 1e-5).float().mean() > 0.9


def rank(model, x_adv, y, loss="ce"):
    """Order points as an attack does: misclassified first, then by loss."""
    logits = model(x_adv).detach()
    return list(zip((~is_correct(logits, y)).tolist(), LOSSES[loss](logits, y).tolist(), strict=True))


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "kl"])
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.6)], ids=str)
def test_the_best_iterate_is_never_worse_than_the_last(trained, threat, loss):
    model, x, y = trained
    options = {"steps": 8, "step_size": threat.eps, "loss": loss}  # steps that are far too long: the last is often bad
    last = PGD(threat, keep="last", **options)(model, x, y, generator=generator())
    best = PGD(threat, keep="best", **options)(model, x, y, generator=generator())
    if loss == "kl":
        value = lambda x_adv: LOSSES["kl"](model(x_adv), y, model(x)).tolist()  # noqa: E731
        wrong = lambda x_adv: (~is_correct(model(x_adv), y)).tolist()  # noqa: E731
        pairs = list(zip(wrong(last), value(last), strict=True)), list(zip(wrong(best), value(best), strict=True))
    else:
        pairs = rank(model, last, y, loss), rank(model, best, y, loss)
    close = 1e-5  # the attack's own forward had other company in the batch
    assert all(b[0] > a[0] or (b[0] == a[0] and b[1] >= a[1] - close) for a, b in zip(*pairs, strict=True))
    assert any(b > a for a, b in zip(*pairs, strict=True))  # else the test would show nothing


@pytest.mark.parametrize("make", [PGD, APGD], ids=["pgd", "apgd"])
def test_more_restarts_never_help_the_defender(trained, make):
    model, x, y = trained
    broken = torch.zeros(len(y), dtype=torch.bool)
    shares = []
    for restarts in (1, 2, 4):
        x_adv = make(Linf(0.12), steps=2, restarts=restarts)(model, x, y, generator=generator(7))
        now = ~is_correct(model(x_adv), y)
        assert torch.all(now | ~broken)  # what fewer restarts have broken stays broken, image by image
        broken = now
        shares.append(int(broken.sum()))
    assert shares[-1] > shares[0]


def test_the_first_restart_sees_the_draws_of_a_single_one(trained):
    model, x, y = trained
    seen = []

    def record(inputs):
        seen.append(inputs.detach().clone())
        return model(inputs)

    PGD(Linf(0.1), steps=2)(record, x, y, generator=generator(1))
    single, seen = seen, []
    PGD(Linf(0.1), steps=2, restarts=2)(record, x, y, generator=generator(1))
    assert all(torch.equal(a, b) for a, b in zip(single, seen[:3], strict=True))
    assert not torch.equal(seen[0], seen[3])


ATTACKS = [
    PGD(Linf(0.1), steps=3),
    PGD(L2(0.5), steps=3, restarts=2, loss="margin"),
    PGD(Linf(0.1), steps=3, keep="last"),
    PGD(Linf(0.1), steps=3, loss="kl"),
    PGD(Linf(0.1), steps=0),
    PGD(Linf(0.1), steps=0, random_start=False),
    FGSM(Linf(0.1)),
    FGSM(L2(0.5), loss="dlr"),
    APGD(Linf(0.1), steps=12),
    APGD(L2(0.5), steps=5, loss="dlr", restarts=2),
    Noise(Linf(0.1)),
    Noise(L2(0.5), draws=4),
]
every_attack = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.describe())


@every_attack
def test_the_generator_decides_and_no_global_state_is_touched(trained, attack):
    model, x, y = trained
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    first, again, other = (attack(model, x, y, generator=generator(seed)) for seed in (1, 1, 2))
    unseeded = attack(model, x, y), attack(model, x, y), attack(model, x, y, generator=stream(0, "attack"))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert before[2] == np.random.get_state()[1].tobytes()  # noqa: NPY002
    assert torch.equal(first, again)
    assert torch.equal(unseeded[0], unseeded[1]) and torch.equal(unseeded[0], unseeded[2])
    random_start = isinstance(attack, Noise) or getattr(attack, "random_start", False)
    assert torch.equal(first, other) != random_start


@every_attack
def test_the_cost_is_what_the_attack_says(trained, attack):
    model, x, y = trained
    passes = {"forward": 0, "backward": 0}

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx, inputs):
            passes["forward"] += len(inputs)
            return inputs.clone()

        @staticmethod
        def backward(ctx, *slopes):
            passes["backward"] += len(slopes[0])
            return slopes[0]

    attack(lambda inputs: model(Count.apply(inputs)), x, y)
    assert passes == {"forward": attack.forward_passes * len(x), "backward": attack.backward_passes * len(x)}


@every_attack
def test_nothing_of_the_model_is_touched(trained, attack):
    model, x, y = trained
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attack(model, x, y)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert x.grad is None and not x.requires_grad


@every_attack
def test_it_works_where_the_caller_has_switched_autograd_off(trained, attack):
    model, x, y = trained
    expected = attack(model, x, y)
    with torch.no_grad():
        assert torch.equal(attack(model, x, y), expected)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        result = attack(model, x.clone(), y.clone())  # tensors of inference mode, which autograd cannot keep
    assert torch.equal(result, expected)
    assert not result.requires_grad


@every_attack
@pytest.mark.parametrize("n", [0, 1])
def test_batches_of_none_and_one(trained, attack, n):
    model, x, y = trained
    x_adv = attack(model, x[:n], y[:n])
    assert x_adv.shape == x[:n].shape
    attack.threat.check(x_adv, x[:n])


@every_attack
def test_labels_of_any_integer_type_and_images_with_a_graph(trained, attack):
    model, x, y = trained
    expected = attack(model, x, y)
    result = attack(model, x.clone().requires_grad_(), y.to(torch.uint8))
    assert torch.equal(result, expected) and not result.requires_grad


@every_attack
def test_a_float64_batch_stays_one(trained, attack):
    model, x, y = trained
    x_adv = attack(lambda inputs: model(inputs.float()), x.double(), y)
    assert x_adv.dtype == torch.float64
    attack.threat.check(x_adv, x.double())


@given(
    st.sampled_from(["linf", "l2"]),
    st.sampled_from([0.0, 8 / 255, 0.5, 2.0]),
    st.integers(0, 2**31),
    st.sampled_from(["smooth", "constant", "undefined", "infinite", "saturated"]),
    st.sampled_from(["pgd", "last", "apgd", "fgsm", "noise"]),
)
@settings(max_examples=80, deadline=None)
def test_every_result_is_in_ball_and_box_whatever_the_model(norm, eps, seed, kind, name):
    threat, n = Threat(norm, eps), 4
    attack = {
        "pgd": PGD(threat, steps=4, restarts=2),
        "last": PGD(threat, steps=4, keep="last"),
        "apgd": APGD(threat, steps=6),
        "fgsm": FGSM(threat),
        "noise": Noise(threat, draws=2),
    }[name]
    x = (images(n, (2, 3, 3), seed) * 1.4 - 0.2).clamp(0, 1)
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

    x_adv = attack(forward, x, torch.arange(n) % 3, generator=generator(seed))
    threat.check(x_adv, x)
    assert x_adv.min() >= 0 and x_adv.max() <= 1


def test_the_loop_never_waits_for_the_device(trained):
    model, x, y = trained

    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.name()
            self.count += name in {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}
            return func(*args, **(kwargs or {}))

    def waits(attack):
        with Waits() as mode:
            attack(model, x, y, generator=generator())
        return mode.count

    for threat in (Linf(0.1), L2(0.5)):
        assert waits(PGD(threat, steps=2)) == waits(PGD(threat, steps=9, restarts=2)) == 1
        assert waits(APGD(threat, steps=20)) == 1


def test_crafting_does_not_compute_gradients_of_the_weights(trained):
    _, x, y = trained
    asked = []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, inputs, weight):
            ctx.save_for_backward(inputs, weight)
            return inputs @ weight

        @staticmethod
        def backward(ctx, *slopes):
            asked.append(ctx.needs_input_grad)
            inputs, weight = ctx.saved_tensors
            return slopes[0] @ weight.T, inputs.T @ slopes[0]

    net = nn.Linear(25, 4)
    with guard(net):
        PGD(Linf(0.1), steps=2)(lambda inputs: Product.apply(inputs.flatten(1), net.weight.T), x, y)
    assert asked == [(True, False)] * 2
    assert net.weight.requires_grad and net.weight.grad is None


def test_kl_uses_the_clean_logits_it_is_given(trained):
    model, x, y = trained
    attack, calls = PGD(Linf(0.1), steps=3, loss="kl"), []

    def forward(inputs):
        calls.append(1)
        return model(inputs)

    own = attack(forward, x, y, generator=generator())
    count = len(calls)
    given_ = attack(forward, x, y, generator=generator(), clean=model(x))
    assert torch.equal(own, given_) and len(calls) - count == count - 1
    assert not torch.equal(attack(forward, x, y, generator=generator(), clean=model(x.flip(0))), own)


def test_attacks_work_on_a_trained_net_in_the_expected_order(trained):
    model, x, y = trained

    def right(attack):
        return int(is_correct(model(attack(model, x, y, generator=generator())), y).sum())

    threat = Linf(0.15)
    clean = int(is_correct(model(x), y).sum())
    noise, fgsm, pgd = right(Noise(threat)), right(FGSM(threat)), right(PGD(threat, steps=20))
    assert clean > 150 and noise > fgsm >= pgd and pgd < 0.7 * clean
    assert right(PGD(Linf(1.0), steps=20)) == 0  # everything can be reached: every image falls


def test_fgsm_is_one_full_step_from_the_image(linear):
    model, x, y = linear((3, 6, 5)), images(9), torch.arange(9) % 2
    model[1].weight.data *= 0.1
    assert torch.equal(FGSM(Linf(0.1))(model, x, y), optimum(model, x, y, 0.1))
    middle = images(9, low=0.4, high=0.6)
    expected = middle + 0.1 * nn.functional.normalize(direction(model, y), dim=1).view(middle.shape)
    torch.testing.assert_close(FGSM(L2(0.1))(model, middle, y), expected)


def test_noise_is_a_draw_of_the_ball_and_its_worst_of_several(trained):
    model, x, y = trained
    assert torch.equal(Noise(L2(1.0))(model, x, y, generator=generator(1)), L2(1.0).random_start(x, generator(1)))
    one, ten = (LOSSES["margin"](model(Noise(L2(1.0), draws=d)(model, x, y)), y) for d in (1, 10))
    assert torch.all(ten >= one - 1e-5) and ten.mean() > one.mean()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PGD(Linf(0.1), steps=-1), "steps"),
        (lambda: PGD(Linf(0.1), steps=2.0), "steps"),
        (lambda: PGD(Linf(0.1), steps=True), "steps"),
        (lambda: PGD(Linf(0.1), step_size=0), "step_size"),
        (lambda: PGD(Linf(0.1), step_size="-1/255"), "step_size"),
        (lambda: PGD(Linf(0.1), step_size="x"), "step_size"),
        (lambda: PGD(Linf(0.1), step_size=2), "step_size: 2 is not allowed; allowed: at most 1"),
        (lambda: MIM(Linf(0.1), step_size=2), "step_size: 2 is not allowed; allowed: at most 1"),
        (lambda: RFGSM(Linf(0.1), step_size=10), "step_size: 10 is not allowed; allowed: at most 1"),
        (lambda: PGD(Linf(0.1), restarts=0), "restarts"),
        (lambda: PGD(Linf(0.1), restarts=2, random_start=False), "all the same"),
        (lambda: PGD(Linf(0.1), restarts=2, keep="last"), "throw"),
        (lambda: PGD(Linf(0.1), random_start="no"), "random_start"),
        (lambda: PGD(Linf(0.1), keep="bests"), "nearest: best"),
        (lambda: PGD(Linf(0.1), loss="cw"), "unknown loss"),
        (lambda: PGD(Linf(0.1), loss="kl", random_start=False), "zero at the clean image"),
        (lambda: FGSM(Linf(0.1), loss="kl"), "zero at the clean image"),
        (lambda: APGD(Linf(0.1), steps=0), "steps"),
        (lambda: APGD(Linf(0.1), loss="kl"), "allowed: ce, dlr, margin"),
        (lambda: APGD(Linf(0.1), restarts=2, random_start=False), "all the same"),
        (lambda: Noise(Linf(0.1), draws=0), "draws"),
    ],
)
def test_impossible_settings_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.full((2, 1, 2, 2), 1.01), torch.zeros(2, dtype=torch.long), "inside the model"),
        (torch.full((2, 1, 2, 2), -0.01), torch.zeros(2, dtype=torch.long), "inside the model"),
        (torch.full((2, 1, 2, 2), torch.nan), torch.zeros(2, dtype=torch.long), r"\[0, 1\]"),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.long), "float32 or float64"),
        (torch.zeros(2, 1, 2, 2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.long), "float32 or float64"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.long), "batch of images"),
        (torch.zeros(2, 1, 2, 2), torch.zeros(3, dtype=torch.long), "one integer label"),
        (torch.zeros(2, 1, 2, 2), torch.zeros(2), "one integer label"),
        (torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, dtype=torch.long), "one integer label"),
    ],
)
@pytest.mark.parametrize("make", [PGD, APGD, FGSM, Noise])
def test_impossible_batches_are_refused(make, x, y, words):
    with pytest.raises(UserError, match=words):
        make(Linf(0.1))(lambda inputs: inputs.flatten(1), x, y)


def test_a_forward_without_a_gradient_is_refused():
    x, y = torch.rand(2, 1, 2, 2), torch.zeros(2, dtype=torch.long)
    for make in (PGD, APGD, FGSM):
        with pytest.raises(UserError, match="no gradient"):
            make(Linf(0.1))(lambda inputs: inputs.detach().flatten(1), x, y)
