"""The trained nets of a study: where their checkpoints lie, what they are made from, and the images of their recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from robustlayers.core.files import MANIFEST, read_json, read_tensors
from robustlayers.data import Dataset, Images
from robustlayers.study.schema import DataConfig, Recipe
from robustlayers.study.semantics import build_model, data_of, load_data, model_for_checks
from robustlayers.study.store import Store

__all__ = ["Trained", "alike", "held_out", "images_of", "trained"]


@dataclass(frozen=True)
class Trained:
    """A trained net of the study: where its checkpoint lies, and what it is made from."""

    arm: str
    seed: int
    checkpoint: str
    node: str
    recipe: Recipe
    folders: Mapping[str, Path]  # phase -> folder of its result, in order
    epoch: int
    digest: str  # SHA-256 of the checkpoint

    def build(self) -> nn.Module:
        """Return the net with its weights."""
        model = build_model(self.recipe.model, images_of(self.recipe)[0], self.seed)
        model.load_state_dict(read_tensors(list(self.folders.values())[-1] / f"{self.checkpoint}.safetensors"))
        return model

    def earlier(self) -> dict[str, tuple[Path, str]]:
        """Return the states of the same run that were kept: name -> file and its SHA-256."""
        found = {}
        for place, (phase, folder) in enumerate(self.folders.items()):
            kept = sorted(folder.glob("epoch-*.safetensors"), key=lambda path: int(path.stem.removeprefix("epoch-")))
            found |= {f"epoch {path.stem.removeprefix('epoch-')}": path for path in kept}
            if place < len(self.folders) - 1:
                found[f"end of {phase}"] = folder / "last.safetensors"
        return {name: (path, _digest(path)) for name, path in found.items()}


def trained(store: Store, arm: Mapping[str, Any], recipe: Recipe, seed: int, checkpoint: str) -> Trained | str:
    """Return the net of an arm for a seed, or why there is none."""
    folders = {phase["name"]: store.phase(phase["id"], seed) for phase in arm["phases"]}
    for phase, folder in folders.items():
        if not store.whole(folder):
            failure = store.failure(folder)
            why = f" ({failure[0]})" if failure else "; run the study first"
            return f"arm {arm['name']} has no whole result of phase {phase} for seed {seed}{why}"
    last = list(folders.values())[-1]
    curve = read_json(last / "curve.json")
    epoch = curve["best_epoch"] if checkpoint == "best" else curve["points"][-1]["epoch"]
    weights = last / f"{checkpoint}.safetensors"
    return Trained(arm["name"], seed, checkpoint, arm["nodes"][-1], recipe, folders, epoch, _digest(weights))


def _digest(path: Path) -> str:
    return read_json(path.parent / MANIFEST)["files"][path.name]["sha256"]


def alike(one: Trained, other: Trained) -> bool:
    """Tell whether two nets have tensors of the same names and shapes."""
    shapes = []
    for net in (one, other):
        model = model_for_checks(net.recipe.model, images_of(net.recipe)[0])
        shapes.append({name: tensor.shape for name, tensor in model.state_dict().items()})
    return shapes[0] == shapes[1]


def held_out(net: Trained) -> tuple[str, float, int]:
    """Return what decides the validation images of a net."""
    data = net.recipe.data
    return load_data(data.name).digest, data.validation, data.validation_seed


def images_of(recipe: Recipe) -> tuple[Dataset, Images, Images, Images]:
    """Return (data set, train, validation, test) as a recipe cuts them."""
    return _cut(recipe.data.model_dump_json())


@lru_cache(maxsize=2)
def _cut(config: str) -> tuple[Dataset, Images, Images, Images]:
    """Return the data as a recipe cuts them, which copies all images: once for all jobs."""
    return data_of(DataConfig.model_validate_json(config))
