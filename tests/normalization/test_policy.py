from itertools import product

import pytest
import torch
from torch import nn

from robustlayers.core.errors import UserError
from robustlayers.normalization import PASSES, NormPolicy, Setting, Switch, habit, policy_table
from robustlayers.normalization.layers import DualBatchNorm, FilmNorm
from robustlayers.normalization.policy import layer_switches, policy_content
from robustlayers.selection import Inventory


@pytest.mark.parametrize(("trained", "here"), [(False, False), (True, False), (True, True)])
def test_left_to_itself_a_pass_follows_the_signal_of_the_statistics(trained, here):
    expected = {(False, False): ("running", False), (True, False): ("batch", False), (True, True): ("batch", True)}
    assert Switch().resolve(trained, here) == Setting(*expected[trained, here])


@pytest.mark.parametrize(
    ("by", "update", "trained", "here"),
    list(
        product(["auto", "batch", "running", "frozen", "mixture"], ["auto", True, False], [True, False], [True, False])
    ),
)
def test_what_is_said_is_done_but_frozen_statistics_are_never_updated(by, update, trained, here):
    alpha = 0.3 if by == "mixture" else None
    momentum = None if update is False else 0.5
    found = Switch(by, update, momentum, alpha, branch="main", condition=0.2).resolve(trained, here)
    assert found.by == (by if by != "auto" else "batch" if trained else "running")
    assert found.update is (trained and (here if update == "auto" else update))
    assert found.momentum == (0.5 if found.update else None)
    assert (found.alpha, found.branch, found.condition) == (alpha, "main", 0.2)


def test_the_default_crafts_and_evaluates_by_running_statistics_without_a_trace():
    policy = NormPolicy()
    for trained, here in product([True, False], repeat=2):
        assert policy["craft"].resolve(trained, here) == policy["evaluate"].resolve(trained, here)
        assert policy["craft"].resolve(trained, here) == Setting("running", False)
        assert not policy["ascent"].resolve(trained, here).update
    assert policy["clean"] == policy["adversarial"] == Switch()
    assert policy.extra == ()


def test_every_pass_has_a_switch_and_a_text():
    policy = NormPolicy(craft=Switch("batch", True), clean=Switch("running", "auto"))
    assert [policy[name] for name in PASSES if name not in policy.extra and name in policy.switches] == [
        Switch("batch", True),
        Switch("running", "auto"),
        Switch(),
        Switch("auto", False),
        Switch("running", False),
    ]
    assert str(policy) == (
        "craft: batch, update; clean: running, update by signal; adversarial: by signal, update by signal; "
        "ascent: by signal, no update; evaluate: running, no update"
    )
    with pytest.raises(UserError, match="unknown pass of this norm policy 'log'"):
        policy["log"]
    assert str(habit("mart")).startswith("mart (craft: running, no update; clean: by signal, update;")


def test_the_table_has_a_row_for_each_pass_and_group_of_layers():
    policy = NormPolicy(
        craft=Switch("batch", True, momentum="cumulative", branch="auxiliary"),
        log=Switch("mixture", False, alpha=0.25),
        statistics="clean",
        layers={"stage(2)": {"clean": Switch("frozen", condition=0.5), "log": Switch("batch", True, momentum=0.2)}},
    )
    assert [tuple(row.values()) for row in policy_table(policy)] == [
        ("all", "craft", "batch", "update, cumulative", "auxiliary"),
        ("all", "clean", "by signal", "update, steps that craft: only here", ""),
        ("all", "adversarial", "by signal", "update, steps that craft: not here", ""),
        ("all", "ascent", "by signal", "no update", ""),
        ("all", "log", "0.25 batch + 0.75 running", "no update", ""),
        ("all", "evaluate", "running", "no update", ""),
        ("stage(2)", "clean", "frozen", "update, steps that craft: only here", "condition 0.5"),
        ("stage(2)", "log", "batch", "update, momentum 0.2", ""),
    ]
    assert str(policy).endswith(
        "statistics of the clean pass alone; stage(2): clean frozen, update by signal, condition 0.5, "
        "log batch, update, momentum 0.2"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "runing"}, "unknown statistics to normalize by 'runing'; nearest: running; allowed: auto, batch, "),
        ({"update": "maybe"}, "update: 'maybe' is not allowed; allowed: true, false or auto"),
        (
            {"by": "mixture"},
            "alpha, the share of the batch from 0 to 1, goes with by: mixture, and the other way round",
        ),
        ({"by": "batch", "alpha": 0.5}, "alpha, the share of the batch from 0 to 1, goes with by: mixture"),
        ({"by": "mixture", "alpha": 1.5}, "alpha: 1.5 is not allowed; allowed: 0 to 1, the share of the batch"),
        ({"momentum": 0}, "momentum: 0 is not allowed; allowed: more than 0 up to 1, or cumulative"),
        ({"momentum": "own"}, "momentum: own is not allowed; allowed: more than 0 up to 1, or cumulative"),
        ({"update": False, "momentum": 0.1}, "momentum: this pass updates nothing; leave the momentum out"),
        ({"condition": 2.0}, "condition: 2 is not allowed; allowed: 0 to 1"),
    ],
)
def test_a_switch_that_makes_no_sense_is_an_error(arguments, message):
    with pytest.raises(UserError) as error:
        Switch(**arguments)
    assert str(error.value).startswith(message)


def test_numbers_are_read_as_the_field_writes_them():
    switch = Switch("mixture", True, momentum="1/4", alpha="1/8")
    assert switch.resolve(True, True) == Setting("mixture", True, 0.25, 0.125)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": {"norm": {"crafting": Switch()}}}, "unknown pass of layers 'norm' 'crafting'; nearest: craft;"),
        ({"layers": {"norm": {"log": Switch()}}}, "layers 'norm': no step makes the pass 'log' under this policy"),
        ({"statistics": "noisy"}, "unknown pass that the statistics are of 'noisy'"),
    ],
)
def test_a_policy_that_makes_no_sense_is_an_error(arguments, message):
    with pytest.raises(UserError) as error:
        NormPolicy(**arguments)
    assert str(error.value).startswith(message)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), DualBatchNorm(nn.BatchNorm2d(2)), nn.GroupNorm(1, 2))


def test_layers_are_meant_as_a_whole_with_all_that_is_inside():
    model = net()
    switches = {"craft": Switch("batch")}
    found = layer_switches(NormPolicy(layers={"'2.main.weight'": switches}), Inventory(model))
    assert set(found) == {model[2], model[2].main, model[2].auxiliary}
    assert all(own is switches for own in found.values())


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            {"layers": {"norm": {"craft": Switch()}, "'2'": {"clean": Switch()}}},
            "layers \"'2'\" and 'norm' overlap: 2, 2.main, 2.auxiliary; each layer has one policy",
        ),
        (
            {"layers": {"'0'": {"craft": Switch()}}},
            "layers \"'0'\": selector \"'0'\" picks no norm layer of Sequential",
        ),
        ({"layers": {"nrm": {"craft": Switch()}}}, "layers 'nrm': unknown selector 'nrm'"),
        (
            {"craft": Switch("running", False, branch="axiliary")},
            "craft: unknown branch 'axiliary'; nearest: auxiliary",
        ),
        (
            {"layers": {"'1'": {"craft": Switch(branch="main")}}},
            "layers \"'1'\": branch 'main': no norm layer has branches; norm=dual, for one, makes them",
        ),
        ({"clean": Switch(condition=0.5)}, "clean: condition: no norm layer is conditional (norm=film)"),
    ],
)
def test_a_policy_that_does_not_fit_the_model_is_an_error(policy, message):
    with pytest.raises(UserError) as error:
        layer_switches(NormPolicy(**policy), Inventory(net()))
    assert message.split(";")[0] in str(error.value)


def test_a_branch_or_condition_that_some_layers_have_is_none():
    model = nn.Sequential(*net(), FilmNorm(nn.BatchNorm2d(2)))
    layer_switches(NormPolicy(craft=Switch(branch="auxiliary"), clean=Switch(condition=0.5)), Inventory(model))


def test_the_identity_of_a_policy_has_what_decides_and_leaves_out_what_is_as_ever():
    running, signal = {"by": "running", "update": False}, {"by": "auto", "update": "auto"}
    assert policy_content(habit("standard")) == {"craft": running, "clean": signal, "adversarial": signal}
    changes = (
        {},
        {"clean": Switch("mixture", alpha=0.5)},
        {"clean": Switch("mixture", alpha=0.4)},
        {"clean": Switch(momentum=0.4)},
        {"clean": Switch(branch="main")},
        {"clean": Switch(condition=0.0)},
        {"ascent": Switch("auto", True)},
        {"evaluate": Switch("batch", False)},
        {"log": Switch()},
        {"again": Switch()},
        {"statistics": "clean"},
        {"layers": {"norm": {"clean": Switch()}}},
    )
    contents = [policy_content(NormPolicy(**change)) for change in changes]
    assert all(contents.count(content) == 1 for content in contents)
