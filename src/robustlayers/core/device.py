"""Where and how tensors are computed: device, threads, and what to write down about the machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from robustlayers.core.errors import UserError

__all__ = ["machine", "pick_device", "versions"]


def pick_device(name: str = "auto") -> torch.device:
    """Return the torch device for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; one that is absent is a `UserError`.

    Of several processes on a machine, as `torchrun` starts them, each gets a CUDA device of its own for `auto` and `cuda`.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1 and torch.cuda.is_available():
        local, held = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= held:
            raise UserError(
                f"device: {os.environ['LOCAL_WORLD_SIZE']} processes on a machine with {held} CUDA device(s); start as "
                "many, or use --device cpu"
            )
        return torch.device("cuda", local)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: unknown device {name!r}; allowed: auto, cpu, cuda, cuda:N, mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: {name!r} was asked for, but torch sees no CUDA device here")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device: {name!r} was asked for, but torch sees no MPS device here")
    return device


def versions() -> dict[str, str]:
    """Return the versions that can change a number: Python, torch, numpy and this package."""
    return {
        "python": platform.python_version(),
        "robustlayers": metadata.version("robustlayers"),
        "torch": torch.__version__,
        "numpy": metadata.version("numpy"),
    }


def machine(device: torch.device | str = "cpu") -> str:
    """Return one line about the hardware: processor or accelerator, and the threads torch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {platform.system()} {platform.machine()}"
    return f"{platform.machine()} CPU, {platform.system()}, {torch.get_num_threads()} torch thread(s)"
