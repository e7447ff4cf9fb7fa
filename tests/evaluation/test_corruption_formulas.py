"""Each family of corruptions against its formula: noise, blur, weather, digital."""

import colorsys
import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from robustlayers.evaluation import CORRUPTIONS, corrupt
from robustlayers.evaluation import corruption_formulas as formulas
from robustlayers.evaluation._filters import blur, box_resize, disk, filtered, motion, sample, zoomed
from robustlayers.evaluation.corruptions import SEVERITIES


def draws(n, seed=0):
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(n)]


# -- noise ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_the_mean_and_variance_of_its_formula(severity):
    x = torch.full((8, 3, 64, 64), 0.4)
    n = x.numel()

    def check(family, variance, mean=0.4):
        z = corrupt(x, family, severity).double()
        assert float(z.mean()) == pytest.approx(mean, abs=5 * (variance / n) ** 0.5)
        assert float(z.var()) == pytest.approx(variance, rel=0.02)

    level = {name: corruption.levels[severity - 1] for name, corruption in CORRUPTIONS.items()}
    check("gaussian-noise", level["gaussian-noise"] ** 2)
    check("shot-noise", 0.4 / level["shot-noise"])
    check("speckle-noise", (0.4 * level["speckle-noise"]) ** 2)
    share = level["impulse-noise"]
    z = corrupt(x, "impulse-noise", severity)
    for value, expected in ((0.0, share / 2), (1.0, share / 2), (0.4, 1 - share)):
        found = float((z == torch.tensor(value)).double().mean())
        assert found == pytest.approx(expected, abs=5 * (expected * (1 - expected) / n) ** 0.5)


def test_draws_are_the_same_at_every_severity_and_white():
    x = torch.full((4, 1, 64, 64), 0.5)
    one, five = corrupt(x, "gaussian-noise", 1) - x, corrupt(x, "gaussian-noise", 5) - x
    assert torch.allclose(five, one * 0.10 / 0.04, atol=1e-4)
    power = torch.fft.fft2(one).abs().square().mean((0, 1))
    low, high = power[1:8, 1:8].mean(), power[24:40, 24:40].mean()
    assert float(low / high) == pytest.approx(1, abs=0.25)


# -- blur ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.05, 0.4, 1.0, 3.0])
def test_a_gaussian_blur_is_scipys(pictures, sigma):
    for edge, mode in (("nearest", "nearest"), ("reflect", "reflect"), ("mirror", "mirror")):
        expected = ndimage.gaussian_filter(pictures[0, 0].double().numpy(), sigma, mode=mode, truncate=4)
        found = blur(pictures[:1, :1].double(), sigma, edge=edge)[0, 0]
        assert np.allclose(found, expected, atol=1e-12)
    small = torch.rand(1, 1, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert np.allclose(blur(small, 2.0)[0, 0], ndimage.gaussian_filter(small[0, 0].numpy(), 2.0, mode="nearest"))


def test_filters_and_samples_are_scipys(pictures):
    x = pictures[:1, :1].double()
    kernel = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = ndimage.correlate(x[0, 0].numpy(), kernel.numpy(), mode="mirror")
    assert np.allclose(filtered(x, kernel)[0, 0], expected, atol=1e-12)
    places = 44 * torch.rand(2, 1, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 6
    for edge in ("nearest", "mirror", "reflect"):
        expected = ndimage.map_coordinates(x[0, 0].numpy(), places[:, 0].numpy(), order=1, mode=edge)
        # scipy reads between the last pixel and its mirror image a little differently where that is beyond the edge
        inside = ((places > 0) & (places < 31)).all(0)[0] if edge != "nearest" else torch.ones(9, 7, dtype=torch.bool)
        assert np.allclose(sample(x, *places, edge)[0, 0][inside], expected[inside.numpy()], atol=1e-12)
    turned = sample(x, places[0], places[1], "reflect")
    padded = torch.from_numpy(np.pad(x[0, 0].numpy(), 40, mode="symmetric"))[None, None]
    assert torch.allclose(turned, sample(padded, places[0] + 40, places[1] + 40, "nearest"))
    padded = torch.from_numpy(np.pad(x[0, 0].numpy(), 30, mode="reflect"))[None, None]
    assert torch.allclose(sample(x, *places, "mirror"), sample(padded, places[0] + 30, places[1] + 30, "nearest"))


@pytest.mark.parametrize("level", CORRUPTIONS["defocus-blur"].levels)
def test_a_disk_is_round_and_keeps_brightness(level):
    kernel = disk(*level)
    assert float(kernel.sum()) == pytest.approx(1) and torch.allclose(kernel, kernel.T)
    assert torch.allclose(kernel, kernel.flip(0))
    assert float(kernel.amax()) == pytest.approx(float(kernel[len(kernel) // 2, len(kernel) // 2]))


@pytest.mark.parametrize("family", ["gaussian-blur", "defocus-blur", "motion-blur", "zoom-blur", "pixelate"])
def test_blurs_take_from_high_frequencies_and_leave_flat_images(family, pictures):
    flat = torch.full((1, 3, 32, 32), 0.3)
    assert torch.allclose(corrupt(flat, family, 5), flat, atol=1e-5)
    noisy = torch.rand(8, 1, 32, 32, generator=torch.Generator().manual_seed(2))
    before = torch.fft.fft2(noisy - noisy.mean()).abs().square()[..., 10:22, 10:22].mean()
    after = torch.fft.fft2(corrupt(noisy, family, 5)).abs().square()[..., 10:22, 10:22].mean()
    assert float(after) < 0.5 * float(before)


def test_motion_smears_along_its_direction():
    x = torch.zeros(3, 1, 21, 21)
    x[:, :, 10, 10] = 1
    z = motion(x, 6, 2.0, torch.tensor([0.0, 90.0, 45.0], dtype=torch.float64))[:, 0]
    weights = np.exp(-(np.arange(11) ** 2) / 8.0)
    weights /= np.exp(-(np.arange(13) ** 2) / 8.0).sum()
    assert np.allclose(z[0, 10, :11].flip(0), weights, atol=1e-6)
    assert np.allclose(z[1, :11, 10].flip(0), weights, atol=1e-6)
    assert int((z[2] > 0).sum()) == int((z[2].diagonal() > 0).sum()) > 5
    assert torch.allclose(z.sum((1, 2)), torch.ones(3), atol=1e-3)


def test_a_zoom_enlarges_around_the_middle():
    ramp = torch.linspace(0, 1, 33).view(1, 1, 1, 33).expand(1, 2, 9, 33)
    z = zoomed(ramp, 2.0)
    assert torch.allclose(z[0, 0, 0], torch.linspace(0.25, 0.75, 33), atol=1e-6)
    assert torch.allclose(zoomed(ramp, 1.0), ramp, atol=1e-6)


def test_glass_takes_pixels_that_are_near(pictures):
    x = torch.arange(32 * 32.0).view(1, 1, 32, 32) / 1024
    z = formulas.glass_blur(x, (0.0, 2), draws(1))
    moved = ((x - z) * 1024).round().long()
    rows, columns = (moved + 16) // 32, (moved + 16).remainder(32) - 16
    assert int(rows.min()) == 0 and int(rows.max()) == 2 and set(columns.unique().tolist()) == {0, 1, 2}
    assert not moved[..., :2, :2].any()
    one = formulas.glass_blur(x, (0.0, 1), draws(1))[..., 2:, 2:]
    share = float((one == x[..., 2:, 2:]).double().mean())
    assert share == pytest.approx(0.25, abs=0.06)


# -- weather -------------------------------------------------------------------------------------------------------


def test_clouds_are_rough_by_their_decay_and_differ_between_images():
    roughness = []
    for decay in (1.75, 2.0, 2.5, 3.0):
        clouds = formulas.plasma(6, 32, 32, decay, draws(6))
        assert clouds.shape == (6, 1, 32, 32)
        assert torch.allclose(clouds.amin((1, 2, 3)), torch.zeros(6, dtype=torch.float64))
        assert torch.allclose(clouds.amax((1, 2, 3)), torch.ones(6, dtype=torch.float64))
        assert not torch.allclose(clouds[0], clouds[1])
        roughness.append(float(clouds.diff(dim=3).abs().mean() / clouds.std()))
        assert torch.equal(clouds, formulas.plasma(6, 32, 32, decay, draws(6)))
    assert roughness == sorted(roughness, reverse=True) and roughness[0] < 0.3


def test_fog_is_the_formula(pictures):
    clouds = formulas.plasma(3, 32, 32, 2.5, draws(3)).float()
    brightest = pictures[:3].amax((1, 2, 3), keepdim=True)
    expected = (pictures[:3] + 0.75 * clouds) * brightest / (brightest + 0.75)
    assert torch.allclose(formulas.fog(pictures[:3], (0.75, 2.5), draws(3)), expected, atol=1e-6)


def test_snow_and_frost_are_bright_and_frost_keeps_a_share(pictures):
    for severity in SEVERITIES:
        assert float(corrupt(pictures, "snow", severity).mean()) > float(pictures.mean()) + 0.02
    black = torch.zeros(4, 3, 32, 32)
    pattern = corrupt(black, "procedural-frost", 2) / 0.3
    assert 0.3 < float(pattern.mean()) < 0.9 and float(pattern.std()) > 0.05
    assert bool((pattern[:, 0] <= pattern[:, 2]).all())  # bluish
    white = formulas.frost(torch.ones(4, 3, 32, 32), (0.75, 0.45), draws(4))
    dark = formulas.frost(torch.zeros(4, 3, 32, 32), (0.75, 0.45), draws(4))
    assert torch.allclose(white - dark, torch.full_like(white, 0.75), atol=1e-6)


def test_distances_and_equalized_numbers_are_scipys_and_by_hand():
    marked = torch.rand(5, 1, 9, 13, generator=torch.Generator().manual_seed(0)) < 0.05
    marked[4] = False
    found = formulas._distances(marked)
    for image, distances in zip(marked[:4, 0].numpy(), found[:4, 0].numpy(), strict=True):
        assert np.allclose(distances, ndimage.distance_transform_edt(~image))
    assert float(found[4].min()) > 20  # nothing marked: far
    values = torch.tensor([3, 3, 5, 5, 5, 9, 9, 9, 9, 9]).view(1, 1, 2, 5)
    expected = torch.tensor([0, 0, 3, 3, 3, 8, 8, 8, 8, 8]).view(1, 1, 2, 5).double() / 8
    assert torch.allclose(formulas._equalized(values, 21), expected)
    assert not formulas._equalized(torch.full((1, 1, 2, 2), 7), 21).any()


@pytest.mark.parametrize("severity", SEVERITIES)
def test_spatter_shines_or_covers_where_the_blurred_layer_is_above_its_threshold(severity):
    mean, deviation, sigma, threshold, strength, mud = CORRUPTIONS["spatter"].levels[severity - 1]
    n, size = 60, 32
    x = torch.full((n, 3, size, size), 0.4)
    z = corrupt(x, "spatter", severity)
    changed = (z != x).any(1)
    # How much is wet is what a normal layer after that blur has above the threshold.
    impulse = torch.zeros(1, 1, 33, 33, dtype=torch.float64)
    impulse[..., 16, 16] = 1
    spread = deviation * float(blur(impulse, sigma).square().sum().sqrt())
    share = float(torch.special.ndtr(torch.tensor((mean - threshold) / spread, dtype=torch.float64)))
    found = float(changed.double().mean())
    if mud:
        brown = torch.tensor([63, 42, 20]).view(3, 1, 1) / 255
        cover = (0.4 - z) / (0.4 - brown)  # one and the same share for all colors
        assert torch.allclose(cover[:, 0], cover[:, 2], atol=1e-5)
        assert bool(((cover[:, 0] >= 0.8 - 1e-5) | ~changed).all()) and found < share
    else:
        shine = (z - x).flatten(2)
        tint = torch.tensor([175, 238, 238]) / 255
        assert torch.allclose(
            shine.amax(2), (strength * tint).expand(n, 3), atol=1e-5
        )  # the brightest drop of each image
        assert bool((z >= x).all()) and 0.5 * share < found <= share + 0.01  # a drop in full shade does not show
    rough = (changed[:, 1:] != changed[:, :-1]).double().mean() / (2 * found * (1 - found))
    assert float(rough) < 0.95  # pixels beside each other are alike: drops, not noise


def test_spatter_rises_within_water_and_within_mud_and_dry_images_stay():
    x = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    distances = [float((corrupt(x, "spatter", s) - x).square().mean().sqrt()) for s in SEVERITIES]
    assert distances[0] < distances[1] < distances[2] and distances[3] < distances[4]
    for mud in (False, True):
        assert torch.equal(formulas.spatter(x, (0.1, 0.01, 1.0, 0.7, 0.5, mud), draws(40)), x)


# -- digital -------------------------------------------------------------------------------------------------------


def by_hsv(x, change):
    """Change hue, saturation and value of each pixel by the standard library."""
    pixels = x.movedim(1, -1).reshape(-1, 3).double().tolist()
    found = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel))) for pixel in pixels]
    return torch.tensor(found).view(*x.movedim(1, -1).shape).movedim(-1, 1).to(x)


def unit(value):
    return min(max(value, 0.0), 1.0)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_saturation_and_contrast(pictures, severity):
    x = pictures[:2, :, ::4, ::4].clone()
    x[0, :, 0, 0] = 0
    x[0, :, 0, 1] = torch.tensor([1.0, 0, 0])
    add = CORRUPTIONS["brightness"].levels[severity - 1]
    assert torch.allclose(
        corrupt(x, "brightness", severity), by_hsv(x, lambda h, s, v: (h, s, unit(v + add))), atol=1e-5
    )
    gray = x[:, :1]
    assert torch.allclose(corrupt(gray, "brightness", severity), (gray + add).clamp(0, 1))
    a, b = CORRUPTIONS["saturate"].levels[severity - 1]
    expected = by_hsv(x, lambda h, s, v: (h, unit(a * s + b) if s else s, v))
    assert torch.allclose(corrupt(x, "saturate", severity), expected, atol=1e-5)
    share = CORRUPTIONS["contrast"].levels[severity - 1]
    z = formulas.contrast(x, share, draws(2))
    assert torch.allclose(z.mean((2, 3)), x.mean((2, 3)), atol=1e-6)
    assert torch.allclose(z.std((2, 3)), share * x.std((2, 3)), atol=1e-6)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_pixelate_and_jpeg_are_pillows(pictures, severity):
    bytes_ = (pictures[:3] * 255).round().to(torch.uint8)
    for place, picture in enumerate(bytes_.movedim(1, 3).numpy()):
        small = int(32 * CORRUPTIONS["pixelate"].levels[severity - 1])
        image = Image.fromarray(picture).resize((small, small), Image.Resampling.BOX)
        expected = np.asarray(image.resize((32, 32), Image.Resampling.BOX))
        found = corrupt(bytes_, "pixelate", severity)[place].movedim(0, 2).mul(255).numpy()
        assert np.abs(found - expected).max() <= 1.01  # Pillow rounds to bytes twice
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=CORRUPTIONS["jpeg-compression"].levels[severity - 1])
        with Image.open(file) as image:
            expected = np.asarray(image)
        found = corrupt(bytes_, "jpeg-compression", severity)[place].movedim(0, 2).mul(255).round().numpy()
        assert np.array_equal(found, expected)


def test_a_box_is_the_mean_where_sizes_divide():
    x = torch.rand(1, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(box_resize(x, 3, 2), torch.nn.functional.avg_pool2d(x, (2, 4)))
    assert torch.allclose(box_resize(x, 12, 8), x.repeat_interleave(2, 2))


def test_elastic_moves_points_by_the_affine_map(pictures):
    still = formulas.elastic_transform(pictures[:2], (0.0, 0.0, 0.0), draws(2))
    assert torch.allclose(still, pictures[:2], atol=1e-5)
    # A smooth image is read where the displacement says, so its value moves by slope times displacement at the most.
    ramp = torch.linspace(0, 1, 32).view(1, 1, 1, 32).expand(4, 1, 32, 32)
    z = formulas.elastic_transform(ramp, (0.1, 0.03, 0.0), draws(4))
    moved = ((z - ramp) * 31)[..., 4:-4, 4:-4]
    assert float(moved.std()) > 0.3 and float(moved.abs().max()) <= 32 * 0.1
    assert float(moved.mean()) == pytest.approx(0, abs=0.2)
    affine = formulas.elastic_transform(ramp, (0.0, 0.0, 0.05), draws(4))[..., 8:-8, 8:-8]
    assert torch.allclose(affine.diff(n=2), torch.zeros(4, 1, 16, 14), atol=1e-4)  # lines stay lines
    assert not torch.allclose(affine[0], affine[1], atol=1e-2)
