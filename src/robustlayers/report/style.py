"""How a report looks: colors, markers and figure settings, in one place for the page and its figures.

Figures are drawn in the light colors below. On the page every one of these colors is replaced by a CSS variable, so a
figure follows the reader's light or dark scheme; the file beside the page keeps the light colors and stands alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.transforms import Affine2D

__all__ = [
    "CLEAN",
    "FONT_SIZE",
    "INK",
    "MUTED",
    "ON_DARK",
    "ON_LIGHT",
    "PAPER",
    "RULE",
    "SERIES",
    "VARIABLES",
    "color",
    "drawing",
    "figure",
    "marker",
    "marker_path",
    "plain",
    "ticks",
]

INK = "#1b2026"
MUTED = "#5d6772"
RULE = "#d8dde3"
PAPER = "#ffffff"
CLEAN = "#66707b"  # lines of clean accuracy, whatever the arm
ON_DARK, ON_LIGHT = (
    "#fefefe",
    "#010101",
)  # ink on shades, which stay as they are in every scheme, as pure white would not

# Each has a contrast of 3 with its paper, and any two are told apart under every common color blindness, which the tests
# compute. The first four are Okabe and Ito's; their orange, sky blue and yellow disappear on white paper.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#703000", "#4f1d8c", "#1c2127", "#346749")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h", ">", "p", "<")  # prime to the colors: pairs repeat after 88 arms

# color in the figure -> (CSS variable, light, dark)
VARIABLES: dict[str, tuple[str, str, str]] = {
    INK: ("--ink", "#1b2026", "#e7eaed"),
    MUTED: ("--muted", "#5d6772", "#9da7b1"),
    RULE: ("--rule", "#d8dde3", "#333a42"),
    PAPER: ("--paper", "#ffffff", "#14181c"),
    CLEAN: ("--clean", "#66707b", "#aab3bc"),
    SERIES[0]: ("--series-1", "#0072b2", "#60a9f6"),
    SERIES[1]: ("--series-2", "#d55e00", "#c54a10"),
    SERIES[2]: ("--series-3", "#009e73", "#14e29e"),
    SERIES[3]: ("--series-4", "#cc79a7", "#c16693"),
    SERIES[4]: ("--series-5", "#703000", "#e7c02d"),
    SERIES[5]: ("--series-6", "#4f1d8c", "#7858d1"),
    SERIES[6]: ("--series-7", "#1c2127", "#f4f6f8"),
    SERIES[7]: ("--series-8", "#346749", "#488166"),
}

FONT_SIZE = 12.0  # one unit of a figure is one CSS pixel at its natural width


def color(position: int) -> str:
    """Return the color of the arm at `position`."""
    return SERIES[position % len(SERIES)]


def marker(position: int) -> str:
    """Return the marker of the arm at `position`; no two arms share color and marker before the 89th.

    >>> len({(color(position), marker(position)) for position in range(88)})
    88
    """
    return MARKERS[position % len(MARKERS)]


def plain(text: str, most: int = 60) -> str:
    """Return a name of the user on one line, cut where it is too long for a figure.

    >>> plain("two\\n lines"), plain("abcdef", 4)
    ('two lines', 'abc…')
    """
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Return round numbers between `low` and `high`, `most` at the most.

    >>> ticks(71.2, 93.4)
    [75, 80, 85, 90]
    """
    for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 25, 50, 100):
        first, last = math.ceil(low / step), math.floor(high / step)
        if last - first + 1 <= most:
            return [step * k if step < 1 else int(step * k) for k in range(first, last + 1)]
    return []


@cache
def marker_path(shape: str, size: float = 10.0) -> str:
    """Return a marker as the `d` of an SVG path, centered in a square of `size` units, for legends in text and tables."""
    style = MarkerStyle(shape)
    scale = size * (0.42 if shape in "oshpPX" else 0.48)
    outline = style.get_path().transformed(style.get_transform())
    reach = float(np.abs(np.asarray(outline.vertices)).max())
    placed = outline.transformed(Affine2D().scale(scale / reach, -scale / reach).translate(size / 2, size / 2))
    return "".join(
        "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in np.asarray(polygon)) + "Z"
        for polygon in placed.to_polygons(closed_only=True)
    )


@contextmanager
def drawing() -> Iterator[None]:
    """Draw with the settings of the report, whatever the user's own matplotlib settings are; they come back afterwards."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # The reader's browser has the letters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",  # text stays text: it is found, copied, and set in the reader's own font
                "svg.hashsalt": "robustlayers",  # equal figures give equal bytes
                "font.size": FONT_SIZE,
                "axes.edgecolor": MUTED,
                "axes.linewidth": 0.8,
                "axes.labelcolor": MUTED,
                "axes.labelsize": FONT_SIZE,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "axes.axisbelow": True,
                "grid.color": RULE,
                "grid.linewidth": 0.8,
                "text.color": INK,
                "xtick.color": MUTED,
                "ytick.color": MUTED,
                "xtick.labelsize": FONT_SIZE - 1,
                "ytick.labelsize": FONT_SIZE - 1,
                "xtick.major.size": 0,
                "ytick.major.size": 0,
                "xtick.major.pad": 6,
                "ytick.major.pad": 6,
                "path.simplify": False,
            }
        )
        yield


def figure(width: float, height: float) -> Figure:
    """Return an empty transparent figure of `width` x `height` CSS pixels."""
    empty = Figure(figsize=(width / 72, height / 72), dpi=72)
    empty.patch.set_visible(False)
    return empty
