"""Claims judged: whether the seeds of a study support, contradict or leave open what it claims.

The difference of both sides of a claim is taken per seed, over the seeds that have every term, and a one-sided t-test
asks whether its mean lies on the claimed side, and another whether it lies on the opposite side. Each direction is
corrected by Holm's method over all claims of the checkpoint, so at level 0.95 the chance of calling any claim supported
where there is no effect is at most 5 %, and the same holds for contradicted. Claims are written in the language of
`robustlayers.study.claim_syntax`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from robustlayers.core.errors import UserError
from robustlayers.study.claim_syntax import Claim, parse
from robustlayers.study.statistics import ROUNDING, holm, identical, paired_t, t_interval
from robustlayers.study.summary import ClaimResult

__all__ = ["Claim", "Lookup", "judge", "parse"]

Lookup = Callable[[str, dict[str, str], str], Mapping[int, float]]  # (metric, levels, checkpoint) -> seed -> value


def judge(
    claims: Sequence[tuple[str, Claim]],
    lookup: Lookup,
    checkpoints: Sequence[str],
    level: float = 0.95,
    facts: Collection[str] = (),
    numbers: Collection[str] = (),
) -> list[ClaimResult]:
    """Return what the seeds say about each claim, for each checkpoint in the order given.

    `claims` are (what it says in words, the bound claim); `lookup(metric, levels, checkpoint)` returns seed -> value,
    without the seeds that have none. A claim whose terms all pin their checkpoint is judged once, under the first of
    these checkpoints. The verdict is `supported` or `contradicted` where the adjusted one-sided p of that direction is
    below 1 - level, else `undecided`; Holm's m counts every claim of the checkpoint, also those without a test. The
    interval is two-sided at `level` and not adjusted, so it can touch 0 where a one-sided test decides.

    One seed decides nothing, and nor do differences that are all equal: on few images two seeds coincide by chance, and
    there is no spread to test. Only claims about `facts`, metrics that have no spread by nature such as `trained_share`,
    are decided by the sign of the difference (0 supports `>=` and `<=` and leaves `>` and `<` undecided); p is then None.

    A difference is told in percentage points where every value is in [0, 1] and no metric is one of the `numbers`, such as
    counts, which may be 0 or 1 by chance.
    """
    if not 0 < level < 1:
        raise UserError(f"confidence level must be between 0 and 1, such as 0.95; it is {level}")
    results: list[ClaimResult] = []
    for checkpoint in checkpoints:
        evidence = [
            _gather(say, claim, lookup, checkpoint, facts, numbers)
            for say, claim in claims
            if _judged_at(claim, checkpoints) in (None, checkpoint)
        ]
        toward = holm([1.0 if item.p is None else item.p for item in evidence])
        against = holm([1.0 if item.p_against is None else item.p_against for item in evidence])
        results.extend(
            _verdict(item, checkpoint, p, opposite, level)
            for item, p, opposite in zip(evidence, toward, against, strict=True)
        )
    return results


def _judged_at(claim: Claim, checkpoints: Sequence[str]) -> str | None:
    """Return the checkpoint under which a claim that pins all of its checkpoints is judged; None for any other."""
    pins = [term.checkpoint for _, term in claim.difference.terms]
    if None in pins:
        return None
    return next((checkpoint for checkpoint in checkpoints if checkpoint in pins), checkpoints[0])


@dataclass(frozen=True)
class _Evidence:
    """What the seeds of one claim show at one checkpoint."""

    say: str
    claim: Claim
    seeds: tuple[int, ...]
    left_out: tuple[int, ...]  # seeds that only some of the arms have
    differences: tuple[float, ...]
    identical: bool
    exact: bool  # every term is a fact, which no other seed would change
    fractions: bool  # every measured value is a share
    p: float | None
    p_against: float | None


def _gather(
    say: str, claim: Claim, lookup: Lookup, checkpoint: str, facts: Collection[str], numbers: Collection[str]
) -> _Evidence:
    expression = claim.difference
    columns: list[tuple[float, dict[int, float]]] = []
    for factor, term in expression.terms:
        found = lookup(term.metric, term.levels, term.checkpoint or checkpoint)
        columns.append((factor, {seed: value for seed, value in found.items() if math.isfinite(value)}))
    some = {seed for _, column in columns for seed in column}
    seeds = sorted(seed for seed in some if all(seed in column for _, column in columns))
    differences: list[float] = []
    scale = 0.0
    for seed in seeds:
        addends = [expression.constant, *(factor * column[seed] for factor, column in columns)]
        size = math.fsum(abs(addend) for addend in addends)
        total = math.fsum(addends)
        differences.append(0.0 if abs(total) <= ROUNDING * size else total)
        scale = max(scale, size)
    same = len(seeds) > 1 and identical(differences, scale)
    p = None if len(seeds) < 2 or same else paired_t(differences)
    return _Evidence(
        say,
        claim,
        tuple(seeds),
        tuple(sorted(some.difference(seeds))),
        tuple(differences),
        identical=len(seeds) > 1 and p is None,
        exact=all(term.metric in facts for _, term in expression.terms),
        fractions=all(0 <= value <= 1 for _, column in columns for value in column.values())
        and not any(term.metric in numbers for _, term in expression.terms),
        p=p,
        p_against=None if p is None else paired_t([-difference for difference in differences]),
    )


def _verdict(item: _Evidence, checkpoint: str, toward: float, against: float, level: float) -> ClaimResult:
    mean = low = high = None
    if item.differences:
        mean, low, high = t_interval(item.differences, level)
    verdict = "undecided"
    reason = "; ".join(_reason(item, mean, low, high, level, min(toward, against), against < toward))
    if item.identical:
        low = high = None
    if item.exact and item.differences:
        signs = {difference > 0 for difference in item.differences}
        if not any(item.differences):
            verdict = "supported" if item.claim.operator in (">=", "<=") else "undecided"
        elif len(signs) == 1:
            verdict = "supported" if signs == {True} else "contradicted"
    elif item.p is not None:
        alpha = 1 - level
        verdict = "supported" if toward < alpha else "contradicted" if against < alpha else "undecided"
    return ClaimResult(
        say=item.say,
        that=item.claim.text,
        checkpoint=checkpoint,
        verdict=verdict,
        reason=reason,
        seeds=item.seeds,
        differences=item.differences,
        mean=mean,
        low=low,
        high=high,
        p=item.p,
        p_adjusted=None if item.p is None else toward,
    )


def _reason(
    item: _Evidence,
    mean: float | None,
    low: float | None,
    high: float | None,
    level: float,
    p: float,
    opposite: bool,
) -> Iterator[str]:
    """Yield the parts of the sentence about a verdict: the difference, and what qualifies it."""

    def amount(value: float) -> str:
        return f"{100 * value:z.1f}" if item.fractions else f"{value:z.4g}"

    count = len(item.seeds)
    unit = " points" if item.fractions else ""
    if mean is None:
        yield "no seed has finished in every arm of the claim" if item.left_out else "no finished seeds"
        return
    text = f"difference {amount(mean)}{unit}"
    if item.exact:
        yield f"{text}, the same for every seed"
    elif count == 1:
        yield f"{text}, n = 1"
        yield "one seed cannot show spread"
    elif item.identical:
        yield text
        yield f"identical differences in all {count} seeds, so there is no spread to test"
    elif low is not None and high is not None:
        shown = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
        side = " for the opposite" if opposite else ""
        yield f"{text}, {100 * level:g}% CI {amount(low)} to {amount(high)}, {shown} (Holm){side}, n = {count}"
    if item.left_out:
        seeds = ", ".join(str(seed) for seed in item.left_out)
        yield f"left out, as not every arm has finished: seed{'s' if len(item.left_out) > 1 else ''} {seeds}"
