"""How much faster is an evaluation by PGD? Ours on the folded forward, with and without early exit, against other libraries.

The task of each: robust accuracy of the pretrained ResNet-20 on images of cifar10-jpeg, in batches, in float32. Theirs attack
every image; ours those that are right without an attack, and with early exit an image leaves its batch once it is broken.
Neither changes the number that is asked for. The eps is one that about half of the images survive; the images that survive
must be equally many within sampling error, and the mean loss of ours not lower, where ours keeps the last iterate as theirs do
(adv-lib gives images that it did not break back unchanged):

    python benchmarks/evaluation.py --threads 2 --write
"""

from __future__ import annotations

from collections.abc import Callable

import measuring
import peers
import torch
from measuring import Task
from torch import Tensor
from torch.nn import functional

import robustlayers as rl


def by_peer(task: Task, craft: measuring.Craft, batch: int) -> Callable[[], Tensor]:
    """Return an evaluation as it is written around a library's attack."""

    def run() -> Tensor:
        verdicts = [
            measuring.robust(task.model, craft(x, y), y)
            for x, y in zip(task.x.split(batch), task.y.split(batch), strict=True)
        ]
        return torch.cat(verdicts).cpu()

    return run


def by_us(task: Task, eps: float, steps: int, batch: int, *, early: bool) -> Callable[[], Tensor]:
    """Return our evaluation."""
    attack = rl.PGD(rl.Linf(eps), steps=steps, step_size=eps / 4, early_exit=early)
    return lambda: rl.correct(task.model, task.x, task.y, attack, batch_size=batch)


def losses(task: Task, craft: measuring.Craft, batch: int) -> Tensor:
    """Return the cross-entropy of the plain model on what was crafted for each image, which tells strength more finely."""
    found = []
    for x, y in zip(task.x.split(batch), task.y.split(batch), strict=True):
        x_adv = craft(x, y)
        with torch.no_grad(), rl.inference(task.model):
            found.append(functional.cross_entropy(task.model(x_adv), y, reduction="none"))
    return torch.cat(found)


def compared(mine: Tensor, theirs: Tensor) -> str:
    """Return a mean loss and by how much ours is higher, image by image; `ValueError` if lower by three errors."""
    more = mine - theirs
    error = float(more.std() / len(more) ** 0.5)
    if float(more.mean()) < -3 * error:
        raise ValueError(f"ours is weaker: its loss is lower by {-float(more.mean()):.3g} (standard error {error:.2g})")
    return f"{float(theirs.mean()):.3f} (ours more by {float(more.mean()):+.3f}, standard error {error:.3f})"


def main() -> None:
    """Measure and print."""
    parser = measuring.options(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    head = measuring.machine(arguments)
    print(head, flush=True)
    task = measuring.pretrained(arguments.data, arguments.images, device)
    eps = measuring.half_broken(task.model, task.x[:128], task.y[:128])
    crafts = peers.crafters(task.model, eps, eps / 4, arguments.steps)
    runs = {name: by_peer(task, craft, arguments.batch) for name, craft in crafts.items()}
    runs["ours"] = by_us(task, eps, arguments.steps, arguments.batch, early=False)
    runs["ours, early exit"] = by_us(task, eps, arguments.steps, arguments.batch, early=True)
    left: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[], None]:
        def run() -> None:
            left[name] = runs[name]()

        return run

    spent = measuring.interleaved(
        {name: keep(name) for name in runs}, arguments.rounds, measuring.clock_of(arguments), device
    )
    for name in runs:
        measuring.agree(name, left[name], "ours", left["ours"])
    attack = rl.PGD(rl.Linf(eps), steps=arguments.steps, step_size=eps / 4, keep="last")
    mine = losses(task, lambda x, y: attack(task.model, x, y), arguments.batch)
    strength = {name: compared(mine, losses(task, craft, arguments.batch)) for name, craft in crafts.items()}
    strength["ours"] = f"{float(mine.mean()):.3f}"
    middle = {name: measuring.spread(seconds).median for name, seconds in spent.items()}
    fastest = min(crafts or {"ours": None}, key=lambda name: middle[name])
    rows = [
        [
            name,
            measuring.spread(seconds).text(2),
            f"{len(task.y) / middle[name]:.0f}",
            measuring.ratio(spent[fastest], seconds).text(),
            f"{int(left[name].sum())} of {len(task.y)}",
            strength.get(name, ""),
        ]
        for name, seconds in spent.items()
    ]
    speed = measuring.table(
        ["PGD of", "s (quartiles)", "images/s", f"times as fast as {fastest} (quartiles)", "images left", "mean loss"],
        rows,
    )
    settings = f"PGD-{arguments.steps}, linf {255 * eps:.2g}/255, {task}, batches of {arguments.batch}"
    measuring.publish("evaluation", f"{settings}. {head}\n\n{speed}", write=arguments.write)


if __name__ == "__main__":
    main()
