import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustlayers import models
from robustlayers.core.errors import UserError
from robustlayers.models.norms import make_norm
from robustlayers.normalization import crafting_forward
from robustlayers.normalization.layers import RandomNorm, held_draws, seed_draws

BUFFERS = {f"batch.{name}": name for name in ("running_mean", "running_var", "num_batches_tracked")}


@pytest.mark.parametrize(
    ("kind", "reference", "buffers"),
    [
        ("batch", lambda: nn.BatchNorm2d(4), BUFFERS),
        ("instance", lambda: nn.InstanceNorm2d(4, affine=True), {}),
        ("layer", lambda: nn.GroupNorm(1, 4), {}),
        ("group-2", lambda: nn.GroupNorm(2, 4), {}),
    ],
)
def test_a_held_kind_is_torchs_layer(kind, reference, buffers, same_as_torch):
    layer = RandomNorm(nn.BatchNorm2d(4), kinds=("batch", "instance", "layer", "group-2"))
    layer.branch = kind
    same_as_torch(layer, reference(), 3, 4, 2, 2, buffers=buffers)
    assert type(layer.plain()) is type(reference())


def test_each_forward_draws_one_of_the_kinds_alike(values):
    layer = RandomNorm(nn.BatchNorm2d(4), kinds="instance+layer").double()
    layer.seed(3)
    x = values(2, 4, 3, 3)
    results = {"instance": functional.instance_norm(x), "layer": functional.group_norm(x, 1)}
    seen = []
    for _ in range(60):
        y = layer(x)
        seen.append(next(name for name, result in results.items() if torch.allclose(y, result, atol=1e-8)))
    assert 18 <= seen.count("layer") <= 42  # 5 standard deviations are 19


def test_draws_are_a_function_of_seed_and_position_and_touch_no_global_state():
    model = models.build("small-cnn", seed=0, norm="random(kinds=batch+layer)").eval()
    x = torch.rand(2, 3, 8, 8)
    state = torch.random.get_rng_state()

    def run(seed, *position):
        seed_draws(model, seed, *position)
        return torch.stack([model(x) for _ in range(6)]).detach()

    first = run(0, 1, 2)
    assert torch.equal(first, run(0, 1, 2))
    assert not torch.equal(first, run(1, 1, 2))
    assert not torch.equal(first, run(0, 1, 3))
    assert torch.equal(state, torch.random.get_rng_state())
    assert len({row.numpy().tobytes() for row in first}) > 1  # also in evaluation mode


def test_layers_draw_independently_and_a_new_model_is_repeatable():
    made = [models.build("resnet", seed=0, depth=14, width=4, norm="random") for _ in range(2)]
    draws = [
        [[layer.draw() for _ in range(8)] for layer in model.modules() if isinstance(layer, RandomNorm)]
        for model in made
    ]
    assert draws[0] == draws[1]
    assert len({tuple(line) for line in draws[0]}) == len(draws[0])
    assert seed_draws(nn.Sequential(), 0) == 0


def test_held_draws_hold_for_all_passes_inside_and_are_put_back(values):
    model = models.build("small-cnn", seed=0, norm="random").eval()
    x = torch.rand(2, 3, 8, 8)
    with held_draws(model) as first:
        assert torch.equal(model(x), model(x))
        assert set(first) == {name for name, m in model.named_modules() if isinstance(m, RandomNorm)}
    drawn = [first]
    for _ in range(5):
        with held_draws(model) as names:
            drawn.append(names)
    assert len({tuple(names.values()) for names in drawn}) > 1
    assert {m.branch for m in model.modules() if isinstance(m, RandomNorm)} == {"random"}


def test_draws_are_live_while_crafting_and_no_reason_for_a_new_trace():
    model = models.build("small-cnn", seed=0, norm="random(kinds=batch+layer)").eval()
    x = torch.rand(2, 3, 8, 8)
    crafting = crafting_forward(model)
    plan = crafting._plan
    crafting.refresh()
    results = {crafting(x).numpy().tobytes() for _ in range(12)}
    crafting.refresh()
    assert len(results) > 1
    assert crafting._plan is plan
    with held_draws(model):
        torch.testing.assert_close(crafting(x), model(x), rtol=1e-5, atol=1e-6)


def test_only_a_drawn_batch_norm_moves_statistics_and_copies_draw_alike(values):
    layer = RandomNorm(nn.BatchNorm2d(4), kinds="batch+layer").double()
    layer.branch = "layer"
    layer(values(2, 4, 3, 3))
    assert int(layer.get_buffer("batch.num_batches_tracked")) == 0
    assert [copy.deepcopy(layer).draw() for _ in range(2)] == [layer.draw()] * 2
    assert not list(make_norm("random(kinds=instance+layer)", 4).buffers())


def test_gradcheck_and_autocast(values):
    layer = RandomNorm(nn.BatchNorm2d(4), kinds="batch+instance+layer").double()
    for kind in layer.kinds:
        layer.branch = kind
        assert torch.autograd.gradcheck(layer, (values(2, 4, 2, 2).requires_grad_(),))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer.float()(values(2, 4, 2, 2).bfloat16()).dtype == torch.bfloat16
        layer.double()


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ("batch", "two or more, each once"),
        ("batch+batch", "two or more, each once"),
        ("batch+grup-8", "unknown kind of random norm 'grup-8'; nearest: group-8"),
    ],
)
def test_kinds_that_are_wrong_are_refused(kinds, message):
    with pytest.raises(UserError, match=message):
        RandomNorm(nn.BatchNorm2d(4), kinds=kinds)
    assert any(message in str(fault) for fault in models.check("resnet", {"norm": {"name": "random", "kinds": kinds}}))
