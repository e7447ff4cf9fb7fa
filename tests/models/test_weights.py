"""Loading weights: strict, whole or nothing, with names that help; and a published network that scores as recorded."""

import os
from pathlib import Path

import pytest
import torch

from robustlayers import data, models
from robustlayers.core.errors import UserError
from robustlayers.core.files import write_tensors

DATA = Path(os.environ.get("ROBUSTLAYERS_DATA") or Path(__file__).parents[2] / "../shared/data")


def net(seed=0, **options):
    return models.build("small-cnn", seed=seed, **options)


def same(a, b):
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


def test_a_round_trip_through_a_file_copies_everything(tmp_path):
    source, target = net(0, mean=0.1), net(1)
    source.get_buffer("bn1.running_mean").fill_(3)
    path = write_tensors(tmp_path / "net.safetensors", source.state_dict())
    assert models.load_weights(target, path) == ()
    assert same(target, source)


def test_counters_and_input_normalization_may_be_missing():
    tensors = {n: t for n, t in net(0).state_dict().items() if "tracked" not in n and not n.startswith("normalize")}
    target = net(1, mean=0.25)
    kept = models.load_weights(target, tensors)
    assert set(kept) == {n for n in target.state_dict() if n not in tensors}
    assert target.get_buffer("normalize.mean").tolist() == [0.25] * 3
    assert torch.equal(target.get_parameter("linear.weight"), tensors["linear.weight"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("bn1.running_var"), "1 tensor(s) missing: bn1.running_var"),
        (lambda t: t.update({"fc.weight": torch.zeros(1)}), "1 unexpected tensor(s): fc.weight"),
        (lambda t: t.update({"linear.bias": torch.zeros(7)}), "linear.bias: shape [7], the model's is [10]"),
        (lambda t: t.update({"linear.bias": torch.zeros(10, dtype=torch.int64)}), "linear.bias: torch.int64"),
        (lambda t: t.update({"linear.wight": t.pop("linear.weight")}), "linear.weight (nearest: linear.wight)"),
    ],
)
def test_a_misfit_is_named_and_changes_nothing(change, expected):
    tensors = dict(net(0).state_dict())
    change(tensors)
    target = net(1)
    with pytest.raises(UserError) as error:
        models.load_weights(target, tensors)
    assert expected in str(error.value)
    assert same(target, net(1))


def test_a_long_list_is_cut():
    with pytest.raises(UserError, match="and 12 more"):
        models.load_weights(net(), {})


def test_a_damaged_or_missing_file_is_named(tmp_path):
    path = write_tensors(tmp_path / "net.safetensors", net().state_dict())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        models.load_weights(net(), path)
    with pytest.raises(UserError, match="no such file"):
        models.load_weights(net(), tmp_path / "absent.safetensors")


def test_mapping_renames_prefixes_and_whole_names():
    source = net(0)
    renamed = {f"module.{name}".replace("linear", "fc"): tensor for name, tensor in source.state_dict().items()}
    target = net(1)
    models.load_weights(target, renamed, {"module": "", "module.fc": "linear"})
    assert same(target, source)


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"module": ""}, "mapping: no tensor is called 'module'"),
        ({"line": "linear"}, "no tensor is called 'line'; nearest: linear"),
        ({"linear.weight": "linear.bias"}, "two tensors would be called 'linear.bias'"),
    ],
)
def test_a_mapping_that_fits_nothing_or_merges_is_refused(mapping, expected):
    with pytest.raises(UserError) as error:
        models.load_weights(net(1), net(0).state_dict(), mapping)
    assert expected in str(error.value)


def pretrained(depth=20):
    path = DATA / "pretrained" / f"resnet{depth}.safetensors"
    if not path.is_file():
        pytest.skip(f"the pretrained network {path} is not here")
    model = models.build("resnet", seed=0, depth=depth, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    kept = models.load_weights(model, path)
    assert all(name.startswith("normalize.") or name.endswith("num_batches_tracked") for name in kept)
    return model


@pytest.mark.parametrize("depth", [20, 32])
def test_published_weights_fit(depth):
    pretrained(depth)


@pytest.mark.slow
def test_the_published_resnet20_scores_as_recorded():
    model = pretrained().eval()
    if not (DATA / "cifar10-jpeg").is_dir():
        pytest.skip(f"the data set {DATA / 'cifar10-jpeg'} is not here")
    test = data.load(f"parquet:{DATA / 'cifar10-jpeg'}").test
    hits = 0
    with torch.inference_mode():
        for images, labels in zip(test.images.split(500), test.labels.split(500), strict=True):
            hits += int((model(data.to_float(images)).argmax(1) == labels).sum())
    assert len(test) == 10_000
    assert hits / len(test) == pytest.approx(0.810, abs=0.003)
