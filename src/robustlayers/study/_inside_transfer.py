"""What is asked of all arms together: do images that were crafted on one net fool the others?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from robustlayers import evaluation
from robustlayers.evaluation import CrossTable
from robustlayers.study._looks import Arrays, Found, Look, Number, Payload, number, tidy

__all__ = ["transfer", "transfer_cost", "transfer_load"]

_BATCH = 100


def transfer_cost(look: Look) -> Mapping[str, float]:
    nets = len(look.nets)
    return {"transfer": look.n * (nets * look.crafting + nets * (nets + 1))}


def transfer(look: Look) -> Found:
    reached: dict[str, int] = {}
    progress = look.part("transfer")

    def crafted(arm: str, done: int, total: int) -> None:
        reached[arm] = done
        progress(f"crafted on {arm}", sum(reached.values()), total * len(look.nets))

    found = evaluation.transfer(look.nets, look.x, look.y, look.attack, _BATCH, seed=look.seed, progress=crafted)
    rows = [{key: value for key, value in row.items() if key != "attack"} for row in found.rows()]
    numbers = [one for arm in found.names for one in _numbers(found, arm)]
    payload = {
        "names": list(found.names),
        "clean": dict(found.clean),
        "counts": {crafted: dict(line) for crafted, line in found.counts.items()},
        "total": found.total,
        "attack": found.attack,
    }
    return Found(tidy("transfer", rows), numbers, payload)


def _numbers(found: CrossTable, arm: str) -> list[Number]:
    """Return the headline numbers of one arm as it is attacked."""
    white = found.accuracy(arm, arm)
    others = [name for name in found.names if name != arm]
    worst = min(others, key=lambda name: found.accuracy(name, arm))
    return [
        {**one, "arm": arm}
        for one in (
            number("clean", found.clean[arm] / found.total, "%"),
            number("crafted on itself", white, "%"),
            number("crafted on another arm, worst", found.accuracy(worst, arm), "%", worst),
            number("worst minus its own", found.accuracy(worst, arm) - white, "points"),
        )
    ]


def transfer_load(payload: Payload, arrays: Arrays) -> Mapping[str, Any]:
    return {"transfer": CrossTable(**{**payload, "names": tuple(payload["names"])})}
