from itertools import product

import pytest

from robustlayers.normalization import PASSES, NormPolicy, Switch


@pytest.mark.parametrize(("trained", "here"), [(False, False), (True, False), (True, True)])
def test_left_to_itself_a_pass_follows_the_signal_of_the_statistics(trained, here):
    expected = {(False, False): ("running", False), (True, False): ("batch", False), (True, True): ("batch", True)}
    assert Switch().resolve(trained, here) == expected[trained, here]


@pytest.mark.parametrize(
    ("by", "update", "trained", "here"),
    list(product(["auto", "batch", "running"], ["auto", True, False], [True, False], [True, False])),
)
def test_what_is_said_is_done_but_frozen_statistics_are_never_updated(by, update, trained, here):
    found_by, found_update = Switch(by, update).resolve(trained, here)
    assert found_by == (by if by != "auto" else "batch" if trained else "running")
    assert found_update is (trained and (here if update == "auto" else update))


def test_the_default_crafts_and_evaluates_by_running_statistics_without_a_trace():
    policy = NormPolicy()
    for trained, here in product([True, False], repeat=2):
        assert policy["craft"].resolve(trained, here) == policy["evaluate"].resolve(trained, here) == ("running", False)
    assert policy["clean"] == policy["adversarial"] == Switch()


def test_every_pass_has_a_switch_and_a_text():
    policy = NormPolicy(craft=Switch("batch", True), clean=Switch("running", "auto"))
    assert [policy[name] for name in PASSES] == [
        Switch("batch", True),
        Switch("running", "auto"),
        Switch(),
        Switch("running", False),
    ]
    assert str(policy) == (
        "craft: batch, update; clean: running, update by signal; adversarial: by signal, update by signal; "
        "evaluate: running, no update"
    )
