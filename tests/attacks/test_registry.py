from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustlayers.attacks import (
    APGD,
    ATTACKS,
    FAB,
    FGSM,
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
    is_own,
    label,
    parse,
)
from robustlayers.core.errors import UserError

THREAT = Linf("8/255")


@pytest.mark.parametrize(
    ("text", "attack"),
    [
        ("pgd", PGD(THREAT)),
        ("pgd-20", PGD(THREAT, steps=20)),
        ("pgd-50x5", PGD(THREAT, steps=50, restarts=5)),
        ("pgd-margin-20", PGD(THREAT, steps=20, loss="margin")),
        ("fgsm", FGSM(THREAT)),
        ("fgsm-dlr", FGSM(THREAT, loss="dlr")),
        ("apgd-ce", APGD(THREAT)),
        ("apgd-ce-50", APGD(THREAT, steps=50)),
        ("apgd-dlr", APGD(THREAT, loss="dlr")),
        ("apgd-dlr-50x2", APGD(THREAT, steps=50, loss="dlr", restarts=2)),
        ("noise", Noise(THREAT)),
        ("noise-10", Noise(THREAT, draws=10)),
        ("r-fgsm", RFGSM(THREAT)),
        ("n-fgsm", NFGSM(THREAT)),
        ("n-fgsm-margin", NFGSM(THREAT, loss="margin")),
        ("mim-10", MIM(THREAT)),
        ("mim-dlr-20", MIM(THREAT, steps=20, loss="dlr")),
        ("square", Square(THREAT)),
        ("square-1000", Square(THREAT, queries=1000)),
        ("square-ce-1000", Square(THREAT, queries=1000, loss="ce")),
        ("apgd-t", TargetedAPGD(THREAT)),
        ("apgd-t-50", TargetedAPGD(THREAT, steps=50)),
        ("apgd-t-margin-50x2", TargetedAPGD(THREAT, steps=50, loss="margin", restarts=2)),
        ("fab-t", FAB(THREAT)),
        ("fab-t-20", FAB(THREAT, steps=20)),
        ("gaussian-10", Gaussian(THREAT, draws=10)),
        ("apgd-ce + square-100", WorstOf([APGD(THREAT), Square(THREAT, queries=100)])),
        ({"name": "pgd-20x2", "early_exit": True}, PGD(THREAT, steps=20, restarts=2, early_exit=True)),
        ({"name": "pgd", "momentum": "3/4", "start": "gaussian"}, PGD(THREAT, momentum=0.75, start="gaussian")),
        ({"name": "n-fgsm", "project": False, "noise": 1}, NFGSM(THREAT, noise=1.0, project=False)),
        ({"name": "apgd-t", "targets": 3}, TargetedAPGD(THREAT, targets=3)),
        ({"name": "gaussian", "sigma": "4/255"}, Gaussian(THREAT, sigma=4 / 255)),
        ({"name": "pgd", "steps": 10, "step_size": "2/255"}, PGD(THREAT, steps=10, step_size=2 / 255)),
        ({"name": "pgd-20", "keep": "last"}, PGD(THREAT, steps=20, keep="last")),
        ({"name": "apgd", "loss": "dlr", "random_start": False}, APGD(THREAT, loss="dlr", random_start=False)),
    ],
)
def test_names_and_mappings(text, attack):
    assert parse(text, THREAT) == attack


losses = st.sampled_from(["ce", "margin", "dlr"])
counts = st.integers(1, 300)
attacks = st.one_of(
    st.builds(PGD, st.just(THREAT), steps=counts, restarts=counts, loss=losses),
    st.builds(APGD, st.just(L2(1)), steps=counts, restarts=counts, loss=losses),
    st.builds(FGSM, st.just(THREAT), loss=losses),
    st.builds(Noise, st.just(THREAT), draws=counts),
    st.builds(Gaussian, st.just(THREAT), draws=counts),
    st.builds(RFGSM, st.just(THREAT), loss=losses),
    st.builds(NFGSM, st.just(L2(1)), loss=losses),
    st.builds(MIM, st.just(THREAT), steps=counts, loss=losses),
    st.builds(TargetedAPGD, st.just(THREAT), steps=counts, restarts=counts, loss=losses),
    st.builds(FAB, st.just(THREAT), steps=counts),
    st.builds(Square, st.just(THREAT), queries=counts, loss=st.sampled_from(["ce", "margin"])),
)


@given(attacks)
def test_the_short_name_leads_back_to_the_attack(attack):
    assert parse(label(attack), attack.threat) == attack


@given(st.lists(attacks.filter(lambda attack: attack.threat == THREAT), min_size=2, max_size=4))
def test_several_have_a_short_name_too(parts):
    assert parse(label(WorstOf(parts)), THREAT) == WorstOf(parts)


@pytest.mark.parametrize(
    "text",
    [
        *("pgd-20", "pgd-50x5", "fgsm", "apgd-ce", "apgd-ce-50", "apgd-dlr", "noise", "gaussian", "n-fgsm", "r-fgsm"),
        *("mim-10", "square-1000", "square-5000", "apgd-t", "apgd-t-50", "fab-t", "pgd-20x5", "apgd-ce+square-1000"),
    ],
)
def test_documented_names_are_their_own_short_name(text):
    assert label(parse(text, THREAT)) == text


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("pdg-20", "nearest: .*pgd"),
        ("squre-100", "unknown attack 'squre'; nearest: square"),
        ("m-fgsm", "nearest: .*n-fgsm"),
        ("apgd-tt", "unknown loss of an attack 'tt'"),
        ("n-fgsm-3", "not understood"),
        ("square-10x2", "not understood"),
        ("fab-t-ce", "no loss"),
        ("apgd-t-kl", "not offered for apgd-t"),
        ("pgd-20+", "unknown attack ''"),
        ("pgd-20+pdg", "nearest: .*pgd"),
        ("pgd20", "unknown attack"),
        ("pgd-", "not understood"),
        ("pgd-20x", "not understood"),
        ("pgd-twenty", "unknown loss"),
        ("fgsm-3", "not understood"),
        ("noise-3x2", "not understood"),
        ("noise-ce", "no loss"),
        ("apgd-c", "unknown loss of an attack 'c'"),
        ("pgd-20x0", "restarts"),
        ("", "unknown attack"),
        ({"name": "pgd", "stepsize": 0.1}, "nearest: step_size"),
        ({"name": "pgd", "threat": THREAT}, "unknown option"),
        ({"name": "pgd-20", "steps": 10}, "given twice"),
        ({"name": "pgd", "steps": "10"}, "steps: '10'"),
        ({"name": "pgd", "step_size": "2/0"}, "divides by zero"),
        ({"steps": 3}, "mapping with a name"),
        (20, "mapping with a name"),
    ],
)
def test_mistakes_are_named(what, words):
    with pytest.raises(UserError, match=words):
        parse(what, THREAT)


def test_foreign_attacks_are_labeled_by_their_name_or_class():
    @dataclass
    class Spatial:
        threat: Threat

    class Named:
        name = "spatial-5000"

    assert label(Spatial(THREAT)) == "spatial" and label(Named()) == "spatial-5000"
    assert not is_own(Spatial(THREAT)) and not is_own(WorstOf([PGD(THREAT), Spatial(THREAT)]))
    assert label(WorstOf([PGD(THREAT), Spatial(THREAT)])) == "pgd-10+spatial"


def test_ours_are_known_as_ours():
    ours = [kind(THREAT) for kind in ATTACKS.values()]
    assert all(is_own(attack) for attack in (*ours, WorstOf(ours), Transfer(MIM(THREAT), lambda x: x)))
    assert label(Transfer(MIM(THREAT), lambda x: x, name="resnet")) == "mim-10 from resnet"


def test_descriptions_say_what_decides_the_strength():
    assert parse("pgd-50x5", THREAT).describe() == "pgd-50, linf 8/255, step 0.4/255, 5 restarts, best iterate"
    attack = PGD(L2(0.5), steps=10, step_size=0.1, random_start=False, loss="margin", keep="last")
    assert attack.describe() == ("pgd-10, l2 0.5, step 0.1, 1 restart, last iterate, loss margin, from the clean image")
