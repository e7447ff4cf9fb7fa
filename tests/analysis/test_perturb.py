import pytest
import torch

from robustlayers.analysis.perturb import as_bytes, craft, noise_like
from robustlayers.attacks import PGD, Linf
from robustlayers.core.errors import UserError

SIZES = {
    "l2": lambda d: d.flatten(1).norm(dim=1),
    "linf": lambda d: d.flatten(1).abs().amax(1),
    "l1": lambda d: d.flatten(1).abs().sum(1),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("norm", SIZES)
@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_noise_is_exactly_as_large_and_inside_the_box_also_where_the_box_cuts_it(kind, norm):
    x = torch.rand(5, 3, 8, 8, generator=generator(1), dtype=torch.float64)
    x[0] = 0  # half of all noise points out of the box here
    x[1] = x[1].round()
    lengths = torch.linspace(0.01, 0.1, 5, dtype=torch.float64).view(-1, 1, 1, 1)
    perturbed = (x + lengths).clamp(0, 1)
    noisy = noise_like(x, perturbed, kind, norm=norm, generator=generator())
    assert torch.allclose(SIZES[norm](noisy - x), SIZES[norm](perturbed - x), rtol=1e-9)
    assert noisy.min() >= 0 and noisy.max() <= 1
    # A factor that ignores the box would have made it shorter.
    delta = (noisy - x)[2:3]
    assert (noisy[0] - x[0] == 0).double().mean() == pytest.approx(0.5, abs=0.1) and delta.std() > 0


def test_kinds_are_what_they_say_and_draws_come_from_the_generator_alone():
    x = torch.full((1, 1, 100, 100), 0.5, dtype=torch.float64)
    random = torch.get_rng_state()
    gaussian, uniform = (noise_like(x, x + 0.01, kind, generator=generator()) - x for kind in ("gaussian", "uniform"))
    kurtosis = [float((d**4).mean() / (d**2).mean() ** 2) for d in (gaussian, uniform)]
    assert kurtosis == pytest.approx([3.0, 1.8], abs=0.1)
    again = noise_like(x, x + 0.01, "gaussian", generator=generator())
    assert torch.equal(again - x, gaussian) and torch.equal(torch.get_rng_state(), random)
    nothing = noise_like(x, x, "gaussian", generator=generator())
    assert torch.allclose(nothing, x, atol=1e-12)


def test_mistakes_of_noise_are_said():
    x = torch.zeros(2, 1, 4, 4)
    for arguments, message in [
        ((x, x + 0.1, "gausian"), "unknown kind of noise 'gausian'; nearest: gaussian"),
        ((x, x[:1], "gaussian"), "perturbed images are floats of the same shape"),
        ((x, (255 * x).byte(), "gaussian"), "perturbed images are floats"),
        ((x + 2, x, "gaussian"), r"floats? images in \[0, 1\]"),
        ((x, x + 1, "gaussian"), "no room"),  # every pixel at the far end of the box
    ]:
        with pytest.raises(UserError, match=message):
            noise_like(*arguments, generator=generator())
    with pytest.raises(UserError, match="unknown norm 'l3'"):
        noise_like(x, x, "gaussian", norm="l3", generator=generator())


def test_crafting_is_the_attack_on_every_batch_and_leaves_nothing_behind(net, batch, bits):
    model, (x, y) = net("small-cnn").train(), batch(7)
    values, attack = bits(model), PGD(Linf("8/255"), steps=2)
    seen = []
    found = craft(model, x, y, attack, generator=generator(), batch_size=4, progress=lambda *step: seen.append(step))
    draws = generator()
    model.eval()
    expected = torch.cat([attack(model, x[p], y[p], generator=draws) for p in (slice(0, 4), slice(4, 7))])
    assert torch.allclose(found, expected, atol=1e-5)
    assert seen == [("pgd-2", 4, 7), ("pgd-2", 7, 7)]
    model.train()
    assert bits(model) == values and all(p.grad is None and p.requires_grad for p in model.parameters())
    as_bytes = (255 * x).byte()
    assert craft(model, as_bytes, y, attack, generator=generator()).dtype == torch.float32


def test_what_a_foreign_attack_does_to_the_model_does_not_reach_the_next_batch(net, batch):
    class Careless:
        threat, name, seen = Linf("8/255"), "careless", []

        def __call__(self, forward, x, y, *, generator):
            self.seen.append(forward.training)
            forward.train()
            return x

    model, (x, y) = net("small-cnn").train(), batch(6)
    craft(model, x, y, Careless(), generator=generator(), batch_size=2)
    assert Careless.seen == [False] * 3 and model.training


def test_an_attack_that_leaves_its_threat_is_refused(net, batch):
    class Wild:
        threat, name = Linf("8/255"), "wild"

        def __call__(self, forward, x, y, *, generator):
            return (x + 0.1).clamp(0, 1)

    model, (x, y) = net("mlp"), batch(4)
    with pytest.raises(UserError, match="wild: the attack left the ball"):
        craft(model, x, y, Wild(), generator=generator())
    assert all(p.requires_grad for p in model.parameters())


def test_bytes_are_what_an_image_file_holds_and_a_cast_is_numpys():
    x = torch.rand(4, 3, 8, 8, generator=generator())
    rounded, cast = as_bytes(x), as_bytes(x, "cast")
    assert torch.equal((255 * rounded).round().byte(), (255 * x).round().byte()) and rounded.dtype == x.dtype
    assert torch.equal((255 * cast).round().byte(), torch.from_numpy((255 * x.numpy()).astype("uint8")))
    assert float((rounded - x).abs().max()) <= 0.5 / 255 + 1e-6
    assert bool((cast <= x + 1e-6).all()) and float((x - cast).max()) > 0.9 / 255


@pytest.mark.parametrize("how", ["round", "cast"])
def test_an_image_of_bytes_keeps_every_value(how):
    whole = torch.arange(256, dtype=torch.uint8)
    x = whole.float().div_(255)
    assert torch.equal((255 * as_bytes(x, how)).round().byte(), whole)
    assert torch.equal(as_bytes(as_bytes(x, how), how), as_bytes(x, how))


def test_a_cast_wraps_around_what_left_the_box_and_rounding_clips_it():
    x = torch.tensor([-0.5, -1.2, 255.6, 256.0, 300.7], dtype=torch.float64) / 255
    assert (255 * as_bytes(x, "cast")).round().tolist() == [0, 255, 255, 0, 44]
    assert (255 * as_bytes(x)).round().tolist() == [0, 0, 255, 255, 255]


def test_mistakes_about_bytes_are_said():
    with pytest.raises(UserError, match="unknown way to make bytes 'cut'"):
        as_bytes(torch.rand(2), "cut")
    with pytest.raises(UserError, match="only finite floats"):
        as_bytes(torch.tensor([float("nan")]))
    with pytest.raises(UserError, match=r"got torch\.uint8"):
        as_bytes(torch.zeros(2, dtype=torch.uint8))
