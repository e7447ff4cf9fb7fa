"""robustlayers: which layers should learn from adversarial examples, and how are normalization layers treated meanwhile.

Names are loaded on first use, so that `robustlayers --help` answers without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustlayers import data, models

__version__ = "0.1.0"

_HOME = {
    "data": "robustlayers.data",
    "models": "robustlayers.models",
}

__all__ = ["__version__", "data", "models"]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'robustlayers' has no attribute {name!r}")
    module = import_module(home)
    return module if home.rpartition(".")[2] == name else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
