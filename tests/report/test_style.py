"""The palette: every color is seen on its paper, and any two are told apart by every kind of color vision, in both schemes."""

from __future__ import annotations

import itertools
import re
from importlib import resources

import numpy as np
import pytest
from matplotlib import colormaps

from robustlayers.analysis import _axes
from robustlayers.report import style

# Machado, Oliveira & Fernandes 2009, severity 1, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
LIGHT = {name: light for name, light, _ in style.VARIABLES.values()}
DARK = {name: dark for name, _, dark in style.VARIABLES.values()}
SCHEMES = pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])


def linear(color: str) -> np.ndarray:
    values = np.array([int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2, from 1 to 21."""
    low, high = sorted(0.05 + float(linear(color) @ (0.2126, 0.7152, 0.0722)) for color in (one, other))
    return high / low


def apart(one: str, other: str, vision: str) -> float:
    """How different two colors look: 100 times their distance in OKLab (Ottosson 2020), black and white being 100."""
    seen = [OKLAB @ np.cbrt(CONES @ np.clip(VISION[vision] @ linear(color), 0, 1)) for color in (one, other)]
    return 100 * float(np.linalg.norm(seen[0] - seen[1]))


def series(colors: dict[str, str]) -> list[str]:
    return [color for name, color in colors.items() if name.startswith("--series")] + [colors["--clean"]]


def test_the_measures_are_the_standard_ones() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)
    assert apart("#000000", "#ffffff", "normal") == pytest.approx(100, abs=0.01)
    assert apart("#00ff00", "#ffcc00", "protanopia") < 10 < apart("#00ff00", "#ffcc00", "normal")


@SCHEMES
def test_marks_and_words_are_seen_on_paper(colors: dict[str, str]) -> None:
    paper = colors["--paper"]
    for color in series(colors):
        assert contrast(color, paper) >= 3, color
    for name in ("--ink", "--muted", "--clean"):
        assert contrast(colors[name], paper) >= 4.5, name


@SCHEMES
@pytest.mark.parametrize("vision", VISION)
def test_any_two_series_are_told_apart(colors: dict[str, str], vision: str) -> None:
    for one, other in itertools.combinations(series(colors), 2):
        assert apart(one, other, vision) >= 7, (one, other)


def test_the_words_of_the_page_are_seen_on_its_grounds() -> None:
    css = (resources.files("robustlayers.report") / "templates" / "page.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{([^}]*)\}", css)
    assert len(blocks) == 2
    for block, colors in zip(blocks, (LIGHT, DARK), strict=True):
        own = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", block))
        grounds = (colors["--paper"], own["--tint"], own["--warn-tint"])
        words = (colors["--ink"], colors["--muted"], own["--good"], own["--bad"], own["--link"])
        for ground, word in itertools.product(grounds, words):
            assert contrast(ground, word) >= 4.5, (ground, word)


def test_plots_of_their_own_have_the_colors_that_the_report_exchanges() -> None:
    assert style.SERIES[: len(_axes.SERIES)] == _axes.SERIES
    assert {_axes.GRAY, _axes.INK} <= set(style.VARIABLES)
    assert all(light == key for key, (_, light, _) in style.VARIABLES.items())


def test_numbers_on_shades_are_seen() -> None:
    for share in np.linspace(0, 1, 101):
        shade = "#{:02x}{:02x}{:02x}".format(*(round(255 * part) for part in colormaps["cividis"](share)[:3]))
        assert contrast({"white": style.ON_DARK, "black": style.ON_LIGHT}[_axes.ink_on(share)], shade) >= 4.5, share
    assert contrast(style.ON_LIGHT, "#ffffff") > 15
