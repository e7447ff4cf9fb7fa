"""Natural and adversarial test images, with the perturbation made visible: what the attack did to each arm."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from robustlayers.analysis._sheets import picture, signed
from robustlayers.core.quantities import pixels_text
from robustlayers.report import style
from robustlayers.report.figures import Drawing
from robustlayers.study.summary import Pictures, Summary

__all__ = ["Gallery", "Shot", "draw", "gallery", "perturbation", "png", "uri"]


@dataclass(frozen=True)
class Shot:
    """One image as attacked in one arm: what the net said before and after."""

    image: str  # data URI
    change: str  # data URI of the visible perturbation
    before: str
    before_right: bool
    after: str
    after_right: bool


@dataclass(frozen=True)
class Gallery:
    """All pictures, ready for the page."""

    attack: str
    labels: Sequence[str]
    natural: Sequence[str]  # data URIs
    arms: Sequence[tuple[str, Sequence[Shot]]]
    reach: str  # the largest change of a pixel, as k/255
    amplification: float  # how many times larger the shown change is than the real one
    colored: bool  # RGB: each channel around mid-gray; else blue and orange


def _reach(pictures: Pictures) -> float:
    """The largest change of any pixel in any arm; 0 where nothing changed."""
    return max(
        (float(np.abs(image - pictures.natural).max()) for image in pictures.adversarial.values() if image.size),
        default=0.0,
    )


def perturbation(natural: np.ndarray, adversarial: np.ndarray, reach: float) -> np.ndarray:
    """Return adversarial − natural as a picture: [channels, height, width] to float [height, width, 3] in [0, 1].

    Mid-gray is no change and ±`reach` is full color. One channel: blue for darker, orange for brighter. Three channels:
    each is shown as 0.5 + 0.5 change / reach, so that the sign of every channel is kept.
    """
    return signed(adversarial.astype(float) - natural.astype(float), reach)


def png(shown: np.ndarray) -> bytes:
    """Return a picture [height, width, 3] in [0, 1] as PNG."""
    levels = np.round(255 * np.clip(np.nan_to_num(shown, nan=0.5), 0, 1)).astype(np.uint8)
    if (levels == levels[..., :1]).all():
        levels = levels[..., 0]
    stream = io.BytesIO()
    Image.fromarray(levels).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def uri(data: bytes) -> str:
    """Return PNG bytes as a data URI."""
    return "data:image/png;base64," + b64encode(data).decode()


def gallery(pictures: Pictures) -> Gallery:
    """Return all pictures as data URIs with the labels that the arms gave them."""
    reach = _reach(pictures)
    arms = []
    for arm, attacked in pictures.adversarial.items():
        before, after = pictures.predicted_natural[arm], pictures.predicted_adversarial[arm]
        shots = [
            Shot(
                image=uri(png(picture(attacked[index]))),
                change=uri(png(perturbation(pictures.natural[index], attacked[index], reach))),
                before=before[index],
                before_right=before[index] == label,
                after=after[index],
                after_right=after[index] == label,
            )
            for index, label in enumerate(pictures.labels)
        ]
        arms.append((arm, shots))
    return Gallery(
        attack=pictures.attack,
        labels=list(pictures.labels),
        natural=[uri(png(picture(image))) for image in pictures.natural],
        arms=arms,
        reach=pixels_text(round(reach * 255, 2) / 255),
        amplification=0.5 / reach if reach else 1.0,
        colored=pictures.natural.shape[1] == 3,
    )


def draw(summary: Summary) -> Drawing | None:
    """Return the pictures as one PNG with their data, and as a `Gallery` for the page; None where there are none."""
    pictures = summary.pictures
    if pictures is None or not len(pictures.natural):
        return None
    shown = gallery(pictures)
    scale = (
        "each color channel around mid-gray" if shown.colored else "mid-gray is no change, blue darker, orange brighter"
    )
    caption = (
        f"Test images as attacked in each arm by {shown.attack} (first seed, checkpoint best), and below them what the "
        f"attack changed, amplified {shown.amplification:.1f} times: {scale}; full color is {shown.reach}, the largest "
        "change that occurs. The label is the one that the arm gives to the attacked image, marked right or wrong; where the "
        "arm is wrong about the natural image already, that label stands below."
    )
    return Drawing(
        name="pictures",
        title="What the attack does",
        caption=caption,
        data=_table(pictures),
        png=_sheet(pictures, shown),
        facts={"gallery": shown},
    )


def _table(pictures: Pictures) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for arm, attacked in pictures.adversarial.items():
        for index, label in enumerate(pictures.labels):
            change = attacked[index].astype(float) - pictures.natural[index].astype(float)
            before, after = pictures.predicted_natural[arm][index], pictures.predicted_adversarial[arm][index]
            rows.append(
                {
                    "arm": arm,
                    "image": index,
                    "label": label,
                    "predicted_natural": before,
                    "right_natural": before == label,
                    "predicted_adversarial": after,
                    "right_adversarial": after == label,
                    "linf": float(np.abs(change).max()),
                    "l2": float(np.sqrt((change**2).sum())),
                }
            )
    return rows


def _sheet(pictures: Pictures, shown: Gallery) -> bytes:
    """All pictures on one sheet with their labels, for Markdown and slides."""
    reach, count = _reach(pictures), len(pictures.labels)
    side, gap, text, left = 64, 6, 16, 120
    rows = 1 + 2 * len(shown.arms)
    tops = [text + 4]
    for row in range(1, rows):
        tops.append(tops[-1] + side + (text + gap if row % 2 else 2))
    width, height = left + count * (side + gap), tops[-1] + side + gap
    with style.drawing():
        figure = style.figure(width, height)
        figure.patch.set(visible=True, facecolor=style.PAPER)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, width), ylim=(height, 0))
        small: dict[str, Any] = {"fontsize": 9, "ha": "center", "va": "bottom", "parse_math": False}
        head: dict[str, Any] = {"fontsize": 10, "va": "center", "fontweight": "bold", "parse_math": False}
        light: dict[str, Any] = {**head, "fontweight": "normal"}
        wrong: dict[str, Any] = {**small, "color": style.SERIES[1]}
        axes.text(4, tops[0] + side / 2, "natural", **head)
        for index, label in enumerate(pictures.labels):
            x = left + index * (side + gap)
            box = (x, x + side, tops[0] + side, tops[0])
            axes.imshow(picture(pictures.natural[index]), extent=box, interpolation="nearest")
            axes.text(x + side / 2, tops[0] - 1, style.plain(label, 12), **small)
        for row, (arm, shots) in enumerate(shown.arms):
            upper, lower = tops[1 + 2 * row], tops[2 + 2 * row]
            axes.text(4, upper + side / 2, style.plain(arm, 18), **head)
            axes.text(4, lower + side / 2, f"change × {shown.amplification:.1f}", **light)
            for index, shot in enumerate(shots):
                x = left + index * (side + gap)
                pair = (picture(pictures.adversarial[arm][index]), upper), (
                    perturbation(pictures.natural[index], pictures.adversarial[arm][index], reach), lower,
                )  # fmt: skip
                for seen, top in pair:
                    axes.imshow(np.clip(seen, 0, 1), extent=(x, x + side, top + side, top), interpolation="nearest")
                said = f"{'✓' if shot.after_right else '✗'} {shot.after}"
                axes.text(x + side / 2, upper - 1, style.plain(said, 13), **(small if shot.after_right else wrong))
        axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
        FigureCanvasAgg(figure)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=108, metadata={"Software": None})
    return stream.getvalue()
