"""Rules of ascent: how each method turns weights and gradients into a perturbation of the weights, and its defaults.

A rule is a pure function `(weights, gradients, *, size, ...) -> v` of tensors by name, which hold zeros outside of what is
perturbed. A new ascent is one such function and one line in `ASCENTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["ASCENTS", "SCALINGS", "Method"]

SCALINGS = ("tensor", "global")

Tensors = Mapping[str, Tensor]

# A zero gradient keeps a direction of zero instead of 0 / 0; other norms are so much larger that it does not change them.
_TINY = 1e-20


@dataclass(frozen=True)
class Method:
    """The rule of an ascent and the defaults of its settings.

    `perturb(weights, gradients, size=..., **options)` returns v by tensor name, for tensors that hold zeros outside the
    selection; `options` are the settings that this method takes beyond those of all methods, with their defaults.
    """

    perturb: Callable[..., dict[str, Tensor]]
    symbol: str  # what the paper calls the size
    size: float
    vectors: bool
    steps: int = 1
    limit: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def _relative(weights: Tensors, gradients: Tensors, *, size: float, scaling: str) -> dict[str, Tensor]:
    """v = size * norm(w) * g / norm(g) for each tensor by itself, or with norms over all of them (Wu et al. 2020)."""
    if scaling == "tensor":
        return {name: size * _norm(weights[name]) * _divided(g, _norm(g)) for name, g in gradients.items()}
    whole, slope = _norm(*weights.values()), _norm(*gradients.values())
    return {name: size * whole * _divided(g, slope) for name, g in gradients.items()}


def _steepest(weights: Tensors, gradients: Tensors, *, size: float) -> dict[str, Tensor]:
    """v = size * g / norm(g) over all tensors: Foret et al. 2021 with p = 2."""
    slope = _norm(*gradients.values())
    return {name: size * _divided(g, slope) for name, g in gradients.items()}


def _adaptive(
    weights: Tensors, gradients: Tensors, *, size: float, eta: float, adaptive_bias: bool
) -> dict[str, Tensor]:
    """v = size * T^2 g / norm(T g) over all tensors: Kwon et al. 2021 with p = 2, T for each entry by itself."""
    scales = {name: weights[name].abs() + eta for name in gradients if adaptive_bias or not _is_bias(name)}
    steep = {name: g * scales[name] if name in scales else g for name, g in gradients.items()}
    slope = _norm(*steep.values())
    directions = {name: size * _divided(g, slope) for name, g in steep.items()}
    return {name: v * scales[name] if name in scales else v for name, v in directions.items()}


def _is_bias(name: str) -> bool:
    """Tell a bias by the last part of its name: `conv.bias`, `attention.in_proj_bias`, `lstm.bias_ih_l0`."""
    return "bias" in name.rpartition(".")[2].split("_")


def _norm(*tensors: Tensor) -> Tensor:
    """Return the Euclidean norm of all entries of all tensors together, as a scalar on their device."""
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def _divided(gradient: Tensor, norm: Tensor) -> Tensor:
    return gradient / (norm + _TINY)


ASCENTS: dict[str, Method] = {
    # Wu et al. 2020 as released: no vectors, and gamma 0.01 with PGD adversarial training (0.005 with TRADES).
    "awp": Method(_relative, "gamma", 0.01, vectors=False, options={"scaling": "tensor"}),
    # Yu et al. 2022 as released; gamma is passed on from the weight perturbation that it replaces.
    "rwp": Method(_relative, "gamma", 0.01, vectors=False, steps=10, limit=1.7, options={"scaling": "global"}),
    # Foret et al. 2021; restricted to norm layers (Mueller et al. 2023) it often needs a far larger rho.
    "sam": Method(_steepest, "rho", 0.05, vectors=True),
    # Kwon et al. 2021; biases as they are, as in the released code.
    "asam": Method(_adaptive, "rho", 0.5, vectors=True, options={"eta": 0.01, "adaptive_bias": False}),
}
