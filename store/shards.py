"""Zarr v3 arrays of rows, written as a stream and read as plain byte ranges.

An uncompressed shard whose chunks span all columns is the rows in C order, then an index of
(offset, nbytes) pairs in little-endian uint64, then the crc32c of that index
(https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html). So a shard is
written with one chunk in memory, read with one `pread`, and every Zarr v3 reader opens it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from millpond.store.errors import LakeCorrupt
from millpond.store.files import sync_folder

Array = NDArray[Any]


@dataclass(frozen=True)
class ArraySpec:
    """The shape of a row array, all but its number of rows."""

    dtype: str
    """NumPy data type, which is also Zarr's name of it."""
    columns: int | None
    """Values a row; None for a one-dimensional array."""
    chunk_rows: int
    shard_rows: int
    """A multiple of `chunk_rows`."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return np.dtype(self.dtype).itemsize * (1 if self.columns is None else self.columns)

    @property
    def chunks_per_shard(self) -> int:
        """Chunks of a full shard."""
        return self.shard_rows // self.chunk_rows

    def shard_path(self, folder: Path, shard: int) -> Path:
        """The file of shard number `shard` of the array in `folder`."""
        return folder / "c" / str(shard) if self.columns is None else folder / "c" / str(shard) / "0"

    def metadata(self, rows: int, attributes: dict[str, Any]) -> dict[str, Any]:
        """The array's `zarr.json`."""
        tail = [] if self.columns is None else [self.columns]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [rows, *tail],
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.shard_rows, *tail]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": False if self.dtype == "bool" else 0,
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": [self.chunk_rows, *tail],
                        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
                        "index_codecs": [
                            {"name": "bytes", "configuration": {"endian": "little"}},
                            {"name": "crc32c"},
                        ],
                        "index_location": "end",
                    },
                }
            ],
            "dimension_names": ["row"] if self.columns is None else ["row", "d_model"],
            "attributes": attributes,
        }


@dataclass(frozen=True)
class ArrayRecord:
    """What a manifest keeps of one array."""

    rows: int
    shards: tuple[tuple[int, int], ...]
    """Size in bytes and crc32c of every shard file, in order."""


class ArrayWriter:
    """Writes one array, a shard after the other; `finish` makes it whole."""

    def __init__(self, folder: Path, spec: ArraySpec, attributes: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.spec = spec
        self.attributes = attributes or {}
        self.rows = 0
        self._shards: list[tuple[int, int]] = []
        self._descriptor: int | None = None
        self._in_shard = 0
        self._crc = 0
        folder.mkdir(parents=True)

    def append(self, rows: Array) -> None:
        """Add `rows`, shape (n,) or (n, columns), of the array's data type."""
        expected = (len(rows),) if self.spec.columns is None else (len(rows), self.spec.columns)
        if rows.shape != expected or rows.dtype != np.dtype(self.spec.dtype):
            raise ValueError(f"{self.folder.name}: got {rows.dtype}{rows.shape}, expected {self.spec.dtype}{expected}")
        done = 0
        while done < len(rows):
            take = min(len(rows) - done, self.spec.shard_rows - self._in_shard)
            self._write(np.ascontiguousarray(rows[done : done + take]).reshape(-1).view(np.uint8).data)
            self._in_shard += take
            self.rows += take
            done += take
            if self._in_shard == self.spec.shard_rows:
                self._close_shard()

    def finish(self) -> ArrayRecord:
        """Complete the last shard and write the metadata; the array can be opened from here on."""
        if self._in_shard:
            self._close_shard()
        metadata = json.dumps(self.spec.metadata(self.rows, self.attributes)).encode()
        with (self.folder / "zarr.json").open("wb") as handle:
            handle.write(metadata)
            handle.flush()
            os.fsync(handle.fileno())
        for folder in {self.spec.shard_path(self.folder, shard).parent for shard in range(len(self._shards))}:
            sync_folder(folder)
        if self._shards:
            sync_folder(self.folder / "c")
        sync_folder(self.folder)
        return ArrayRecord(self.rows, tuple(self._shards))

    def close(self) -> None:
        """Release the open file, if any, without completing the array."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self, data: memoryview | bytes) -> None:
        if self._descriptor is None:
            path = self.spec.shard_path(self.folder, len(self._shards))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            self._crc = 0
        self._crc = google_crc32c.extend(self._crc, bytes(data))
        view = memoryview(data)
        while view:
            view = view[os.write(self._descriptor, view) :]

    def _close_shard(self) -> None:
        spec = self.spec
        used = -(-self._in_shard // spec.chunk_rows)
        padding = used * spec.chunk_rows - self._in_shard
        if padding:
            self._write(bytes(padding * spec.row_bytes))
        chunk_bytes = spec.chunk_rows * spec.row_bytes
        index = np.full((spec.chunks_per_shard, 2), np.iinfo(np.uint64).max, "<u8")
        index[:used, 0] = np.arange(used, dtype=np.uint64) * np.uint64(chunk_bytes)
        index[:used, 1] = chunk_bytes
        encoded = index.tobytes()
        self._write(encoded + int(google_crc32c.value(encoded)).to_bytes(4, "little"))
        assert self._descriptor is not None
        os.fsync(self._descriptor)
        size = os.fstat(self._descriptor).st_size
        self.close()
        self._shards.append((size, self._crc))
        self._in_shard = 0


def read_rows(folder: Path, spec: ArraySpec, start: int, stop: int) -> Array:
    """Rows `start` to `stop` of the array in `folder`, in its stored data type.

    Raises:
        LakeCorrupt: a shard is missing or shorter than its rows.
    """
    shape = (stop - start,) if spec.columns is None else (stop - start, spec.columns)
    out = np.empty(shape, spec.dtype)
    target = memoryview(out.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    filled = 0
    for shard in range(start // spec.shard_rows, -(-stop // spec.shard_rows)):
        first = max(start - shard * spec.shard_rows, 0)
        last = min(stop - shard * spec.shard_rows, spec.shard_rows)
        wanted = (last - first) * spec.row_bytes
        path = spec.shard_path(folder, shard)
        try:
            with path.open("rb", buffering=0) as handle:
                handle.seek(first * spec.row_bytes)
                got = 0
                while got < wanted:
                    count = handle.readinto(target[filled + got : filled + wanted])
                    if not count:
                        raise LakeCorrupt(f"{path} ends after {got} of {wanted} wanted bytes; run millpond verify")
                    got += count
        except FileNotFoundError:
            raise LakeCorrupt(f"{path} is missing; run millpond verify") from None
        filled += wanted
    return out


def file_crc32c(path: Path) -> int:
    """crc32c of a whole file."""
    crc = 0
    with path.open("rb") as handle:
        while block := handle.read(1 << 22):
            crc = google_crc32c.extend(crc, block)
    return crc


def group_metadata(arrays: dict[str, Any], attributes: dict[str, Any]) -> dict[str, Any]:
    """The `zarr.json` of a group whose arrays have the metadata `arrays`, by name."""
    return {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": attributes,
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": arrays},
    }


def write_group(folder: Path, arrays: Iterable[str], attributes: dict[str, Any]) -> None:
    """Write the group's `zarr.json` with the metadata of its `arrays` consolidated in it."""
    metadata = {name: json.loads((folder / name / "zarr.json").read_bytes()) for name in arrays}
    with (folder / "zarr.json").open("wb") as handle:
        handle.write(json.dumps(group_metadata(metadata, attributes)).encode())
        handle.flush()
        os.fsync(handle.fileno())
    sync_folder(folder)
