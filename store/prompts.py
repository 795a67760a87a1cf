"""The prompt table: one row a prompt, in the order of the prompts' rows, kept as Parquet."""

from __future__ import annotations

import io

import google_crc32c
import pandas as pd

from millpond.store.errors import LakeCorrupt
from millpond.store.objects import Storage

COLUMNS = {"id": "str", "sha256": "str", "n_prompt_tokens": "int64", "n_tokens": "int64", "n_rows": "int64"}
"""Columns that every prompt table has, and their data types; `sha256` is of the prompt's token ids as little-endian int32."""


def encode_prompt_table(table: pd.DataFrame) -> bytes:
    """A prompt table as Parquet."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()


def write_prompt_table(folder: Storage, table: pd.DataFrame) -> tuple[int, int]:
    """Write `prompts.parquet` into `folder`; returns its size in bytes and its crc32c."""
    data = encode_prompt_table(table)
    folder.put("prompts.parquet", data)
    return len(data), int(google_crc32c.value(data))


def read_prompt_table(folder: Storage) -> pd.DataFrame:
    """The prompt table in `folder`; its index is the number that the `prompt` coordinate holds."""
    where = f"{folder.url}/prompts.parquet"
    try:
        return decode_prompt_table(folder.get("prompts.parquet"), where)
    except FileNotFoundError:
        raise LakeCorrupt(f"{where} is missing; restore it or delete the run") from None


def decode_prompt_table(data: bytes, where: str) -> pd.DataFrame:
    """The prompt table in a Parquet file's bytes; `where` names it in errors."""
    try:
        table = pd.read_parquet(io.BytesIO(data))
    except (OSError, ValueError, KeyError) as error:
        raise LakeCorrupt(
            f"{where} is no Parquet file ({' '.join(str(error).split())}); restore it or delete the run"
        ) from error
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise LakeCorrupt(f"{where} has no column {missing[0]!r}; restore it or delete the run")
    return table
