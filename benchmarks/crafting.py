"""How much faster is our crafting? PGD on the crafting forward against PGD of torchattacks, adv-lib, foolbox, in turn.

All get the same model in evaluation mode, the same images, eps, step size and steps, keep one start, and stay in the same
ball. Ours includes `refresh`, as in training, where weights change between two batches. Before the clock runs, each
contender attacks once at an eps that about half of the images survive, and the survivors on the plain model must be
equally many within sampling error. "Convolutions alone" are the same convolutions, forward and for the gradient of their
input, without anything between them: what is left where all else costs nothing. A second table tells how far the folded
gradient is from the model's:

    python benchmarks/crafting.py --threads 2 --write
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial

import measuring
import peers
import torch
from measuring import Task
from torch import Tensor, nn
from torch.nn import functional

import robustlayers as rl
from robustlayers.normalization.fold import CraftingForward

EPS, STEP = 8 / 255, 2 / 255
OURS = {
    "ours, fp32": {"precision": "fp32"},
    "ours, fp32, not channels-last": {"precision": "fp32", "channels_last": False},
    "ours, bf16": {"precision": "bf16"},
    "ours, auto": {"precision": "auto"},
}
FLOORS = {torch.float32: "convolutions alone, fp32", torch.bfloat16: "convolutions alone, bf16"}
WANTED = {  # the least that is promised, against the fastest peer
    ("ResNet-20", "fp32"): 1.8,
    ("ResNet-20", "auto"): 2.8,
    ("ResNet-18", "auto"): 2.5,
}


def ours(forward: CraftingForward, eps: float, step_size: float, steps: int) -> measuring.Craft:
    """Return our PGD as a loop of training runs it: weights are read anew, the last iterate counts, as in the peers."""
    attack = rl.PGD(rl.Linf(eps), steps=steps, step_size=step_size, keep="last")

    def craft(x: Tensor, y: Tensor) -> Tensor:
        forward.refresh()
        return attack(forward, x, y)

    return craft


def contenders(task: Task, forwards: dict[str, CraftingForward], eps: float, step: float, steps: int) -> dict:
    """Return all of them by name, at equal settings."""
    mine = {name: ours(forward, eps, step, steps) for name, forward in forwards.items()}
    return peers.crafters(task.model, eps, step, steps) | mine


def equally_strong(task: Task, forwards: dict[str, CraftingForward], steps: int) -> tuple[float, dict[str, int]]:
    """Return an eps and the images that survive each contender; `ValueError` if they differ by more than chance."""
    eps = measuring.half_broken(task.model, task.x, task.y)
    left: dict[str, Tensor] = {}
    for name, craft in contenders(task, forwards, eps, eps / 4, steps).items():
        x_adv = craft(task.x, task.y)
        measuring.check(name, x_adv, task.x, eps) if name != "adv-lib" else None  # it returns unbroken images unchanged
        left[name] = measuring.robust(task.model, x_adv, task.y)
    first = next(iter(left))
    for name, mine in left.items():
        measuring.agree(name, mine, first, left[first])
    return eps, {name: int(right.sum()) for name, right in left.items()}


def measure(
    task: Task, rounds: int, steps: int, clock: Callable[[], float], device: torch.device
) -> list[list[object]]:
    """Return the rows of one network."""
    forwards = {name: rl.crafting_forward(task.model, **settings) for name, settings in OURS.items()}  # pyright: ignore[reportArgumentType]
    chosen = forwards["ours, auto"].settle(task.x)
    print(f"<!-- {task}: auto took {chosen.reason} -->", flush=True)
    eps, left = equally_strong(task, forwards, steps)
    crafts = contenders(task, forwards, EPS, STEP, steps)
    for name, craft in crafts.items():
        measuring.check(name, craft(task.x, task.y), task.x, EPS)
    timed: dict[str, Callable[[], object]] = {n: partial(craft, task.x, task.y) for n, craft in crafts.items()}
    for dtype, name in FLOORS.items():
        timed[name] = convolutions(task, dtype, steps)
    spent = measuring.interleaved(timed, rounds, clock, device)
    middle = {name: measuring.spread(seconds).median for name, seconds in spent.items()}
    theirs = [name for name in spent if name not in OURS and name not in FLOORS.values()]
    fastest = min(theirs, key=lambda name: middle[name]) if theirs else None
    rows = []
    for name, seconds in spent.items():
        ratio = measuring.ratio(spent[fastest], seconds) if fastest else None
        shown = name if name != "ours, auto" else f"ours, auto ({chosen.name})"
        least = WANTED.get((task.name, name.removeprefix("ours, ")))
        rows.append(
            [
                str(task),
                shown,
                measuring.spread(seconds).text(3),
                f"{len(task.y) / middle[name]:.0f}",
                "" if ratio is None else ratio.text(),
                "" if least is None else f"{least} {'met' if ratio and ratio.median >= least else 'not met'}",
                f"{left[name]} at eps {255 * eps:.2g}/255" if name in left else "",
            ]
        )
    return rows


def convolutions(task: Task, dtype: torch.dtype, steps: int) -> Callable[[], object]:
    """Return what makes every convolution of the network as often as PGD does, channels-last, and nothing else."""
    found: list[tuple[nn.Conv2d, Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        found.append((module, args[0], out))

    hooks = [module.register_forward_hook(note) for module in task.model.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        task.model(task.x)
    for hook in hooks:
        hook.remove()

    def laid(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype).contiguous(memory_format=torch.channels_last)

    made = [(module, laid(x), laid(module.weight), laid(out)) for module, x, out in found]

    def run() -> None:
        for _ in range(steps):
            for module, x, weight, gradient in made:
                stride, padding, dilation, groups = module.stride, module.padding, module.dilation, module.groups
                functional.conv2d(x, weight, None, stride, padding, dilation, groups)
                torch.ops.aten.convolution_backward(
                    gradient, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
                )

    return run


def gradient_error(task: Task) -> list[object]:
    """Return a row: how far the folded gradient is from the plain model's, image by image.

    The error of an image is |g' - g| / |g| in the Euclidean norm, of the gradient of the cross-entropy to the second class.
    In float64 this is the error of folding itself. In float32 a ReLU whose input is as near to 0 as rounding goes may be
    on in one and off in the other; the gradient then differs by a path of the network, however exact both are. The plain
    model in float32 differs from itself in float64 by as much, which the last column tells.
    """
    double = Task(task.name, copy.deepcopy(task.model).double(), task.x.double(), task.y)
    with torch.no_grad():
        y = task.model(task.x).topk(2, dim=1).indices[:, 1]
    folded, folded_double = (_gradient(rl.crafting_forward(t.model), t.x, y) for t in (task, double))
    plain, plain_double = (_gradient(t.model, t.x, y) for t in (task, double))
    cells = []
    for mine, other in ((folded_double, plain_double), (folded, plain), (folded, plain_double), (plain, plain_double)):
        mine, other = mine.double().flatten(1), other.double().flatten(1)
        errors = (mine - other).norm(dim=1) / other.norm(dim=1)
        share = (errors <= 1e-4).double().mean().item()
        cells.append(f"{errors.median().item():.1e} / {errors.max().item():.1e} / {share:.1%}")
    return [str(task), *cells]


def _gradient(forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    loss = functional.cross_entropy(forward(x), y, reduction="sum")
    return torch.autograd.grad(loss, x)[0].detach()


def main() -> None:
    """Measure and print."""
    parser = measuring.options(__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--images", type=int, default=128, help="images for ResNet-20; half as many for ResNet-18")
    parser.add_argument("--networks", nargs="+", choices=("ResNet-20", "ResNet-18"), default=["ResNet-20", "ResNet-18"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, clock = torch.device(arguments.device), measuring.clock_of(arguments)
    head = measuring.machine(arguments)
    print(head, flush=True)
    rows, errors = [], []
    for name in arguments.networks:
        if name == "ResNet-20":
            task = measuring.pretrained(arguments.data, arguments.images, device)
        else:
            task = measuring.synthetic("ResNet-18", "resnet18", {}, max(1, arguments.images // 2), device)
        task.model.requires_grad_(True)  # as a model in training is
        errors.append(gradient_error(task))
        print(errors[-1], flush=True)
        rows += measure(task, arguments.rounds, arguments.steps, clock, device)
        if hasattr(os, "getloadavg"):
            print(f"<!-- load {os.getloadavg()[0]:.1f} -->", flush=True)
    columns = [
        "network, images",
        "PGD of",
        "s (quartiles)",
        "images/s",
        "times as fast as the fastest peer (quartiles)",
    ]
    speed = measuring.table([*columns, "at least", "images left"], rows)
    pairs = ["folded to plain, both float64", "folded to plain", "folded to plain float64", "plain to plain float64"]
    against = ["network, images", *pairs]
    note = (
        "Relative error of the input gradient, median / largest / share of images with at most 1e-4, in float32 unless "
        "said otherwise:"
    )
    text = f"PGD-{arguments.steps}, linf 8/255, step 2/255. {head}\n\n{speed}\n\n{note}\n\n{measuring.table(against, errors)}"
    measuring.publish("crafting", text, write=arguments.write)


if __name__ == "__main__":
    main()
