import pytest
import torch
from torch import nn

from robustlayers import models
from robustlayers.core.errors import UserError
from robustlayers.normalization import crafting_forward
from robustlayers.normalization.layers import DualBatchNorm, Film, FilmNorm, conditioned


def trained(channels=3, **settings):
    layer = FilmNorm(nn.BatchNorm2d(channels), **settings).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-1, 1, generator=generator)
    return layer


def test_at_the_beginning_it_is_the_norm_layer_for_every_condition(values):
    norm = nn.BatchNorm2d(3).double()
    x = values(4, 3, 2, 2)
    norm(x)
    expected = norm.eval()(x)
    layer = FilmNorm(norm)
    for condition in (0, "1/2", 1.0, torch.rand(4)):
        layer.condition = condition
        assert torch.equal(layer(x), expected)


def test_the_formula(values):
    layer = trained()
    x = values(4, 3, 2, 2)
    film, condition = layer.film, torch.tensor([0.0, 0.2, 0.7, 1.0]).double()
    layer.condition = condition
    y = layer.eval()(x)
    for index, value in enumerate(condition):
        hidden = nn.functional.leaky_relu(value * film.hidden_weight + film.hidden_bias)
        gamma, beta = 1 + film.scale @ hidden, film.shift @ hidden
        expected = gamma.view(3, 1, 1) * layer.norm(x)[index] + beta.view(3, 1, 1)
        torch.testing.assert_close(y[index], expected, rtol=1e-10, atol=1e-10)
        layer.condition = float(value)
        torch.testing.assert_close(layer(x)[index], expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer.plain()(x)[index], expected, rtol=1e-6, atol=1e-6)
        layer.condition = condition


def test_gradcheck(values):
    film = Film(2, hidden=3).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in film.parameters():
            parameter.uniform_(0.2, 1, generator=generator)
    names = [name for name, _ in film.named_parameters()]
    condition = torch.tensor([0.1, 0.6, 0.9]).double().requires_grad_()

    def run(x, condition, *parameters):
        return torch.func.functional_call(film, dict(zip(names, parameters, strict=True)), (x, condition))

    assert torch.autograd.gradcheck(run, (values(3, 2, 2).requires_grad_(), condition, *film.parameters()))


def test_the_condition_is_no_state_and_is_put_back():
    model = models.build("small-cnn", seed=0, norm="film(hidden=2)")
    layers = [module for module in model.modules() if isinstance(module, FilmNorm)]
    assert layers
    assert not any("condition" in name for name in model.state_dict())
    with conditioned(model, 0.3):
        assert [layer.condition for layer in layers] == [0.3] * len(layers)
    with pytest.raises(UserError, match="takes"), conditioned(model, 0.3):
        model(torch.zeros(1))
    assert [layer.condition for layer in layers] == [0.0] * len(layers)


def test_with_a_dual_norm_inside_the_condition_chooses_the_branch():
    model = models.build("small-cnn", seed=0, norm="film(dual=true)")
    inner = [module for module in model.modules() if isinstance(module, DualBatchNorm)]
    assert inner
    for condition, branch in ((0, "main"), (0.1, "auxiliary"), (torch.zeros(2), "main"), (torch.ones(2), "auxiliary")):
        with conditioned(model, condition):
            assert {layer.branch for layer in inner} == {branch}
    assert {layer.branch for layer in inner} == {"main"}
    with pytest.raises(UserError, match="run them as two batches"), conditioned(model, torch.tensor([0.0, 1.0])):
        pass


def test_crafting_follows_the_condition_without_a_new_trace():
    model = models.build("small-cnn", seed=0, norm="film").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("film.scale"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.rand(2, 3, 8, 8)
    crafting = crafting_forward(model)
    plan = crafting._plan
    seen = []
    for condition in (0.0, 1.0):
        with conditioned(model, condition):
            crafting.refresh()
            seen.append(crafting(x))
            torch.testing.assert_close(seen[-1], model(x), rtol=1e-5, atol=1e-6)
    assert not torch.equal(*seen)
    assert crafting._plan is plan


def test_autocast(values):
    layer = trained().float()
    layer.condition = 0.5
    x = values(4, 3, 2, 2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.1)


def test_mistakes_are_told():
    layer = FilmNorm(nn.BatchNorm2d(3))
    with pytest.raises(UserError, match="condition: 2 is not allowed; allowed: 0 to 1"):
        layer.condition = 2
    with pytest.raises(UserError, match="allowed: one number for each image"):
        layer.condition = torch.zeros(2, 2)
    layer.condition = torch.zeros(3)
    with pytest.raises(UserError, match="condition: 3 numbers for 2 images"):
        layer(torch.zeros(2, 3, 2, 2))
    with pytest.raises(UserError, match="set a number, not one for each image"):
        layer.plain()
    with pytest.raises(UserError, match="Sequential has no conditional norm layer"), conditioned(nn.Sequential(), 0.1):
        pass
    with pytest.raises(UserError, match="hidden: 0 is not allowed"):
        FilmNorm(nn.BatchNorm2d(3), hidden=0)
