"""Flags for catastrophic overfitting: of a net that is overfitted by construction, and of learning curves."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from robustlayers.attacks import Linf
from robustlayers.core.errors import UserError
from robustlayers.evaluation import MEANINGS, flags, meaning, sanity
from robustlayers.evaluation.flags import attack_strength, collapse

THREAT = Linf(0.25)


class Turned(torch.autograd.Function):
    """The identity, with a gradient that is turned round where `away` says so."""

    @staticmethod
    def forward(ctx, x, away):
        ctx.save_for_backward(away)
        return x.clone()

    @staticmethod
    def backward(ctx, *slopes):
        return torch.where(ctx.saved_tensors[0], -slopes[0], slopes[0]), None


class Overfitted(nn.Module):
    """A net whose gradient misleads at the images themselves and is right a little beside them."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        gap = ((x * 255 - (x * 255).round()).abs().amax((1, 2, 3), keepdim=True) < 1e-3).expand_as(x)
        return self.net(Turned.apply(x, gap))


class Blunted(Overfitted):
    """The reverse: right at the images themselves, misleading everywhere else."""

    def forward(self, x):
        gap = ((x * 255 - (x * 255).round()).abs().amax((1, 2, 3), keepdim=True) >= 1e-3).expand_as(x)
        return self.net(Turned.apply(x, gap))


def names(texts):
    return [text.partition(":")[0] for text in texts]


def test_a_net_overfitted_to_the_single_step_by_construction_is_told_and_an_honest_one_is_not(trained):
    model, x, y = trained
    found = flags(Overfitted(model), x, y, THREAT)
    assert names(found) == ["single step"], found
    assert "catastrophic overfitting" in meaning(found[0])
    assert flags(model, x, y, THREAT) == []
    report = sanity(Overfitted(model), x, y, THREAT, queries=20)
    assert names(report.flags).count("single step") == 1  # not once more for all images


def test_ten_steps_that_do_less_than_one_are_told(trained):
    model, x, y = trained
    found = attack_strength(Blunted(model), x, y, Linf(0.3))
    assert "weaker than one step" in names(found), found
    assert attack_strength(copy.deepcopy(model), x, y, Linf(0.3)) == []


CLEAN = [0.5, 0.6, 0.7, 0.75]


@pytest.mark.parametrize(
    ("clean", "robust", "epoch"),
    [
        (CLEAN, [0.3, 0.4, 0.02, 0.01], 3),  # catastrophic overfitting
        (CLEAN, [0.3, 0.4, 0.41, 0.1], 4),
        (CLEAN, [0.3, 0.4, 0.02, 0.4], None),  # it came back
        (CLEAN, [0.4, 0.35, 0.3, 0.25], None),  # robust overfitting is slow
        (CLEAN, [0.04, 0.05, 0.01, 0.0], None),  # too little to lose
        ([0.5, 0.6, 0.1, 0.1], [0.3, 0.4, 0.1, 0.1], None),  # the net broke as a whole
        (CLEAN, [0.1, 0.2, 0.3, 0.4], None),
        ([0.5], [0.3], None),
        ([], [], None),
    ],
)
def test_a_collapse_is_a_fall_of_robust_accuracy_alone_that_stays(clean, robust, epoch):
    found = collapse(range(1, len(clean) + 1), clean, robust, 1000)
    assert (f"to {100 * robust[epoch - 1]:.1f} % after epoch {epoch}" in found[0]) if epoch else found == []


def test_a_fall_of_few_images_is_chance():
    assert collapse([1, 2], [0.5, 0.5], [0.1, 0.04], 1000)
    assert collapse([1, 2], [0.5, 0.5], [0.1, 0.0], 10) == []
    with pytest.raises(ValueError, match="zip"):
        collapse([1], [0.5, 0.5], [0.1, 0.0], 10)
    with pytest.raises(UserError):
        meaning("collapsed: no such flag")


def test_every_flag_stands_in_the_document_with_what_it_means():
    text = (Path(__file__).parents[2] / "docs" / "rows.md").read_text()
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and line.count(" | ") == 2]
    documented = {line[0].removeprefix("| "): line[2].removesuffix(" |") for line in lines}
    assert MEANINGS.items() <= documented.items()
