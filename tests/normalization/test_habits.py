"""How many updates of the running statistics one step makes under each published habit, stated and counted."""

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

from robustlayers.attacks import PGD, Linf
from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.data import Images
from robustlayers.normalization import HABITS, NormPolicy, Switch, habit, habits
from robustlayers.normalization.layers import RandomNorm
from robustlayers.selection import Partition
from robustlayers.study.phases import build_policy
from robustlayers.study.schema import NormalizationConfig
from robustlayers.training import PartialStep, PhaseTrainer

PGD_10 = PGD(Linf(0.1), steps=10, keep="last")
ADVERSARIAL, BOTH, NATURAL = "adversarial", {"natural": 0.5, "adversarial": 0.5}, "natural"

# The table of the module's docstring with k = 10.
UPDATES = {
    "standard": (1, 2, 1),
    "rice": (11 + 1 + 1, 11 + 1 + 1 + 1, 1),
    "trades": (2, 3, 1),
    "mart": (1, 2, 1),
    "clean-statistics": (1, 1, 1),
    "adversarial-statistics": (1, 1, 1),
    "frozen": (0, 0, 0),
    "batch-at-test": (1, 2, 1),
}
# Forwards that a habit adds to those of the attack and the objectives.
ADDED = {"rice": (2, 2, 0), "trades": (1, 1, 0), "clean-statistics": (1, 0, 0)}


def make():
    generator = stream(0, "net")
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5), nn.BatchNorm1d(5)
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


def data(seed=0):
    generator = stream(seed, "data")
    x = torch.rand(16, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (16,), generator=generator)


def step_of(model, signal, policy, groups=None, attack=PGD_10):
    groups = groups or {"all": signal}
    selectors = {group: "all" if group == "all" else group for group in groups}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return PartialStep(model, Partition(model, selectors), groups, optimizer=optimizer, attack=attack, policy=policy)


def statistics(model):
    return {name: t.clone() for name, t in model.state_dict().items() if "running" in name or "tracked" in name}


def test_every_habit_is_in_the_table():
    assert set(UPDATES) == set(HABITS) and set(ADDED) < set(HABITS)
    for name, policy in HABITS.items():
        assert policy.name == name and f"| `{name}` |" in habits.__doc__
    with pytest.raises(UserError, match="unknown habit of normalization 'rise'; nearest: rice"):
        habit("rise")


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize(("place", "signal"), list(enumerate([ADVERSARIAL, BOTH, NATURAL])))
def test_updates_and_forwards_of_one_step(name, place, signal):
    model = make()
    step = step_of(model, signal, name)
    log = step(*data())
    counted = {key: int(t) for key, t in model.state_dict().items() if "tracked" in key}
    assert set(counted.values()) == {UPDATES[name][place]}
    assert step.statistics_updates() == {key.rpartition(".")[0]: count for key, count in counted.items()}
    plain = (10 if place < 2 else 0) + (2 if place == 1 else 1)
    assert log.forward_passes == plain + ADDED.get(name, (0, 0, 0))[place] == step.passes_per_batch()[0]
    assert log.backward_passes == step.passes_per_batch()[1]
    assert ("log" in log.correct) == (name == "rice" and place < 2)


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_norm_layers_are_frozen_under_every_habit(name, optimizer, bits):
    model = make()
    step = step_of(model, None, name, {"norm": "frozen", "rest": BOTH})
    if optimizer == "adamw":
        step.optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    before = bits(model)
    for seed in range(2):
        step(*data(seed))
    changed = {key for key, value in bits(model).items() if value != before[key]}
    assert changed == {"0.weight", "0.bias", "4.weight", "4.bias"}
    assert set(step.statistics_updates().values()) == {0}


def test_rice_is_the_published_loop_with_its_scoring_and_logging_forwards():
    """A loop that never leaves train mode: 10 crafting forwards, the 11th that scores, the step, the clean log."""
    x, y = data()
    model = make()
    log = step_of(model, ADVERSARIAL, "rice")(x, y, generator=stream(0, "attack"))
    reference = make().train()
    x_adv = PGD_10(reference, x, y, generator=stream(0, "attack"))
    with torch.no_grad():
        reference(x_adv)
    functional.cross_entropy(reference(x_adv), y).backward()
    torch.optim.SGD(reference.parameters(), lr=0.05).step()
    logged = reference(x)
    assert int(log.correct["log"]) == int((logged.argmax(1) == y).sum())
    assert int(reference[1].num_batches_tracked) == 13
    for (key, one), two in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.allclose(one, two, rtol=0, atol=1e-12), key


def test_the_clean_images_are_an_eighth_of_rices_statistics():
    """0.1 / (1 - 0.9^13) = 13 % of what 13 forwards wrote, the last being the clean one."""
    moved = []
    for last in (0.0, 1.0):
        layer = nn.BatchNorm1d(1)
        for value in [0.0] * 12 + [last]:
            layer(torch.tensor([[value - 1], [value + 1]]))
        moved.append(layer.running_mean.item())
    assert (moved[1] - moved[0]) / (1 - 0.9**13) == pytest.approx(0.134, abs=1e-3)


def test_an_attack_that_scores_its_last_iterate_is_not_scored_again():
    step = step_of(make(), ADVERSARIAL, "rice", attack=PGD(Linf(0.1), steps=10))
    log = step(*data())
    assert step.attack.forward_passes == 11 and log.forward_passes == 13
    assert set(step.statistics_updates().values()) == {13}
    assert {int(t) for name, t in step.model.state_dict().items() if "tracked" in name} == {13}


def test_trades_sees_the_clean_images_twice():
    x, y = data()
    model = make()
    step_of(model, BOTH, "trades")(x, y, generator=stream(0, "attack"))
    reference = make()
    x_adv = PGD_10(reference.eval(), x, y, generator=stream(0, "attack"))
    reference.train()
    for images in (x, x_adv, x):
        reference(images)
    for key, value in statistics(reference).items():
        assert torch.allclose(model.state_dict()[key], value, rtol=0, atol=1e-12), key


@pytest.mark.parametrize("signal", [ADVERSARIAL, BOTH])
@pytest.mark.parametrize("name", ["clean-statistics", "adversarial-statistics"])
def test_statistics_of_one_kind_of_images(name, signal):
    x, y = data()
    model = make()
    step_of(model, signal, name)(x, y, generator=stream(0, "attack"))
    reference = make()
    x_adv = PGD_10(copy.deepcopy(reference).eval(), x, y, generator=stream(0, "attack"))
    reference.train()(x if name == "clean-statistics" else x_adv)
    for key, value in statistics(reference).items():
        assert torch.allclose(model.state_dict()[key], value, rtol=0, atol=1e-12), key


def test_clean_statistics_change_no_gradient_of_adversarial_training():
    """The added pass trains nothing: the weights are those of adversarial training, the statistics differ."""
    one, two = make(), make()
    step_of(one, ADVERSARIAL, "clean-statistics")(*data())
    step_of(two, ADVERSARIAL, None)(*data())
    for (key, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b) == ("running" not in key), key


def test_no_pass_is_added_for_statistics_that_are_frozen():
    step = step_of(make(), None, "clean-statistics", {"norm": "frozen", "rest": "adversarial"})
    assert step.passes == ("adversarial",)


@pytest.mark.parametrize("name", UPDATES)
def test_gradients_alone_move_statistics_as_often_as_a_step(name):
    model = make()
    found = step_of(model, BOTH, name).gradients(*data())
    assert {int(t) for key, t in model.state_dict().items() if "tracked" in key} == {UPDATES[name][1]}
    assert found.log.forward_passes == step_of(make(), BOTH, name).passes_per_batch()[0]


RANDOM = NormPolicy(layers={"'1'": {"adversarial": Switch("mixture", alpha=0.5)}})


@pytest.mark.parametrize("policy", ["rice", "trades", "clean-statistics", RANDOM, "moving"])
def test_a_phase_that_is_resumed_goes_on_as_one_that_never_stopped(policy):
    """Statistics of the phase's start, draws of norm layers and added passes included."""
    pixels = torch.randint(0, 256, (21, 1, 8, 8), generator=stream(0, "pixels"), dtype=torch.uint8)
    images = Images(pixels, torch.arange(21) % 5)
    chosen = habit(policy) if isinstance(policy, str) and policy != "moving" else policy
    if policy == "moving":
        chosen = NormPolicy(craft=Switch("frozen", False), clean=Switch("frozen"), adversarial=Switch("frozen"))

    def trainer():
        model = make().float()
        model[5] = RandomNorm(nn.BatchNorm1d(5), kinds=("batch", "layer"))
        attack = PGD(Linf(0.1), steps=2, keep="last")
        return PhaseTrainer(
            model, {"all": "all"}, {"all": BOTH}, images, epochs=2, attack=attack, batch_size=8, policy=chosen
        )

    whole = trainer()
    whole.train_epoch()
    whole.run(1)
    state = {name: tensor.clone() for name, tensor in whole.state().items()}
    whole.run()
    resumed = trainer()
    resumed.load_state(state)
    resumed.run()
    for (key, one), two in zip(whole.state().items(), resumed.state().values(), strict=True):
        assert torch.equal(one, two), key
    forward, backward = whole.passes()
    assert forward == whole.step.passes_per_batch()[0] * 42 and backward == whole.step.passes_per_batch()[1] * 42


# -- in a study ----------------------------------------------------------------------------------------------------


def policy_of(value, groups=None):
    return build_policy(NormalizationConfig.model_validate(value), groups)


@pytest.mark.parametrize("name", UPDATES)
def test_a_habit_is_one_word_in_a_study(name):
    assert policy_of(name) == policy_of({"habit": name}) == habit(name)
    assert policy_of(name).name == name


def test_the_schema_knows_every_habit():
    kind = NormalizationConfig.model_json_schema()["properties"]["habit"]["anyOf"][0]["enum"]
    assert set(kind) == set(HABITS)


def test_a_study_changes_single_passes_of_a_habit_and_has_exceptions_by_layer():
    policy = policy_of(
        {
            "habit": "rice",
            "adversarial": {"by": "mixture", "alpha": "1/4"},
            "layers": {"early": {"craft": {"by": "batch"}}, "norm & stage(4)": "frozen"},
        },
        {"early": "stem | stage(1)"},
    )
    assert policy.adversarial == Switch("mixture", alpha=0.25) and policy.craft == habit("rice").craft
    assert policy.extra == ("score", "log") and policy.name == ""
    assert list(policy.layers) == ["stem | stage(1)", "norm & stage(4)"]
    assert policy.layers["stem | stage(1)"] == {"craft": Switch("batch")}
    frozen = {name: Switch("running", False) for name in ("craft", "clean", "adversarial", "ascent", "evaluate")}
    assert policy.layers["norm & stage(4)"] == frozen


def test_what_a_study_wrote_before_means_what_it_did():
    assert policy_of({}) == NormPolicy()
    assert policy_of({"craft": {"by": "batch"}}) == NormPolicy(craft=Switch("batch", "auto"))
    assert policy_of({"ascent": {"update": True}}) == NormPolicy(ascent=Switch("auto", True))


@pytest.mark.parametrize(
    "value",
    [
        {"clean": {"by": "mixture"}},
        {"clean": {"by": "batch", "alpha": 0.5}},
        {"clean": {"by": "mixture", "alpha": 2}},
        {"clean": {"update": False, "momentum": 0.5}},
        {"clean": {"momentum": 0}},
        {"clean": {"momentum": "own"}},
        {"clean": {"condition": 2}},
        {"habit": "rise"},
        "rise",
        ["rice"],
        {"layers": {"norm": "rise"}},
        {"layers": {"norm": {"layers": {}}}},
    ],
)
def test_what_makes_no_sense_is_no_policy_of_a_study(value):
    with pytest.raises(ValidationError):
        policy_of(value)


def test_an_exception_for_a_pass_that_is_not_made_is_an_error():
    with pytest.raises(UserError, match="layers 'norm': no step makes the pass 'log' under this policy"):
        policy_of({"layers": {"norm": {"log": {}}}})
    assert policy_of({"layers": {"norm": "rice"}}).layers["norm"].keys() == NormPolicy().switches.keys()
