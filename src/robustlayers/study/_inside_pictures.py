"""What can be seen of a net: its first filters, input gradients, perturbations, and the loss around one image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustlayers import analysis
from robustlayers.core.errors import UserError
from robustlayers.core.random import stream
from robustlayers.study._looks import Arrays, Found, Look, Number, Payload, number, tidy

__all__ = ["pictures", "pictures_cost", "pictures_load", "shown"]

SHOWN = 6
"""Images, the first of each class: the same for every arm."""

_POINTS = 25
_FAR = 2.0  # the reach of the surface, in eps


def shown(labels: Tensor, most: int = SHOWN) -> Tensor:
    """Return the places of a few images: the first of each class, then the first of those that are left, in order.

    >>> shown(torch.tensor([3, 3, 0, 3, 1]), 4)
    tensor([0, 1, 2, 4])
    """
    values = labels.cpu().tolist()
    first = [place for place, label in enumerate(values) if label not in values[:place]]
    rest = [place for place in range(len(values)) if place not in first]
    return torch.tensor(sorted([*first, *rest][:most]))


def pictures_cost(look: Look) -> Mapping[str, float]:
    count = min(SHOWN, look.n)
    return {
        "gradients": 3.0 * count,
        "perturbations": count * (look.crafting + 2),
        "surface": count * (_POINTS**2 + 3.0),
    }


def pictures(look: Look) -> Found:
    places = shown(look.y)
    some = look.held_out.take(places.to(look.y.device))
    x, y = some.images, some.labels
    rows: list[dict[str, Any]] = []
    numbers: list[Number] = []
    payload: dict[str, Any] = {"places": places.tolist(), "labels": y.tolist()}
    arrays: dict[str, Tensor] = {}
    try:
        filters = analysis.first_filters(look.model, example=look.x[:2])
    except UserError:  # a net without convolutions
        pass
    else:
        rows += tidy("filters", filters.rows())
        payload["filters"] = filters.layer
        arrays["filters"] = torch.from_numpy(filters.weights)
        shares = [row["mean_share"] for row in filters.rows() if row["mean_share"] is not None]
        numbers.append(number("first filters that average", _share(shares), "%"))
    gradients = analysis.input_gradients(look.model, x, y, progress=look.part("gradients"))
    rows += _tidy("gradients", gradients.rows(), places)
    made = analysis.perturbations(look.model, x, y, look.attack, seed=look.seed, progress=look.part("perturbations"))
    rows += _tidy("perturbations", made.rows(), places)
    eps, signs = float(look.attack.threat.eps), look.attack.threat.norm == "linf"
    progress, surfaces = look.part("surface"), []
    for place in range(len(y)):

        def advance(what: str, done: int, total: int, place: int = place) -> None:
            progress(what, place * total + done, len(y) * total)

        surfaces.append(
            analysis.loss_surface(
                look.model,
                x[place : place + 1],
                y[place : place + 1],
                reach=min(1.0, _FAR * eps) if signs else "16/255",
                points=_POINTS,
                names=("sign of the gradient", "random signs"),
                generator=stream(look.seed, "analysis", "surface", place),  # the same for every arm
                progress=advance,
            )
        )
        rows += tidy("surface", [{"image": int(places[place]), **row} for row in surfaces[-1].rows()])
    payload |= {"names": list(surfaces[0].names), "eps": eps if signs else None}
    for name, values in (
        ("images", gradients.images),
        ("gradients", gradients.gradients),
        ("gradient losses", gradients.losses),
        ("gradient right", gradients.right),
        ("adversarial", made.adversarial),
        ("right", made.right),
        ("right attacked", made.right_attacked),
        ("losses", made.losses),
        ("losses attacked", made.losses_attacked),
        ("surfaces", np.stack([one.losses for one in surfaces])),
        ("surfaces right", np.stack([one.right for one in surfaces])),
        ("offsets", surfaces[0].offsets),
    ):
        arrays[name] = torch.from_numpy(np.ascontiguousarray(values))
    change = made.adversarial.astype(float) - made.images
    along = (np.sign(change) == np.sign(gradients.gradients))[change != 0]
    numbers += [
        number("pixels changed towards the gradient's sign", float(along.mean()) if along.size else None, "%"),
        number("loss before the attack, mean of the images shown", float(made.losses.mean()), "nats"),
        number("loss after it", float(made.losses_attacked.mean()), "nats"),
    ]
    return Found(rows, numbers, payload, arrays)


def pictures_load(payload: Payload, arrays: Arrays) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    if "filters" in payload:
        found["filters"] = analysis.Filters(payload["filters"], arrays["filters"])
    images = arrays["images"]
    return found | {
        "gradients": analysis.InputGradients(
            images, arrays["gradients"], arrays["gradient losses"], arrays["gradient right"]
        ),
        "perturbations": analysis.Perturbations(
            images,
            arrays["adversarial"],
            arrays["right"],
            arrays["right attacked"],
            arrays["losses"],
            arrays["losses attacked"],
        ),
        **{
            f"surface {place}": analysis.Surface(
                arrays["offsets"],
                arrays["surfaces"][place].astype(float),
                arrays["surfaces right"][place],
                tuple(payload["names"]),
            )
            for place in range(len(images))
        },
    }


def _share(shares: list[float]) -> float | None:
    """Return how many filters have more than half of their energy in their mean, as a share."""
    return sum(share > 0.5 for share in shares) / len(shares) if shares else None


def _tidy(part: str, rows: list[dict[str, Any]], places: Tensor) -> list[dict[str, Any]]:
    """Return rows that name images by their place among the held-out ones."""
    return tidy(part, [{**row, "image": int(places[row["image"]])} for row in rows])
