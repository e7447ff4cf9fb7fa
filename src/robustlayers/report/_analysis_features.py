"""How figures about features are named, sized and labeled: similarity of layers, and perturbation to signal."""

from __future__ import annotations

from matplotlib.axes import Axes

from robustlayers.report import style
from robustlayers.report._analysis_axes import NAME
from robustlayers.study.summary import Analyzed

__all__ = ["CKA_KINDS", "SIGNAL_KINDS", "heat_height", "settle"]

_UNDER_ATTACK = (
    "Read as above: rows are layers on clean images, columns the same net's layers on attacked ones. The diagonal turns "
    "dark where the attack changes what is represented."
)
_TWO = (
    "Read as above: rows are layers of the arm, columns those of the other one, on the same images. The diagonal turns "
    "dark where the two nets part."
)
_SPLITS = (
    "How to read it: CKA of clean with attacked images, layer by layer from left to right. Where the line of training images "
    "lies above that of held-out ones, the layer has learned to keep the attack out on the images it was trained on only."
)
_CONTRAST = (
    "How to read it: CKA on attacked training images minus that on attacked held-out images, layers in execution order from "
    "the lower left corner on. Pale is no difference; colored blocks are layers that represent what they were trained on "
    "otherwise than unseen images, which is where the net overfits."
)
_PROCRUSTES = (
    "Read as above: bright pairs of layers are those that a rotation turns into each other. From features averaged over "
    "positions; it weighs directions of little variance too, so it is a check where CKA is carried by a few images."
)
_COURSE = "Read as above, on the images as they were attacked for the net as it is."
_BY_IMAGES = (
    "How to read it: CKA of each layer of the arm with the same layer of the other one, from left to right, by the images that "
    "both see. Where the lines of attacked images lie below that of clean ones, the attack drives the two nets apart."
)

CKA_KINDS: dict[str, tuple[str, str]] = {
    "clean": ("Layer with layer, on clean images", ""),
    "attacked": ("Clean with attacked images", _UNDER_ATTACK),
    "same layer": ("Clean with attacked images, by split", _SPLITS),
    "contrast": ("Training minus held-out images, attacked", _CONTRAST),
    "procrustes": ("The same by orthogonal Procrustes", _PROCRUSTES),
    "course": ("Over training: each layer with itself as it is now", ""),
    "course, attacked": ("Over training, on attacked images", _COURSE),
    "between": ("Two arms, on clean images", _TWO),
    "by images": ("Two arms, layer by layer", _BY_IMAGES),
    "crossing": ("Two arms, by what each of them sees", ""),
}
SIGNAL_KINDS: dict[str, tuple[str, str]] = {
    "ratio": ("Perturbation to signal, layer by layer", ""),
    "excess": ("Attack over noise, in three norms", ""),
    "channels": ("Perturbation to signal, by channel", ""),
    "amplification": ("Amplification by norm layers", ""),
}


def heat_height(key: str, moments: int = 0) -> float:
    """Return the height of a figure of CKA."""
    if key.startswith("course"):
        return max(200.0, 150.0 + 15.0 * min(moments, 20))
    return {"clean": 300.0, "same layer": 270.0, "by images": 290.0, "crossing": 210.0}.get(key, 312.0)


def settle(key: str, axes: Axes, result: Analyzed) -> None:
    """Say on the axes of a figure of CKA which sides are compared."""
    axes.grid(visible=False)
    for bar in (one for one in axes.figure.axes if one is not axes):
        bar.yaxis.label.set_fontsize(style.FONT_SIZE - 1)
    if key in ("same layer", "by images"):
        axes.grid(visible=True, axis="y")
        axes.set_ylabel("CKA of the same layer")
        return
    if key.startswith("course"):
        return
    sides = {"clean": ("", ""), "attacked": ("clean", "attacked"), "contrast": ("", "")}
    sides |= {"procrustes": (result.arm, result.against)} if result.against else {"procrustes": ("", "")}
    row, column = sides.get(key, (result.arm, result.against))
    if key == "crossing":
        row, column = f"{style.plain(row, NAME)} sees", f"{style.plain(column, NAME)} sees"
    axes.set_ylabel(style.plain(row, NAME + 5), parse_math=False)
    axes.set_xlabel(style.plain(column, NAME + 5), parse_math=False)
