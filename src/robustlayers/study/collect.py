"""From the store to a summary: everything that was measured so far, missing and failed seeds included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robustlayers.core.device import machine, versions
from robustlayers.core.errors import Fault, UserError
from robustlayers.core.files import read_json, read_tensors
from robustlayers.evaluation.flags import meaning
from robustlayers.study.analyzed import collect_analyses
from robustlayers.study.claims import judge
from robustlayers.study.claims import parse as parse_claim
from robustlayers.study.metrics import FACTS, NUMBERS
from robustlayers.study.store import Store
from robustlayers.study.summary import (
    Arm,
    CurvePoint,
    GroupLine,
    LedgerLine,
    PhaseLine,
    Pictures,
    Row,
    Summary,
)

__all__ = ["collect", "collect_layers", "collect_rows"]

_LEDGER = (
    "moved_parameters",
    "moved_buffers",
    "relative_l2",
    "largest",
    "effective_lr",
    "gradient_passes",
)


def collect_rows(store: Store) -> list[Row]:
    """Return every measured number of the study that the store's plan describes, in a fixed order."""
    plan = _plan(store)
    return [row for arm in plan["arms"] for seed in plan["seeds"] for row in _rows(store, plan, arm, seed)]


def collect(store: Store) -> Summary:
    """Return the summary of the study in `store`, complete or not."""
    plan = _plan(store)
    rows = collect_rows(store)
    arms = [_arm(store, plan, arm, rows) for arm in plan["arms"]]
    by_levels = {tuple(sorted(arm.levels.items())): arm for arm in arms}

    def lookup(metric: str, levels: dict[str, str], checkpoint: str) -> Mapping[int, float]:
        arm = by_levels[tuple(sorted(levels.items()))]
        found = arm.results.get("" if metric in FACTS else checkpoint, {})
        return found.get(metric, {})

    factors = {factor: tuple(levels) for factor, levels in plan["factors"].items()}
    stated = [(claim["say"], parse_claim(claim["that"])) for claim in plan["claims"]]
    # That the study measures these metrics was seen to before the plan was written.
    bound = [(say, claim.bind(factors, claim.metrics, plan["checkpoints"])) for say, claim in stated]
    claims = judge(bound, lookup, plan["checkpoints"], facts=FACTS, numbers=NUMBERS)
    return Summary(
        name=plan["name"],
        question=plan["question"],
        command=plan["command"],
        data=plan["data"],
        test_images=plan["test_images"],
        model=plan["model"],
        model_parameters=plan["model_parameters"],
        norm_parameters=plan["norm_parameters"],
        threat=plan["threat"],
        training_attack=plan["training_attack"],
        attacks=plan["attacks"],
        attack_texts=plan["attack_texts"],
        checkpoints=plan["checkpoints"],
        selection=plan["selection"],
        seeds=plan["seeds"],
        factors=factors,
        arms=arms,
        claims=claims,
        rows=rows,
        versions=plan.get("versions") or versions(),
        machine=plan.get("machine") or machine(),
        recipe_yaml=plan["recipe_yaml"],
        notes=_notes(plan, arms, rows),
        pictures=_pictures(store, plan, arms),
        analyses=collect_analyses(store, plan),
    )


def _plan(store: Store) -> dict[str, Any]:
    if not store.plan.exists():
        raise UserError(Fault("no study here: it has no plan.json; run a study into it first", file=str(store.root)))
    return read_json(store.plan)


def _rows(store: Store, plan: Mapping[str, Any], arm: Mapping[str, Any], seed: int) -> list[Row]:
    folder = store.result(arm["run"], seed)
    if not store.whole(folder):
        return []
    base = {"study": plan["name"], "arm": arm["name"], "levels": arm["levels"], "run": arm["run"], "seed": seed}
    rows = [Row(**base, **row) for row in read_json(folder / "rows.json")]
    if (folder / "norms.json").exists():
        for line in read_json(folder / "norms.json"):
            if line["layer"] == "all" and line["value"] is not None:
                name = f"norm_{line['metric']}" + (f"_{line['pass']}" if line["pass"] else "")
                kept = {key: line[key] for key in ("checkpoint", "epoch", "value", "split", "attack", "normalization")}
                rows.append(Row(**base, metric=name, **kept))
    ledgers = {phase["name"]: read_json(store.phase(phase["id"], seed) / "ledger.json") for phase in arm["phases"]}
    for fact in FACTS:  # passes as they were made: a phase that stopped early made fewer than planned
        spent = fact.endswith("_passes") and all(fact in ledger for ledger in ledgers.values())
        value = sum(ledger[fact] for ledger in ledgers.values()) if spent else arm[fact]
        rows.append(Row(**base, checkpoint="", metric=fact, value=value))
    for phase, ledger in ledgers.items():
        for line in ledger["groups"]:
            where = {"phase": phase, "group": line["group"]}
            hashes = {"hash_before": line.get("before", ""), "hash_after": line.get("after", "")}
            for metric in _LEDGER:
                value = line.get(metric)
                if value is not None:
                    rows.append(Row(**base, checkpoint="", metric=metric, value=value, **where, **hashes))
    return rows


def _arm(store: Store, plan: Mapping[str, Any], arm: Mapping[str, Any], rows: list[Row]) -> Arm:
    outcomes = {seed: _outcome(store, arm, seed) for seed in plan["seeds"]}
    norms: dict[str, list[dict[str, Any]]] = {}
    for row in _layer_rows(store, plan, arm):
        norms.setdefault(row["checkpoint"], []).append(row)
    results: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if row.run == arm["run"] and row.arm == arm["name"] and not row.phase:
            results.setdefault(row.checkpoint, {}).setdefault(row.metric, {})[row.seed] = row.value
    return Arm(
        name=arm["name"],
        levels=arm["levels"],
        run=arm["run"],
        status={seed: outcome.status for seed, outcome in outcomes.items()},
        reasons={seed: outcome.reason for seed, outcome in outcomes.items() if outcome.reason is not None},
        trained_parameters=arm["trained_parameters"],
        trained_share=arm["trained_share"],
        forward_passes=arm["forward_passes"],
        backward_passes=arm["backward_passes"],
        seconds={seed: outcome.seconds for seed, outcome in outcomes.items()},
        results=results,
        best_epoch={seed: outcome.best_epoch for seed, outcome in outcomes.items() if outcome.best_epoch is not None},
        phases=[_phase_line(phase, _crafted_in(phase, outcomes)) for phase in arm["phases"]],
        curves={seed: outcome.points for seed, outcome in outcomes.items()},
        ledger=[line for outcome in outcomes.values() for line in outcome.ledger],
        norms=norms,
    )


@dataclass
class _Outcome:
    """What became of one seed of an arm, up to the phase that is missing if any is."""

    status: str
    reason: str | None = None
    seconds: float = 0.0
    best_epoch: int | None = None
    points: list[CurvePoint] = field(default_factory=list)
    ledger: list[LedgerLine] = field(default_factory=list)
    crafting: dict[str, str] = field(default_factory=dict)  # phase -> what `auto` chose there and why


def _outcome(store: Store, arm: Mapping[str, Any], seed: int) -> _Outcome:
    result = store.result(arm["run"], seed)
    outcome = _Outcome("finished" if store.whole(result) else "missing")

    def note_failure(folder: Path) -> None:
        if outcome.status == "missing" and (failure := store.failure(folder)):
            outcome.status, outcome.reason = failure

    note_failure(result)
    for phase in arm["phases"]:
        folder = store.phase(phase["id"], seed)
        note_failure(folder)
        if not store.whole(folder):
            break
        clock, curve = read_json(folder / "time.json"), read_json(folder / "curve.json")
        outcome.seconds += clock["seconds"]
        outcome.best_epoch = curve["best_epoch"]
        outcome.points += [
            _point(point, took) for point, took in zip(curve["points"], clock["epoch_seconds"], strict=True)
        ]
        ledger = read_json(folder / "ledger.json")
        if "crafting" in ledger:
            outcome.crafting[phase["name"]] = ledger["crafting"]
        for line in ledger["groups"]:
            known = {key: line[key] for key in LedgerLine.__dataclass_fields__ if key in line}
            outcome.ledger.append(LedgerLine(seed=seed, phase=phase["name"], **known))
    return outcome


def _crafted_in(phase: Mapping[str, Any], outcomes: Mapping[int, _Outcome]) -> dict[str, list[int]]:
    """Return what `auto` chose in a phase, without the reasons, with the seeds: it may differ, since it is timed."""
    found: dict[str, list[int]] = {}
    for seed, outcome in outcomes.items():
        if phase["name"] in outcome.crafting:
            found.setdefault(outcome.crafting[phase["name"]].partition(":")[0], []).append(seed)
    return found


def _phase_line(phase: Mapping[str, Any], crafted_in: Mapping[str, Sequence[int]]) -> PhaseLine:
    return PhaseLine(
        name=phase["name"],
        epochs=phase["epochs"],
        attack=phase["attack"],
        optimizer=phase["optimizer"],
        normalization=phase["normalization"],
        groups=[
            GroupLine(
                name=group["name"],
                signal=group["signal"],
                start=group["start"],
                tensors=[(name, shape, share) for name, shape, share in group["tensors"]],
                parameters=group["parameters"],
                buffers=group["buffers"],
                share=group["share"],
                selector="" if group["selector"] == group["name"] else group["selector"],
            )
            for group in phase["groups"]
        ],
        forward_passes=phase["forward_passes"],
        backward_passes=phase["backward_passes"],
        shared_with=phase["shared_with"],
        extras=phase.get("extras", ()),
        step_passes=tuple(phase.get("step_passes", (0, 0))),
        crafted_in=crafted_in,
    )


def collect_layers(store: Store) -> list[dict[str, Any]]:
    """Return what the norm layers of every run hold, layer by layer: the rows of `normalization.norm_report`."""
    plan = _plan(store)
    return [
        {"study": plan["name"], "arm": arm["name"], "levels": arm["levels"], "run": arm["run"], **row}
        for arm in plan["arms"]
        for row in _layer_rows(store, plan, arm)
    ]


def _layer_rows(store: Store, plan: Mapping[str, Any], arm: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for seed in plan["seeds"]:
        folder = store.result(arm["run"], seed)
        if store.whole(folder) and (folder / "norms.json").exists():  # results of an earlier version have none
            found += [{"seed": seed, **row} for row in read_json(folder / "norms.json")]
    return found


def _point(point: Mapping[str, Any], seconds: float) -> CurvePoint:
    measured: dict[str, Any] = {key: float("nan") if value is None else value for key, value in point.items()}
    return CurvePoint(**measured, seconds=seconds)


def _notes(plan: Mapping[str, Any], arms: list[Arm], rows: list[Row]) -> list[str]:
    notes = []
    data = plan["data"].partition(":")[0]
    if data == "fashion-mnist-mini":
        notes.append(
            "fashion-mnist-mini is a fixed, class-balanced part of Fashion-MNIST (10,000 train and 2,000 test images): "
            "numbers on it are not comparable with published Fashion-MNIST results."
        )
    if "cifar10-jpeg" in data:
        notes.append(
            "cifar10-jpeg is CIFAR-10 after JPEG compression: numbers on it are not comparable with published ones."
        )
    if not any(name.startswith("apgd") for name in plan["attacks"]):
        notes.append(
            "Robust accuracy is an upper bound: only " + ", ".join(plan["attacks"]) + " was tried, no adaptive attack."
        )
    if len(plan["seeds"]) < 5:
        notes.append(
            f"{len(plan['seeds'])} seed(s): intervals are wide, and only large differences can be told from chance."
        )
    missing = [
        f"{arm.name} seed {seed} ({why})" for arm in arms for seed, why in arm.status.items() if why != "finished"
    ]
    if missing:
        notes.append("Not in the numbers: " + "; ".join(missing) + ".")
    return notes + _flags(rows)


def _flags(rows: list[Row]) -> list[str]:
    """Return a note for each flag that was raised: one of its texts, how many runs have it, what it means."""
    texts: dict[str, dict[str, set[tuple[str, int]]]] = {}
    for row in rows:
        for flag in filter(None, row.flags.split("; ")):
            texts.setdefault(flag.partition(":")[0], {}).setdefault(flag, set()).add((row.run, row.seed))
    notes = []
    for name, found in sorted(texts.items()):
        first, runs = min(found), len(set().union(*found.values()))
        others = f" (one of {runs} nets that raise it)" if runs > 1 and len(found) > 1 else ""
        notes.append(f"Flag raised: {first}{others}.{_meaning(name)}")
    return notes


def _meaning(flag: str) -> str:
    try:
        return f" {meaning(flag)}"
    except UserError:  # of an earlier version
        return ""


def _pictures(store: Store, plan: Mapping[str, Any], arms: list[Arm]) -> Pictures | None:
    seed = plan["seeds"][0]
    found = {}
    for arm in arms:
        folder = store.result(arm.run, seed)
        if store.whole(folder):
            found[arm.name] = read_tensors(folder / "pictures.safetensors")
    if not found:
        return None
    classes = plan["classes"]
    some = next(iter(found.values()))

    def names(tensor: Any) -> list[str]:
        return [classes[index] for index in tensor.tolist()]

    return Pictures(
        natural=some["natural"].numpy(),
        labels=names(some["labels"]),
        adversarial={arm: tensors["adversarial"].numpy() for arm, tensors in found.items()},
        predicted_natural={arm: names(tensors["predicted_natural"]) for arm, tensors in found.items()},
        predicted_adversarial={arm: names(tensors["predicted_adversarial"]) for arm, tensors in found.items()},
        attack=plan["attack_texts"][plan["attacks"][0]],
    )
