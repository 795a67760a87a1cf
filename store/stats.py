"""Statistics of a hook's rows, gathered while they are written and merged without reading them again.

Means and variances are merged as in Chan, Golub and LeVeque (1979). The Gram sketch is a CountSketch
(Clarkson and Woodruff 2013): every row is added, with a random sign, to one of `SKETCH_ROWS` buckets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.store.dtypes import decode_into
from millpond.store.errors import InvalidInput, LakeCorrupt

SKETCH_ROWS = 64
BLOCK_ROWS = SKETCH_ROWS
"""Rows absorbed at once, few enough for a core's cache: float32 sums about the first block's mean, float64 across blocks."""
SKETCHED_BLOCKS = 16
"""Blocks whose rows are added to the sketch in float32 before they go to that in float64."""

_FIELDS = {"mean": "F64", "squares": "F64", "maximum": "F64", "totals": "F64", "weights": "F64", "buckets": "I64"}
_NUMPY = {"F64": "<f8", "F32": "<f4", "I64": "<i8"}
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class MassiveDimensions:
    """Dimensions with massive activations (Sun et al. 2024, https://arxiv.org/abs/2402.17762, section 2)."""

    dimensions: NDArray[np.int64]
    """Their numbers, the largest first."""
    maximum: Float64
    """Largest magnitude of each."""


class HookStatistics:
    """Count, mean, variance, norms, largest magnitudes and a Gram sketch of one hook's rows, (d_model,) each.

    `update` costs 2 ns a value on one core (d_model 2048) and buffers `BLOCK_ROWS` rows as float32.

    The sketch S has `SKETCH_ROWS` = k rows; the expected squared Frobenius error of SᵀS as an
    estimate of the centred Gram matrix G is at most 2/k of trace(G)² (k = 64: 18 % of the trace),
    so leading directions are reliable and single small entries are not. Signs and buckets depend on
    `key` and on the rows' order: statistics that will be merged must have different keys.
    """

    def __init__(self, d_model: int, key: int = 0) -> None:
        if d_model < 1:
            raise InvalidInput(f"d_model is {d_model}; give 1 or more")
        if key < 0:
            raise InvalidInput(f"key is {key}; give 0 or more, such as int(segment_id, 16)")
        self.d_model = d_model
        self._key = key
        self._blocks = 0
        self._absorbed = 0
        self._mean = np.zeros(d_model)
        self._squares = np.zeros(d_model)
        self._maximum = np.zeros(d_model)
        self._norms = np.zeros(2)  # sum, largest
        self._weights = np.zeros(SKETCH_ROWS)
        self._origin: NDArray[np.floating[Any]] = np.zeros(d_model)
        self._sketch = np.zeros((SKETCH_ROWS, d_model))  # of the rows less the origin
        self._recent: NDArray[np.float32] | None = None  # what the last few blocks add to it
        self._buffer: NDArray[np.float32] | None = None
        self._buffered = 0

    def update(self, rows: NDArray[np.generic]) -> None:
        """Take in `rows`, (n, d_model), as they are stored: uint16 is bfloat16 bits; float16 and float32 are values.

        Raises:
            InvalidInput: another data type or shape.
        """
        if rows.ndim != 2 or rows.shape[1] != self.d_model or rows.dtype.name not in ("uint16", "float16", "float32"):
            raise InvalidInput(
                f"statistics got {rows.dtype}{rows.shape}; give uint16, float16 or float32 of shape (n, {self.d_model})"
            )
        if self._buffer is None:
            self._buffer = np.zeros((BLOCK_ROWS, self.d_model), np.float32)
        for start in range(0, len(rows), BLOCK_ROWS):
            piece = rows[start : start + BLOCK_ROWS]
            while len(piece):
                taken = piece[: BLOCK_ROWS - self._buffered]
                place = self._buffer[self._buffered : self._buffered + len(taken)]
                decode_into(taken, "bfloat16" if taken.dtype == np.uint16 else taken.dtype.name, place)
                self._buffered += len(taken)
                piece = piece[len(taken) :]
                if self._buffered == BLOCK_ROWS:
                    self._absorb_block()

    def _absorb(self) -> None:
        """Take in what is buffered, so that every total is up to date."""
        self._absorb_block()
        if self._recent is not None:
            self._sketch += self._recent
            self._recent = None

    def _absorb_block(self) -> None:
        if self._buffer is not None and self._buffered:
            with np.errstate(over="ignore", invalid="ignore"):  # rows may be kept that are not finite
                self._absorb_buffer(self._buffer)

    def _absorb_buffer(self, buffer: NDArray[np.float32]) -> None:
        rows, n = buffer[: self._buffered], self._buffered
        self._buffered = 0
        norms = np.sqrt(np.einsum("ij,ij->i", rows, rows), dtype=np.float64)
        for odd in np.flatnonzero(~np.isfinite(norms)):  # beyond float32's range when squared
            norms[odd] = np.linalg.norm(rows[odd].astype(np.float64))
        self._norms = np.array([self._norms[0] + norms.sum(), max(self._norms[1], norms.max())])
        np.maximum(self._maximum, np.maximum(rows.max(0), -rows.min(0)), out=self._maximum)
        if not self._absorbed:
            self._origin = rows.mean(0, dtype=np.float64).astype(np.float32)
        rows -= self._origin
        mean, squares = _moments(rows)
        self._add_sketch(rows)
        self._add(n, mean + self._origin, squares)

    def _add_sketch(self, rows: NDArray[np.float32]) -> None:
        """Add each row, by a random sign, to a bucket; overwrites the rows.

        The rows of a block go to consecutive buckets from a random one on: no two of a block share one, and two of
        different blocks do with probability 1 / `SKETCH_ROWS`, which is all that the error of the sketch depends on.
        """
        now = self._blocks % SKETCHED_BLOCKS
        if not now:
            self._draw()
        if self._recent is None:
            self._recent = np.zeros((SKETCH_ROWS, self.d_model), np.float32)
        self._blocks += 1
        signs, first = self._signs[now, : len(rows)], int(self._first[now])
        rows *= signs[:, None]
        end = min(SKETCH_ROWS - first, len(rows))
        for buckets, part in ((slice(first, first + end), slice(end)), (slice(len(rows) - end), slice(end, None))):
            self._recent[buckets] += rows[part]
            self._weights[buckets] += signs[part]
        if self._blocks % SKETCHED_BLOCKS == 0:
            self._sketch += self._recent
            self._recent = None

    def _draw(self) -> None:
        """Signs and first buckets of the next blocks."""
        rng = np.random.default_rng([self._key, self._blocks])
        self._signs = rng.integers(0, 2, (SKETCHED_BLOCKS, SKETCH_ROWS), np.int8).astype(np.float32) * 2 - 1
        self._first = rng.integers(0, SKETCH_ROWS, SKETCHED_BLOCKS)

    def _add(self, n: int, mean: Float64, squares: Float64) -> None:
        total = self._absorbed + n
        shift = mean - self._mean
        self._squares += squares + shift**2 * (self._absorbed * n / total)
        self._mean = self._mean + shift * (n / total)
        self._absorbed = total

    def _centred_sketch(self) -> Float64:
        """The sketch of the rows less their mean: another centre changes it by the rows' weights times the difference."""
        return self._sketch - np.outer(self._weights, self._mean - self._origin)

    def merge(self, other: HookStatistics) -> None:
        """Take in everything `other` holds; the order of merging matters only to rounding."""
        if other.d_model != self.d_model:
            raise InvalidInput(f"statistics of d_model {other.d_model} cannot be merged into those of {self.d_model}")
        self._absorb()
        other._absorb()
        if not other._absorbed:
            return
        if not self._absorbed:
            self._origin = other._origin
        self._sketch += other._sketch - np.outer(other._weights, self._origin.astype(np.float64) - other._origin)
        self._weights += other._weights
        self._add(other._absorbed, other._mean, other._squares)
        np.maximum(self._maximum, other._maximum, out=self._maximum)
        self._norms = np.array([self._norms[0] + other._norms[0], max(self._norms[1], other._norms[1])])

    @property
    def count(self) -> int:
        """Rows."""
        return self._absorbed + self._buffered

    @property
    def mean(self) -> Float64:
        """Mean of each dimension; zeros when there are no rows."""
        self._absorb()
        return self._mean.copy()

    @property
    def variance(self) -> Float64:
        """Population variance of each dimension."""
        self._absorb()
        return np.maximum(self._squares, 0) / max(self._absorbed, 1)

    @property
    def mean_norm(self) -> float:
        """Mean Euclidean norm of the rows."""
        self._absorb()
        return float(self._norms[0]) / max(self._absorbed, 1)

    @property
    def max_norm(self) -> float:
        """Largest Euclidean norm of a row."""
        self._absorb()
        return float(self._norms[1])

    @property
    def max_abs(self) -> Float64:
        """Largest magnitude in each dimension."""
        self._absorb()
        return self._maximum.copy()

    def massive_dimensions(self, least: float = 100.0, times: float = 1000.0) -> MassiveDimensions:
        """Dimensions whose largest magnitude exceeds `least` and `times` the median dimension's root mean square."""
        maximum = self.max_abs
        typical = float(np.median(np.sqrt(self.variance + self.mean**2)))
        found = np.flatnonzero((maximum > least) & (maximum > times * typical))
        found = found[np.argsort(-maximum[found], kind="stable")]
        return MassiveDimensions(found, maximum[found])

    @property
    def covariance_factor(self) -> Float64:
        """R, (`SKETCH_ROWS`, d_model): RᵀR estimates the covariance with the error that the class states."""
        self._absorb()
        return np.asarray(self._centred_sketch() / np.sqrt(max(self._absorbed, 1)))

    def to_bytes(self) -> bytes:
        """The statistics as a safetensors file."""
        return pack_statistics({"": self})

    @classmethod
    def from_bytes(cls, data: bytes) -> HookStatistics:
        """What `to_bytes` gave.

        Raises:
            LakeCorrupt: it is something else.
        """
        found = unpack_statistics(data)
        if set(found) != {""}:
            raise LakeCorrupt("these statistics are not those of a single hook; restore the file")
        return found[""]

    def __repr__(self) -> str:
        massive = self.massive_dimensions().dimensions.tolist()
        return (
            f"<HookStatistics: {self.count:,} rows of {self.d_model}, mean norm {self.mean_norm:.4g}, "
            f"largest value {self.max_abs.max():.4g}, massive dimensions {massive or 'none'}>"
        )

    def _tensors(self) -> dict[str, tuple[str, NDArray[np.generic]]]:
        self._absorb()
        sketch = self._centred_sketch()
        used = np.flatnonzero(sketch.any(axis=1))  # few rows fill few buckets
        totals = np.array([self._absorbed, *self._norms], float)
        values = (self._mean, self._squares, self._maximum, totals, self._weights, used)
        named = {name: (dtype, value) for (name, dtype), value in zip(_FIELDS.items(), values, strict=True)}
        return {**named, "sketch": ("F32", sketch[used])}


def _moments(rows: NDArray[np.float32]) -> tuple[Float64, Float64]:
    """Mean and sum of squares about it; the rows are centred anew where the mean would drown the variance."""
    n = len(rows)
    mean = (np.ones(n, np.float32) @ rows).astype(np.float64) / n
    squares = np.einsum("ij,ij->j", rows, rows) - n * mean**2
    unsafe = ~(n * mean**2 <= 64 * squares)
    if unsafe.any():
        exact = rows[:, unsafe].astype(np.float64)
        mean[unsafe] = exact.mean(0)
        squares[unsafe] = ((exact - mean[unsafe]) ** 2).sum(0)
    return mean, squares


def pack_statistics(statistics: Mapping[str, HookStatistics]) -> bytes:
    """Statistics by hook as one safetensors file, whose tensors are called `<hook>/<field>`; byte for byte reproducible."""
    header: dict[str, object] = {"__metadata__": {"format": "millpond-statistics", "version": "1"}}
    blobs, offset = [], 0
    for hook, found in statistics.items():
        for name, (dtype, value) in found._tensors().items():
            blob = np.ascontiguousarray(value, _NUMPY[dtype]).tobytes()
            place = [offset, offset + len(blob)]
            header[f"{hook}/{name}"] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": place}
            blobs.append(blob)
            offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(blobs)


def unpack_statistics(data: bytes) -> dict[str, HookStatistics]:
    """What `pack_statistics` wrote.

    Raises:
        InvalidInput: a newer Millpond wrote it.
        LakeCorrupt: it is something else.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        about = header.pop("__metadata__")
        if about["format"] != "millpond-statistics":
            raise LakeCorrupt(f"statistics have format {about['format']!r}; restore the file")
        if about["version"] != "1":
            raise InvalidInput(f"statistics have version {about['version']!r}; this Millpond reads 1: upgrade Millpond")
        tensors: dict[str, dict[str, NDArray[np.generic]]] = {}
        for name, entry in header.items():
            hook, _, field = name.rpartition("/")
            first, last = entry["data_offsets"]
            values = np.frombuffer(data[8 + length + first : 8 + length + last], _NUMPY[entry["dtype"]])
            tensors.setdefault(hook, {})[field] = values.reshape(entry["shape"])
        return {hook: _restore(fields) for hook, fields in tensors.items()}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise LakeCorrupt(f"statistics cannot be read ({type(error).__name__}: {error}); restore the file") from error


def add_statistics(total: dict[str, HookStatistics], more: Mapping[str, HookStatistics]) -> None:
    """Merge statistics by hook into those of `total`."""
    for hook, found in more.items():
        total.setdefault(hook, HookStatistics(found.d_model)).merge(found)


def _restore(fields: Mapping[str, NDArray[np.generic]]) -> HookStatistics:
    found = HookStatistics(len(fields["mean"]))
    totals = fields["totals"].astype(np.float64)
    found._absorbed = int(totals[0])
    found._norms = totals[1:]
    found._mean = fields["mean"].astype(np.float64)
    found._origin = found._mean
    found._squares = fields["squares"].astype(np.float64)
    found._maximum = fields["maximum"].astype(np.float64)
    found._weights = fields["weights"].astype(np.float64)
    found._sketch[fields["buckets"].astype(np.int64)] = fields["sketch"]
    return found
