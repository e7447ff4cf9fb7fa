"""What a study may measure beside attacks: accuracy on common corruptions, and accuracy against eps and steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from robustlayers.core.errors import UserError, one_of
from robustlayers.core.quantities import pixels_text
from robustlayers.data import Images
from robustlayers.evaluation import CORRUPTIONS, SanityReport, corruption_accuracy
from robustlayers.study.schema import CorruptionsConfig, EvaluateConfig

__all__ = [
    "SANITY_IMAGES",
    "corruption_passes",
    "corruption_rows",
    "extras_content",
    "extras_passes",
    "families_of",
    "sanity_passes",
    "sanity_rows",
    "severities_text",
]

SANITY_IMAGES = 100
"""Test images, the first ones, that `sanity: true` looks at."""

_SANITY_PASSES = 1600  # of an image, at most

_GROUPS = tuple(dict.fromkeys(corruption.group for corruption in CORRUPTIONS.values()))


def families_of(config: CorruptionsConfig, channels: int) -> tuple[str, ...]:
    """Return the families that a study's corruptions mean, in the order of the benchmark.

    `all` and the name of a group (`noise`, `blur`, `weather`, `digital`, `extra`) mean those that the channels allow.
    Raises `UserError` for an unknown name, and for a family by its own name that the channels do not allow.
    """
    found: set[str] = set()
    for name in config.families:
        if name in CORRUPTIONS:
            allowed = CORRUPTIONS[name].channels
            if allowed is not None and channels not in allowed:
                some = " or ".join(map(str, allowed))
                raise UserError(f"{name}: not for images with {channels} channel(s); allowed: {some}")
            found.add(name)
        elif name == "all" or name in _GROUPS:
            found |= {
                family
                for family, one in CORRUPTIONS.items()
                if name in ("all", one.group) and (one.channels is None or channels in one.channels)
            }
        else:
            raise UserError(one_of("corruption", name, ["all", "none", *_GROUPS, *CORRUPTIONS], most=30))
    return tuple(family for family in CORRUPTIONS if family in found)


def extras_content(config: EvaluateConfig, channels: int) -> dict[str, Any]:
    """Return what of these options decides a result; nothing where none is used."""
    content: dict[str, Any] = {}
    families = families_of(config.corruptions, channels)
    if families:
        own = config.corruptions
        content["corruptions"] = {"families": families, "severities": sorted(own.severities), "images": own.images}
    if config.sanity:
        content["sanity"] = True
    return content


def extras_passes(config: EvaluateConfig, channels: int, images: int) -> int:
    """Return the passes of single images that these options cost for a checkpoint, at most."""
    return corruption_passes(config, channels, images) + sanity_passes(config, images)


def corruption_passes(config: EvaluateConfig, channels: int, images: int) -> int:
    """Return the passes of single images in corruptions for a checkpoint."""
    own = config.corruptions
    return len(families_of(own, channels)) * len(own.severities) * min(own.images or images, images)


def sanity_passes(config: EvaluateConfig, images: int) -> int:
    """Return the passes of single images in the search for signs of misleading numbers for a checkpoint, at most."""
    return _SANITY_PASSES * min(SANITY_IMAGES, images) if config.sanity else 0


def corruption_rows(
    forward: Any,
    test: Images,
    config: CorruptionsConfig,
    batch_size: int,
    report: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Return accuracies on corrupted test images: each family at each severity, means of families, the mean of them.

    `test`: the test images, of which the first `config.images` count. Their corruption is drawn from seed 0 whatever the
    run's seed, so all arms and seeds see the same pictures.
    """
    families = families_of(config, test.shape[0])
    if not families:
        return []
    some = test.first(min(config.images or len(test), len(test)))
    severities = tuple(sorted(config.severities))
    table = corruption_accuracy(forward, some.images, some.labels, families, severities, batch_size, progress=report)
    spoken = severities_text(severities)
    counted = sum(CORRUPTIONS[family].group != "extra" for family in families) or len(families)
    what = f"mean over {counted} famil{'y' if counted == 1 else 'ies'} and {spoken}, {len(some)} images"
    rows = [{"metric": "corrupted", "value": table.mean, "split": "test", "attack": what}]
    for family in families:
        what = f"{family}, mean over {spoken}, {len(some)} images"
        rows.append({"metric": f"corrupted:{family}", "value": table.means[family], "split": "test", "attack": what})
        for severity, count in zip(severities, table.counts[family], strict=True):
            row = {"metric": f"corrupted:{family}:{severity}", "value": count / table.total, "count": count}
            rows.append({**row, "total": table.total, "split": "test", "attack": f"{family}, severity {severity}"})
    return rows


def sanity_rows(found: SanityReport) -> list[dict[str, Any]]:
    """Return the accuracies of a check for misleading numbers, one row for each attack, each eps and number of steps."""
    rows = []
    for row in found.rows():
        what = {"": row["attack"], "eps": "", "steps": ""}[row["setting"]]
        if row["setting"] == "eps":
            what = f"eps={pixels_text(row['value'])}"
        elif row["setting"] == "steps":
            what = f"steps={int(row['value'])}"
        text = row["attack"] if row["setting"] else f"{row['attack']}, {found.threat}"
        rows.append(
            {
                "metric": f"sanity:{what}",
                "value": row["accuracy"],
                "count": row["count"],
                "total": row["total"],
                "split": "test",
                "attack": "" if what == "clean" else text,
            }
        )
    return rows


def severities_text(severities: Sequence[int]) -> str:
    """Return severities as a person reads them.

    >>> severities_text([1, 3])
    'severities 1, 3'
    """
    return f"severit{'y' if len(severities) == 1 else 'ies'} {', '.join(map(str, severities))}"
