"""Verdicts over seeds: against scipy, at the edges where no test is possible, and under the null."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import scipy.stats

from robustlayers.core.errors import UserError
from robustlayers.study.claims import judge, parse
from robustlayers.study.statistics import holm
from robustlayers.study.summary import ClaimResult

FACTORS = {"group": ["none", "norm", "all"]}
METRICS = ["clean", "robust", "passes"]

Table = Mapping[tuple[str, str, str], Mapping[int, float]]  # (metric, group, checkpoint) -> seed -> value


def verdicts(
    table: Table,
    *claims: str,
    checkpoints: tuple[str, ...] = ("last",),
    level: float = 0.95,
    facts: Sequence[str] = (),
) -> list[ClaimResult]:
    bound = [(f"say {text}", parse(text).bind(FACTORS, METRICS, ["best", "last"])) for text in claims]

    def lookup(metric: str, levels: dict[str, str], checkpoint: str) -> Mapping[int, float]:
        return table.get((metric, levels["group"], checkpoint), {})

    return judge(bound, lookup, checkpoints, level, facts)


def robust(checkpoint: str = "last", **arms: list[float]) -> dict[tuple[str, str, str], dict[int, float]]:
    return {("robust", group, checkpoint): dict(enumerate(values)) for group, values in arms.items()}


def test_a_supported_claim_carries_its_numbers() -> None:
    table = robust(norm=[0.523, 0.531, 0.540], none=[0.401, 0.405, 0.419])
    (result,) = verdicts(table, "robust[norm] > robust[none]")
    expected = scipy.stats.ttest_rel([0.523, 0.531, 0.540], [0.401, 0.405, 0.419], alternative="greater")
    assert result.verdict == "supported"
    assert (result.say, result.that) == ("say robust[norm] > robust[none]", "robust[norm] > robust[none]")
    assert (result.checkpoint, list(result.seeds)) == ("last", [0, 1, 2])
    assert list(result.differences) == pytest.approx([0.122, 0.126, 0.121])
    assert result.p == result.p_adjusted == pytest.approx(expected.pvalue, rel=1e-8)
    both = scipy.stats.ttest_rel([0.523, 0.531, 0.540], [0.401, 0.405, 0.419]).confidence_interval(0.95)
    assert (result.mean, result.low, result.high) == pytest.approx((0.123, both.low, both.high), rel=1e-8)
    assert result.reason == "difference 12.3 points, 95% CI 11.6 to 13.0, p < 0.001 (Holm), n = 3"


def test_the_opposite_is_contradicted_and_the_difference_is_turned() -> None:
    table = robust(norm=[0.523, 0.531, 0.540], none=[0.401, 0.405, 0.419])
    (result,) = verdicts(table, "robust[norm] < robust[none]")
    assert result.verdict == "contradicted"
    assert result.mean == pytest.approx(-0.123)
    assert result.p is not None and result.p > 0.99
    assert result.reason == ("difference -12.3 points, 95% CI -13.0 to -11.6, p < 0.001 (Holm) for the opposite, n = 3")


def test_a_difference_within_the_noise_is_undecided() -> None:
    (result,) = verdicts(robust(norm=[0.50, 0.54, 0.52], none=[0.49, 0.55, 0.50]), "robust[norm] > robust[none]")
    assert result.verdict == "undecided"
    assert result.reason == "difference 0.7 points, 95% CI -3.1 to 4.5, p = 0.264 (Holm), n = 3"
    (result,) = verdicts(
        robust(norm=[0.50, 0.54, 0.52], none=[0.49, 0.55, 0.50]), "robust[norm] > robust[none]", level=0.5
    )
    assert result.verdict == "supported"
    assert "50% CI" in result.reason


def test_pairing_is_by_seed_and_not_by_order() -> None:
    table = {
        ("robust", "norm", "last"): {7: 0.9, 3: 0.5, 5: 0.7, 1: 0.1},
        ("robust", "none", "last"): {3: 0.41, 5: 0.60, 7: 0.79, 9: 0.2},
    }
    (result,) = verdicts(table, "robust[norm] > robust[none]")
    assert list(result.seeds) == [3, 5, 7]
    assert list(result.differences) == pytest.approx([0.09, 0.10, 0.11])
    assert result.verdict == "supported"  # without the pairing the spread of the arms would hide it
    assert result.reason.endswith("n = 3; left out, as not every arm has finished: seeds 1, 9")


def test_too_few_seeds_decide_nothing() -> None:
    (result,) = verdicts({}, "robust[norm] > robust[none]")
    assert (result.verdict, result.reason) == ("undecided", "no finished seeds")
    assert (result.mean, result.low, result.p, result.p_adjusted, list(result.seeds)) == (None, None, None, None, [])
    (result,) = verdicts(robust(norm=[0.5, 0.6]), "robust[norm] > robust[none]")
    assert (result.verdict, result.reason) == ("undecided", "no seed has finished in every arm of the claim")
    (result,) = verdicts(robust(norm=[0.5], none=[0.4]), "robust[norm] > robust[none]")
    assert result.verdict == "undecided"
    assert result.reason == "difference 10.0 points, n = 1; one seed cannot show spread"
    assert (result.low, result.high, result.p) == (None, None, None)


@pytest.mark.parametrize(
    ("claim", "values", "verdict"),
    [
        ("robust[norm] > robust[none]", [0.3, 0.4], "supported"),
        ("robust[norm] < robust[none]", [0.3, 0.4], "contradicted"),
        ("robust[norm] > robust[none]", [0.2, 0.3], "undecided"),
        ("robust[norm] < robust[none]", [0.2, 0.3], "undecided"),
        ("robust[norm] >= robust[none]", [0.2, 0.3], "supported"),
        ("robust[norm] <= robust[none]", [0.2, 0.3], "supported"),
        ("robust[norm] >= robust[none] + 0.1", [0.3, 0.4], "supported"),  # 0.3 - 0.2 - 0.1 is not 0 in floats
        ("robust[norm] > robust[none] + 0.1", [0.3, 0.4], "undecided"),
    ],
)
def test_facts_are_judged_by_their_sign_and_accuracies_without_spread_not_at_all(
    claim: str, values: list[float], verdict: str
) -> None:
    table = robust(norm=values, none=[0.2, 0.3])
    (result,) = verdicts(table, claim, facts=["robust"])
    assert result.verdict == verdict
    assert (result.p, result.p_adjusted, result.low, result.high) == (None, None, None, None)
    assert result.reason.endswith(" points, the same for every seed")
    assert "-0.0" not in result.reason
    # On few images two seeds coincide by chance: the same numbers as accuracies decide nothing.
    (result,) = verdicts(table, claim)
    assert result.verdict == "undecided"
    assert (result.p, result.p_adjusted, result.low, result.high) == (None, None, None, None)
    assert result.reason.endswith(" points; identical differences in all 2 seeds, so there is no spread to test")


def test_one_seed_is_enough_for_a_fact() -> None:
    table = {("passes", "norm", "last"): {0: 0.005}}
    assert verdicts(table, "passes[norm] < 1 %", facts=["passes"])[0].verdict == "supported"
    assert verdicts(table, "passes[norm] < 1 %")[0].verdict == "undecided"


def test_holm_is_over_the_claims_of_one_checkpoint_tested_or_not() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(0.4, 0.02, 4)
    table = robust(
        none=list(base),
        norm=list(base + generator.normal(0.02, 0.01, 4)),
        all=list(base + generator.normal(0.05, 0.01, 4)),
    )
    claims = ["robust[norm] > robust[none]", "robust[all] > robust[norm]", "robust[all] > robust[none]"]
    alone = [verdicts(table, claim)[0].p for claim in claims]
    together = verdicts(table, *claims, "clean[all] > clean[none]")
    assert [result.p for result in together] == [*alone, None]
    expected = holm([*(p for p in alone if p is not None), 1.0])[:3]
    assert [result.p_adjusted for result in together[:3]] == pytest.approx(expected)
    assert expected != alone
    assert together[3].p_adjusted is None


def test_each_checkpoint_is_judged_on_its_own_and_a_pinned_claim_once() -> None:
    table = robust(norm=[0.5, 0.52], none=[0.4, 0.43]) | robust("best", norm=[0.6, 0.63], none=[0.4, 0.41])
    results = verdicts(
        table,
        "robust[norm] > robust[none]",
        "robust[norm, checkpoint=best] > robust[norm, checkpoint=last]",
        "robust[norm, checkpoint=last] > 0.1",
        "robust[norm] >= robust[norm, checkpoint=last]",
        checkpoints=("best", "last"),
    )
    assert [(result.checkpoint, result.that[:25]) for result in results] == [
        ("best", "robust[norm] > robust[none"[:25]),
        ("best", "robust[norm, checkpoint=b"),
        ("best", "robust[norm] >= robust[no"),
        ("last", "robust[norm] > robust[none"[:25]),
        ("last", "robust[norm, checkpoint=l"),
        ("last", "robust[norm] >= robust[no"),
    ]
    means = [result.mean for result in results]
    assert means == pytest.approx([0.21, 0.105, 0.105, 0.095, 0.41, 0.0])
    assert results[0].p_adjusted is not None and results[0].p is not None
    assert results[0].p_adjusted >= results[0].p


def test_what_is_no_accuracy_is_shown_as_a_number() -> None:
    table = {("passes", "all", "last"): {0: 1200.0, 1: 1300.0}, ("passes", "norm", "last"): {0: 1000.0, 1: 1001.0}}
    (result,) = verdicts(table, "passes[norm] < passes[all]")
    assert result.reason.startswith("difference 249.5, 95% CI -379.5 to 878.5, p = ")


def test_a_number_that_is_below_one_by_chance_is_no_share() -> None:
    table = {("passes", "all", "last"): {0: 0.3, 1: 0.5}, ("passes", "norm", "last"): {0: 0.1, 1: 0.2}}
    claim = parse("passes[norm] < passes[all]").bind(FACTORS, METRICS, ["last"])

    def lookup(metric: str, levels: dict[str, str], checkpoint: str) -> Mapping[int, float]:
        return table[metric, levels["group"], checkpoint]

    (share,), (number,) = (judge([("", claim)], lookup, ["last"], numbers=names) for names in ((), ("passes",)))
    assert share.reason.startswith("difference 25.0 points, ") and number.reason.startswith("difference 0.25, ")
    assert (share.verdict, share.mean, share.p) == (number.verdict, number.mean, number.p)


def test_rounding_of_large_numbers_is_no_spread() -> None:
    every = [10_000_000 * 3**seed for seed in range(5)]
    table = {
        ("passes", "all", "last"): dict(enumerate(map(float, every))),
        ("passes", "norm", "last"): {seed: 0.3 * passes + 100.3 for seed, passes in enumerate(every)},
    }
    (result,) = verdicts(table, "passes[norm] > 0.3 * passes[all]", facts=["passes"])
    assert len(set(result.differences)) > 1
    assert (result.verdict, result.p) == ("supported", None)
    assert result.reason == "difference 100.3, the same for every seed"


def test_values_that_are_not_finite_are_no_values() -> None:
    (result,) = verdicts(robust(norm=[0.5, float("nan"), 0.6], none=[0.4, 0.4, 0.45]), "robust[norm] > robust[none]")
    assert list(result.seeds) == [0, 2]
    assert result.reason.endswith("left out, as not every arm has finished: seed 1")


def test_a_claim_must_be_bound_and_the_level_a_share() -> None:
    claim = parse("robust[norm] > 0.1")
    with pytest.raises(UserError, match="not bound to factors"):
        judge([("", claim)], lambda *_: {0: 0.5}, ["last"])
    with pytest.raises(UserError, match="confidence level must be between 0 and 1"):
        judge([], lambda *_: {}, ["last"], level=95)
    assert judge([], lambda *_: {}, ["last"]) == []


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_family_of_claims_without_effect_is_called_true_in_at_most_one_study_of_twenty(seeds: int) -> None:
    claims = ["robust[norm] > robust[none]", "robust[all] > robust[none]", "robust[all] < robust[norm]"]
    bound = [("", parse(text).bind(FACTORS, METRICS, ["last"])) for text in claims]
    generator = np.random.default_rng(seeds)
    studies = 1000
    supported = contradicted = 0
    for values in generator.normal(0.5, 0.02, (studies, 3, seeds)):
        arms = {group: dict(enumerate(row.tolist())) for group, row in zip(FACTORS["group"], values, strict=True)}
        results = judge(bound, lambda metric, levels, checkpoint, arms=arms: arms[levels["group"]], ["last"])
        supported += any(result.verdict == "supported" for result in results)
        contradicted += any(result.verdict == "contradicted" for result in results)
    tolerance = 3 * np.sqrt(0.05 * 0.95 / studies)
    # bounded by 5 %, and not by being deaf: Holm over three claims that depend on each other loses little
    assert 0.02 < supported / studies < 0.05 + tolerance
    assert 0.02 < contradicted / studies < 0.05 + tolerance


def test_one_claim_without_effect_has_exactly_the_stated_rate_and_a_real_one_is_found() -> None:
    claim = [("", parse("robust[norm] > robust[none]").bind(FACTORS, METRICS, ["last"]))]
    generator = np.random.default_rng(11)
    studies = 1500
    hits = {0.0: 0, 0.05: 0}
    for shift in hits:
        for none, norm in generator.normal(0.5, 0.02, (studies, 2, 3)):
            arms = {"none": dict(enumerate(none.tolist())), "norm": dict(enumerate((norm + shift).tolist()))}
            (result,) = judge(claim, lambda metric, levels, checkpoint, arms=arms: arms[levels["group"]], ["last"])
            hits[shift] += result.verdict == "supported"
    assert abs(hits[0.0] / studies - 0.05) < 3 * np.sqrt(0.05 * 0.95 / studies)
    assert hits[0.05] / studies > 0.5
