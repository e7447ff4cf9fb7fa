"""Everything that a report says, gathered once: the page and its Markdown twin only differ in how they set it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from robustlayers.report import analysis, loupe, tables
from robustlayers.report.analysis import Inside
from robustlayers.report.answer import Answer, Standing, answer
from robustlayers.report.figures import Drawing, curves, pictures, strength, tradeoff
from robustlayers.report.measured import primary
from robustlayers.report.tables import Table
from robustlayers.report.wording import compact, count, listing, plural, share, slugs
from robustlayers.study.summary import Arm, GroupLine, PhaseLine, Summary

__all__ = ["ArmContent", "Content", "PhaseContent", "gather"]

CURVES = (
    "How to read: gray is clean accuracy, color is robust accuracy; solid lines are validation, dashed ones train. Thick "
    "lines are means over the seeds that finished, thin ones single seeds. A ring marks the epoch chosen as best, a cross "
    "where a seed stopped. A vertical line begins a phase; a shaded phase is shared with other arms and was trained once."
)


@dataclass(frozen=True)
class PhaseContent:
    """One phase of an arm: its terms in words, its groups as a table, the tensors of every group."""

    phase: PhaseLine
    terms: Sequence[tuple[str, str]]
    table: Table
    groups: Sequence[tuple[GroupLine, str]]  # group and a heading for its tensors


@dataclass(frozen=True)
class ArmContent:
    """One arm with all that is folded away at first."""

    arm: Arm
    position: int
    slug: str
    line: str
    terms: Sequence[tuple[str, str]]
    seeds: Table
    branches: Table | None
    phases: Sequence[PhaseContent]
    ledger: Table | None


@dataclass(frozen=True)
class Content:
    """A whole report before it is set."""

    summary: Summary
    answer: Answer
    facts: Sequence[tuple[str, str]]
    results: Table
    beside: Table | None
    measuring: Table
    claims: Table | None
    tradeoff: Sequence[Drawing]
    curves: Sequence[Drawing]
    curves_caption: str
    pictures: Drawing | None
    strength: Sequence[Drawing]
    loupe: Sequence[Drawing]
    inside: Sequence[Inside]
    arms: Sequence[ArmContent]
    provenance: Sequence[tuple[str, str]]
    files: Sequence[tuple[str, str]]

    @property
    def drawings(self) -> list[Drawing]:
        """All figures, in the order of the page."""
        inside = (one for part in self.inside for panel in part.panels for one in panel.drawings)
        return [
            *self.tradeoff,
            *self.curves,
            *([self.pictures] if self.pictures else []),
            *self.strength,
            *self.loupe,
            *inside,
        ]


def gather(summary: Summary) -> Content:
    """Return all parts of the report of a study."""
    said = answer(summary)
    drawn = curves.draw(summary)
    content = Content(
        summary=summary,
        answer=said,
        facts=_facts(summary),
        results=tables.results(summary),
        beside=tables.beside(summary),
        measuring=tables.measuring(summary),
        claims=tables.claims(summary) if summary.claims else None,
        tradeoff=tradeoff.draw(summary),
        curves=drawn,
        curves_caption=CURVES,
        pictures=pictures.draw(summary),
        strength=strength.draw(summary),
        loupe=_loupes(summary),
        inside=analysis.gather(summary) if summary.analyses else [],
        arms=_arms(summary, said),
        provenance=_provenance(summary),
        files=(),
    )
    files = [("rows.csv", "every measured number"), ("claims.csv", "the claims, seed by seed")]
    files += [(f"figures/{one.name}.csv", f"the numbers behind: {one.title}") for one in content.drawings]
    return Content(**{**content.__dict__, "files": files if summary.claims else [files[0], *files[2:]]})


def _loupes(summary: Summary) -> list[Drawing]:
    names = slugs([arm.name for arm in summary.arms])
    drawn = (
        loupe.draw(arm.norms.get(primary(summary), ()), name=f"loupe-{slug}", title=arm.name)
        for arm, slug in zip(summary.arms, names, strict=True)
    )
    return [one for one in drawn if one is not None]


def _facts(summary: Summary) -> list[tuple[str, str]]:
    norm = summary.norm_parameters
    portion = f" ({share(norm / summary.model_parameters)})" if summary.model_parameters else ""
    found = [
        ("Data", summary.data),
        (
            "Model",
            f"{summary.model}: {plural(summary.model_parameters, 'parameter')}, "
            f"{count(norm)}{portion} of them in norm layers",
        ),
        ("Threat", summary.threat),
        ("Training attack", summary.training_attack or "none"),
        ("Evaluation", listing(summary.attacks) or "clean images only"),
        ("Seeds", f"{len(summary.seeds)} ({listing(summary.seeds)})"),
    ]
    found.extend((f"Factor {factor}", listing(levels)) for factor, levels in summary.factors.items())
    return found


def _arms(summary: Summary, said: Answer) -> list[ArmContent]:
    standings: dict[str, Standing] = {one.arm.name: one for one in said.standings}
    names = slugs([arm.name for arm in summary.arms])
    found = []
    for position, arm in enumerate(summary.arms):
        terms = [(factor, level) for factor, level in arm.levels.items()]
        terms.append(("identity of the recipe", arm.run))
        found.append(
            ArmContent(
                arm=arm,
                position=position,
                slug=names[position],
                line=standings[arm.name].text,
                terms=terms,
                seeds=tables.seeds(summary, arm),
                branches=tables.branches(summary, arm),
                phases=[_phase(phase) for phase in arm.phases],
                ledger=tables.ledger(arm) if arm.ledger else None,
            )
        )
    return found


def _of(seeds: Sequence[int]) -> str:
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {listing(seeds)}"


def _phase(phase: PhaseLine) -> PhaseContent:
    shared = phase.shared_with
    terms = [
        ("Epochs", str(phase.epochs) + (f", result shared by {plural(shared, 'arm')}" if shared > 1 else "")),
        ("Attack", phase.attack or "none needed"),
        ("Crafting, auto", "; ".join(f"{made} ({_of(seeds)})" for made, seeds in phase.crafted_in.items())),
        ("Optimizer", phase.optimizer),
        ("Norm policy", phase.normalization),
        ("Besides", "; ".join(phase.extras)),
        (
            "Passes of a step",
            f"{phase.step_passes[0]} forward, {phase.step_passes[1]} backward" if any(phase.step_passes) else "",
        ),
        ("Passes per seed", f"{compact(phase.forward_passes)} forward, {compact(phase.backward_passes)} backward"),
    ]
    terms = [(name, text) for name, text in terms if text]
    headings = [
        (
            group,
            f"{plural(len(group.tensors), 'tensor')} of group {group.name}: {plural(group.parameters, 'parameter')} "
            f"({share(group.share)} of the model), {plural(group.buffers, 'buffer entry', 'buffer entries')}",
        )
        for group in phase.groups
    ]
    return PhaseContent(phase, terms, tables.groups(phase), headings)


def _provenance(summary: Summary) -> list[tuple[str, str]]:
    return [
        ("Choice of best", summary.selection),
        ("Seeds", listing(summary.seeds)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in summary.versions.items())),
        ("Machine", summary.machine),
        ("Repeat with", summary.command),
    ]
