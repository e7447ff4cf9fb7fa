"""What does CKA of a whole network cost? Seconds and memory of all pairs of layers, each time in a process of its own.

Layers are all convolutions, norm layers, linear layers and activations of the pretrained ResNet-20, on images of
cifar10-jpeg; or, with `--seeded`, of one drawn anew on random images, which costs the same. Memory is the largest resident
size of the process, torch included:

    python benchmarks/cka.py --threads 2 --write
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import measuring
import torch
from measuring import Task

from robustlayers import analysis

LEAST_SECONDS, LEAST_BYTES = 60.0, 1.5e9  # that are promised, for 2,000 images on two cores
POOLED = "Procrustes of pooled features"


def contenders(task: Task) -> dict[str, Callable[[], object]]:
    """Return what is measured, by name."""
    noisy = (task.x + 0.02).clamp(0, 1)
    return {
        "CKA": lambda: analysis.cka(task.model, task.x),
        "CKA, 20 permutations": lambda: analysis.cka(
            task.model, task.x, permutations=20, generator=torch.Generator().manual_seed(0)
        ),
        "CKA, two kinds of images": lambda: analysis.cka(task.model, task.x, other_x=noisy),
        POOLED: lambda: analysis.procrustes(task.model, task.x, pool=True),
    }


def subject(arguments: Any) -> Task:
    """Return the network and its images."""
    device = torch.device(arguments.device)
    if arguments.seeded:
        return measuring.synthetic("ResNet-20, drawn", "resnet", {"depth": 20}, arguments.images, device)
    return measuring.pretrained(arguments.data, arguments.images, device)


def peak_bytes() -> float:
    """Return the largest resident size of this process so far; the kernel counts in kilobytes, that of macOS in bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(size if sys.platform == "darwin" else 1024 * size)


def child(arguments: Any) -> None:
    """Measure one contender and print what it took."""
    torch.set_num_threads(arguments.threads)
    task = subject(arguments)
    run = contenders(task)[arguments.only]
    before, began = peak_bytes(), time.perf_counter()
    run()
    print(json.dumps({"seconds": time.perf_counter() - began, "bytes": peak_bytes(), "before": before}))


def main() -> None:
    """Measure and print."""
    parser = measuring.options(__doc__, threads=2)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument(
        "--seeded", action="store_true", help="a network that is drawn, and random images: no data needed"
    )
    parser.add_argument("--only", help="measure this alone, in this process, and print it as JSON")
    arguments = parser.parse_args()
    if arguments.only:
        child(arguments)
        return
    head, task = measuring.machine(arguments), subject(arguments)
    layers = len(analysis.layers_of(task.model, example=task.x))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders(task)}

    def measured(name: str) -> Callable[[], None]:
        def run() -> None:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ValueError(f"{name}: {done.stderr[-300:]}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))

        return run

    measuring.interleaved({name: measured(name) for name in found}, arguments.rounds)
    rows = []
    for name, rounds in found.items():
        counted = rounds[1:]  # the first one warms up the files
        seconds = measuring.spread([one["seconds"] for one in counted])
        size, before = (max(one[key] for one in counted) / 1e9 for key in ("bytes", "before"))
        promised = "" if name == POOLED else _verdict(seconds.median, size * 1e9)
        rows.append([name, seconds.text(1), f"{size:.2f}", f"{before:.2f}", promised])
    header = [
        "of all pairs of layers",
        "s (quartiles)",
        "largest memory, GB",
        "before it began",
        f"{LEAST_SECONDS:g} s, 1.5 GB",
    ]
    text = f"{layers} layers of {task}. {head}\n\n{measuring.table(header, rows)}"
    measuring.publish("cka", text, write=arguments.write)


def _verdict(seconds: float, size: float) -> str:
    return "met" if seconds <= LEAST_SECONDS and size <= LEAST_BYTES else "not met"


if __name__ == "__main__":
    main()
