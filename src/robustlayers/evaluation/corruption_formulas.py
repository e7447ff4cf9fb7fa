"""The formulas of the common corruptions of Hendrycks & Dietterich 2019, written anew for batches of small images.

A formula takes images [n, c, h, w] in [0, 1], the numbers of its severity, and one generator for each image; what it
returns may leave [0, 1] and is clamped by `corruptions.corrupt`. Draws come from the generators alone, on the CPU, so an
image's corruption is the same in every batch and on every device. Lengths are in pixels and meant for about 32 x 32.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustlayers.attacks._draws import normal, uniform
from robustlayers.core.errors import UserError
from robustlayers.evaluation._filters import (
    blur,
    box_resize,
    disk,
    filtered,
    luminance,
    motion,
    sample,
    zoomed,
)

__all__ = [
    "Formula",
    "brightness",
    "contrast",
    "defocus_blur",
    "elastic_transform",
    "fog",
    "frost",
    "gaussian_blur",
    "gaussian_noise",
    "glass_blur",
    "impulse_noise",
    "jpeg_compression",
    "motion_blur",
    "pixelate",
    "plasma",
    "saturate",
    "shot_noise",
    "snow",
    "spatter",
    "speckle_noise",
    "zoom_blur",
]

Formula = Callable[[Tensor, Any, Sequence[torch.Generator]], Tensor]
Draws = Sequence[torch.Generator]


# -- noise ---------------------------------------------------------------------------------------------------------


def gaussian_noise(x: Tensor, sigma: float, draws: Draws) -> Tensor:
    """x + sigma z, z standard normal for every value."""
    return x + sigma * normal(x.shape, draws, x.dtype).to(x.device)


def shot_noise(x: Tensor, photons: float, draws: Draws) -> Tensor:
    """Poisson(photons x) / photons: mean x, variance x / photons."""
    rates = (x * photons).cpu()
    counts = [torch.poisson(rate, generator=one) for rate, one in zip(rates, draws, strict=True)]
    return (torch.stack(counts) / photons).to(x)


def impulse_noise(x: Tensor, share: float, draws: Draws) -> Tensor:
    """Salt and pepper: a value is replaced with probability `share`, by 0 or by 1 as likely."""
    u = uniform(x.shape, draws, x.dtype).to(x.device)
    return torch.where(u < share / 2, 0.0, torch.where(u < share, 1.0, x))


def speckle_noise(x: Tensor, sigma: float, draws: Draws) -> Tensor:
    """x + x sigma z, z standard normal: noise in proportion to the brightness."""
    return x + x * sigma * normal(x.shape, draws, x.dtype).to(x.device)


# -- blur ----------------------------------------------------------------------------------------------------------


def gaussian_blur(x: Tensor, sigma: float, draws: Draws) -> Tensor:
    """A Gaussian of standard deviation `sigma` pixels."""
    return blur(x, sigma)


def defocus_blur(x: Tensor, level: tuple[float, float], draws: Draws) -> Tensor:
    """The mean over a disk, softened: (radius, standard deviation of the softening)."""
    return filtered(x, disk(*level))


def glass_blur(x: Tensor, level: tuple[float, int], draws: Draws) -> Tensor:
    """Between two Gaussian blurs, each pixel takes the value of a near one: (standard deviation, rounds).

    That is the pixel 0 or 1 rows and 0 or 1 columns before, as likely; the first two rows and columns stay. The paper
    speaks of an exchange; the code that made its data copies, and so does this.
    """
    sigma, rounds = level
    n, c, h, w = x.shape
    x = blur(x, sigma)
    before = uniform((n, rounds, 2, h, w), draws).to(x.device) < 0.5
    before[:, :, :, :2], before[:, :, :, :, :2] = False, False
    rows, columns = torch.arange(h, device=x.device)[:, None], torch.arange(w, device=x.device)
    for turn in before.long().unbind(1):
        up, left = turn.unbind(1)
        places = (rows - up) * w + columns - left
        x = x.flatten(2).gather(2, places.view(n, 1, h * w).expand(n, c, h * w)).view(n, c, h, w)
    return blur(x, sigma)


def motion_blur(x: Tensor, level: tuple[float, float], draws: Draws) -> Tensor:
    """A smear along a direction between -45 and 45 degrees: (radius, standard deviation)."""
    return motion(x, *level, _degrees(-45, 45, draws))


def zoom_blur(x: Tensor, widest: float, draws: Draws) -> Tensor:
    """The mean of the image and of its enlargements by 1, 1.01, ... up to `widest`."""
    factors = [1 + step / 100 for step in range(round(100 * (widest - 1)) + 1)]
    return (x + torch.stack([zoomed(x, factor) for factor in factors]).sum(0)) / (len(factors) + 1)


# -- weather -------------------------------------------------------------------------------------------------------


def plasma(n: int, height: int, width: int, decay: float, draws: Draws) -> Tensor:
    """Return clouds [n, 1, height, width] in [0, 1] by the diamond-square algorithm on a torus.

    Every new point is the mean of its four neighbors and a uniform draw; the amplitude of the draws falls by `decay`
    squared from each size of detail to the half, so a larger `decay` is smoother.
    """
    side = 2
    while side < max(height, width):
        side *= 2
    cloud = torch.zeros(n, side, side, dtype=torch.float64)
    step, reach = side, 100.0

    def mean_and_draw(corners: Tensor) -> Tensor:
        return corners / 4 + reach**2 * (2 * uniform(corners.shape, draws, torch.float64) - 1)

    while step >= 2:
        half = step // 2
        old = cloud[:, ::step, ::step]
        pair = old + old.roll(-1, 1)
        cloud[:, half::step, half::step] = mean_and_draw(pair + pair.roll(-1, 2))
        new = cloud[:, half::step, half::step]
        cloud[:, ::step, half::step] = mean_and_draw(new + new.roll(1, 1) + old + old.roll(-1, 2))
        cloud[:, half::step, ::step] = mean_and_draw(new + new.roll(1, 2) + old + old.roll(-1, 1))
        step, reach = half, reach / decay
    low, high = cloud.amin((1, 2), keepdim=True), cloud.amax((1, 2), keepdim=True)
    return ((cloud - low) / (high - low))[:, None, :height, :width]


def fog(x: Tensor, level: tuple[float, float], draws: Draws) -> Tensor:
    """(x + amount plasma) m / (m + amount), m the image's brightest value: (amount, decay of the plasma)."""
    amount, decay = level
    brightest = x.amax((1, 2, 3), keepdim=True)
    clouds = plasma(len(x), x.shape[2], x.shape[3], decay, draws).to(x)
    return (x + amount * clouds) * brightest / (brightest + amount)


def frost(x: Tensor, level: tuple[float, float], draws: Draws) -> Tensor:
    """Share of the image, and of frost: here bright veins where two clouds are at half their height, on a pale ground.

    The benchmark lays six photographs of frost over the images. They are not part of this package, so this pattern is
    procedural and its numbers are not comparable with the benchmark's.
    """
    keep, amount = level
    clouds = [plasma(len(x), x.shape[2], x.shape[3], 1.8, draws).to(x) for _ in range(2)]
    veins = torch.stack([(1 - (2 * cloud - 1).abs()) ** 3 for cloud in clouds]).amax(0)
    pattern = 0.35 + 0.65 * veins
    tint = x.new_tensor([0.86, 0.93, 1.0] if x.shape[1] == 3 else [0.93]).view(1, -1, 1, 1)
    return keep * x + amount * pattern * tint


def snow(x: Tensor, level: tuple[float, float, float, float, float, float, float], draws: Draws) -> Tensor:
    """Flakes, smeared along their fall, over an image that is paler: both the layer and its turn by 180 degrees.

    (mean, deviation of a normal layer; its enlargement; flakes are what is above a threshold; radius and standard
    deviation of the smear; share of the image as it is).
    """
    mean, deviation, factor, threshold, radius, sigma, keep = level
    n, _, h, w = x.shape
    layer = (mean + deviation * normal((n, 1, h, w), draws, x.dtype)).to(x.device)
    layer = zoomed(layer, factor)
    layer = torch.where(layer < threshold, 0.0, layer).clamp(0, 1)
    layer = motion(layer, radius, sigma, _degrees(-135, -45, draws))
    pale = torch.maximum(x, 1.5 * luminance(x) + 0.5)
    return keep * x + (1 - keep) * pale + layer + layer.flip(2, 3)


def spatter(x: Tensor, level: tuple[float, float, float, float, float, bool], draws: Draws) -> Tensor:
    """Drops of water that shine, or splashes of mud that cover: what of a blurred normal layer is above a threshold.

    (mean, deviation of the layer; standard deviation of its blur; threshold; water: strength of the shine, mud: standard
    deviation of the softening of its edge; whether it is mud). Water adds pale turquoise where a drop is, most where the
    light falls on its rim; mud takes the place of the pixels that it covers to four fifths or more.

    Rims are the pixels of a drop beside one that is dry, and distances to them are exact; the published code finds both
    by Canny's filter and a chamfer, and divides by zero where there is no drop.
    """
    mean, deviation, sigma, threshold, strength, mud = level
    n, _, h, w = x.shape
    layer = blur(mean + deviation * normal((n, 1, h, w), draws, torch.float64), sigma)
    if mud:
        cover = blur((layer > threshold).double(), strength)
        cover = torch.where(cover < 0.8, 0.0, cover).to(x)
        return (1 - cover) * x + cover * _tint(x, (63, 42, 20))
    drops = torch.where(layer < threshold, 0.0, layer)
    wet = drops > 0
    dry_near = filtered((~wet).double(), x.new_tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]]), "nearest") > 0
    box = torch.full((3, 3), 1 / 9, dtype=torch.float64)
    depth = (filtered(_distances(wet & dry_near).clamp_max(20), box) + 1e-9).long()  # whole numbers, as of an image
    light = x.new_tensor([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    relief = filtered(filtered(_equalized(depth, 21), light).clamp(0, 1), box)
    shine = drops * relief
    shine = strength * shine / shine.amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
    return x + shine.to(x) * _tint(x, (175, 238, 238))


# -- digital -------------------------------------------------------------------------------------------------------


def brightness(x: Tensor, amount: float, draws: Draws) -> Tensor:
    """The value of HSV raised by `amount`, with hue and saturation kept; gray images are shifted."""
    if x.shape[1] != 3:
        return x + amount
    value = x.amax(1, keepdim=True)
    raised = (value + amount).clamp(0, 1)
    return torch.where(value > 0, x * (raised / value.clamp_min(1e-12)), raised)


def contrast(x: Tensor, amount: float, draws: Draws) -> Tensor:
    """(x - m) amount + m, m the mean of each channel."""
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * amount + mean


def saturate(x: Tensor, level: tuple[float, float], draws: Draws) -> Tensor:
    """The saturation s of HSV becomes a s + b, for images with three channels: (a, b).

    Pixels without a hue stay gray; the published code turns them red where b > 0.
    """
    scale, shift = level
    value = x.amax(1, keepdim=True)
    saturation = (value - x.amin(1, keepdim=True)) / value.clamp_min(1e-12)
    wanted = (scale * saturation + shift).clamp(0, 1)
    return torch.where(saturation > 0, value - (value - x) * (wanted / saturation.clamp_min(1e-12)), x)


def elastic_transform(x: Tensor, level: tuple[float, float, float], draws: Draws) -> Tensor:
    """A random affine map, then a smooth random displacement of every pixel.

    (amplitude and smoothness of the displacement, largest shift of the three points that make the affine map), all as
    shares of the shorter side.
    """
    n, _, h, w = x.shape
    side = min(h, w)
    amplitude, sigma, reach = (side * share for share in level)
    center, size = torch.tensor([h // 2, w // 2], dtype=torch.float64), side // 3
    offsets = torch.tensor([[1, 1], [1, -1], [-1, -1]], dtype=torch.float64) * size
    old = center + offsets
    new = old + reach * (2 * uniform((n, 3, 2), draws, torch.float64) - 1)
    if size:  # else the three points are one, and no map is defined
        # The map from where a pixel comes out to where it is read, by what it does to the three points.
        back = torch.linalg.solve(torch.cat([new, torch.ones(n, 3, 1, dtype=torch.float64)], 2), old.expand(n, 3, 2))
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        points = torch.stack([rows, columns, torch.ones_like(rows)], 2).double().view(1, h * w, 3)
        places = (points @ back).view(n, h, w, 2).to(x)
        x = sample(x, places[..., 0], places[..., 1], "mirror")
    shifts = 2 * uniform((n, 2, h, w), draws, torch.float64) - 1
    if amplitude == 0:
        return x
    shifts = (amplitude * blur(shifts, sigma, truncate=3, edge="reflect")).to(x)
    rows = torch.arange(h, device=x.device)[:, None] + shifts[:, 0]
    return sample(x, rows, torch.arange(w, device=x.device) + shifts[:, 1], "reflect")


def pixelate(x: Tensor, share: float, draws: Draws) -> Tensor:
    """Reduced to `share` of its sides by box filtering, and enlarged again."""
    h, w = x.shape[2:]
    return box_resize(box_resize(x, max(1, int(h * share)), max(1, int(w * share))), h, w)


def jpeg_compression(x: Tensor, quality: int, draws: Draws) -> Tensor:
    """JPEG at a quality from 1 to 95, by Pillow, which rounds to bytes; for one or three channels."""
    from PIL import Image  # takes long to import

    if x.shape[1] not in (1, 3):
        raise UserError(f"jpeg-compression: images with {x.shape[1]} channels; allowed: 1 or 3")
    pixels = x.mul(255).round().clamp(0, 255).to(torch.uint8).cpu().movedim(1, 3).numpy()
    found = np.empty_like(pixels)
    for place, picture in enumerate(pixels):
        file = io.BytesIO()
        Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture).save(file, "JPEG", quality=quality)
        with Image.open(file) as image:
            found[place] = np.asarray(image).reshape(picture.shape)
    return torch.from_numpy(found).movedim(3, 1).to(x).div(255)


def _degrees(low: float, high: float, draws: Draws) -> Tensor:
    return low + (high - low) * uniform((len(draws), 1), draws, torch.float64)[:, 0]


def _tint(x: Tensor, color: tuple[int, int, int]) -> Tensor:
    """Return a color [1, c, 1, 1] for three channels, and its gray for any other number of them."""
    tint = x.new_tensor(color).view(1, 3, 1, 1) / 255
    return tint if x.shape[1] == 3 else luminance(tint)


def _distances(marked: Tensor) -> Tensor:
    """Return each pixel's distance to the nearest marked one of its image, far more than any side where there is none.

    The square of it is a minimum over columns of the squared distance within the column, which is one over rows.
    """
    n, _, h, w = marked.shape
    far = float(4 * (h + w) ** 2)
    rows, columns = (torch.arange(side, device=marked.device, dtype=torch.float64) for side in (h, w))
    squared = torch.full((n, 1, h, w), far, dtype=torch.float64, device=marked.device)
    for row in range(h):
        reach = torch.where(marked[:, :, row : row + 1], ((rows - row) ** 2)[:, None], far)
        squared = torch.minimum(squared, reach)
    found = torch.full_like(squared, far)
    for column in range(w):
        found = torch.minimum(found, squared[..., column : column + 1] + (columns - column) ** 2)
    return found.sqrt()


def _equalized(values: Tensor, levels: int) -> Tensor:
    """Return whole numbers [n, 1, h, w] below `levels` as the share of their image's pixels up to them, from 0 to 1.

    The lowest of an image becomes 0; where all are the same, all become 0.
    """
    flat = values.flatten(1)
    counts = torch.zeros(len(flat), levels, dtype=torch.float64, device=values.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float64))
    below = counts.gather(1, flat.amin(1, keepdim=True))
    shares = (counts.cumsum(1) - below) / (flat.shape[1] - below).clamp_min(1)
    return shares.gather(1, flat).view_as(values)
