"""Attacks: threats, the attacks themselves, their losses, and the guard that keeps an attack from leaving a trace."""

from robustlayers.attacks.apgd import APGD
from robustlayers.attacks.fgsm import FGSM
from robustlayers.attacks.guard import guard
from robustlayers.attacks.losses import LOSSES, Loss, find_loss, is_correct
from robustlayers.attacks.noise import Noise
from robustlayers.attacks.pgd import PGD
from robustlayers.attacks.registry import ATTACKS, Attack, is_own, label, parse
from robustlayers.attacks.threat import L2, NORMS, Linf, Threat

__all__ = [
    "APGD",
    "ATTACKS",
    "FGSM",
    "L2",
    "LOSSES",
    "NORMS",
    "PGD",
    "Attack",
    "Linf",
    "Loss",
    "Noise",
    "Threat",
    "find_loss",
    "guard",
    "is_correct",
    "is_own",
    "label",
    "parse",
]
