"""What a misspelt name was probably meant to be."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel

_CLOSE = 0.8
"""Of difflib's ratio, which is 1 for equal names."""


def near(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that is closest to `name`, whatever the case of their letters; None if none is close."""
    by_small = {one.casefold(): one for one in names}
    return next((by_small[one] for one in get_close_matches(name.casefold(), by_small, 1, _CLOSE)), None)


def fields_at(model: type[BaseModel], place: Iterable[Any]) -> set[str]:
    """Names of the fields that an object at `place` inside a `model` may have; `place` as pydantic's errors say it."""
    here = {model}
    for part in (part for part in place if isinstance(part, str)):  # numbers are places in lists
        inside = {
            found for one in here if part in one.model_fields for found in _models(one.model_fields[part].annotation)
        }
        tagged = {one for one in here if any(field.default == part for field in one.model_fields.values())}
        here = inside or tagged or here
    return {name for one in here for name in one.model_fields}


def _models(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {found for part in get_args(annotation) for found in _models(part)}
