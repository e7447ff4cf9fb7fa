"""PGD of other libraries at equal settings, imported when asked for, and training loops in the manner of others.

Where torchvision and visdom are not installed, adv-lib gets empty modules of these names: it imports them for a distance and
a plot that PGD does not use. Nothing of torchattacks and foolbox is replaced.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["PEERS", "Missing", "crafters", "torchattacks_style_pgd", "torchattacks_style_step", "trades_style_mode"]

Craft = Callable[[Tensor, Tensor], Tensor]
