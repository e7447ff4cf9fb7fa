"""From the store to a summary: everything that was measured so far, missing and failed seeds included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from robustlayers.core.device import machine, versions
from robustlayers.core.errors import Fault, UserError
from robustlayers.core.files import read_json, read_tensors
from robustlayers.evaluation.flags import meaning
from robustlayers.study.analyzed import collect_analyses
from robustlayers.study.claims import judge
from robustlayers.study.claims import parse as parse_claim
from robustlayers.study.definition import FACTS
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
    metrics = ["clean", "robust", *plan["attacks"], *FACTS]
    claims = judge(
        [(c["say"], parse_claim(c["that"]).bind(factors, metrics, plan["checkpoints"])) for c in plan["claims"]],
        lookup,
        plan["checkpoints"],
        facts=FACTS,
    )
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
    status, reasons, seconds, best_epoch = {}, {}, {}, {}
    curves: dict[int, list[CurvePoint]] = {}
    ledger: list[LedgerLine] = []
    for seed in plan["seeds"]:
        status[seed] = "finished" if store.whole(store.result(arm["run"], seed)) else "missing"
        if status[seed] == "missing" and (failure := store.failure(store.result(arm["run"], seed))):
            status[seed], reasons[seed] = failure
        time = 0.0
        points: list[CurvePoint] = []
        for phase in arm["phases"]:
            folder = store.phase(phase["id"], seed)
            failure = store.failure(folder)
            if failure and status[seed] == "missing":
                status[seed], reasons[seed] = failure
            if not store.whole(folder):
                break
            clock = read_json(folder / "time.json")
            time += clock["seconds"]
            curve = read_json(folder / "curve.json")
            best_epoch[seed] = curve["best_epoch"]
            for point, took in zip(curve["points"], clock["epoch_seconds"], strict=True):
                points.append(_point(point, took))
            ledger += [
                LedgerLine(
                    seed=seed,
                    phase=phase["name"],
                    **{key: line[key] for key in LedgerLine.__dataclass_fields__ if key in line},
                )
                for line in read_json(folder / "ledger.json")["groups"]
            ]
        seconds[seed] = time
        curves[seed] = points
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
        status=status,
        reasons=reasons,
        trained_parameters=arm["trained_parameters"],
        trained_share=arm["trained_share"],
        forward_passes=arm["forward_passes"],
        backward_passes=arm["backward_passes"],
        seconds=seconds,
        results=results,
        best_epoch=best_epoch,
        phases=[
            PhaseLine(
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
            )
            for phase in arm["phases"]
        ],
        curves=curves,
        ledger=ledger,
        norms=norms,
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
        notes.append("Not in the numbers: " + ", ".join(missing) + ".")
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
