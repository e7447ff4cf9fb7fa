"""The types of a study's fields: numbers as people write them, names, patches, and models that accept nothing else."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from robustlayers.core.errors import UserError
from robustlayers.core.quantities import number
from robustlayers.study.validate import shown

__all__ = ["Closed", "Named", "Options", "Patch", "Quantity", "folder_name"]


def _number(value: Any) -> float:
    if not isinstance(value, int | float | str) or isinstance(value, bool):
        raise ValueError(f"{'empty' if value is None else shown(value)} is not a number; write 0.03 or 8/255")
    try:
        return number(value)
    except UserError as error:
        raise ValueError(error.faults[0].message.removeprefix("value: ")) from None


def _identifier(text: str) -> str:
    if not text.strip() or any(mark in text for mark in '."\n'):
        raise ValueError("a name must not be empty nor contain dots, quotes or line breaks")
    return text


def folder_name(text: str) -> str:
    """Return a name that a folder may have; a validator."""
    if "/" in text or "\\" in text:
        raise ValueError("names the folder of the results, so it must not contain slashes")
    return text


def _patch(value: Any) -> Any:
    return {} if value is None else value  # a level with nothing after its colon changes nothing


Quantity = Annotated[float, BeforeValidator(_number)]
"""A finite number, also written 8/255 or 1e-3."""

Named = Annotated[str, AfterValidator(_identifier)]
"""A name that paths can hold: without dots, quotes and line breaks."""

Options = dict[str, Any]
Patch = Annotated[dict[str, Any], BeforeValidator(_patch)]
"""Dotted path -> value; nothing stands for no change."""


class Closed(BaseModel):
    """A part of a study: frozen, strictly typed, and nothing else is accepted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
