"""Looking inside: what each layer of a net does for its accuracy and its robustness."""

from robustlayers.analysis.activations import Layer, activations, layers_of
from robustlayers.analysis.amplification import Amplification, amplification
from robustlayers.analysis.cka import CKA, Block, Parting, Similarity, cka
from robustlayers.analysis.course import Course, cka_course
from robustlayers.analysis.criticality import Criticality, CriticalityRow, criticality, fresh_state, write_scores
from robustlayers.analysis.gaps import EpochGap, Gaps, gaps
from robustlayers.analysis.interpolation import Line, LinePoint, interpolation, on_line, sharpness
from robustlayers.analysis.perturb import Rounding, as_bytes, craft, noise_like
from robustlayers.analysis.pictures import (
    Filters,
    InputGradients,
    Perturbations,
    first_filters,
    input_gradients,
    perturbations,
)
from robustlayers.analysis.probes import ProbeRow, Probes, probes
from robustlayers.analysis.procrustes import Procrustes, procrustes
from robustlayers.analysis.rift import Rift, RiftPoint, rift
from robustlayers.analysis.signal import ChannelSpread, SignalExcess, SignalRatio, signal_ratio
from robustlayers.analysis.surface import Surface, loss_surface
from robustlayers.analysis.transplant import PARTS, TransplantRow, Transplants, transplant
from robustlayers.analysis.views import Contrast, Crossing, SameLayer, cka_views
from robustlayers.analysis.worst import WorstCase, WorstCaseRow, robust_criticality

__all__ = [
    "CKA",
    "PARTS",
    "Amplification",
    "Block",
    "ChannelSpread",
    "Contrast",
    "Course",
    "Criticality",
    "CriticalityRow",
    "Crossing",
    "EpochGap",
    "Filters",
    "Gaps",
    "InputGradients",
    "Layer",
    "Line",
    "LinePoint",
    "Parting",
    "Perturbations",
    "ProbeRow",
    "Probes",
    "Procrustes",
    "Rift",
    "RiftPoint",
    "Rounding",
    "SameLayer",
    "SignalExcess",
    "SignalRatio",
    "Similarity",
    "Surface",
    "TransplantRow",
    "Transplants",
    "WorstCase",
    "WorstCaseRow",
    "activations",
    "amplification",
    "as_bytes",
    "cka",
    "cka_course",
    "cka_views",
    "craft",
    "criticality",
    "first_filters",
    "fresh_state",
    "gaps",
    "input_gradients",
    "interpolation",
    "layers_of",
    "loss_surface",
    "noise_like",
    "on_line",
    "perturbations",
    "probes",
    "procrustes",
    "rift",
    "robust_criticality",
    "sharpness",
    "signal_ratio",
    "transplant",
    "write_scores",
]
