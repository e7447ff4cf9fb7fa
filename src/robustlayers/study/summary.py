"""What a study found, as plain data: the one thing that the report, the rows and the claims are made from.

Everything here is immutable and free of tensors but the pictures, so a report can be drawn from a summary alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = [
    "Analyzed",
    "Arm",
    "ClaimResult",
    "CurvePoint",
    "GroupLine",
    "LedgerLine",
    "PhaseLine",
    "Pictures",
    "Row",
    "Summary",
]


@dataclass(frozen=True)
class Row:
    """One measured number: a line of `robustlayers rows`; deterministic, so without any time in it."""

    study: str
    arm: str
    levels: Mapping[str, str]  # factor -> level
    run: str  # identity of the recipe, 16 hexadecimal digits
    seed: int
    checkpoint: str  # "best" (chosen on validation), "last"; "" for facts of the whole run
    metric: str  # "clean", "robust" (worst case over all attacks), an attack's name, or a fact such as "trained_share"
    value: float
    count: int | None = None  # correct images, for accuracies
    total: int | None = None  # images looked at
    split: str = ""  # "test" or "validation"
    attack: str = ""  # the attack spelled out: "pgd-20, linf 8/255, step 1/255, 1 restart"
    normalization: str = ""  # how norm layers normalized while measuring: "running"
    epoch: int | None = None  # the epoch the checkpoint is of, counted from 1 over all phases
    flags: str = ""  # what a sceptic should know, semicolon separated
    phase: str = ""  # of the ledger: its phase, its group, and the hashes of the group before and after
    group: str = ""
    hash_before: str = ""
    hash_after: str = ""


@dataclass(frozen=True)
class CurvePoint:
    """Accuracies after one epoch, each in [0, 1], in evaluation mode, on a fixed part of train and on validation."""

    epoch: int  # from 1, counted over all phases of the run
    phase: str
    train_clean: float
    train_robust: float
    validation_clean: float
    validation_robust: float
    train_loss: float | None = None  # mean training loss of the epoch, all objectives together
    seconds: float | None = None


@dataclass(frozen=True)
class GroupLine:
    """One group of a phase: which tensors it holds and what it learns from."""

    name: str
    signal: str  # "natural", "adversarial", "frozen"
    start: str  # "keep", ...
    tensors: Sequence[tuple[str, str, float]]  # (name, shape as text, share of the tensor's entries in the group)
    parameters: int  # entries of parameters, without buffers
    buffers: int  # entries of buffers
    share: float  # parameters / all parameters of the model
    selector: str = ""  # what picked the tensors, where it is not the group's name


@dataclass(frozen=True)
class LedgerLine:
    """What moved in one group during one phase of one seed: the proof of what was promised."""

    seed: int
    phase: str
    group: str
    signal: str
    parameters: int
    buffers: int
    moved_parameters: int  # entries that differ after the phase
    moved_buffers: int
    relative_l2: float  # |after - before| / |before| over the group's parameters
    largest: float  # largest absolute change over parameters
    kept: bool  # the promise: frozen is bit-equal, trained moved
    before: str = ""  # SHA-256 of the group's entries before and after, 16 hexadecimal digits
    after: str = ""
    effective_lr: float | None = None  # mean over updates of |lr gradient| / |weights|; None where nothing was updated
    gradient_passes: int = 0  # backward passes of single images that the group's gradient was taken from


@dataclass(frozen=True)
class PhaseLine:
    """One phase of an arm as it was run."""

    name: str
    epochs: int
    attack: str  # "" where no adversarial pass was needed
    optimizer: str
    normalization: str  # the norm policy in words
    groups: Sequence[GroupLine]
    forward_passes: int  # passes of one image through the net, all epochs of the phase; shared phases counted whole
    backward_passes: int
    shared_with: int  # number of arms that use this very phase result
    extras: Sequence[str] = ()  # windows, eps schedule, ascent, average, early stop, in words
    step_passes: tuple[int, int] = (0, 0)  # forward and backward passes of one image in an ordinary step
    crafted_in: Mapping[str, Sequence[int]] = field(default_factory=dict)  # what `crafting: auto` chose -> seeds


@dataclass(frozen=True)
class Arm:
    """One setting of the factors, over all seeds."""

    name: str  # "norm", or "norm, wide" where there are several factors
    levels: Mapping[str, str]
    run: str
    status: Mapping[int, str]  # seed -> "finished", "diverged", "failed", "missing"
    reasons: Mapping[int, str]  # seed -> why it diverged or failed
    trained_parameters: int  # entries trained in the last phase
    trained_share: float
    forward_passes: int  # per seed, all phases
    backward_passes: int
    seconds: Mapping[int, float]  # seed -> training time of the arm's own phases, shared ones included
    results: Mapping[str, Mapping[str, Mapping[int, float]]]  # checkpoint -> metric -> seed -> value in [0, 1]
    best_epoch: Mapping[int, int]  # seed -> epoch chosen on validation
    phases: Sequence[PhaseLine]
    curves: Mapping[int, Sequence[CurvePoint]]  # seed -> points
    ledger: Sequence[LedgerLine]
    norms: Mapping[str, Sequence[Mapping[str, object]]] = field(default_factory=dict)  # checkpoint -> rows, all seeds


@dataclass(frozen=True)
class ClaimResult:
    """A claim judged: the paired difference over seeds and what it says."""

    say: str
    that: str
    checkpoint: str
    verdict: str  # "supported", "contradicted", "undecided"
    reason: str  # one sentence: "difference 12.3 points, 95% CI 10.1 to 14.5, p = 0.002 (Holm), n = 3"
    seeds: Sequence[int]
    differences: Sequence[float]  # per seed: left minus right, oriented so that positive supports the claim
    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    p_adjusted: float | None


@dataclass(frozen=True)
class Pictures:
    """A few test images with the adversarial ones crafted for each arm (first seed, `best` checkpoint)."""

    natural: np.ndarray  # float32 [n, channels, height, width] in [0, 1]
    labels: Sequence[str]
    adversarial: Mapping[str, np.ndarray]  # arm -> float32, same shape
    predicted_natural: Mapping[str, Sequence[str]]  # arm -> class names
    predicted_adversarial: Mapping[str, Sequence[str]]
    attack: str


@dataclass(frozen=True)
class Analyzed:
    """What one analysis found in the net of one arm, against that of another, or in all together; see `study.analyses`."""

    analysis: str
    identity: str
    arm: str  # "" where several are looked at together
    against: str  # the other arm, "" where there is none
    seed: int
    checkpoint: str
    epoch: int | None
    images: int | None  # held-out images that were looked at, None where none was
    attack: str
    select: str  # the selector of layers or groups, "" for the usual ones
    numbers: Sequence[Mapping[str, object]]  # label, value, unit
    payload: Mapping[str, object]  # what its figures are drawn from
    rows: Sequence[Mapping[str, object]]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    arms: Sequence[str] = ()  # all that were looked at


@dataclass(frozen=True)
class Summary:
    """A whole study: question, setting, arms, claims."""

    name: str
    question: str
    command: str
    data: str  # "fashion-mnist-mini: 9000 train, 1000 validation, 2000 test images, 28x28x1, 10 classes"
    test_images: int
    model: str  # "resnet depth=8 width=16 norm=batch"
    model_parameters: int
    norm_parameters: int
    threat: str  # "linf 12/255"
    training_attack: str
    attacks: Sequence[str]  # names of the evaluation attacks, the columns beside "clean" and "robust"
    attack_texts: Mapping[str, str]
    checkpoints: Sequence[str]
    selection: str  # how "best" was chosen, one sentence
    seeds: Sequence[int]
    factors: Mapping[str, Sequence[str]]
    arms: Sequence[Arm]
    claims: Sequence[ClaimResult]
    rows: Sequence[Row]
    versions: Mapping[str, str]
    machine: str
    recipe_yaml: str  # the study file as resolved
    notes: Sequence[str] = field(default_factory=tuple)  # threats to validity, data remarks, seeds that are missing
    pictures: Pictures | None = None
    analyses: Sequence[Analyzed] = field(default_factory=tuple)
