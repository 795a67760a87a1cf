"""Durable, atomic operations on local files."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c

from millpond.store.errors import LakeCorrupt

_CHECKSUM = b'"crc32c": "'


def sync_folder(folder: Path) -> None:
    """Make renames and creations inside `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Write `path` so that readers see all of it or nothing, and it survives a power loss."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as a JSON object with `write_whole`; its last member is the checksum of the file.

    That is the crc32c, as 8 hexadecimal digits, of the file with those digits all 0.
    """
    data = (json.dumps({**value, "crc32c": "0" * 8}, indent=1, allow_nan=False) + "\n").encode()
    head, mark, tail = data.rpartition(_CHECKSUM)
    write_whole(path, head + mark + _digits(data) + tail[8:])


def read_json(path: Path) -> Any:
    """The JSON value in `path`, without the checksum of `write_json`.

    Raises:
        LakeCorrupt: the file is not JSON, or not as it was written.
    """
    data = path.read_bytes()
    try:
        value = json.loads(data)
    except ValueError as error:
        raise LakeCorrupt(f"{path} is not JSON ({error}); restore it from a copy or delete the run") from error
    if not isinstance(value, dict):
        raise LakeCorrupt(f"{path} holds a JSON {type(value).__name__}, not an object; restore it from a copy")
    if "crc32c" in value:
        head, mark, tail = data.rpartition(_CHECKSUM)
        if value.pop("crc32c") != _digits(head + mark + b"0" * 8 + tail[8:]).decode():
            raise LakeCorrupt(f"{path} does not have its own checksum; restore it from a copy or delete the run")
    return value


def _digits(data: bytes) -> bytes:
    return f"{int(google_crc32c.value(data)):08x}".encode()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of the file `path`; it falls with the process, however that ends."""
    with path.open("r+b") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def remove_tree(folder: Path) -> None:
    """Make `folder` vanish at once (one rename), then delete what it, and such folders before it, held."""
    grave = folder.with_name(f".deleted-{uuid.uuid4().hex}")
    try:
        folder.rename(grave)
    except FileNotFoundError:
        return
    sync_folder(folder.parent)
    shutil.rmtree(grave)
    for left in folder.parent.glob(".deleted-*"):  # of a deletion that was killed
        shutil.rmtree(left, ignore_errors=True)
