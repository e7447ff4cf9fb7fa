import json
import math
from types import SimpleNamespace

import pytest

from robustlayers.analysis import gaps
from robustlayers.core.errors import UserError


def point(epoch, robust, phase="main", clean=0.8, **changes):
    values = {"train_clean": 0.95, "train_robust": 0.7, "validation_clean": clean, "validation_robust": robust}
    return {"epoch": epoch, "phase": phase, **values, **changes}


CURVE = [
    point(1, 0.05, "natural", 0.9),
    point(2, 0.40, clean=0.7),
    point(3, 0.55, clean=0.78),
    point(4, 0.55, clean=0.80),
    point(5, 0.43, clean=0.84),
]


def test_the_best_epoch_against_the_last():
    found = gaps(CURVE)
    assert (found.best_epoch, found.best_robust, found.last_epoch, found.last_robust) == (3, 0.55, 5, 0.43)
    assert found.robust_overfitting == pytest.approx(0.12) and found.clean_change == pytest.approx(0.06)
    assert [round(epoch.robust_gap, 6) for epoch in found.epochs] == [0.65, 0.3, 0.15, 0.15, 0.27]
    assert [round(epoch.clean_gap, 6) for epoch in found.epochs] == [0.05, 0.25, 0.17, 0.15, 0.11]


def test_points_may_be_objects_in_any_order():
    assert gaps([SimpleNamespace(**p) for p in reversed(CURVE)]) == gaps(CURVE)


def test_epochs_without_a_measurement_have_no_gap():
    curve = [*CURVE, point(6, None), point(7, math.nan, validation_clean=math.nan)]
    found = gaps(curve)
    assert (found.last_epoch, found.robust_overfitting) == (5, gaps(CURVE).robust_overfitting)
    assert found.epochs[5].robust_gap is None and found.epochs[5].clean_gap == pytest.approx(0.15)
    assert found.epochs[6].clean_gap is None and found.epochs[6].validation_clean is None
    json.dumps(found.rows(), allow_nan=False)


def test_one_phase_alone():
    curve = [point(1, 0.9, "first"), *CURVE[1:]]
    assert gaps(curve).best_epoch == 1
    found = gaps(curve, phase="main")
    assert (found.best_epoch, len(found.epochs)) == (3, 4)
    with pytest.raises(UserError, match="unknown phase 'mian'; nearest: main"):
        gaps(curve, phase="mian")


def test_without_overfitting_the_number_is_zero():
    assert gaps(CURVE[:3]).robust_overfitting == 0 and gaps(CURVE[:1]).clean_change == 0


def test_user_errors():
    with pytest.raises(UserError, match="epoch 2 is there more than once"):
        gaps([*CURVE, point(2, 0.3)])
    with pytest.raises(UserError, match="no epoch has a robust accuracy"):
        gaps([point(1, None)])
    with pytest.raises(UserError, match="no epoch has a robust accuracy"):
        gaps([])
    with pytest.raises(UserError, match=r"point 0: validation_robust is 43"):
        gaps([point(1, 43.0)])
    with pytest.raises(UserError, match="point 0: has no train_clean"):
        gaps([{"epoch": 1, "phase": "a"}])


def test_the_plot_has_both_gaps_and_the_best_epoch():
    axes = gaps(CURVE).plot()
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["robust gap"].get_xdata()) == [1, 2, 3, 4, 5]
    assert lines["robust gap"].get_ydata()[2] == pytest.approx(15)
    assert list(lines["best robust validation accuracy"].get_xdata()) == [3, 3]
    assert axes.get_ylabel().endswith("points")
