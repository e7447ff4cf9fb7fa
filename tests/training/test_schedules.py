import math

import pytest
import torch

from robustlayers.core.errors import UserError
from robustlayers.training import SCHEDULES, Schedule

STEPS = 40


def one_cycle(t):  # from 0 up to 1 at 0.4, down to 0 at 1
    return t / 0.4 if t <= 0.4 else 1 - (t - 0.4) / 0.6


# Schedule -> the factor of each step, from the definition; t runs from 0 to just below 1.
CLOSED_FORMS = {
    Schedule(): lambda i: 1.0,
    Schedule("cosine"): lambda i: math.cos(math.pi * i / STEPS / 2) ** 2,
    Schedule("linear"): lambda i: (STEPS - i) / STEPS,
    Schedule("one-cycle"): lambda i: one_cycle((i + 0.5) / STEPS),
    Schedule("piecewise"): lambda i: 1.0 if i < 20 else 0.1 if i < 30 else 0.01,
    Schedule("piecewise", milestones=(0.25,), factor=0.5): lambda i: 1.0 if i < 10 else 0.5,
    Schedule("constant", warmup=0.25): lambda i: min(1.0, (i + 0.5) / 10),
    Schedule("cosine", warmup=0.5): lambda i: math.cos(math.pi * (i + 0.5) / STEPS / 2) ** 2 * min(1, (i + 0.5) / 20),
}


@pytest.mark.parametrize("schedule", CLOSED_FORMS, ids=str)
def test_every_schedule_is_its_closed_form_in_every_parameter_group(schedule):
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    rates = (0.1, 0.02, 3.0)
    optimizer = torch.optim.SGD(
        [{"params": [p], "lr": 99.0, "base_lr": rate} for p, rate in zip(parameters, rates, strict=True)]
    )
    for step in range(STEPS):
        factor = schedule.apply(optimizer, step, STEPS)
        assert factor == pytest.approx(CLOSED_FORMS[schedule](step), rel=1e-9, abs=1e-12)
        assert [group["lr"] for group in optimizer.param_groups] == [rate * factor for rate in rates]
        assert factor > 0  # no step is lost


def test_all_are_tried_and_an_unknown_one_is_told():
    assert {schedule.name for schedule in CLOSED_FORMS} == set(SCHEDULES)
    with pytest.raises(UserError, match=r"^unknown schedule 'cosin'; nearest: cosine; allowed: constant, cosine, "):
        Schedule("cosin")


def test_a_schedule_is_a_function_of_the_step_alone():
    """So a resume needs no state of it."""
    schedule = Schedule("cosine", warmup=0.1)
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0, "base_lr": 1.0}])
    forwards = [schedule.apply(optimizer, step, STEPS) for step in range(STEPS)]
    backwards = [schedule.apply(optimizer, step, STEPS) for step in reversed(range(STEPS))]
    assert forwards == backwards[::-1]
    assert schedule.apply(optimizer, 0, 0) >= 0  # a phase without steps
