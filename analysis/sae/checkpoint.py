"""A training run's state in one file: written whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import torch

from millpond.store.errors import InvalidInput, LakeCorrupt
from millpond.store.posix import sync_folder

NAME = "checkpoint.pt"
_FORMAT = 1


def write_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint in `folder`; a reader sees the old or the new one, also after a power loss."""
    temporary = folder / f".{NAME}.{uuid.uuid4().hex}"
    try:
        with temporary.open("wb") as handle:
            torch.save({"format": _FORMAT, **state}, handle)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(folder / NAME)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(folder)


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The checkpoint in `folder`, or None if there is none.

    Raises:
        LakeCorrupt: it cannot be read.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    for left in folder.glob(f".{NAME}.*"):  # of a training that was killed while it wrote
        left.unlink(missing_ok=True)
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise LakeCorrupt(f"{path} cannot be read ({error}); remove it to train from the start") from error
    if state.get("format") != _FORMAT:
        raise InvalidInput(f"{path} has format {state.get('format')}, not {_FORMAT}; train from the start")
    return state


def check_same(path: Path, name: str, held: dict[str, Any], given: dict[str, Any], free: tuple[str, ...] = ()) -> None:
    """Refuse to go on with a checkpoint of something else.

    Raises:
        InvalidInput: a field differs, named with both values.
    """
    for field in {**held, **given}:
        if field not in free and held.get(field) != given.get(field):
            raise InvalidInput(
                f"{path / NAME} is of another {name}: its {field} is {_short(held.get(field))}, "
                f"this one's {_short(given.get(field))}; go on with the same, or train into another folder"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
