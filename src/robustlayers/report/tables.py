"""The tables of a report as plain data, so that the page and its Markdown twin print the very same cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite

from robustlayers.report.answer import difference, in_points
from robustlayers.report.measured import accuracy, metrics, primary, status, values
from robustlayers.report.statistics import Interval
from robustlayers.report.wording import (
    NONE,
    compact,
    count,
    duration,
    listing,
    p_text,
    percent,
    plus_minus,
    sentence,
    share,
)
from robustlayers.study.summary import Arm, LedgerLine, PhaseLine, Summary

__all__ = [
    "Cell",
    "Column",
    "Table",
    "beside",
    "branches",
    "claims",
    "groups",
    "ledger",
    "measuring",
    "results",
    "seeds",
]


@dataclass(frozen=True)
class Cell:
    """One cell: its text, a small remark below it, and the number it is sorted by."""

    text: str
    note: str = ""
    value: float | None = None
    rows: int = 1  # how many rows it reaches over; the covered places below hold None
    kind: str = ""  # "arm", "verdict", "code", "bad": how the page shows it


@dataclass(frozen=True)
class Column:
    """One column: its head, and whether it holds numbers."""

    title: str
    numeric: bool = False


@dataclass(frozen=True)
class Table:
    """A table of blocks of rows; rows of a block belong together and are sorted as one."""

    name: str
    caption: str
    columns: Sequence[Column]
    blocks: Sequence[Sequence[Sequence[Cell | None]]]
    sortable: bool = False


def _accuracy(found: Interval, planned: int) -> Cell:
    note = "" if found.n in (planned, 0) else f"n = {found.n} of {planned}"
    return Cell(plus_minus(found), note, found.mean)


def results(summary: Summary) -> Table:
    """Return arms × accuracies for every checkpoint, with what each arm trains and what it costs."""
    names = metrics(summary)
    shown = list(summary.checkpoints) or [primary(summary)]
    blocks = []
    for arm in summary.arms:
        rows: list[list[Cell | None]] = []
        for position, checkpoint in enumerate(shown):
            measured: list[Cell | None] = [
                _accuracy(accuracy(arm, checkpoint, metric), len(summary.seeds)) for metric in names
            ]
            head: list[Cell | None] = [None]
            tail: list[Cell | None] = [None] * 3
            if position == 0:
                head = [Cell(arm.name, _states(summary, arm), rows=len(shown), kind="arm")]
                tail = list(_cost(arm, len(shown)))
            rows.append([*head, Cell(checkpoint), *measured, *tail])
        blocks.append(rows)
    columns = [
        Column("Arm"),
        Column("Checkpoint"),
        *(Column(name if name not in ("clean", "robust") else name.capitalize(), True) for name in names),
        Column("Trained", True),
        Column("Passes", True),
        Column("Time", True),
    ]
    caption = (
        "Accuracy on test images, mean ± half width of the 95% t interval over seeds, in percent. "
        "Robust is the worst case over all attacks, image by image. Trained: parameters trained in the last phase. "
        "Passes: images sent forward / backward through the network in training, per seed. Time: mean training time per "
        "seed. Shared phases are counted in every arm that uses them."
    )
    return Table("results", caption, columns, blocks, sortable=True)


def _states(summary: Summary, arm: Arm) -> str:
    """Return the seeds that are in no mean, in a few words; the reasons stand with the cautions."""
    found: dict[str, list[int]] = {}
    for seed in summary.seeds:
        word = status(arm, seed)
        if word != "finished":
            found.setdefault(word, []).append(seed)
    return "; ".join(f"seed {listing(gone)} {word}" for word, gone in found.items())


def _cost(arm: Arm, rows: int) -> tuple[Cell, Cell, Cell]:
    spent = [seconds for seed, seconds in sorted(arm.seconds.items()) if status(arm, seed) == "finished"]
    mean = sum(spent) / len(spent) if spent else None
    passes = f"{compact(arm.forward_passes)} / {compact(arm.backward_passes)}"
    return (
        Cell(count(arm.trained_parameters), share(arm.trained_share), arm.trained_parameters, rows),
        Cell(passes, "", arm.forward_passes + arm.backward_passes, rows),
        Cell(NONE if mean is None else duration(mean), "", mean, rows),
    )


def seeds(summary: Summary, arm: Arm) -> Table:
    """Return one arm seed by seed: what became of it, and every accuracy at every checkpoint."""
    names = metrics(summary)
    known = sorted({*summary.seeds, *arm.status})
    epochs = {(row.seed, row.checkpoint): row.epoch for row in summary.rows if row.arm == arm.name}
    blocks = []
    for seed in known:
        word = status(arm, seed)
        rows: list[list[Cell | None]] = []
        shown = list(summary.checkpoints) or [primary(summary)]
        for position, checkpoint in enumerate(shown):
            head: list[Cell | None] = [None, None]
            tail: list[Cell | None] = [None]
            if position == 0:
                kind = "" if word == "finished" else "bad"
                head = [Cell(str(seed), rows=len(shown)), Cell(word, arm.reasons.get(seed, ""), None, len(shown), kind)]
                spent = arm.seconds.get(seed) or None
                tail = [Cell(NONE if spent is None else duration(spent), "", spent, len(shown))]
            epoch = epochs.get((seed, checkpoint))
            if epoch is None and checkpoint == "best":
                epoch = arm.best_epoch.get(seed)
            measured: list[Cell | None] = []
            for metric in names:
                value = arm.results.get(checkpoint, {}).get(metric, {}).get(seed)
                used = seed in values(arm, checkpoint, metric)
                measured.append(Cell(percent(value, 2), "" if used or value is None else "in no mean"))
            rows.append([*head, Cell(checkpoint), Cell(NONE if epoch is None else str(epoch)), *measured, *tail])
        blocks.append(rows)
    columns = [
        Column("Seed"),
        Column("Status"),
        Column("Checkpoint"),
        Column("Epoch", True),
        *(Column(name if name not in ("clean", "robust") else name.capitalize(), True) for name in names),
        Column("Time", True),
    ]
    return Table("seeds", "Every seed: accuracy on test images in percent.", columns, blocks)


def beside(summary: Summary) -> Table | None:
    """Return accuracy on corrupted images by family, and the calibration error, arm by arm; None where neither is known."""
    checkpoint = primary(summary)
    found = dict.fromkeys(metric for arm in summary.arms for metric in arm.results.get(checkpoint, {}))
    families = [metric for metric in found if metric.startswith("corrupted:") and metric.count(":") == 1]
    names = {"corrupted": "corrupted images, mean", **{metric: metric.partition(":")[2] for metric in families}}
    names = {metric: name for metric, name in names.items() if metric in found}
    if "ece" in found:
        names["ece"] = "calibration error"
    if not names:
        return None
    texts = {row.metric: row.attack for row in summary.rows if row.metric in names}
    blocks = [
        [
            [
                Cell(name),
                *(_accuracy(accuracy(arm, checkpoint, metric), len(summary.seeds)) for arm in summary.arms),
            ]
        ]
        for metric, name in names.items()
    ]
    caption = f"Checkpoint {checkpoint}, mean ± half width of the 95% t interval over seeds, in percent. "
    if "corrupted" in names:
        caption += (
            f"Accuracy on corrupted test images: {texts.get('corrupted', '')}; the mean leaves out extra families. "
        )
    if "ece" in names:
        caption += "Calibration error: expected difference of confidence and accuracy on clean test images, in 15 bins."
    columns = [Column("Measure"), *(Column(arm.name, True) for arm in summary.arms)]
    return Table("beside", caption.strip(), columns, blocks)


def branches(summary: Summary, arm: Arm) -> Table | None:
    """Return the accuracy of each branch under what was crafted on each branch; None where no branch was measured."""
    checkpoint = primary(summary)
    found = [metric for metric in arm.results.get(checkpoint, {}) if "@" in metric]
    measured = [metric.partition("@")[2] for metric in found if metric.startswith("clean@")]
    if not measured:
        return None

    def row(head: str, metrics: Sequence[str]) -> list[list[Cell | None]]:
        return [[Cell(head), *(_accuracy(accuracy(arm, checkpoint, name), len(summary.seeds)) for name in metrics)]]

    blocks = [row("no attack", [f"clean@{name}" for name in measured])]
    blocks += [
        row(f"{attack} on {crafted}", [f"{attack}@{crafted}>{name}" for name in measured])
        for attack in summary.attacks
        for crafted in measured
        if f"{attack}@{crafted}>{measured[0]}" in found
    ]
    caption = (
        f"Checkpoint {checkpoint}: each branch of the norm layers (columns) on images crafted on each branch (rows). What is "
        "crafted on another branch is a transfer attack: a branch is as robust as the lowest number of its column."
    )
    columns = [Column("Crafted on"), *(Column(f"Measured on {name}", True) for name in measured)]
    return Table("branches", caption, columns, blocks)


def groups(phase: PhaseLine) -> Table:
    """Return the groups of a phase: what each learns from and how much it holds."""
    blocks = [
        [
            [
                Cell(group.name, group.selector, kind="code"),
                Cell(group.signal),
                Cell(group.start),
                Cell(str(len(group.tensors)), "", len(group.tensors)),
                Cell(count(group.parameters), share(group.share), group.parameters),
                Cell(count(group.buffers), "", group.buffers),
            ]
        ]
        for group in phase.groups
    ]
    columns = [
        Column("Group"),
        Column("Learns from"),
        Column("Start"),
        Column("Tensors", True),
        Column("Parameters", True),
        Column("Buffer entries", True),
    ]
    return Table("groups", "", columns, blocks)


def _range(texts: Sequence[str]) -> str:
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


def _counts(numbers: Iterable[int]) -> str:
    return _range([count(number) for number in sorted(numbers)])


def _sizes(numbers: Iterable[float]) -> str:
    return _range([f"{number:#.3g}".rstrip(".") if number else "0" for number in sorted(numbers)])


def _rate(lines: Sequence[LedgerLine]) -> Cell:
    rates = [line.effective_lr for line in lines if line.effective_lr is not None and isfinite(line.effective_lr)]
    return Cell(_sizes(rates), "", rates[0]) if rates else Cell(NONE)


def ledger(arm: Arm) -> Table:
    """Return what moved, per phase and group over all seeds of the ledger: lowest to highest where seeds differ."""
    found: dict[tuple[str, str, str], list[LedgerLine]] = {}
    for line in arm.ledger:
        found.setdefault((line.phase, line.group, line.signal), []).append(line)
    blocks = []
    for (phase, group, signal), lines in found.items():
        faults = [line.seed for line in lines if not line.kept]
        kept = f"kept in {len(lines) - len(faults)} of {len(lines)}"
        blocks.append(
            [
                [
                    Cell(phase),
                    Cell(group, kind="code"),
                    Cell(signal),
                    Cell(kept, f"broken in seed {listing(faults)}" if faults else "", kind="bad" if faults else ""),
                    Cell(
                        _counts(line.moved_parameters for line in lines),
                        f"of {count(lines[0].parameters)}",
                        max(line.moved_parameters for line in lines),
                    ),
                    Cell(
                        _counts(line.moved_buffers for line in lines),
                        f"of {count(lines[0].buffers)}",
                        max(line.moved_buffers for line in lines),
                    ),
                    Cell(_sizes(line.relative_l2 for line in lines), "", lines[0].relative_l2),
                    Cell(_sizes(line.largest for line in lines), "", lines[0].largest),
                    _rate(lines),
                    Cell(
                        compact(lines[0].gradient_passes) if lines[0].gradient_passes else NONE,
                        "",
                        lines[0].gradient_passes,
                    ),
                    Cell(
                        lines[0].after[:8] or NONE,
                        f"before: {lines[0].before[:8]}" if lines[0].before else "",
                        kind="code",
                    ),
                ]
            ]
        )
    columns = [
        Column("Phase"),
        Column("Group"),
        Column("Signal"),
        Column("Promise"),
        Column("Parameters moved", True),
        Column("Buffers moved", True),
        Column("Relative L2", True),
        Column("Largest change", True),
        Column("Effective rate", True),
        Column("Gradient passes", True),
        Column("Hash after"),
    ]
    caption = (
        "Ledger: what moved in each group. The promise is that frozen tensors stay equal bit by bit and that trained ones "
        "move. Relative L2 is |after − before| / |before| over the parameters of the group; ranges are over seeds. "
        "Effective rate: mean over updates of learning rate × |gradient| / |parameters|. Gradient passes: images sent "
        "backward for this group, per seed. Hashes are of the first seed."
    )
    return Table("ledger", caption, columns, blocks)


def claims(summary: Summary) -> Table:
    """Return every claim at every checkpoint: verdict, mean difference, interval, p, the difference of each seed."""
    blocks = []
    for claim in summary.claims:
        bounds = (
            NONE
            if claim.low is None or claim.high is None
            else f"{difference(claim, claim.low)} to {difference(claim, claim.high)}"
        )
        each = [
            f"seed\N{NO-BREAK SPACE}{seed}:\N{NO-BREAK SPACE}{difference(claim, value)}"
            for seed, value in zip(claim.seeds, claim.differences, strict=True)
        ]
        # p speaks for the claim only; what speaks against it, or why there is no p, is said in words.
        why = "" if claim.p is not None and claim.verdict != "contradicted" else sentence(claim.reason)
        blocks.append(
            [
                [
                    Cell(claim.say, claim.that),
                    Cell(claim.checkpoint),
                    Cell(claim.verdict, kind="verdict"),
                    Cell(difference(claim, claim.mean), "" if in_points(claim) else "not in points", claim.mean),
                    Cell(bounds, "", claim.low),
                    Cell(_p(claim.p_adjusted), "" if claim.p is None else f"raw {_p(claim.p)}", claim.p_adjusted),
                    Cell("; ".join(each) or NONE, why),
                ]
            ]
        )
    columns = [
        Column("Claim"),
        Column("Checkpoint"),
        Column("Verdict"),
        Column("Difference", True),
        Column("95% CI", True),
        Column("p (Holm)", True),
        Column("Per seed"),
    ]
    caption = (
        "Differences are paired by seed, in percentage points, and turned so that a positive one speaks for the claim. p is "
        "how likely a mean difference at least as favorable is if the true one is zero, corrected for the number of claims "
        "by Holm's method, with the uncorrected one below."
    )
    return Table("claims", caption, columns, blocks, sortable=True)


def _p(value: float | None) -> str:
    return NONE if value is None else "".join(p_text(value).split()).removeprefix("p").removeprefix("=")


def measuring(summary: Summary) -> Table:
    """Return how each accuracy was measured: the attack spelled out, and how norm layers normalized meanwhile."""
    blocks = []
    for metric in metrics(summary):
        rows = [row for row in summary.rows if row.metric == metric and row.total]
        modes = sorted({row.normalization for row in rows if row.normalization})
        images = sorted({row.total for row in rows if row.total})
        text = summary.attack_texts.get(metric, "")
        if metric == "clean":
            text = text or "no attack"
        if metric == "robust":
            text = text or f"worst case of {listing(summary.attacks)}, image by image" if summary.attacks else NONE
        blocks.append(
            [
                [
                    Cell(metric, kind="code"),
                    Cell(text or NONE),
                    Cell(listing(modes) or NONE),
                    Cell(listing(count(number) for number in images) or NONE),
                ]
            ]
        )
    columns = [Column("Accuracy"), Column("Measured with"), Column("Norm statistics"), Column("Images", True)]
    return Table("measuring", "", columns, blocks)
