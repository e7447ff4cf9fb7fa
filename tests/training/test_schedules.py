import math
from itertools import pairwise

import pytest
import torch

from robustlayers.core.errors import UserError
from robustlayers.training import SCHEDULES, Schedule

STEPS = 40


def one_cycle(t):  # from 0 up to 1 at 0.4, down to 0 at 1
    return t / 0.4 if t <= 0.4 else 1 - (t - 0.4) / 0.6


def triangles(t, cycles, peak):  # by the corners, as Wong et al. interpolate between them
    corners = [(0.0, 0.0)]
    for cycle in range(cycles):
        corners += [((cycle + peak) / cycles, 1.0), ((cycle + 1) / cycles, 0.0)]
    for (a, low), (b, high) in pairwise(corners):
        if a <= t <= b:
            return low + (high - low) * (t - a) / (b - a)
    raise AssertionError(t)


# Schedule -> the factor of each step, from the definition; t runs from 0 to just below 1.
CLOSED_FORMS = {
    Schedule(): lambda i: 1.0,
    Schedule("cosine"): lambda i: math.cos(math.pi * i / STEPS / 2) ** 2,
    Schedule("linear"): lambda i: (STEPS - i) / STEPS,
    Schedule("one-cycle"): lambda i: one_cycle((i + 0.5) / STEPS),
    Schedule("cyclic"): lambda i: triangles((i + 0.5) / STEPS, 1, 0.4),
    Schedule("cyclic", cycles=4, peak=0.25): lambda i: triangles((i + 0.5) / STEPS, 4, 0.25),
    Schedule("cyclic", cycles=3, peak=0.5): lambda i: triangles((i + 0.5) / STEPS, 3, 0.5),
    Schedule("cyclic", cycles=2, warmup=0.5): lambda i: triangles((i + 0.5) / STEPS, 2, 0.4) * min(1, (i + 0.5) / 20),
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


def test_one_cycle_is_the_cyclic_schedule_with_one_cycle():
    for t in (0.0, 0.1, 0.4, 0.7, 0.999):
        assert Schedule("cyclic").factor_at(t) == Schedule("one-cycle").factor_at(t)
    ends = [Schedule("cyclic", cycles=2).factor_at(t) for t in (0.0, 0.2, 0.5, 0.7, 1.0)]
    assert ends == pytest.approx([0, 1, 0, 1, 0], abs=1e-12)


def three_groups(**extra):
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    groups = [
        {"params": [p], "lr": 99.0, "base_lr": rate} for p, rate in zip(parameters, (0.1, 0.02, 3.0), strict=True)
    ]
    for key, values in extra.items():
        for group, value in zip(groups, values, strict=True):
            group[key] = value
    return torch.optim.SGD(groups)


def check_that_every_group_follows(schedule, optimizer):
    """Fails where the rate of any parameter group is not its base rate by its own schedule and its layer rate."""
    for step in range(STEPS):
        schedule.apply(optimizer, step, STEPS)
        for index, group in enumerate(optimizer.param_groups):
            factor = CLOSED_FORMS[group.get("schedule") or schedule](step)
            wanted = group["base_lr"] * factor * group.get("rate", 1.0)
            assert group["lr"] == pytest.approx(wanted, rel=1e-9), f"group {index} at step {step}"


def test_a_group_follows_its_own_schedule_and_its_layer_rate():
    own = [None, Schedule("linear"), Schedule("cyclic", cycles=4, peak=0.25)]
    optimizer = three_groups(schedule=own, rate=[1.0, 0.25, 0.5])
    check_that_every_group_follows(Schedule("piecewise"), optimizer)
    assert Schedule("piecewise").apply(optimizer, 30, STEPS) == pytest.approx(0.01)  # its own, not a group's


def only_the_first(self, optimizer, step, steps):
    """The published fault: with weight decay for some tensors only, the schedule sets `param_groups[0]` alone."""
    factor = self.factor_of(step, steps)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["base_lr"] * factor
    return factor


@pytest.mark.parametrize("name", ["piecewise", "linear", "cyclic"])
def test_a_schedule_that_reaches_the_first_group_only_is_caught(name, monkeypatch):
    check_that_every_group_follows(Schedule(name), three_groups())
    monkeypatch.setattr(Schedule, "apply", only_the_first)
    with pytest.raises(AssertionError, match=r"^group 1 at step 0"):
        check_that_every_group_follows(Schedule(name), three_groups())


@pytest.mark.parametrize("schedule", CLOSED_FORMS, ids=str)
def test_the_text_tells_one_schedule_from_another(schedule):
    assert [str(other) for other in CLOSED_FORMS].count(str(schedule)) == 1


def test_the_text():
    assert str(Schedule("piecewise", warmup=0.05)) == "piecewise (x 0.1 at 0.5, 0.75; warm-up 0.05)"
    assert str(Schedule("cyclic", cycles=3)) == "cyclic (3 cycles; peak at 0.4)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cycles": 0}, "schedule: cycles 0; allowed: a whole number of at least 1"),
        ({"cycles": 1.5}, "schedule: cycles 1.5; allowed: a whole number of at least 1"),
        ({"peak": 1.0}, "schedule: peak 1.0; allowed: a number between 0 and 1"),
        ({"milestones": (0.5, 1.5)}, "schedule: milestones [0.5, 1.5]; allowed: numbers between 0 and 1"),
        ({"factor": 0.0}, "schedule: factor 0.0; allowed: more than 0, at most 1"),
        ({"warmup": 1.0}, "schedule: warmup 1.0; allowed: from 0 to less than 1"),
    ],
)
def test_a_number_out_of_its_range_is_told(options, message):
    with pytest.raises(UserError) as error:
        Schedule(**options)
    assert str(error.value) == message


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
