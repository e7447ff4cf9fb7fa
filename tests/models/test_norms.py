"""Norm kinds by name and options: one canonical text, one clear sentence for each mistake, imported when first used."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from robustlayers import models
from robustlayers.core.errors import UserError
from robustlayers.models import norms


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("batch", "batch"),
        ({"name": "batch"}, "batch"),
        ({"name": "group", "groups": 8}, "group(groups=8)"),
        ("group( groups = 8 )", "group(groups=8)"),
        ("group(groups=32)", "group"),
        ("group()", "group"),
        ({"name": "group(groups=8)"}, "group(groups=8)"),
        ("robust(tracked=both, power=0.5)", "robust(power=0.5, tracked=both)"),
        ({"name": "robust", "power": "1/2", "momentum": None}, "robust(momentum=none, power=0.5)"),
        ("dual(own_affine=false)", "dual(own_affine=false)"),
        ({"name": "random", "kinds": ["batch", "group-4"]}, "random(kinds=batch+group-4)"),
    ],
)
def test_there_is_one_canonical_text_and_it_reads_back(given, text):
    assert norms.norm_text(given) == text
    assert norms.norm_text(text) == text
    assert models.resolve("resnet", {"norm": given})["norm"] == text
    assert models.check("resnet", {"norm": given}) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("bach", "unknown norm 'bach'; nearest: batch; allowed: adapter, batch, "),
        ("grup(groups=8)", "unknown norm 'grup'; nearest: group"),
        ("group(8)", "'8' is no option; write group(name=value, ...)"),
        ("group(groups=8, groups=4)", "groups stands there twice"),
        ({"name": "group(groups=8)", "groups": 4}, "groups stands there twice"),
        ("group(groups=8", "unknown norm 'group(groups=8'"),
        ({"groups": 8}, "has no name, as in {name: group, groups: 8}"),
        (8, "8 is not a name; allowed: adapter, "),
        (None, "None is not a name"),
        ({"name": "group", "group": 8}, "unknown option of norm group 'group'; nearest: groups"),
        ({"name": "layer", "groups": 8}, "norm layer has no options, not 'groups'"),
        ("group(groups=true)", "option groups of norm group: True is not a whole number"),
        ("dual(own_affine=1)", "option own_affine of norm dual: 1 is not allowed; allowed: true, false"),
        ("robust(momentum=2)", "option momentum of norm robust: 2 is not allowed; allowed: above 0, up to 1"),
        ("robust(eps=0)", "option eps of norm robust: 0 is not allowed; it must be positive"),
        ("robust(tracked=bth)", "unknown tracked statistics 'bth'; nearest: both"),
        ("joint(statistics=half)", "unknown statistics of a joint batch 'half'"),
        ({"name": "random", "kinds": 3}, "3 is not allowed; allowed: two or more of batch"),
    ],
)
def test_each_mistake_is_one_sentence(given, message):
    with pytest.raises(UserError) as error:
        norms.norm_text(given)
    assert message in str(error.value)
    faults = models.check("resnet", {"norm": given})
    assert [fault.path for fault in faults] == ["norm"]
    assert message in str(faults[0])


@pytest.mark.parametrize("name", models.norm_names())
def test_every_kind_is_there_under_its_name_with_options_that_resolve(name):
    kind = norms.find_norm(name)
    layer = norms.make_norm(name, 8)
    assert isinstance(layer, nn.Module)
    assert kind.shifts == (name != "none")
    assert norms.conv_bias(name) == (name == "none")
    for key, option in kind.options.items():
        assert option.problem(option.default) is None
        assert option.allowed()
        assert norms.norm_text({"name": name, key: option.default}) == name
    state = torch.random.get_rng_state()  # arms with other norms shall begin from the same convolutions
    norms.make_norm(name, 8)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_convolutions_begin_alike_whatever_the_norm():
    expected = models.build("resnet", seed=3, depth=8, width=4, norm="batch")
    for name in models.norm_names():
        if name != "none":  # there the convolutions have a bias, which is drawn too
            model = models.build("resnet", seed=3, depth=8, width=4, norm=name)
            for path in ("conv1.weight", "layer3.0.conv2.weight", "linear.weight"):
                assert torch.equal(model.get_parameter(path), expected.get_parameter(path)), (name, path)


def test_a_model_is_built_without_importing_normalization_first():
    code = (
        "import sys, robustlayers.models.norms as norms\n"
        "assert isinstance(norms._KINDS['robust'], str)\n"
        "from robustlayers.models import registry\n"
        "model = registry.build('small-cnn', norm='robust')\n"
        "assert type(model.bn1).__name__ == 'RobustNorm'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_names_that_could_not_be_read_back_are_refused():
    with pytest.raises(UserError, match=r"norm 'a\(b\)' is no name"):
        models.register_norm("a(b)", models.NormKind(nn.BatchNorm2d))
