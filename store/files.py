"""Documents: JSON objects that carry their own checksum."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c

from millpond.store.errors import LakeCorrupt
from millpond.store.posix import sync_folder

_CHECKSUM = b'"crc32c": "'


def write_whole(path: Path, data: bytes) -> None:
    """Write the file `path` so that readers see all of it or nothing, and it survives a power loss."""
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


def encode_document(value: Mapping[str, Any]) -> bytes:
    """`value` as a JSON object whose last member is its checksum.

    That is the crc32c, as 8 hexadecimal digits, of the document with those digits all 0.
    """
    data = (json.dumps({**value, "crc32c": "0" * 8}, indent=1, allow_nan=False) + "\n").encode()
    head, mark, tail = data.rpartition(_CHECKSUM)
    return head + mark + _digits(data) + tail[8:]


def decode_document(data: bytes, where: str) -> Any:
    """The JSON object in `data`, without its checksum.

    Raises:
        LakeCorrupt: it is not JSON, or not as it was written; `where` names it.
    """
    try:
        value = json.loads(data)
    except ValueError as error:
        raise LakeCorrupt(f"{where} is not JSON ({error}); restore it from a copy or delete the run") from error
    if not isinstance(value, dict):
        raise LakeCorrupt(f"{where} holds a JSON {type(value).__name__}, not an object; restore it from a copy")
    if "crc32c" in value:
        head, mark, tail = data.rpartition(_CHECKSUM)
        if value.pop("crc32c") != _digits(head + mark + b"0" * 8 + tail[8:]).decode():
            raise LakeCorrupt(f"{where} does not have its own checksum; restore it from a copy or delete the run")
    return value


def read_json(path: Path) -> Any:
    """The document in the file `path`."""
    return decode_document(path.read_bytes(), str(path))


def _digits(data: bytes) -> bytes:
    return f"{int(google_crc32c.value(data)):08x}".encode()
