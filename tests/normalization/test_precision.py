"""Precision of crafting: what is chosen is fast and agrees with the model, and a resume takes the same."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from robustlayers.attacks import PGD, Linf
from robustlayers.core.errors import UserError
from robustlayers.data import Images
from robustlayers.models import build
from robustlayers.normalization import crafting_forward
from robustlayers.normalization import precision as module
from robustlayers.normalization.precision import Choice, choose
from robustlayers.training import PhaseTrainer


@pytest.fixture
def model():
    made = build("resnet", seed=0, depth=8, width=8, channels=1, classes=10)
    for layer in made.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(1))
    return made.eval()


@pytest.fixture
def images():
    return torch.rand(16, 1, 16, 16, generator=torch.Generator().manual_seed(2))


def gradient(forward, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(forward(x)[:, 3].sum(), x)[0]


def test_bf16_points_where_the_model_does_and_returns_float32(model, images):
    forward = crafting_forward(model, precision="bf16")
    assert forward(images).dtype == torch.float32 and forward.channels_last
    exact, rough = gradient(model, images), gradient(forward, images)
    assert not torch.equal(exact, rough)
    assert (exact.sign() == rough.sign()).float().mean() > 0.9
    assert nn.functional.cosine_similarity(exact.flatten(1), rough.flatten(1)).mean() > 0.97


def test_preactivation_nets_multiply_and_add_in_bf16_too(images, monkeypatch):
    net = build("preact-resnet", seed=0, depth=18, width=4, channels=1).eval()
    forward = crafting_forward(net, precision="bf16")
    monkeypatch.setattr("robustlayers.normalization.fold_layers.AsItIs.forward", None)  # calling it would fail
    exact, rough = gradient(net, images), gradient(forward, images)
    assert nn.functional.cosine_similarity(exact.flatten(1), rough.flatten(1)).mean() > 0.95
    assert forward.fused > 0


def test_auto_settles_once_and_says_why(model, images, monkeypatch):
    monkeypatch.setattr("robustlayers.normalization.precision._SECONDS", 0.0)
    forward = crafting_forward(model, precision="auto")
    forward(images)
    choice = forward.choice
    assert choice is not None and forward.precision == choice.precision != "auto"
    assert set(choice.measured) == {"fp32", "fp32, channels-last", "bf16", "bf16, channels-last"}
    assert choice.measured["fp32"].signs > 0.999 and choice.name in choice.reason
    forward(images.flip(0))
    assert forward.choice is choice
    assert Choice.of(json.loads(json.dumps(choice.plain_data()))) == choice


def test_a_candidate_that_points_elsewhere_is_never_chosen(model, images, monkeypatch):
    monkeypatch.setattr("robustlayers.normalization.precision._SECONDS", 0.0)

    def make(model, *, precision, channels_last):
        if (precision, channels_last) == ("fp32", False):
            return crafting_forward(model)
        return lambda x: -x.flatten(1)[:, :10]  # in no time

    choice = choose(model, images, make)
    assert (choice.precision, choice.channels_last) == ("fp32", False)
    assert min(choice.measured.values(), key=lambda found: found.seconds).signs < 0.9
    assert "did not agree" in choice.reason


def test_on_a_gpu_compiled_candidates_are_tried_and_left_out_where_they_fail(model, images, monkeypatch):
    monkeypatch.setattr("robustlayers.normalization.precision._SECONDS", 0.0)
    monkeypatch.setattr("robustlayers.normalization.precision._CANDIDATES", (*module._CANDIDATES, *module._COMPILED))

    def make(model, *, precision, channels_last, compiled=False):
        if compiled and precision == "bf16":
            raise RuntimeError("no compiler")
        return crafting_forward(model, precision=precision, channels_last=channels_last)

    choice = choose(model, images, make)
    assert "fp32, channels-last, compiled" in choice.measured
    assert "bf16, channels-last, compiled" not in choice.measured
    pinned = replace(choice, precision="fp32", channels_last=True, compiled=True)
    assert Choice.of(json.loads(json.dumps(pinned.plain_data()))) == pinned and pinned.name.endswith("compiled")
    older = {key: value for key, value in choice.plain_data().items() if key != "compiled"}
    assert not Choice.of(older).compiled


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.filterwarnings("ignore")
def test_compiled_it_is_the_same_function_and_is_refreshed(model, images):
    forward = crafting_forward(model, compiled=True)
    for _ in range(2):
        x = images.clone().requires_grad_()
        plain, folded = (torch.autograd.grad(function(x).square().sum(), x)[0] for function in (model.eval(), forward))
        torch.testing.assert_close(folded, plain, rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
        forward.refresh()


def test_the_model_is_as_it_was(model, images, monkeypatch):
    monkeypatch.setattr("robustlayers.normalization.precision._SECONDS", 0.0)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    crafting_forward(model, precision="auto")(images)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_an_unknown_precision_is_an_error(model):
    with pytest.raises(UserError, match="unknown precision 'fp16'; nearest: "):
        crafting_forward(model, precision="fp16")


@pytest.mark.parametrize("crafting", ["bf16", "auto"])
def test_a_phase_resumes_with_the_same_choice(crafting, monkeypatch):
    monkeypatch.setattr("robustlayers.normalization.precision._SECONDS", 0.0)
    pixels = torch.randint(256, (48, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = Images(pixels, torch.arange(48) % 3)

    def trainer():
        return PhaseTrainer(
            build("small-cnn", seed=0, width=4, channels=1, classes=3),
            {"all": "all"},
            {"all": "adversarial"},
            data,
            epochs=2,
            batch_size=16,
            attack=PGD(Linf("8/255"), steps=2, keep="last"),
            crafting=crafting,
        )

    whole = trainer()
    whole.run(steps=2)
    state = whole.state()
    while whole.done < whole.epochs:
        whole.run()
    resumed = trainer()
    resumed.load_state(state)
    # Whatever would be faster now: what was chosen stays.
    monkeypatch.setattr("robustlayers.normalization.fold.choose", lambda *_: pytest.fail("chosen again"))
    while resumed.done < resumed.epochs:
        resumed.run()
    assert resumed.step.choice == whole.step.choice and (crafting == "bf16" or whole.step.choice is not None)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
