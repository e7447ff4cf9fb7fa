"""How much faster is a step of adversarial training? PGD and update by our step and by loops in the manner of others.

All start from the same pretrained ResNet-20 and see the same batch of cifar10-jpeg in every round, with the same eps, step
size and steps; crafting normalizes by running statistics, the update by the batch's, and statistics move once in a step.
SGD without momentum, so that the update is the cheapest there is. Afterwards all that were trained meet one attack, and
must stand as many images within sampling error:

    python benchmarks/training_step.py --threads 2 --write
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import measuring
import peers
import torch
from measuring import Task
from torch import Tensor, nn

import robustlayers as rl

EPS, STEP, RATE = 8 / 255, 2 / 255, 0.001
LEAST = 2.3  # promised of ours with the fastest crafting that agrees


def own_step(
    model: nn.Module, steps: int, crafting: str, precision: str = "fp32"
) -> Callable[[Tensor, Tensor], object]:
    """Return our step in which the whole model learns from PGD, with the norm behavior of the loops by hand."""
    step = rl.PartialStep(
        model,
        rl.Partition(model, {"all": "all"}),
        {"all": "adversarial"},
        optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
        attack=rl.PGD(rl.Linf(EPS), steps=steps, step_size=STEP, keep="last"),
        crafting=crafting,
        precision=precision,
    )
    if set(step.statistics_updates().values()) != {1}:
        raise ValueError("our step moves statistics more or less than once")
    return step


def contenders(task: Task, steps: int) -> tuple[dict[str, Callable[[], object]], dict[str, nn.Module]]:
    """Return the steps by name, and the copy of the model that each one trains."""
    runs: dict[str, Callable[[], object]] = {}
    models: dict[str, nn.Module] = {}
    for name, loop in (("torchattacks-style", peers.torchattacks_style_step), ("MAIR-style", peers.mair_style_step)):
        model = models[name] = copy.deepcopy(task.model)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        runs[name] = partial(loop, model, optimizer, task.x, task.y, EPS, STEP, steps)
    for crafting, precision in (("fp32", "fp32"), ("auto", "fp32"), ("auto", "bf16")):
        name = f"ours, crafting {crafting}, update {precision}"
        model = models[name] = copy.deepcopy(task.model)
        runs[name] = partial(own_step(model, steps, crafting, precision), task.x, task.y)
    return runs, models


def main() -> None:
    """Measure and print."""
    parser = measuring.options(__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--images", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    head = measuring.machine(arguments)
    print(head, flush=True)
    task = measuring.pretrained(arguments.data, arguments.images, device)
    task.model.requires_grad_(True)
    runs, models = contenders(task, arguments.steps)
    spent = measuring.interleaved(runs, arguments.rounds, measuring.clock_of(arguments), device)
    eps = measuring.half_broken(task.model, task.x, task.y)
    attack = rl.PGD(rl.Linf(eps), steps=10, keep="last")
    left = {}
    for name, model in models.items():
        with rl.inference(model):
            x_adv = attack(model, task.x, task.y)
        left[name] = measuring.robust(model, x_adv, task.y)
    first = next(iter(left))
    for name, mine in left.items():
        measuring.agree(name, mine, first, left[first])
    rows = []
    for name, seconds in spent.items():
        ratio = measuring.ratio(spent[first], seconds)
        least = f"{LEAST} {'met' if ratio.median >= LEAST else 'not met'}" if "crafting auto" in name else ""
        rows.append([name, measuring.spread(seconds).text(3), ratio.text(), least, int(left[name].sum())])
    columns = ["step", "s (quartiles)", f"times as fast as {first} (quartiles)", "at least"]
    speed = measuring.table([*columns, f"images left at eps {255 * eps:.2g}/255 afterwards"], rows)
    text = f"PGD-{arguments.steps} and update, linf 8/255, {task}. {head}\n\n{speed}"
    measuring.publish("training step", text, write=arguments.write)


if __name__ == "__main__":
    main()
