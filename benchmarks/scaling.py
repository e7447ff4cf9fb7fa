"""What does crafting cost as the network, the batch, the steps or the threads grow? One of them at a time.

PGD on the plain model in evaluation mode and on the crafting forward, in fp32 and bf16, follow each other in turn:

    python benchmarks/scaling.py --threads 2 --write
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import measuring
import torch

import robustlayers as rl

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Case:
    """One place to measure at."""

    depth: int = 20
    width: int = 16
    batch: int = 64
    steps: int = 5
    threads: int = 1


def cases(base: Case, most: int) -> dict[str, list[Case]]:
    """Return the places by what grows; `most` threads."""
    grown = {
        "depth": (8, 20, 32, 56),
        "width": (8, 16, 32, 64),
        "batch": (16, 64, 128, 256),
        "steps": (1, 5, 10, 20),
        "threads": tuple(n for n in (1, 2, 4, 8, 16) if n <= most),
    }
    return {name: [replace(base, **{name: value}) for value in values] for name, values in grown.items()}


def measure(case: Case, rounds: int, clock: Callable[[], float], device: torch.device) -> list[object]:
    """Return seconds of the plain model, and how many times as fast each precision is."""
    torch.set_num_threads(case.threads)
    settings = {"depth": case.depth, "width": case.width}
    task = measuring.synthetic("ResNet", "resnet", settings, case.batch, device)
    attack = rl.PGD(rl.Linf("8/255"), steps=case.steps, step_size="2/255", keep="last")
    runs: dict[str, Callable[[], object]] = {"plain": lambda: attack(task.model, task.x, task.y)}
    for precision in PRECISIONS:
        forward = rl.crafting_forward(task.model, precision=precision)
        runs[precision] = lambda forward=forward: (forward.refresh(), attack(forward, task.x, task.y))
    spent = measuring.interleaved(runs, rounds, clock, device)
    plain = measuring.spread(spent["plain"])
    per_pass = 1e3 * plain.median / (case.batch * case.steps)
    ratios = [measuring.ratio(spent["plain"], spent[precision]).text() for precision in PRECISIONS]
    return [plain.text(3), f"{per_pass:.2f}", *ratios]


def main() -> None:
    """Measure and print."""
    parser = measuring.options(__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(asdict(Case())), default=list(asdict(Case())))
    arguments = parser.parse_args()
    device, clock = torch.device(arguments.device), measuring.clock_of(arguments)
    head = measuring.machine(arguments)
    print(head, flush=True)
    rows = []
    for name, grown in cases(Case(threads=arguments.threads), arguments.threads).items():
        for case in grown if name in arguments.only else []:
            rows.append([name, getattr(case, name), *measure(case, arguments.rounds, clock, device)])
            print(rows[-1], flush=True)
    columns = ["what grows", "to", "plain, s (quartiles)", "ms per image and step"]
    speed = measuring.table([*columns, *(f"{precision}, times as fast" for precision in PRECISIONS)], rows)
    base = Case(threads=arguments.threads)
    text = (
        f"ResNet-{base.depth} of width {base.width}, {base.batch} random images of 3x32x32, PGD-{base.steps}, "
        f"but for what grows. {head}\n\n{speed}"
    )
    measuring.publish("scaling", text, write=arguments.write)


if __name__ == "__main__":
    main()
