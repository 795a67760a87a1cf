"""Zarr v3 arrays of rows, written as a stream and read as plain byte ranges.

A shard is its chunks, then an index of (offset, nbytes) pairs in little-endian uint64, then the crc32c of
that index (https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html). Uncompressed
chunks that span all columns are the rows in C order. So a shard is written with one chunk in memory, an
uncompressed one is read as plain byte ranges without its index, and every Zarr v3 reader opens it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from millpond.store.codecs import decode_chunk, encoder, zarr_codecs
from millpond.store.errors import LakeCorrupt
from millpond.store.objects import Storage, StreamWriter

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
    codec: str = "none"
    """One of `codecs.CODECS`."""
    dimension: str = "d_model"
    """Zarr's name of the columns."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return np.dtype(self.dtype).itemsize * (1 if self.columns is None else self.columns)

    @property
    def chunks_per_shard(self) -> int:
        """Chunks of a full shard."""
        return self.shard_rows // self.chunk_rows

    @property
    def index_bytes(self) -> int:
        """Bytes of a shard's index and its checksum."""
        return 16 * self.chunks_per_shard + 4

    def shard_path(self, shard: int) -> str:
        """The object of shard number `shard`, below the array."""
        return f"c/{shard}" if self.columns is None else f"c/{shard}/0"

    def n_shards(self, rows: int) -> int:
        """Shards of an array of `rows` rows."""
        return -(-rows // self.shard_rows)

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
                        "codecs": zarr_codecs(self.codec, np.dtype(self.dtype).itemsize),
                        "index_codecs": [
                            {"name": "bytes", "configuration": {"endian": "little"}},
                            {"name": "crc32c"},
                        ],
                        "index_location": "end",
                    },
                }
            ],
            "dimension_names": ["row"] if self.columns is None else ["row", self.dimension],
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

    def __init__(
        self,
        folder: Storage,
        spec: ArraySpec,
        attributes: dict[str, Any] | None = None,
        memory: int = 64 << 20,
        kept: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.folder = folder
        self.spec = spec
        self.attributes = attributes or {}
        self.memory = memory
        """Most bytes in flight to a store over a network."""
        self.rows = len(kept) * spec.shard_rows
        self._shards: list[tuple[int, int]] = list(kept)
        """Size and crc32c of each; those given as `kept` are full shards that are in place already."""
        self._shard: _ShardWriter | None = None

    def append(self, rows: Array) -> None:
        """Add `rows`, shape (n,) or (n, columns), of the array's data type."""
        expected = (len(rows),) if self.spec.columns is None else (len(rows), self.spec.columns)
        if rows.shape != expected or rows.dtype != np.dtype(self.spec.dtype):
            raise ValueError(f"{self.folder.name}: got {rows.dtype}{rows.shape}, expected {self.spec.dtype}{expected}")
        rows = np.ascontiguousarray(rows)
        done = 0
        while done < len(rows):
            if self._shard is None:
                self._shard = _ShardWriter(self._open_shard(), self.spec)
            take = min(len(rows) - done, self.spec.shard_rows - self._shard.rows)
            self._shard.append(rows[done : done + take])
            self.rows += take
            done += take
            if self._shard.rows == self.spec.shard_rows:
                self._close_shard()

    def finish(self) -> ArrayRecord:
        """Complete the last shard and write the metadata; the array can be opened from here on."""
        if self._shard is not None:
            self._close_shard()
        metadata = json.dumps(self.spec.metadata(self.rows, self.attributes)).encode()
        self.folder.put("zarr.json", metadata)
        return ArrayRecord(self.rows, tuple(self._shards))

    def close(self) -> None:
        """Drop the shard being written, if any, without completing the array."""
        if self._shard is not None:
            self._shard.stream.abandon()
            self._shard = None

    def _open_shard(self) -> StreamWriter:
        return self.folder.stream_writer(self.spec.shard_path(len(self._shards)), self.memory)

    def _close_shard(self) -> None:
        assert self._shard is not None
        self._shards.append(self._shard.finish())
        self._shard = None


WRITE_BYTES = 1 << 18
"""Written at once, while it is in a core's cache from taking its checksum."""
GATHER_BYTES = 1 << 16
"""Less than this is gathered first."""


class _ShardWriter:
    """One shard: gathers rows into chunks where they are compressed, and small pieces into larger writes."""

    def __init__(self, stream: StreamWriter, spec: ArraySpec) -> None:
        self.stream = stream
        self.spec = spec
        self.rows = 0
        self._crc = 0
        self._bytes = 0
        self._index = np.full((spec.chunks_per_shard, 2), np.iinfo(np.uint64).max, "<u8")
        self._gathered = np.empty(GATHER_BYTES, np.uint8)
        self._gathered_bytes = 0
        self._encoder = None if spec.codec == "none" else encoder(spec.codec)
        shape = (spec.chunk_rows,) if spec.columns is None else (spec.chunk_rows, spec.columns)
        self._chunk = None if self._encoder is None else np.zeros(shape, spec.dtype)

    def append(self, rows: Array) -> None:
        if self._chunk is None:
            self._write(rows.reshape(-1).view(np.uint8))
            self.rows += len(rows)
            return
        done, size = 0, self.spec.chunk_rows
        while done < len(rows):
            filled = self.rows % size
            take = min(size - filled, len(rows) - done)
            if take == size:
                self._encode(rows[done : done + take])
            else:
                self._chunk[filled : filled + take] = rows[done : done + take]
                if filled + take == size:
                    self._encode(self._chunk)
            self.rows += take
            done += take

    def _encode(self, chunk: Array) -> None:
        assert self._encoder is not None
        data = np.frombuffer(self._encoder.encode(chunk), np.uint8)
        self._index[self.rows // self.spec.chunk_rows] = self._bytes, len(data)
        self._write(data)

    def _write(self, data: Array) -> None:
        """Bytes of the shard; a few are gathered until there are enough of them."""
        self._bytes += len(data)
        while len(data) >= GATHER_BYTES:
            self._flush()
            self._put(data[:WRITE_BYTES])
            data = data[WRITE_BYTES:]
        if self._gathered_bytes + len(data) > GATHER_BYTES:
            self._flush()
        self._gathered[self._gathered_bytes : self._gathered_bytes + len(data)] = data
        self._gathered_bytes += len(data)

    def _flush(self) -> None:
        if self._gathered_bytes:
            self._put(self._gathered[: self._gathered_bytes])
            self._gathered_bytes = 0

    def _put(self, data: Array) -> None:
        self._crc = google_crc32c.extend(self._crc, data)
        self.stream.write(data.data)

    def finish(self) -> tuple[int, int]:
        """Complete the shard; its size and crc32c."""
        spec = self.spec
        used = -(-self.rows // spec.chunk_rows)
        left = self.rows % spec.chunk_rows
        if self._chunk is None:
            chunk_bytes = spec.chunk_rows * spec.row_bytes
            self._index[:used, 0] = np.arange(used, dtype=np.uint64) * np.uint64(chunk_bytes)
            self._index[:used, 1] = chunk_bytes
            if left:
                self._write(np.zeros((spec.chunk_rows - left) * spec.row_bytes, np.uint8))
        elif left:
            self._chunk[left:] = 0
            self._encode(self._chunk)
        encoded = self._index.tobytes()
        tail = encoded + int(google_crc32c.value(encoded)).to_bytes(4, "little")
        self._write(np.frombuffer(tail, np.uint8))
        self._flush()
        self.stream.finish()
        return self._bytes, self._crc


def read_rows(folder: Storage, spec: ArraySpec, start: int, stop: int, out: Array | None = None) -> Array:
    """Rows `start` to `stop` of the array in `folder`, in its stored data type; into contiguous `out` if given.

    Raises:
        LakeCorrupt: a shard is missing or shorter than its rows.
    """
    shape = (stop - start,) if spec.columns is None else (stop - start, spec.columns)
    out = np.empty(shape, spec.dtype) if out is None else out
    assert out.shape == shape
    assert out.dtype == spec.dtype
    done = 0
    for shard in range(start // spec.shard_rows, spec.n_shards(stop) if stop > start else 0):
        first = max(start - shard * spec.shard_rows, 0)
        last = min(stop - shard * spec.shard_rows, spec.shard_rows)
        part = out[done : done + last - first]
        path = spec.shard_path(shard)
        try:
            if spec.codec == "none":
                _read_plain(folder, path, first * spec.row_bytes, part)
            else:
                _read_chunks(folder, path, spec, first, part)
        except FileNotFoundError:
            raise LakeCorrupt(f"{folder.url}/{path} is missing; run millpond verify") from None
        done += len(part)
    return out


SCATTERED_BYTES = 1024
"""Rows of at least so many bytes are read to where they belong; shorter ones are read together and put there."""


def read_rows_to(folder: Storage, spec: ArraySpec, start: int, out: Array, place: NDArray[np.int64]) -> None:
    """The rows from `start` on, as many as `place` has numbers, each into the row of `out` that its number says.

    Raises:
        LakeCorrupt: a shard is missing or shorter than its rows.
    """
    stop = start + len(place)
    if spec.codec != "none" or spec.row_bytes < SCATTERED_BYTES:
        out[place] = read_rows(folder, spec, start, stop)
        return
    rows = out.reshape(len(out), -1).view(np.uint8)
    size = spec.row_bytes
    for shard in range(start // spec.shard_rows, spec.n_shards(stop) if len(place) else 0):
        first, last = max(start, shard * spec.shard_rows), min(stop, (shard + 1) * spec.shard_rows)
        path, there = spec.shard_path(shard), place[first - start : last - start]
        try:
            got = folder.read_to_rows(path, (first - shard * spec.shard_rows) * size, rows, there)
        except FileNotFoundError:
            raise LakeCorrupt(f"{folder.url}/{path} is missing; run millpond verify") from None
        _check_length(folder, path, got, len(there) * size)


def _check_length(folder: Storage, path: str, got: int, wanted: int) -> None:
    if got < wanted:
        raise LakeCorrupt(f"{folder.url}/{path} ends after {got} of {wanted} wanted bytes; run millpond verify")


def _read_plain(folder: Storage, path: str, start: int, out: Array) -> None:
    target = memoryview(out.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    got = folder.read_into(path, start, target)
    _check_length(folder, path, got, len(target))


def _read_chunks(folder: Storage, path: str, spec: ArraySpec, first: int, out: Array) -> None:
    """Rows from `first` on of one compressed shard; its chunks lie one after the other, so one range holds them."""
    size, last = spec.chunk_rows, first + len(out)
    index = shard_index(folder, path, spec)[first // size : -(-last // size)].astype(np.int64)
    begin, end = int(index[0, 0]), int(index[-1].sum())
    if (index < 0).any() or (index[:-1].sum(axis=1) != index[1:, 0]).any():
        raise LakeCorrupt(f"{folder.url}/{path} has an index that skips chunks; run millpond verify")
    data = memoryview(folder.get_range(path, begin, end - begin))
    _check_length(folder, path, len(data), end - begin)
    spare = None
    for number, (offset, nbytes) in enumerate(index, first // size):
        piece = data[offset - begin : offset - begin + nbytes]
        low, high = max(number * size, first), min((number + 1) * size, last)
        where = f"{folder.url}/{path}"
        if high - low == size:
            decode_chunk(piece, out[low - first : high - first], where)
        else:
            spare = np.empty((size, *out.shape[1:]), out.dtype) if spare is None else spare
            decode_chunk(piece, spare, where)
            out[low - first : high - first] = spare[low - number * size : high - number * size]


@lru_cache(maxsize=4096)
def shard_index(folder: Storage, path: str, spec: ArraySpec) -> NDArray[np.uint64]:
    """Offset and length of each chunk of a shard, read once.

    Raises:
        LakeCorrupt: the index does not have its checksum.
    """
    tail = bytes(folder.get_tail(path, spec.index_bytes))
    encoded = tail[:-4]
    if len(tail) < spec.index_bytes or int(google_crc32c.value(encoded)).to_bytes(4, "little") != tail[-4:]:
        raise LakeCorrupt(f"{folder.url}/{path} has a damaged index; run millpond verify")
    return np.frombuffer(encoded, "<u8").reshape(-1, 2)


def check_shards(array: str, recorded: Sequence[tuple[int, int]], found: Sequence[tuple[int, int]]) -> None:
    """Compare the sizes and checksums of an array's shards with those that were recorded.

    Raises:
        LakeCorrupt: one differs.
    """
    for number, (wanted, got) in enumerate(zip(recorded, found, strict=True)):
        if wanted != got:
            raise LakeCorrupt(
                f"shard {number} of {array} does not have its checksum, so nothing was made of it; run millpond verify, and "
                "restore it from a copy"
            )


def object_crc32c(storage: Storage, path: str) -> tuple[int, int]:
    """Size and crc32c of a whole object."""
    crc, size = 0, storage.head(path).size
    for start in range(0, size, 1 << 23):
        block = storage.get_range(path, start, min(1 << 23, size - start))
        crc = google_crc32c.extend(crc, np.frombuffer(block, np.uint8))
    return size, crc


def group_metadata(arrays: dict[str, Any], attributes: dict[str, Any]) -> dict[str, Any]:
    """The `zarr.json` of a group whose arrays have the metadata `arrays`, by name."""
    return {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": attributes,
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": arrays},
    }


def write_group(folder: Storage, arrays: dict[str, dict[str, Any]], attributes: dict[str, Any]) -> None:
    """Write the group's `zarr.json` with the metadata of its `arrays` consolidated in it."""
    folder.put("zarr.json", json.dumps(group_metadata(arrays, attributes)).encode())
