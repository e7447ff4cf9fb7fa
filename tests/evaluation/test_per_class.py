import pytest
import torch

from robustlayers.attacks import FGSM, Linf
from robustlayers.core.errors import UserError
from robustlayers.evaluation import interval, per_class, worst_case


def test_counts_of_every_class_and_metric_add_up(trained):
    model, x, y = trained
    verdicts = worst_case(model, x, y, {"fgsm": FGSM(Linf(0.2))})
    found = per_class(verdicts, y, ["a", "b", "c", "d"])
    assert [one.metric for one in found] == [metric for metric in verdicts for _ in range(4)]
    for one in found:
        mask = y == one.label
        assert one.name == "abcd"[one.label] and one.total == int(mask.sum())
        assert one.count == int((verdicts[one.metric] & mask).sum()) and one.accuracy == one.count / one.total
        assert (one.low, one.high) == interval(one.count, one.total)
        assert one.row()["accuracy"] == one.accuracy
    for metric, verdict in verdicts.items():
        assert sum(one.count for one in found if one.metric == metric) == int(verdict.sum())


def test_classes_without_an_image_are_left_out():
    found = per_class(torch.tensor([False, True]), torch.tensor([3, 1]), level=0.5)
    assert [(one.label, one.name, one.accuracy) for one in found] == [(1, "1", 1.0), (3, "3", 0.0)]
    assert (found[0].low, found[0].high) == interval(1, 1, 0.5)


@pytest.mark.parametrize(
    ("verdict", "labels", "names", "words"),
    [
        (torch.ones(3) > 0, torch.tensor([0, 1]), None, r"bool \[2\]"),
        (torch.ones(2), torch.tensor([0, 1]), None, r"bool \[2\]"),
        (torch.ones(2) > 0, torch.tensor([0, 2]), ["a", "b"], "label 2 has no name"),
        (torch.ones(2) > 0, torch.tensor([0, -1]), None, "0 or more"),
        (torch.ones(2) > 0, torch.tensor([0.0, 1.0]), None, "integers"),
    ],
)
def test_mistakes_are_named(verdict, labels, names, words):
    with pytest.raises(UserError, match=words):
        per_class(verdict, labels, names)
