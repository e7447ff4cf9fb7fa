"""The gradient of every group in a mixed step against separate, whole backward passes written in plain torch."""

import copy
from itertools import combinations_with_replacement, permutations

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustlayers.attacks import PGD, Linf
from robustlayers.core.random import stream
from robustlayers.normalization import NormPolicy, Switch
from robustlayers.selection import Partition
from robustlayers.training import PartialStep

ATTACK = PGD(Linf(0.1), steps=2)
SIGNALS = {
    "natural": {"natural": 1.0},
    "adversarial": {"adversarial": 1.0},
    "frozen": {},
    "mixed": {"natural": 0.3, "adversarial": 0.7},
    "double": {"adversarial": 2.0},
}
PAIRS = [*permutations(SIGNALS, 2), *((same, same) for same in ("natural", "adversarial", "mixed"))]
PARTITIONS = {
    "layers": {"one": "norm", "two": "rest"},
    "entries": {"one": "random(like=norm, seed=1)", "two": "rest"},
    "affine": {"one": "norm.affine", "two": "rest"},
    "statistics": {"one": "norm.statistics", "two": "rest"},
}
TOLERANCE = 1e-10


def batch_norms(model):
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def whole_backward(model, by, x, y):
    """d cross-entropy / d every parameter, each norm layer in the mode `by` says, everything else training."""
    model = copy.deepcopy(model).train()
    for name, module in batch_norms(model):
        module.train(by[name] == "batch")
    functional.cross_entropy(model(x), y).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def crafted(model, by, x, y):
    model = copy.deepcopy(model).eval()
    for name, module in batch_norms(model):
        module.train(by[name] == "batch")
    return ATTACK(model, x, y, generator=stream(0, "attack", 9))


def by_brute_force(model, partition, signals, x, y, switches=None):
    """Sum over groups of the group's mask times its weights times the gradient of each objective alone.

    A layer's mode is `switches[pass]` where given; else crafting is by running statistics, and another pass by the
    batch's unless the layer's running statistics are frozen.
    """
    switches = switches or {}
    frozen = {name: not signals[partition.group_of(f"{name}.running_mean")[0]] for name, _ in batch_norms(model)}
    modes = {
        name: {layer: switches.get(name) or ("running" if name == "craft" or still else "batch")
               for layer, still in frozen.items()}
        for name in ("craft", "clean", "adversarial")
    }  # fmt: skip
    x_adv = crafted(model, modes["craft"], x, y)
    gradient = {
        "natural": whole_backward(model, modes["clean"], x, y),
        "adversarial": whole_backward(model, modes["adversarial"], x_adv, y),
    }
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for group, selection in partition.groups.items():
        for name, mask in selection.parts.items():
            if name in total:
                for objective, weight in signals[group].items():
                    part = weight * gradient[objective][name]
                    total[name] += part if mask is None else torch.where(mask, part, 0.0)
    return total, gradient


def held_by_trained(partition, signals):
    return {
        name
        for group, selection in partition.groups.items()
        if signals[group]
        for name in selection
        if not partition.inventory[name].buffer
    }


@pytest.mark.parametrize("name", ["mlp", "small-cnn", "resnet"])
@pytest.mark.parametrize("groups", PARTITIONS)
def test_group_gradients_equal_separate_backward_passes(net, batch, name, groups):
    model = net(name, torch.float64)
    x, y = batch(dtype=torch.float64)
    partition = Partition(model, PARTITIONS[groups])
    for one, two in PAIRS:
        signals = {"one": SIGNALS[one], "two": SIGNALS[two]}
        expected, parts = by_brute_force(model, partition, signals, x, y)
        step = PartialStep(
            model,
            partition,
            {g: s or "frozen" for g, s in signals.items()},
            optimizer=None,
            attack=ATTACK,
        )
        before = {key: value.clone() for key, value in model.state_dict().items()}
        found = step.gradients(x, y, generator=stream(0, "attack", 9)).by_name
        model.load_state_dict(before)
        assert set(found) == held_by_trained(partition, signals), (one, two)
        for key, value in expected.items():
            error = (found[key] - value).abs().max() if key in found else value.abs().max()
            assert float(error) <= TOLERANCE, (one, two, key)
        # Power: the objectives differ by far more than the tolerance, so a mix-up of groups would show.
        assert all(
            float((parts["natural"][k] - parts["adversarial"][k]).abs().max()) > 1e-6 for k in expected if "weight" in k
        )


@pytest.mark.parametrize("name", ["mlp", "resnet"])
@pytest.mark.parametrize(
    ("craft", "clean", "adversarial", "update"),
    [
        *(("batch", None, None, update) for update in ("auto", True, False)),
        *((None, "running", None, update) for update in ("auto", True, False)),
        *((None, "running", "batch", update) for update in ("auto", True, False)),
        # Where the second pass normalizes by running statistics, it would see what the first has made of them.
        (None, "batch", "running", False),
        ("batch", "running", "running", False),
    ],
)
def test_so_they_do_under_every_norm_policy(net, batch, name, craft, clean, adversarial, update):
    """Above all where a later pass updates the statistics that an earlier pass has normalized by."""
    model = net(name, torch.float64)
    x, y = batch(dtype=torch.float64)
    partition = Partition(model, PARTITIONS["layers"])
    signals = {"one": SIGNALS["mixed"], "two": SIGNALS["natural"]}
    switches = {"clean": clean, "adversarial": adversarial, "craft": craft}
    policy = NormPolicy(
        craft=Switch(craft or "running", False),
        clean=Switch(clean or "auto", update),
        adversarial=Switch(adversarial or "auto", update),
    )
    step = PartialStep(model, partition, signals, optimizer=None, attack=ATTACK, policy=policy)
    expected, _ = by_brute_force(model, partition, signals, x, y, switches)
    found = step.gradients(x, y, generator=stream(0, "attack", 9)).by_name
    for key, value in expected.items():
        assert float((found[key] - value).abs().max()) <= TOLERANCE, key


def test_statistics_updated_while_crafting_do_not_disturb_the_gradient(net, batch):
    """Running statistics normalize and are updated in every pass: each gradient is taken at those before its pass."""
    model = net("mlp", torch.float64)
    x, y = batch(dtype=torch.float64)
    partition = Partition(model, {"all": "all"})
    always = Switch("running", True)
    policy = NormPolicy(craft=always, clean=always, adversarial=always)
    step = PartialStep(model, partition, {"all": SIGNALS["mixed"]}, optimizer=None, attack=ATTACK, policy=policy)

    reference = copy.deepcopy(model)

    def forward(images):  # evaluation by a copy of the statistics, then an update of the real ones
        now = copy.deepcopy(reference).eval()
        logits = torch.func.functional_call(now, dict(reference.named_parameters()), (images,))
        features = [images.detach()]
        for module, frozen in zip(reference, now, strict=True):
            if isinstance(module, nn.BatchNorm1d):
                module.train()(features[-1])
            features.append(frozen(features[-1]).detach())
        return logits

    x_adv = ATTACK(forward, x, y, generator=stream(0, "attack", 9))
    losses = {
        "natural": functional.cross_entropy(forward(x), y),
        "adversarial": functional.cross_entropy(forward(x_adv), y),
    }
    total = sum(weight * losses[objective] for objective, weight in SIGNALS["mixed"].items())
    expected = torch.autograd.grad(total, list(reference.parameters()))
    result = step.gradients(x, y, generator=stream(0, "attack", 9))
    for value, name in zip(expected, dict(model.named_parameters()), strict=True):
        assert float((result.by_name[name] - value).abs().max()) <= TOLERANCE
    for objective, loss in losses.items():
        assert float(result.log.losses[objective] - loss.detach()) == pytest.approx(0, abs=1e-12)
    for (_, one), (_, other) in zip(batch_norms(model), batch_norms(reference), strict=True):
        assert torch.allclose(one.running_var, other.running_var, rtol=0, atol=1e-12)
        assert int(one.num_batches_tracked) == int(other.num_batches_tracked) == 3 + 2 + 1 + 2


def test_three_groups_that_divide_one_tensor(net, batch):
    model = net("mlp", torch.float64)
    x, y = batch(dtype=torch.float64)
    partition = Partition(
        model,
        {
            "a": "random(like=linear.bias, of=1.weight, seed=0)",
            "b": "1.weight - random(like=linear.bias, of=1.weight, seed=0)",
            "c": "rest",
        },
    )
    for signals in permutations(["natural", "adversarial", "frozen"]):
        weights = dict(zip("abc", (SIGNALS[s] for s in signals), strict=True))
        expected, _ = by_brute_force(model, partition, weights, x, y)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        step = PartialStep(model, partition, dict(zip("abc", signals, strict=True)), optimizer=None, attack=ATTACK)
        found = step.gradients(x, y, generator=stream(0, "attack", 9)).by_name
        model.load_state_dict(before)
        assert float((found["1.weight"] - expected["1.weight"]).abs().max()) <= TOLERANCE
        frozen = partition["abc"[signals.index("frozen")]].parts.get("1.weight")
        if frozen is not None:
            assert not found["1.weight"][frozen].any()


def test_a_step_is_a_plain_step_of_the_optimizer_on_these_gradients(net, batch):
    for signals in combinations_with_replacement(["natural", "adversarial"], 2):
        model = net("small-cnn", torch.float64)
        x, y = batch(dtype=torch.float64)
        partition = Partition(model, PARTITIONS["layers"])
        expected, _ = by_brute_force(
            model, partition, {g: SIGNALS[s] for g, s in zip(("one", "two"), signals, strict=True)}, x, y
        )
        wanted = {name: p.detach() - 0.1 * expected[name] for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = PartialStep(
            model, partition, dict(zip(("one", "two"), signals, strict=True)), optimizer=optimizer, attack=ATTACK
        )
        step(x, y, generator=stream(0, "attack", 9))
        for name, parameter in model.named_parameters():
            assert torch.allclose(parameter, wanted[name], rtol=0, atol=1e-12)


def test_a_group_of_everything_is_ordinary_adversarial_training(net, batch):
    """Madry et al. 2018 as everybody writes it, except that attacks are crafted in evaluation mode."""
    model = net("resnet", torch.float64)  # crafting by an equivalent forward may differ in the last bits
    reference = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4) for m in (model, reference)]
    step = PartialStep(
        model, Partition(model, {"all": "all"}), {"all": "adversarial"}, optimizer=optimizers[0], attack=ATTACK
    )
    for index in range(3):
        x, y = batch(seed=index, dtype=torch.float64)
        step(x, y, generator=stream(0, "attack", index))
        reference.eval()
        x_adv = ATTACK(reference, x, y, generator=stream(0, "attack", index))
        reference.train()
        optimizers[1].zero_grad()
        functional.cross_entropy(reference(x_adv), y).backward()
        optimizers[1].step()
    for (name, one), other in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12), name


@pytest.mark.parametrize("signals", [("mixed", "mixed"), ("adversarial", "natural")])
@pytest.mark.parametrize("planted", [False, True])
def test_a_pass_keeps_its_gradient_though_the_next_pass_updates_the_statistics(net, batch, planted, signals):
    """And the check would notice if it did not."""
    model = net("mlp", torch.float64)
    x, y = batch(dtype=torch.float64)
    partition = Partition(model, PARTITIONS["layers"])
    chosen = {"one": SIGNALS[signals[0]], "two": SIGNALS[signals[1]]}
    policy = NormPolicy(clean=Switch("running", False), adversarial=Switch("batch", True))
    step = PartialStep(model, partition, chosen, optimizer=None, attack=ATTACK, policy=policy)
    if planted:  # the clean pass keeps the statistics by reference
        step.binding().moving = {name: set() for name in step.passes}
    expected, _ = by_brute_force(model, partition, chosen, x, y, {"clean": "running", "adversarial": "batch"})
    found = step.gradients(x, y, generator=stream(0, "attack", 9)).by_name
    error = max(float((found[key] - value).abs().max()) for key, value in expected.items())
    assert error > 1e-4 if planted else error <= TOLERANCE
