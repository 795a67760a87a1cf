"""Manifest versions of an open run: numbered documents that name pages, which hold segments and prompts as columns.

Version N is `manifests/<16 hexadecimal digits of 2^64 - 1 - N>.json`, so the latest one is the first in a listing.
A page is written once, for one version, and later versions go on naming it until it is merged into a larger one.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Literal

import google_crc32c
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from millpond.store.errors import LakeCorrupt
from millpond.store.manifest import FORMAT_VERSION, ArrayChecksums, Part, decode_record
from millpond.store.objects import Storage
from millpond.store.stats import HookStatistics, pack_statistics, unpack_statistics

_LAST = 2**64 - 1
Column = NDArray[Any]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PageRecord(_Record):
    """One page: `<path>.segments.parquet`, `<path>.prompts.parquet`, `<path>.keys`, and perhaps `<path>.statistics`."""

    path: str
    """Below the run; its name begins with the number of the version it was written for."""
    level: int
    """0 for one compaction's segments; pages of one level are merged into one of the next."""
    segments: int
    rows: int
    """Stored, also those that are not visible."""
    prompts: int
    files: dict[str, tuple[int, int]]
    """Suffix to size in bytes and crc32c."""


class VersionRecord(_Record):
    """One version: what an open run holds, apart from commits that are not compacted yet."""

    format: Literal["millpond-version"] = "millpond-version"
    version: Literal[2] = FORMAT_VERSION
    run: str
    """The run's id."""
    number: int
    pages: tuple[PageRecord, ...] = ()


def version_path(number: int) -> str:
    """The document of version `number`."""
    return f"manifests/{_LAST - number:016x}.json"


def version_number(path: str) -> int:
    """The version whose document is `path`."""
    return _LAST - int(path.rpartition("/")[2].removesuffix(".json"), 16)


def latest_version(run: Storage, run_id: str) -> VersionRecord:
    """The newest version of a run; version 0 is that of a run never compacted."""
    while True:
        entry = next(iter(run.list("manifests")), None)
        if entry is None:
            return VersionRecord(run=run_id, number=0)
        try:
            return read_version(run, version_number(entry.path))
        except FileNotFoundError:
            continue  # superseded and collected since it was listed


def read_version(run: Storage, number: int) -> VersionRecord:
    """Version `number`.

    Raises:
        FileNotFoundError: there is none, or it was collected.
    """
    path = version_path(number)
    return decode_record(run.get(path), VersionRecord, f"{run.url}/{path}")


class Segments:
    """Segments as columns: one row each, with the checksums of every shard of every array, and whether it was dropped."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    @classmethod
    def of(cls, parts: list[Part], arrays: list[str]) -> Segments:
        """The columns of commit records."""
        columns: dict[str, Any] = {
            "id": pa.array([part.path.rpartition("/")[2] for part in parts], pa.string()),
            "rows": pa.array([part.rows for part in parts], pa.int64()),
            "prompts": pa.array([part.prompts for part in parts], pa.int64()),
            "prompt_table": pa.array([list(part.prompt_table) for part in parts], pa.list_(pa.int64())),
            "statistics": pa.array([part.statistics and list(part.statistics) for part in parts], pa.list_(pa.int64())),
            "dropped": pa.array([False] * len(parts), pa.bool_()),
        }
        for name in arrays:
            shards = [[value for shard in part.arrays[name].shards for value in shard] for part in parts]
            columns[f"shards:{name}"] = pa.array(shards, pa.list_(pa.int64()))
        return cls(pa.table(columns))

    def part(self, row: int) -> Part:
        """One segment as a record."""
        values = {
            name: column[row].as_py() for name, column in zip(self.table.column_names, self.table.columns, strict=True)
        }
        arrays = {
            name.removeprefix("shards:"): ArrayChecksums(
                rows=values["rows"], shards=tuple(zip(flat[::2], flat[1::2], strict=True))
            )
            for name, flat in values.items()
            if name.startswith("shards:")
        }
        return Part(
            path=f"segments/{values['id']}",
            rows=values["rows"],
            prompts=values["prompts"],
            arrays=arrays,
            prompt_table=values["prompt_table"],
            statistics=values["statistics"],
        )


def write_page(
    run: Storage,
    path: str,
    level: int,
    segments: Segments,
    prompts: pd.DataFrame,
    statistics: Mapping[str, HookStatistics],
) -> PageRecord:
    """Write the files of a page; `prompts` has, beside a prompt table's columns, the booleans `visible` and `dropped`.

    `statistics`, by hook, are those of its dropped segments.
    """
    buffer = io.BytesIO()
    pq.write_table(segments.table, buffer, compression="none", use_dictionary=False)
    files = {
        ".segments.parquet": buffer.getvalue(),
        ".prompts.parquet": _parquet(prompts),
        ".keys": np.sort(prompt_keys(prompts["id"])).astype("<u8").tobytes(),
    }
    if statistics:
        files[".statistics"] = pack_statistics(statistics)
    for suffix, data in files.items():
        run.put(path + suffix, data)
    return PageRecord(
        path=path,
        level=level,
        segments=len(segments),
        rows=int(prompts["n_rows"].sum()),
        prompts=len(prompts),
        files={suffix: (len(data), int(google_crc32c.value(data))) for suffix, data in files.items()},
    )


def _parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), buffer, compression="zstd")
    return buffer.getvalue()


def read_page_file(run: Storage, page: PageRecord, suffix: str) -> bytes:
    """One file of a page, checked.

    Raises:
        LakeCorrupt: it is missing, or not as it was written.
    """
    path = page.path + suffix
    try:
        data = run.get(path)
    except FileNotFoundError:
        raise LakeCorrupt(
            f"{run.url}/{path} is missing; open the run again (old versions are collected) or run millpond verify"
        ) from None
    if (len(data), int(google_crc32c.value(data))) != page.files[suffix]:
        raise LakeCorrupt(f"{run.url}/{path} does not have the checksum of the manifest; restore it or delete the run")
    return data


def dropped_statistics(run: Storage, page: PageRecord) -> dict[str, HookStatistics]:
    """Statistics by hook of a page's dropped segments; none if it has no such segment, or they had none."""
    return unpack_statistics(read_page_file(run, page, ".statistics")) if ".statistics" in page.files else {}


def page_columns(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """Columns of a page's Parquet file; `dropped` is false throughout in pages older than that column."""
    file = pq.ParquetFile(io.BytesIO(data))
    held = file.schema_arrow.names
    table = file.read([name for name in columns or held if name in held], use_threads=False)
    if "dropped" not in held and (columns is None or "dropped" in columns):
        table = table.append_column("dropped", pa.array([False] * len(table), pa.bool_()))
    return table


def prompt_keys(ids: pd.Series[str]) -> NDArray[np.uint64]:
    """A 64-bit hash of each id, to find repeated ones quickly: SipHash as pandas computes it, with its default key."""
    keys: NDArray[np.uint64] = pd.util.hash_array(ids.to_numpy(object), categorize=False)
    return keys
