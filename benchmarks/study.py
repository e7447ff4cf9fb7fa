"""What does sharing phases save? A cut sweep run as one study, and each of its arms on its own.

As one study, a phase that several arms have in common is trained once. On its own, each arm trains all its phases, as a
script for each arm would. Both measure every arm with the same attacks, and must find the same numbers:

    python benchmarks/study.py --write
    python benchmarks/study.py --study studies/cut-sweep.yaml --set phases.whole.epochs=1
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import measuring

from robustlayers.study.collect import collect_rows
from robustlayers.study.definition import load_study
from robustlayers.study.plan import Plan, make_plan
from robustlayers.study.run import run_plan
from robustlayers.study.store import Store

STUDY = Path(__file__).resolve().parent.parent / "studies" / "cut-sweep.yaml"
SMALL = ("seeds=1", "phases.whole.epochs=2", "phases.part.epochs=1")

Numbers = dict[tuple[object, ...], float]


def alone(plan: Plan) -> list[Plan]:
    """Return the plan of each arm, which knows nothing of the others."""
    return [
        replace(plan, arms=(arm,), nodes={name: replace(plan.nodes[name], arms=(arm.name,)) for name in arm.nodes})
        for arm in plan.arms
    ]


def run(plans: Sequence[Plan], device: str, workers: int, threads: int) -> tuple[float, Numbers]:
    """Return the seconds that the plans take one after the other, each in a folder of its own, and what they found."""
    numbers: Numbers = {}
    began = time.perf_counter()
    for plan in plans:
        with tempfile.TemporaryDirectory() as folder:
            outcome = run_plan(plan, folder, device=device, workers=workers, threads=threads)
            if outcome.failed:
                raise ValueError(f"a run failed: {next(iter(outcome.failed.values()))}")
            for row in collect_rows(Store(folder)):
                key = (row.arm, row.seed, row.checkpoint, row.metric, row.split, row.phase, row.group, row.epoch)
                numbers[key] = row.value
    return time.perf_counter() - began, numbers


def main() -> None:
    """Measure and print."""
    parser = measuring.options(__doc__)
    parser.set_defaults(rounds=1)
    parser.add_argument("--study", type=Path, default=STUDY)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help=f"changes besides {' '.join(SMALL)}")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side, in both")
    arguments = parser.parse_args()
    head = measuring.machine(arguments)
    print(head, flush=True)
    plan = make_plan(load_study(arguments.study, [*SMALL, *arguments.set]))
    found: dict[str, Numbers] = {}
    spent: dict[str, list[float]] = {"each arm alone": [], "one study": []}
    for _ in range(arguments.rounds):
        for name, plans in (("each arm alone", alone(plan)), ("one study", [plan])):
            seconds, found[name] = run(plans, arguments.device, arguments.workers, arguments.threads)
            spent[name].append(seconds)
            print(f"<!-- {name}: {seconds:.1f} s -->", flush=True)
    first, second = found.values()
    different = [key for key in first.keys() | second.keys() if first.get(key) != second.get(key)]
    if different:
        raise ValueError(f"{len(different)} numbers differ, among them {different[0]}")
    trainings = {"each arm alone": plan.trainings_unshared, "one study": plan.trainings}
    rows = [
        [
            name,
            trainings[name],
            measuring.spread(seconds).text(1),
            measuring.ratio(spent["each arm alone"], seconds).text(),
        ]
        for name, seconds in spent.items()
    ]
    speed = measuring.table(["run as", "phase trainings", "s (quartiles)", "times as fast"], rows)
    changes = ", ".join([*SMALL, *arguments.set])
    settings = f"{arguments.study.name} with {changes}: {len(plan.arms)} arms, {arguments.workers} worker(s)"
    text = f"{settings}. {head}\n\n{speed}\n\n{len(first)} numbers measured, the same in both."
    measuring.publish("study", text, write=arguments.write)


if __name__ == "__main__":
    main()
