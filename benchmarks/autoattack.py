"""Is our AutoAttack as strong as the reference, and faster? On the same images, attack by attack, in turn.

The reference is pyautoattack (`benchmarks/requirements.txt`) on the plain model, in its standard budgets and its own
default batch size. Parts of the images go through both, one attack after the other: each side attacks what its own earlier
attacks have left, as both do by themselves; who goes first alternates. So APGD-T counts what APGD-CE and APGD-T break
together; with `--alone` it gets all images. Each attack that is done with a part is noted in a file of JSON lines, and the
same command goes on from there. Prints a table for each eps:

    python benchmarks/autoattack.py --journal autoattack.jsonl --images 500 --clock cpu --write
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from measuring import Task, clock_of, machine, options, pretrained, publish, table
from torch import Tensor, nn

import robustlayers as rl
from robustlayers.evaluation.autoattack import standard
from robustlayers.evaluation.cascade import cascade

ATTACKS = {"apgd-ce": "apgd-ce", "apgd-t": "apgd-t", "fab-t": "fab-t", "square-5000": "square"}
"""Our name of an attack -> that of the reference."""

SIDES: tuple[str, ...] = ("ours", "reference")


@dataclass(frozen=True)
class Record:
    """One attack of one side on one part of the images: how many it got, the places of those it left, and its cost."""

    eps: str
    alone: bool
    side: str
    attack: str
    first: int
    last: int
    attacked: int
    left: list[int]
    seconds: float


def ours(model: nn.Module, x: Tensor, y: Tensor, attack: str, threat: rl.Threat) -> Tensor:
    """Return which images are right after one of our attacks; its draws do not depend on what ran before."""
    return cascade(model, x, y, {attack: standard(threat)[0][attack]}).robust


def reference(model: nn.Module, x: Tensor, y: Tensor, attack: str, threat: rl.Threat) -> Tensor:
    """Return the same of the reference, in the budgets of its standard version; the verdict is the plain model's."""
    from pyautoattack import AutoAttack  # pyright: ignore[reportMissingImports]

    theirs = AutoAttack(model, eps=threat.eps, norm="Linf", seed=0, version="standard")
    theirs.attacks_to_run, theirs.version = [ATTACKS[attack]], "custom"
    result = theirs.run_standard_evaluation(x, y, batch_size=250)
    x_adv = result[0] if isinstance(result, tuple) else result
    threat.check(x_adv, x)
    with torch.no_grad():
        return model(x_adv).argmax(1) == y


RUN: dict[str, Callable[[nn.Module, Tensor, Tensor, str, rl.Threat], Tensor]] = {"ours": ours, "reference": reference}


class Journal:
    """The records so far, in memory and in a file that a killed run goes on from."""

    def __init__(self, path: Path, heading: dict[str, object]) -> None:
        self.path, self.records = path, []
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if lines and json.loads(lines[0]) != heading:
            raise SystemExit(f"{path}: is of a run with other settings: {lines[0]}; name another file")
        for line in lines[1:]:
            try:
                self.records.append(Record(**json.loads(line)))
            except (ValueError, TypeError):  # the last line of a run that was killed as it wrote
                break
        text = [json.dumps(heading), *(json.dumps(asdict(record)) for record in self.records)]
        path.write_text("\n".join(text) + "\n", encoding="utf-8")

    def find(self, eps: str, side: str, attack: str, first: int, *, alone: bool) -> Record | None:
        wanted = eps, side, attack, first, alone
        return next((r for r in self.records if (r.eps, r.side, r.attack, r.first, r.alone) == wanted), None)

    def add(self, record: Record) -> None:
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")


def measure(
    task: Task,
    journal: Journal,
    eps: str,
    attacks: Sequence[str],
    part: int,
    clock: Callable[[], float],
    *,
    alone: bool = False,
) -> None:
    """Run what the journal lacks: each attack on each part, both sides in turn."""
    with torch.no_grad():
        right = (task.model(task.x).argmax(1) == task.y).nonzero().squeeze(1).tolist()
    turn = 0
    for first in range(0, len(task.y), part):
        last = min(first + part, len(task.y))
        left = {side: [place for place in right if first <= place < last] for side in SIDES}
        for attack in attacks:
            turn += 1
            for side in SIDES if turn % 2 else SIDES[::-1]:
                record = journal.find(eps, side, attack, first, alone=alone)
                if record is None:
                    began, standing = clock(), left[side]
                    if standing:
                        robust = RUN[side](task.model, task.x[standing], task.y[standing], attack, rl.Linf(eps))
                        standing = [place for place, held in zip(standing, robust.tolist(), strict=True) if held]
                    spent = clock() - began
                    record = Record(eps, alone, side, attack, first, last, len(left[side]), standing, spent)
                    journal.add(record)
                    print(f"{eps} {first}-{last} {attack} {side}: {len(standing)} left, {spent:.0f} s", flush=True)
                if not alone:
                    left[side] = record.left


def rows(records: Sequence[Record], attacks: Sequence[str], n: int) -> Iterator[list[str]]:
    """Return a line for each attack, and one for all together: what is left, who disagrees, and what it took."""
    total = dict.fromkeys(SIDES, 0.0)
    for attack in attacks:
        mine = {side: [r for r in records if (r.side, r.attack) == (side, attack)] for side in SIDES}
        left = {side: {place for r in mine[side] for place in r.left} for side in SIDES}
        spent = {side: sum(r.seconds for r in mine[side]) for side in SIDES}
        total = {side: total[side] + spent[side] for side in SIDES}
        one, other = left["ours"], left["reference"]
        yield [
            attack,
            f"{len(one)} ({len(one) / n:.1%})",
            f"{len(other)} ({len(other) / n:.1%})",
            f"{100 * (len(one) - len(other)) / n:+.1f}",
            f"{len(one - other)} / {len(other - one)}",
            *_cost(spent),
        ]
    yield ["in all", "", "", "", "", *_cost(total)]


def _cost(spent: dict[str, float]) -> list[str]:
    one, other = spent["ours"], spent["reference"]
    return [f"{one:.0f}", f"{other:.0f}", f"{other / one:.2f}" if one else ""]


HEADER = [
    "attack",
    "ours, left",
    "reference, left",
    "difference, points",
    "left by ours alone / by the reference alone",
    "ours, s",
    "reference, s",
    "ratio",
]


def main() -> None:
    """Measure, print and perhaps publish."""
    parser = options(__doc__)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--part", type=int, default=250, help="images that go through both before the next")
    parser.add_argument("--eps", nargs="+", default=["0.5/255", "1/255"])
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS), help="in their order")
    parser.add_argument("--alone", action="store_true", help="give every attack all images, not what is left")
    parser.add_argument("--journal", type=Path, required=True, help="file of JSON lines; the run goes on from it")
    arguments = parser.parse_args()
    if arguments.rounds != parser.get_default("rounds"):
        parser.error("--rounds: every part of the images goes through once; allowed: --part")
    clock = clock_of(arguments)
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.WARNING)  # the reference tells its progress
    task = pretrained(arguments.data, arguments.images, torch.device(arguments.device))
    attacks = [attack for attack in ATTACKS if attack in arguments.attacks]
    journal = Journal(arguments.journal, _heading(arguments, task))
    text = []
    for eps in arguments.eps:
        measure(task, journal, eps, attacks, arguments.part, clock, alone=arguments.alone)
        found = [r for r in journal.records if r.eps == eps and r.alone == arguments.alone]
        kind = "each attack on all images" if arguments.alone else "each attack on what the ones before left"
        with torch.no_grad():
            clean = int((task.model(task.x).argmax(1) == task.y).sum())
        n = len(task.y)
        text += [f"linf {eps}, {task}, {clean} right without an attack ({clean / n:.1%}); {kind}:", ""]
        text += [table(HEADER, list(rows(found, attacks, n))), ""]
    head = machine(arguments).replace(f"{arguments.rounds} rounds", f"{arguments.part} images in turn")
    publish("autoattack", "\n".join([head, "", *text]).strip(), write=arguments.write)


def _heading(arguments: argparse.Namespace, task: Task) -> dict[str, object]:
    """Return what two runs must have in common to share a journal."""
    names = "images", "part", "threads", "device", "clock"
    return {"task": str(task), **{name: getattr(arguments, name) for name in names}}


if __name__ == "__main__":
    main()
