"""The answer in sentences, composed from the data alone: what holds, how much, how sure, and what to be careful about."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from robustlayers.report.measured import absent, accuracy, broken, primary, values
from robustlayers.report.statistics import Interval
from robustlayers.report.wording import (
    amount,
    count,
    listing,
    percent,
    plural,
    points,
    sentence,
    share,
    spread,
)
from robustlayers.study.summary import Arm, ClaimResult, Summary

__all__ = ["Answer", "Standing", "Verdict", "answer", "difference", "in_points", "quoted"]

_ORDER = ["supported", "contradicted", "undecided"]


@dataclass(frozen=True)
class Verdict:
    """One claim as judged at the checkpoint of the answer, and what the other checkpoints say to it."""

    claim: ClaimResult
    text: str  # the numbers, one sentence
    elsewhere: str  # "" or a sentence on the other checkpoints


@dataclass(frozen=True)
class Standing:
    """One arm: where it stands, in a sentence."""

    arm: Arm
    clean: Interval
    robust: Interval
    text: str


@dataclass(frozen=True)
class Answer:
    """Everything that stands on top of a report."""

    checkpoint: str
    lead: str  # one to three sentences
    setting: str  # what "robust" means here
    verdicts: tuple[Verdict, ...]
    standings: tuple[Standing, ...]  # most robust first
    cautions: tuple[str, ...]


def answer(summary: Summary) -> Answer:
    """Return the sentences for the top of the report."""
    checkpoint = primary(summary)
    verdicts = _verdicts(summary, checkpoint)
    standings = _standings(summary, checkpoint)
    return Answer(
        checkpoint=checkpoint,
        lead=" ".join(filter(None, [_tally(verdicts), _extremes(standings), _seeds(summary, standings)])),
        setting=_setting(summary, checkpoint),
        verdicts=tuple(verdicts),
        standings=tuple(standings),
        cautions=tuple(_cautions(summary, checkpoint)),
    )


def in_points(claim: ClaimResult) -> bool:
    """Return whether the differences of a claim are of shares, to be told in percentage points.

    Claims may also compare counts, such as parameters; the reason of the judge names the unit.
    """
    return claim.mean is None or " points" in claim.reason


def difference(claim: ClaimResult, value: float | None) -> str:
    """Return a difference of a claim, signed, in percentage points if it is one of shares."""
    return points(value) if in_points(claim) else amount(value)


def _verdicts(summary: Summary, checkpoint: str) -> list[Verdict]:
    mine = [claim for claim in summary.claims if claim.checkpoint == checkpoint]
    # A claim that names another checkpoint only is still a part of the answer.
    said = {(claim.say, claim.that) for claim in mine}
    for claim in summary.claims:
        if (claim.say, claim.that) not in said:
            said.add((claim.say, claim.that))
            mine.append(claim)
    found = []
    for claim in mine:
        others = [
            other
            for other in summary.claims
            if (other.say, other.that) == (claim.say, claim.that) and other.checkpoint != claim.checkpoint
        ]
        elsewhere = "; ".join(
            f"checkpoint {other.checkpoint}: {other.verdict}"
            + (f", {difference(other, other.mean)}" if other.mean is not None else "")
            + (" points" if other.mean is not None and in_points(other) else "")
            for other in others
        )
        text = sentence(claim.reason)
        if claim.checkpoint != checkpoint:
            text = f"{text} Checkpoint {claim.checkpoint}."
        found.append(Verdict(claim, text, elsewhere))
    return found


def _tally(verdicts: list[Verdict]) -> str:
    if not verdicts:
        return "This study makes no claims: its numbers are shown as they are, without a test."
    if len(verdicts) == 1:
        return f"The claim is {verdicts[0].claim.verdict}."
    tally = Counter(verdict.claim.verdict for verdict in verdicts)
    if len(tally) == 1:
        return f"All {len(verdicts)} claims are {next(iter(tally))}."
    order = sorted(tally, key=lambda word: (_ORDER.index(word) if word in _ORDER else len(_ORDER), word))
    parts = [f"{tally[word]} {'is' if tally[word] == 1 else 'are'} {word}" for word in order]
    return f"Of {len(verdicts)} claims, {listing(parts)}."


def _standings(summary: Summary, checkpoint: str) -> list[Standing]:
    found = []
    for arm in summary.arms:
        clean, robust = (accuracy(arm, checkpoint, metric) for metric in ("clean", "robust"))
        if clean.mean is None and robust.mean is None:
            text = "no finished seed, nothing to report"
        else:
            text = f"robust {spread(robust)}, clean {spread(clean)}"
        trained = (
            f"trains {count(arm.trained_parameters)} parameters ({share(arm.trained_share)}) in its last phase"
            if arm.trained_parameters
            else "trains no parameters in its last phase"
        )
        found.append(Standing(arm, clean, robust, f"{text}; {trained}."))
    return sorted(found, key=lambda one: math.inf if one.robust.mean is None else -one.robust.mean)


def _extremes(standings: list[Standing]) -> str:
    measured = [one for one in standings if one.robust.mean is not None and one.clean.mean is not None]
    if not measured:
        return "No run has finished, so there is nothing to answer with yet."
    robust = measured[0]
    clean = max(measured, key=lambda one: one.clean.mean or 0.0)
    if len(measured) == 1:
        return f"The only arm with results is {quoted(robust.arm)}: {_pair(robust)}."
    if clean is robust:
        return (
            f"The arm {quoted(robust.arm)} has both the highest robust and the highest clean accuracy: {_pair(robust)}."
        )
    return (
        f"Most robust is the arm {quoted(robust.arm)}: {_pair(robust)}. "
        f"Most accurate on clean images is the arm {quoted(clean.arm)}: {_pair(clean)}."
    )


def quoted(arm: Arm) -> str:
    """Return the name of an arm for running text, where a name such as `none` would be read as a word."""
    return f"“{arm.name}”"


def _pair(one: Standing) -> str:
    return f"{percent(one.robust.mean)} robust, {percent(one.clean.mean)} clean"


def _seeds(summary: Summary, standings: list[Standing]) -> str:
    if len(summary.seeds) == 1 and any(one.clean.n for one in standings):
        return "There is one seed only: its numbers show no spread, and nothing can be tested."
    return ""


def _setting(summary: Summary, checkpoint: str) -> str:
    where = f"{plural(summary.test_images, 'test image')}, checkpoint {checkpoint}"
    over = (
        f"means over {plural(len(summary.seeds), 'seed')} with 95% t intervals"
        if len(summary.seeds) > 1
        else "one seed"
    )
    if not summary.attacks:
        return f"Measured on {where}, {over}."
    under = f"each of {listing(summary.attacks)}" if len(summary.attacks) > 1 else summary.attacks[0]
    return (
        f"Robust accuracy ({summary.threat}) is the share of images that stay correctly classified under {under}. "
        f"Measured on {where}, {over}."
    )


def _cautions(summary: Summary, checkpoint: str) -> list[str]:
    found = []
    for arm in summary.arms:
        gone = absent(summary, arm)
        if gone:
            left = len(values(arm, checkpoint, "robust") or values(arm, checkpoint, "clean"))
            said = listing(f"seed {seed} {word}" for seed, word in gone.items())
            rest = f"its means are over {left} of {len(summary.seeds)} seeds" if left else "it has no numbers to show"
            found.append(f"Arm {quoted(arm)}: {said}; {rest}.")
        found.extend(
            f"Arm {quoted(arm)}: a promise was broken in phase {line.phase}, group {line.group}, seed {line.seed}: "
            f"{line.signal}, but {count(line.moved_parameters)} of {plural(line.parameters, 'parameter')} and "
            f"{count(line.moved_buffers)} of {plural(line.buffers, 'buffer entry', 'buffer entries')} moved."
            for line in broken(arm)
        )
        for one, metrics in arm.results.items():
            wrong = sorted({seed for column in metrics.values() for seed, value in column.items() if value != value})
            if wrong:
                found.append(f"Arm {quoted(arm)}: checkpoint {one}, seed {listing(wrong)}: a value is not a number.")
    flags: dict[str, list[str]] = {}
    for row in summary.rows:
        for flag in filter(None, map(str.strip, row.flags.split(";"))):
            if row.arm not in flags.setdefault(flag, []):
                flags[flag].append(row.arm)
    for flag, arms in flags.items():
        said = listing(f"“{arm}”" if "," in arm else arm for arm in arms)
        found.append(f"{flag} ({said}).")
    return found
