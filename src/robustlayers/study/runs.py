"""Results in the folder of another study, as a source of tensors: found by arm and phase, named by content."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from robustlayers.core.errors import Fault, UserError, names_text, one_of
from robustlayers.core.files import read_json
from robustlayers.study.schema import StartConfig
from robustlayers.study.store import Store

__all__ = ["StoredRun", "find_run"]


@dataclass(frozen=True)
class StoredRun:
    """One phase result in a store, for every seed that has it."""

    store: Store
    node: str
    checkpoint: str

    def state(self, seed: int) -> Path:
        """Return the file with the state for a seed; `UserError` where it is missing or damaged."""
        folder = self.store.phase(self.node, seed)
        if not self.store.whole(folder):
            raise UserError(
                Fault(f"has no whole result for seed {seed}; run that study first", file=str(self.store.root))
            )
        return folder / f"{self.checkpoint}.safetensors"


def find_run(start: StartConfig) -> StoredRun:
    """Return what `{run: FOLDER, arm: ARM, from: PHASE}` names; the arm's last phase unless a phase is given."""
    store = Store(str(start.run))
    if not store.plan.exists():
        raise UserError(Fault("no study here: it has no plan.json", file=str(start.run)))
    arms = {arm["name"]: arm for arm in read_json(store.plan)["arms"]}
    if start.arm is None and len(arms) > 1:
        raise UserError(Fault(f"has {len(arms)} arms; name one: {names_text(arms)}", file=str(start.run)))
    name = start.arm if start.arm is not None else next(iter(arms))
    if name not in arms:
        raise UserError(one_of(f"arm of {start.run}", name, arms))
    phases = {phase["name"]: phase["id"] for phase in arms[name]["phases"]}
    if start.phase is not None and start.phase not in phases:
        raise UserError(one_of(f"phase of {start.run}, arm {name},", start.phase, phases))
    node = phases[start.phase] if start.phase is not None else list(phases.values())[-1]
    return StoredRun(store, node, start.checkpoint)
