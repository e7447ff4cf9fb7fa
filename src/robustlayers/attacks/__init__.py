"""Attacks: threats, the attacks themselves, their losses, and the guard that keeps an attack from leaving a trace."""

from robustlayers.attacks.apgd import APGD
from robustlayers.attacks.combine import Transfer, WorstOf
from robustlayers.attacks.fab import FAB
from robustlayers.attacks.fgsm import FGSM, NFGSM, RFGSM
from robustlayers.attacks.guard import guard
from robustlayers.attacks.losses import LOSSES, Loss, find_loss, is_correct
from robustlayers.attacks.mim import MIM
from robustlayers.attacks.noise import Gaussian, Noise
from robustlayers.attacks.pgd import PGD
from robustlayers.attacks.reference import Reference
from robustlayers.attacks.registry import ATTACKS, Attack, NamedAttack, is_own, label, parse
from robustlayers.attacks.square import Square
from robustlayers.attacks.targeted import TargetedAPGD
from robustlayers.attacks.threat import L1, L2, NORMS, Linf, Threat

__all__ = [
    "APGD",
    "ATTACKS",
    "FAB",
    "FGSM",
    "L1",
    "L2",
    "LOSSES",
    "MIM",
    "NFGSM",
    "NORMS",
    "PGD",
    "RFGSM",
    "Attack",
    "Gaussian",
    "Linf",
    "Loss",
    "NamedAttack",
    "Noise",
    "Reference",
    "Square",
    "TargetedAPGD",
    "Threat",
    "Transfer",
    "WorstOf",
    "find_loss",
    "guard",
    "is_correct",
    "is_own",
    "label",
    "parse",
]
