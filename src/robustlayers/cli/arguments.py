"""Arguments that several commands share, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

__all__ = ["Overrides", "StudyFile", "StudyFolder", "Trust"]

StudyFile = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STUDY.yaml", help="the study file")]
StudyFolder = Annotated[
    Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR", help="the folder a study was run into")
]
Overrides = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(name="set", metavar="PATH=VALUE", help="override a setting, as in seeds=5 or phases.adapt.epochs=2"),
]
Trust = Annotated[
    bool,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.arg(help="run the code that the study file names as its model, MODULE:FUNCTION"),
]
