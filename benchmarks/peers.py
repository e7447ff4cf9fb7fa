"""PGD of other libraries at equal settings, imported when asked for, and training loops in the manner of others.

Where torchvision and visdom cannot be imported, adv-lib gets empty modules of these names: it imports them for a distance
and a plot that PGD does not use. Nothing of torchattacks and foolbox is replaced. MAIR is not on the package index; its
crafting is torchattacks' own, so its loop stands here by hand.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["PEERS", "crafters", "mair_style_step", "torchattacks_style_pgd", "torchattacks_style_step"]

Craft = Callable[[Tensor, Tensor], Tensor]
"""Images and labels -> adversarial images."""


def _torchattacks(model: nn.Module, eps: float, step_size: float, steps: int) -> Craft:
    library = importlib.import_module("torchattacks")
    return library.PGD(model, eps=eps, alpha=step_size, steps=steps, random_start=True)


def _adv_lib(model: nn.Module, eps: float, step_size: float, steps: int) -> Craft:
    for name in ("torchvision", "torchvision.models", "visdom"):
        _stand_in(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it compares versions by what Python has given up
        pgd = importlib.import_module("adv_lib.attacks.projected_gradient_descent").pgd_linf
    return lambda x, y: pgd(model, x, y, eps, steps=steps, absolute_step_size=step_size, random_init=True)


def _foolbox(model: nn.Module, eps: float, step_size: float, steps: int) -> Craft:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = importlib.import_module("foolbox")
    attack = library.attacks.LinfPGD(abs_stepsize=step_size, steps=steps, random_start=True)
    device = next(model.parameters()).device
    wrapped = library.PyTorchModel(model, bounds=(0, 1), device=device)
    return lambda x, y: attack(wrapped, x, y, epsilons=eps)[1]


PEERS: dict[str, Callable[[nn.Module, float, float, int], Craft]] = {
    "torchattacks": _torchattacks,
    "adv-lib": _adv_lib,
    "foolbox": _foolbox,
}


def crafters(model: nn.Module, eps: float, step_size: float, steps: int) -> dict[str, Craft]:
    """Return PGD in linf of each library that can be imported, on a model in evaluation mode; tell which cannot."""
    found = {}
    for name, make in PEERS.items():
        try:
            found[name] = make(model, eps, step_size, steps)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return found


def _stand_in(name: str) -> None:
    """Put an empty module in the place of one that cannot be imported."""
    try:
        importlib.import_module(name)
        return
    except (ImportError, RuntimeError):  # torchvision for another build of torch raises RuntimeError
        pass
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


# -- training loops by hand, in the manner of others ----------------------------------------------------------------


def torchattacks_style_pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    step_size: float,
    steps: int,
    seed: torch.Generator | None = None,
) -> Tensor:
    """Return PGD's last iterate as most loops write it: parameters want gradients, every step makes new tensors."""
    start = torch.empty_like(x).uniform_(-eps, eps, generator=seed)
    x_adv = (x + start).clamp(0, 1).detach()
    for _ in range(steps):
        x_adv.requires_grad_(True)
        loss = functional.cross_entropy(model(x_adv), y)
        (gradient,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + step_size * gradient.sign()
        x_adv = (x + (x_adv - x).clamp(-eps, eps)).clamp(0, 1).detach()
    return x_adv


def torchattacks_style_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, eps: float, step_size: float, steps: int
) -> Tensor:
    """Take one step of adversarial training: crafting in evaluation mode, the update in training mode."""
    model.eval()
    x_adv = torchattacks_style_pgd(model, x, y, eps, step_size, steps)
    model.train()
    loss = functional.cross_entropy(model(x_adv), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def mair_style_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, eps: float, step_size: float, steps: int
) -> float:
    """Take the same step as a trainer that keeps a record: the loss is read after every batch, which waits for it."""
    return float(torchattacks_style_step(model, optimizer, x, y, eps, step_size, steps))
