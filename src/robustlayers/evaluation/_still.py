"""The ground of every evaluation: batches as float images on the model's device, and a model that is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robustlayers.attacks import guard
from robustlayers.core.errors import UserError
from robustlayers.normalization import inference

Forward = Callable[[Tensor], Tensor]
"""Images [n, c, h, w] in [0, 1] -> logits [n, classes]."""


@contextmanager
def still(forward: Forward, device: torch.device) -> Iterator[None]:
    """Hold an `nn.Module` in evaluation mode without autocast and leave it without a trace; functions are let be."""
    if isinstance(forward, nn.Module):
        with guard(forward), inference(forward), torch.autocast(device.type, enabled=False):
            yield
    else:
        yield


@contextmanager
def untouched(forward: Forward) -> Iterator[None]:
    """Undo what an attack does to an `nn.Module`; a function is left alone."""
    if isinstance(forward, nn.Module):
        with guard(forward):
            yield
    else:
        yield


def device_of(forward: Forward, x: Tensor) -> torch.device:
    """Return the device of a module's first tensor, else the device of `x`."""
    if isinstance(forward, nn.Module):
        for tensor in (*forward.parameters(), *forward.buffers()):
            return tensor.device
    return x.device


def images(x: Tensor, device: torch.device) -> Tensor:
    """Return images as floats in [0, 1] on `device`: bytes divided by 255, float32 and float64 as they are.

    Raises `UserError` for other dtypes and for values outside [0, 1].
    """
    if x.dtype == torch.uint8:
        return x.to(device).float().div_(255)
    if x.dtype not in (torch.float32, torch.float64):
        raise UserError(f"evaluation takes images as uint8, or as float32 or float64 in [0, 1]; got {x.dtype}")
    x = x.detach().to(device)
    if x.numel():
        low, high = torch.aminmax(x)
        if not bool((low >= 0) & (high <= 1)):  # also for NaN
            raise UserError(
                f"evaluation takes float images in [0, 1], got values from {low.item():.4g} to {high.item():.4g}; "
                "normalization by mean and standard deviation belongs inside the model"
            )
    return x


def check_labels(x: Tensor, y: Tensor) -> None:
    """Raise `UserError` unless there is one integer label per image, and one image at least."""
    if y.shape != x.shape[:1] or y.is_floating_point() or y.dtype == torch.bool:
        got = f"{y.dtype} {list(y.shape)} for {len(x)} images"
        raise UserError(f"evaluation takes one integer label per image; got {got}")
    if len(x) == 0:
        raise UserError("there is no image to evaluate on")


def check_logits(logits: object, y: Tensor) -> Tensor:
    """Return what a forward made of images with the labels `y`, if it is logits [n, classes] that have all labels.

    Waits for the device. Raises `UserError` for anything else, such as a tuple, and for labels that are no class.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(y):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"the forward must return logits [n, classes]; it returned {shape} for {len(y)} image(s)")
    check_classes(y, logits.shape[1])
    return logits


def check_classes(y: Tensor, classes: int) -> None:
    """Raise `UserError` if a label is not one of so many classes: labels counted from 1 would only look hard."""
    if len(y):
        low, high = (int(value) for value in torch.aminmax(y))
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise UserError(
                f"label {wrong} is no class of the forward, which returns {classes} logits; allowed: 0 to {classes - 1}"
            )
