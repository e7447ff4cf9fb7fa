from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustlayers.attacks import APGD, FGSM, L2, PGD, Linf, Noise, Threat, label, parse
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
)


@given(attacks)
def test_the_short_name_leads_back_to_the_attack(attack):
    assert parse(label(attack), attack.threat) == attack


@pytest.mark.parametrize("text", ["pgd-20", "pgd-50x5", "fgsm", "apgd-ce", "apgd-ce-50", "apgd-dlr", "noise"])
def test_documented_names_are_their_own_short_name(text):
    assert label(parse(text, THREAT)) == text


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("pdg-20", "nearest: .*pgd"),
        ("square", "unknown attack 'square'"),
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
    class Square:
        threat: Threat

    class Named:
        name = "square-5000"

    assert label(Square(THREAT)) == "square" and label(Named()) == "square-5000"


def test_descriptions_say_what_decides_the_strength():
    assert parse("pgd-50x5", THREAT).describe() == "pgd-50, linf 8/255, step 0.4/255, 5 restarts, best iterate"
    attack = PGD(L2(0.5), steps=10, step_size=0.1, random_start=False, loss="margin", keep="last")
    assert attack.describe() == ("pgd-10, l2 0.5, step 0.1, 1 restart, last iterate, loss margin, from the clean image")
