"""The prompt table: one row a prompt, in the order of the prompts' rows, kept as Parquet."""

from __future__ import annotations

import io
from pathlib import Path

import google_crc32c
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from millpond.store.errors import LakeCorrupt
from millpond.store.files import write_whole

COLUMNS = {"id": "str", "sha256": "str", "n_prompt_tokens": "int64", "n_tokens": "int64", "n_rows": "int64"}
"""Columns that every prompt table has, and their data types; `sha256` is of the prompt's token ids as little-endian int32."""


def write_prompt_table(folder: Path, table: pd.DataFrame) -> tuple[int, int]:
    """Write `prompts.parquet` into `folder`; returns its size in bytes and its crc32c."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    data = buffer.getvalue()
    write_whole(folder / "prompts.parquet", data)
    return len(data), int(google_crc32c.value(data))


def read_prompt_table(folder: Path) -> pd.DataFrame:
    """The prompt table in `folder`; its index is the number that the `prompt` coordinate holds."""
    path = folder / "prompts.parquet"
    try:
        table = pd.read_parquet(path)
    except FileNotFoundError:
        raise LakeCorrupt(f"{path} is missing; restore it or delete the run") from None
    except (OSError, ValueError, KeyError) as error:
        raise LakeCorrupt(
            f"{path} is no Parquet file ({' '.join(str(error).split())}); restore it or delete the run"
        ) from error
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise LakeCorrupt(f"{path} has no column {missing[0]!r}; restore it or delete the run")
    return table


def row_offsets(n_rows: pd.Series[int]) -> NDArray[np.int64]:
    """First row of each prompt, and the total at the end, (n_prompts + 1,)."""
    return np.concatenate([[0], np.cumsum(n_rows.to_numpy(np.int64))]).astype(np.int64)
