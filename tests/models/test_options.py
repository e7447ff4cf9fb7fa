"""Options: unknown names, wrong types and ranges, cross-checks, canonical form, norm kinds added from outside."""

import pytest
import torch
from torch import nn

from robustlayers import models
from robustlayers.core.errors import UserError
from robustlayers.models import norms


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("resnet", {"dpth": 20}, "dpth: unknown option of model resnet 'dpth'; nearest: depth"),
        ("resnet", {"depth": 21}, "depth: 21 is not allowed; nearest: 20; allowed: 8, 14, 20, ..."),
        ("resnet", {"depth": 2}, "depth: 2 is not allowed; nearest: 8"),
        ("resnet", {"depth": "20"}, "depth: '20' is not a whole number"),
        ("resnet", {"depth": 20.0}, "depth: 20.0 is not a whole number"),
        ("resnet", {"width": True}, "width: True is not a whole number; allowed: at least 1"),
        ("resnet", {"width": 0}, "width: 0 is not allowed; nearest: 1; allowed: at least 1"),
        ("resnet", {"stem_stride": 8}, "stem_stride: 8 is not allowed; nearest: 4; allowed: 1 to 4"),
        ("resnet", {"shortcut": "C"}, "shortcut: unknown shortcut 'C'"),
        ("resnet", {"shortcut": False}, "shortcut: False is not a name; allowed: A, B"),
        ("resnet", {"norm": "bach"}, "norm: unknown norm 'bach'; nearest: batch"),
        ("resnet", {"classes": 1}, "classes: 1 is not allowed; nearest: 2"),
        ("resnet", {"mean": [0.5, 0.5]}, "mean: 2 values for 3 channel(s); allowed: a number, or a list of 3"),
        ("resnet", {"mean": [0.5], "channels": 3}, "mean: 1 values for 3 channel(s)"),
        ("resnet", {"mean": []}, "mean: an empty list"),
        ("resnet", {"mean": "grey"}, "mean: one value per channel: 'grey' is not a number"),
        ("resnet", {"std": [0.2, 0.2, 0]}, "std: [0.2, 0.2, 0] is not allowed; it must be positive"),
        ("resnet", {"std": float("nan")}, "std: one value per channel: nan is not finite"),
        ("preact-resnet", {"depth": 50}, "depth: 50 is not allowed; nearest: 34; allowed: 18, 34"),
        ("wide-resnet", {"depth": 26}, "depth: 26 is not allowed; nearest: 28; allowed: 10, 16, 22, ..."),
        ("resnt", {}, "name: unknown model 'resnt'; nearest: resnet"),
    ],
)
def test_each_mistake_is_one_fault_and_build_raises_it(name, options, expected):
    faults = models.check(name, options)
    assert len(faults) == 1
    assert str(faults[0]).startswith(expected)
    with pytest.raises(UserError) as error:
        models.build(name, **options)
    assert expected.split(": ", 1)[1] in str(error.value)


def test_all_mistakes_are_reported_at_once():
    faults = models.check("resnet", {"depth": 21, "width": -1, "colour": 3})
    assert {fault.path for fault in faults} == {"depth", "width", "colour"}
    with pytest.raises(UserError) as error:
        models.build("resnet", depth=21, width=-1, colour=3)
    assert len(error.value.faults) == 3


def test_right_options_have_no_faults():
    for name in models.names():
        assert models.check(name, {}) == []
        assert models.check(name, models.resolve(name, {})) == []


def test_resolved_options_are_canonical():
    resolved = models.resolve("resnet", {"mean": "1/2", "channels": 2})
    assert resolved["mean"] == [0.5, 0.5]
    assert resolved["depth"] == 20
    assert resolved == models.resolve("resnet", resolved)
    assert resolved == models.resolve("resnet", {"channels": 2, "mean": (0.5, 0.5)})


def test_a_registered_norm_reaches_every_place(monkeypatch):
    monkeypatch.setattr(norms, "_KINDS", dict(norms._KINDS))
    models.register_norm("own-group", models.NormKind(lambda channels: nn.GroupNorm(1, channels)))
    model = models.build("resnet", seed=0, depth=8, width=4, shortcut="B", norm="own-group")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)]
    assert {"bn1", "layer1.0.bn1", "layer1.0.bn2", "layer2.0.shortcut.1"} <= set(names)
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 10)
    with pytest.raises(UserError, match="registered already"):
        models.register_norm("own-group", models.NormKind(nn.BatchNorm2d))
