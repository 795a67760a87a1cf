"""Statistics of a hook's rows, gathered while they are written and merged without reading them again.

Means and variances are merged as in Chan, Golub and LeVeque (1979). The Gram sketch is a CountSketch
(Clarkson and Woodruff 2013): every row is added, with a random sign, to one of `SKETCH_ROWS` buckets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from millpond.store.errors import InvalidInput, LakeCorrupt
from millpond.store.planes import Scratch, decode_planes, decode_stored, largest, moments

SKETCH_ROWS = 64
BLOCK_BYTES = 1 << 22
"""Rows are absorbed in blocks of at most so many bytes of float32: sums are float32 within a block, float64 across blocks."""
SKETCHED_GROUPS = 64
"""Groups whose signs and buckets are drawn at once, and added to the sketch in float32 before they go to that in float64."""

_FIELDS = {"mean": "F64", "squares": "F64", "maximum": "F64", "totals": "F64", "weights": "F64", "buckets": "I64"}
_NUMPY = {"F64": "<f8", "F32": "<f4", "I64": "<i8"}
_DTYPES = frozenset(map(np.dtype, ("uint16", "float16", "float32")))
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

    `update` costs 1 to 2 ns a value on one core and buffers `block_rows` rows as stored; of bfloat16, where numba is
    installed, it costs 0.2 ns and buffers nothing.

    The sketch S has `SKETCH_ROWS` = k rows; the expected squared Frobenius error of SᵀS as an
    estimate of the centred Gram matrix G is at most 2/k of trace(G)² (k = 64: 18 % of the trace),
    so leading directions are reliable and single small entries are not. Signs and buckets depend on
    `key` and on the rows' order: statistics that will be merged must have different keys.
    """

    def __init__(self, d_model: int, key: int = 0, scratch: Scratch | None = None) -> None:
        """Statistics of no rows.

        Args:
            d_model: values of a row.
            key: of the sketch's random numbers.
            scratch: working memory, which those that are updated by turns share.
        """
        if d_model < 1:
            raise InvalidInput(f"d_model is {d_model}; give 1 or more")
        if key < 0:
            raise InvalidInput(f"key is {key}; give 0 or more, such as int(segment_id, 16)")
        self.d_model = d_model
        self.block_rows = block_rows(d_model)
        self._key = key
        self._scratch = Scratch() if scratch is None else scratch
        self._place = 0  # rows that signs and buckets were drawn for, those that a last block left out among them
        self._absorbed = 0
        self._mean = np.zeros(d_model)
        self._squares = np.zeros(d_model)
        self._maximum = np.zeros(d_model)
        self._largest_bits = np.zeros(d_model, np.uint16)  # what the compiled pass adds to it
        self._norms = np.zeros(2)  # sum, largest
        self._weights = np.zeros(SKETCH_ROWS)
        self._origin = np.zeros(d_model)
        self._sketch = np.zeros((SKETCH_ROWS, d_model))  # of the rows less the origin
        self._recent: NDArray[np.float32] | None = None  # what the last few groups add to it, in planes
        self._buffer: NDArray[np.generic] | None = None  # a block of stored rows, each group of them by bucket
        self._buffered = 0
        self._first = 0  # bucket of the first row of the group being filled

    def update(self, rows: NDArray[np.generic]) -> None:
        """Take in `rows`, (n, d_model), as they are stored: uint16 is bfloat16 bits; float16 and float32 are values.

        Raises:
            InvalidInput: another data type or shape.
        """
        if rows.ndim != 2 or rows.shape[1] != self.d_model or rows.dtype not in _DTYPES:
            raise InvalidInput(
                f"statistics got {rows.dtype}{rows.shape}; give uint16, float16 or float32 of shape (n, {self.d_model})"
            )
        if rows.dtype == np.uint16 and (compiled := compiled_pass()) is not None:
            if self._buffer is not None:
                self._absorb()
                self._buffer = None
            self._pass(rows, compiled)
            return
        if self._buffer is None or self._buffer.dtype != rows.dtype:
            self._absorb()
            self._place = -(-self._place // self.block_rows) * self.block_rows
            self._buffer = np.empty((self.block_rows, self.d_model), rows.dtype)
        done = 0
        while done < len(rows):
            group, filled = divmod(self._buffered, SKETCH_ROWS)
            taken = rows[done : done + SKETCH_ROWS - filled]
            self._lay_down(taken, group, filled)
            done += len(taken)
            self._buffered += len(taken)
            if self._buffered == self.block_rows:
                self._absorb_block()

    def _pass(self, rows: NDArray[np.generic], compiled: Callable[..., None]) -> None:
        """Take in bfloat16 rows at once."""
        rows = np.ascontiguousarray(rows)
        drawn = SKETCHED_GROUPS * SKETCH_ROWS
        while len(rows):
            number, place = divmod(self._place, drawn)
            some, rows = rows[: drawn - place], rows[drawn - place :]
            if self._recent is None:
                self._centre_at_origin()
                self._recent = np.zeros((1, SKETCH_ROWS, self.d_model), np.float32)
            compiled(
                some,
                place,
                *_draw(self._key, number),
                self._recent[0],
                self._weights,
                self._mean,
                self._squares,
                self._largest_bits,
                self._norms,
                self._absorbed,
                self._scratch.rows(3, self.d_model),
            )
            self._absorbed += len(some)
            self._place += len(some)
            if self._place % drawn == 0:
                self._add_recent()

    def _lay_down(self, rows: NDArray[np.generic], group: int, filled: int) -> None:
        """Put rows into the buffer, behind the `filled` ones that their group has.

        The rows of a group go to consecutive buckets from a random one on: no two of a group share one, and two of
        different groups do with probability 1 / `SKETCH_ROWS`, which is all that the error of the sketch depends on.
        """
        assert self._buffer is not None
        if not filled:
            _, self._first = self._drawn(group)
        buckets = self._buffer[group * SKETCH_ROWS : (group + 1) * SKETCH_ROWS]
        start = (self._first + filled) % SKETCH_ROWS
        fits = min(SKETCH_ROWS - start, len(rows))
        buckets[start : start + fits] = rows[:fits]
        buckets[: len(rows) - fits] = rows[fits:]

    def _drawn(self, group: int) -> tuple[NDArray[np.float32], int]:
        """Signs by bucket of a group of the buffer, and its first row's bucket."""
        number = self._place // SKETCH_ROWS + group
        signs, first = _draw(self._key, number // SKETCHED_GROUPS)
        return signs[number % SKETCHED_GROUPS], int(first[number % SKETCHED_GROUPS])

    def _absorb(self) -> None:
        """Take in what is buffered, so that every total is up to date."""
        if self._buffered:
            self._absorb_block()
        self._add_recent()

    def _absorb_block(self) -> None:
        """Take in the rows of the buffer; zeros in the empty places of their last group change nothing."""
        assert self._buffer is not None
        n, self._buffered = self._buffered, 0
        groups = -(-n // SKETCH_ROWS)
        stored = self._buffer[: groups * SKETCH_ROWS]
        held = np.ones(len(stored), bool)
        if n < len(stored):
            held[SKETCH_ROWS * (groups - 1) :] = np.roll(
                np.arange(SKETCH_ROWS) < n - len(stored) + SKETCH_ROWS, self._first
            )
            stored[~held] = 0  # rows of the block before
        planes = self._scratch.planes(stored)
        decode_planes(stored, planes)
        with np.errstate(over="ignore", invalid="ignore"):  # rows may be kept that are not finite
            self._add_sketch(planes, held.reshape(groups, SKETCH_ROWS))
            norms = np.sqrt((planes[:, :, None] @ planes[..., None]).sum((0, 2, 3)), dtype=np.float64)
            for odd in np.flatnonzero(~np.isfinite(norms)):  # beyond float32's range when squared
                norms[odd] = np.linalg.norm(planes[:, odd].astype(np.float64))
            self._norms = np.array([self._norms[0] + norms.sum(), max(self._norms[1], norms.max())])
            np.maximum(self._maximum, largest(stored), out=self._maximum)
            mean, squares = moments(planes, n)
            unsafe = ~((n * mean**2 <= 64 * squares) & (squares < np.inf))  # the mean drowns the variance
            if unsafe.any():
                exact = decode_stored(stored[:, unsafe][held]).astype(np.float64)
                mean[unsafe] = exact.mean(0)
                squares[unsafe] = ((exact - mean[unsafe]) ** 2).sum(0)
            self._add(n, mean, squares)

    def _add_sketch(self, planes: NDArray[np.float32], held: NDArray[np.bool_]) -> None:
        """Add each row, by a random sign, to its bucket."""
        self._centre_at_origin()
        signs = np.stack([self._drawn(group)[0] for group in range(len(held))]) * held
        self._weights += signs.sum(0)
        if self._recent is None:
            self._recent = np.zeros((len(planes), SKETCH_ROWS, planes.shape[2]), np.float32)
        for plane, recent in zip(planes, self._recent, strict=True):
            recent += np.einsum("gk,gkd->kd", signs, plane.reshape(len(held), SKETCH_ROWS, -1))
        self._place += self.block_rows  # what a last block leaves out stays unused
        if self._place % (SKETCHED_GROUPS * SKETCH_ROWS) == 0:
            self._add_recent()

    def _centre_at_origin(self) -> None:
        """Let the sketch be of the rows as they are; that of statistics from a file is of the rows less their mean."""
        if self._origin.any():
            self._sketch += np.outer(self._weights, self._origin)
            self._origin = np.zeros(self.d_model)

    def _add_recent(self) -> None:
        np.maximum(self._maximum, decode_stored(self._largest_bits), out=self._maximum)
        if self._recent is not None:
            self._sketch.reshape(SKETCH_ROWS, -1, len(self._recent))[...] += self._recent.transpose(1, 2, 0)
            self._recent = None

    def _add(self, n: int, mean: Float64, squares: Float64) -> None:
        total = self._absorbed + n
        shift = mean - self._mean
        self._squares += squares + shift**2 * (self._absorbed * n / total)
        self._mean = self._mean + shift * (n / total)
        self._absorbed = total

    def _centred_sketch(self) -> Float64:
        """The sketch of the rows less their mean: another centre changes it by the rows' weights times the difference."""
        centred: Float64 = np.outer(self._weights, self._origin - self._mean).astype(np.float64, copy=False)
        centred += self._sketch
        return centred

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
        if len(used) < SKETCH_ROWS:
            sketch = sketch[used]
        totals = np.array([self._absorbed, *self._norms], float)
        values = (self._mean, self._squares, self._maximum, totals, self._weights, used)
        named = {name: (dtype, value) for (name, dtype), value in zip(_FIELDS.items(), values, strict=True)}
        return {**named, "sketch": ("F32", sketch)}


def block_rows(d_model: int) -> int:
    """Rows of a block: one, two, four or eight groups of `SKETCH_ROWS`."""
    groups = 8
    while groups > 1 and 4 * groups * SKETCH_ROWS * d_model > BLOCK_BYTES:
        groups //= 2
    return groups * SKETCH_ROWS


@cache
def compiled_pass() -> Callable[..., None] | None:
    """`stats_kernel.absorb`; None where numba is not installed. The first call ever compiles it, which takes seconds."""
    try:
        from millpond.store.stats_kernel import absorb
    except ModuleNotFoundError as error:
        if error.name not in ("numba", "llvmlite"):
            raise
        return None
    return absorb


def compile_pass() -> None:
    """Compile now what the first rows would otherwise wait for."""
    HookStatistics(1).update(np.zeros((1, 1), np.uint16))


@lru_cache(maxsize=4)  # all hooks of a segment draw the same
def _draw(key: int, number: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Signs by bucket, (`SKETCHED_GROUPS`, `SKETCH_ROWS`), and first buckets of so many groups."""
    rng = np.random.default_rng([key, number])
    signs = rng.integers(0, 2, (SKETCHED_GROUPS, SKETCH_ROWS), np.int8).astype(np.float32) * 2 - 1
    first = rng.integers(0, SKETCH_ROWS, SKETCHED_GROUPS)
    signs.flags.writeable = first.flags.writeable = False
    return signs, first


def pack_statistics(statistics: Mapping[str, HookStatistics]) -> bytes:
    """Statistics by hook as one safetensors file, whose tensors are called `<hook>/<field>`; byte for byte reproducible."""
    header: dict[str, object] = {"__metadata__": {"format": "millpond-statistics", "version": "1"}}
    blobs, offset = [], 0
    for hook, found in statistics.items():
        for name, (dtype, value) in found._tensors().items():
            blob = np.ascontiguousarray(value, _NUMPY[dtype])
            place = [offset, offset + blob.nbytes]
            header[f"{hook}/{name}"] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": place}
            blobs.append(blob)
            offset += blob.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(blob.data for blob in blobs)


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
    found._origin = found._mean.copy()
    found._squares = fields["squares"].astype(np.float64)
    found._maximum = fields["maximum"].astype(np.float64)
    found._weights = fields["weights"].astype(np.float64)
    found._sketch[fields["buckets"].astype(np.int64)] = fields["sketch"]
    return found
