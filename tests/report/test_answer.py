"""The sentences on top: composed from the data, plain about what is not known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from robustlayers.report.answer import answer


@pytest.fixture
def small(fake):
    return fake.make_summary(with_pictures=False, with_curves=False)


def with_verdicts(summary, *verdicts):
    best = [claim for claim in summary.claims if claim.checkpoint == "best"]
    return replace(summary, claims=[replace(claim, verdict=word) for claim, word in zip(best, verdicts, strict=False)])


@pytest.mark.parametrize(
    ("verdicts", "lead"),
    [
        ((), "This study makes no claims: its numbers are shown as they are, without a test."),
        (("undecided",), "The claim is undecided."),
        (("supported", "supported"), "All 2 claims are supported."),
        (
            ("undecided", "supported", "contradicted"),
            "Of 3 claims, 1 is supported, 1 is contradicted and 1 is undecided.",
        ),
        (("undecided", "undecided", "supported"), "Of 3 claims, 1 is supported and 2 are undecided."),
    ],
)
def test_tally(small, verdicts, lead):
    assert answer(with_verdicts(small, *verdicts)).lead.startswith(lead)


def test_extremes_follow_the_data(small):
    assert "Most robust is the arm “all”: 58.4% robust, 76.7% clean." in answer(small).lead
    assert "Most accurate on clean images is the arm “none”: 0.6% robust, 89.2% clean." in answer(small).lead
    swapped = [replace(arm, name="zero") if arm.name == "none" else arm for arm in small.arms if arm.name != "all"]
    lead = answer(replace(small, arms=swapped)).lead
    assert "Most robust is the arm “all-but-norm”" in lead
    assert "the arm “zero”" in lead


def test_one_arm_can_be_best_in_both(small):
    arm = small.arms[0]
    better = replace(
        arm, results={"best": {"clean": dict.fromkeys(range(3), 0.95), "robust": dict.fromkeys(range(3), 0.9)}}
    )
    lead = answer(replace(small, arms=[better, small.arms[1]])).lead
    assert (
        "The arm “none” has both the highest robust and the highest clean accuracy: 90.0% robust, 95.0% clean." in lead
    )


def test_arms_are_ordered_by_robustness(small):
    said = answer(small).standings
    means = [one.robust.mean for one in said]
    assert means == sorted(means, reverse=True)
    assert said[0].text.endswith("trains 75,002 parameters (100%) in its last phase.")
    assert said[-1].text.endswith("trains no parameters in its last phase.")


def test_one_seed_is_said_plainly(fake):
    said = answer(fake.make_summary(seeds=(0,), with_pictures=False, with_curves=False))
    assert said.lead.endswith("There is one seed only: its numbers show no spread, and nothing can be tested.")
    assert "one seed" in said.setting
    assert all("one seed, no interval" in one.text for one in said.standings)
    robust = [one for one in said.verdicts if "robust" in one.claim.that]
    assert robust
    assert all("one seed cannot show spread" in one.text for one in robust)


def test_every_checkpoint_has_its_say(small):
    first = answer(small).verdicts[0]
    assert first.claim.checkpoint == "best"
    last = next(claim for claim in small.claims if claim.checkpoint == "last" and claim.that == first.claim.that)
    assert first.elsewhere == f"checkpoint last: {last.verdict}, {100 * last.mean:+.1f} points"


def test_a_claim_judged_at_another_checkpoint_only_is_not_lost(small):
    last = [claim for claim in small.claims if claim.checkpoint == "last"][:1]
    said = answer(replace(small, claims=last))
    assert said.lead.startswith(f"The claim is {last[0].verdict}.")
    assert said.verdicts[0].text.endswith("Checkpoint last.")


def test_setting_names_threat_attacks_and_images(small):
    assert answer(small).setting == (
        "Robust accuracy (linf 12/255) is the share of images that stay correctly classified under each of pgd-20 and "
        "apgd-ce. Measured on 2,000 test images, checkpoint best, means over 3 seeds with 95% t intervals."
    )
    assert "classified under pgd-20." in answer(replace(small, attacks=["pgd-20"])).setting
    assert answer(replace(small, attacks=[])).setting.startswith("Measured on 2,000 test images")


def test_a_broken_promise_is_a_caution(small):
    arm = small.arms[1]
    ledger = [
        replace(line, kept=False, moved_parameters=12) if line.group == "rest" and line.seed == 2 else line
        for line in arm.ledger
    ]
    said = answer(replace(small, arms=[replace(arm, ledger=ledger)]))
    assert said.cautions == (
        "Arm “norm”: a promise was broken in phase adapt, group rest, seed 2: frozen, but 12 of 74,522 parameters and "
        "0 of 0 buffer entries moved.",
    )


def test_flags_of_rows_are_cautions_once(small):
    rows = [replace(row, flags="gradient masking suspected; few restarts") for row in small.rows]
    said = answer(replace(small, rows=rows))
    assert len(said.cautions) == 2
    assert said.cautions[0].startswith("gradient masking suspected (none, norm, head, random, all and all-but-norm).")


def test_no_caution_without_cause(small):
    assert answer(small).cautions == ()


def test_arms_whose_names_hold_a_comma_can_be_told_apart(small):
    rows = [replace(row, arm=f"{row.arm}, rice", flags="few restarts") for row in small.rows]
    (first, *_) = answer(replace(small, rows=rows)).cautions
    assert first.startswith("few restarts (“none, rice”, “norm, rice”, ")
