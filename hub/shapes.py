"""The types of value that may leave, how each is quantised, and how many bits it takes: the same for every value of a shape.

A result's kind lists its fields in a fixed order. A field that a kind does not list cannot be sent, nor can text. Widths
depend on shapes alone, so a quote made from shapes is exact and a body's length says nothing about its values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from millpond.hub.bits import BitReader, BitWriter
from millpond.hub.policy import Disclosure
from millpond.hub.quantise import INTERVAL_BITS, NUMBER_BITS, POWERS, Floats, decimal_of, read_numbers, write_numbers
from millpond.store.errors import InvalidInput
from millpond.store.result import Result

MAX_LENGTH = 65_535


@dataclass(frozen=True)
class Context:
    """What quantisation depends on beside the value."""

    rules: Disclosure
    restricted: bool


class Field(Protocol):
    """A type of value."""

    @property
    def name(self) -> str:
        """Of the value in a result."""
        ...

    @property
    def vector(self) -> bool:
        """Whether it has a coordinate for each of the activations' own, so that a careless one would be a row."""
        ...

    def write(self, out: BitWriter, result: Result, context: Context) -> None:
        """Append the quantised value of `result`."""
        ...

    def read(self, data: BitReader, result: Result) -> None:
        """Put the value read into `result`, whose mappings are open dicts."""
        ...

    def bits(self, shape: tuple[int, ...]) -> int:
        """Width of a value of that shape."""
        ...


@dataclass(frozen=True)
class Number:
    """A float with its 95 % interval where it has one, rounded to a step that is at least the standard error."""

    name: str
    vector = False

    def write(self, out: BitWriter, result: Result, context: Context) -> None:
        """18 bits and a flag; 22 more with an interval."""
        value = np.array([_scalar(self.name, result.values[self.name])])
        given = result.intervals.get(self.name)
        out.write(int(given is not None), 1)
        write_numbers(out, value, None if given is None else np.array([given], np.float64), context.rules.digits)

    def read(self, data: BitReader, result: Result) -> None:
        """The value and its interval."""
        has_interval = bool(data.one(1))
        values, intervals = read_numbers(data, 1, has_interval)
        result.values[self.name] = float(values[0])  # type: ignore[index]
        if intervals is not None:
            result.intervals[self.name] = (float(intervals[0, 0]), float(intervals[0, 1]))  # type: ignore[index]

    def bits(self, shape: tuple[int, ...]) -> int:
        """Its width, with an interval."""
        return 1 + NUMBER_BITS + INTERVAL_BITS


@dataclass(frozen=True)
class Numbers:
    """An array of floats, each like `Number`; its interval is in the values `NAME_low` and `NAME_high`."""

    name: str
    bounded: bool = True
    """Whether there are intervals."""
    vector = False

    def write(self, out: BitWriter, result: Result, context: Context) -> None:
        """A flag, the length, then 18 or 40 bits an element."""
        values = _vector(self.name, result.values[self.name])
        bounds = [result.values.get(f"{self.name}_{side}") if self.bounded else None for side in ("low", "high")]
        intervals = None
        if all(bound is not None for bound in bounds):
            intervals = np.stack([_vector(f"{self.name} bounds", bound) for bound in bounds], axis=1)
            if len(intervals) != len(values):
                raise InvalidInput(
                    f"{self.name} has {len(values)} values and {len(intervals)} intervals; give one each"
                )
        out.write(int(intervals is not None), 1)
        out.write(len(values), 16)
        write_numbers(out, values, intervals, context.rules.digits)

    def read(self, data: BitReader, result: Result) -> None:
        """The values and their bounds."""
        has_interval, length = bool(data.one(1)), data.one(16)
        values, intervals = read_numbers(data, length, has_interval)
        result.values[self.name] = values  # type: ignore[index]
        if intervals is not None:
            result.values[f"{self.name}_low"] = intervals[:, 0]  # type: ignore[index]
            result.values[f"{self.name}_high"] = intervals[:, 1]  # type: ignore[index]

    def bits(self, shape: tuple[int, ...]) -> int:
        """Their width, with intervals if they have any."""
        return 17 + _size(shape) * (NUMBER_BITS + INTERVAL_BITS * self.bounded)


@dataclass(frozen=True)
class Counts:
    """Non-negative integers, a histogram or a table; on restricted prompts small cells become 0 and others are rounded."""

    name: str
    ndim: int = 0
    vector = False

    def write(self, out: BitWriter, result: Result, context: Context) -> None:
        """The shape, then 40 bits each."""
        given = np.asarray(result.values[self.name] if self.name in result.values else result.evidence[self.name])
        if given.ndim != self.ndim or given.dtype.kind not in "iu" or (given < 0).any():
            raise InvalidInput(
                f"{self.name} has data type {given.dtype} and {given.ndim} dimensions; give counts in {self.ndim}"
            )
        counts = given.astype(np.int64)
        if context.restricted:
            base = context.rules.count_base
            counts = np.where(counts < context.rules.min_class, 0, (counts + base // 2) // base * base)
        _write_shape(out, counts.shape)
        out.write(counts, 40)

    def read(self, data: BitReader, result: Result) -> None:
        """The counts."""
        shape = _read_shape(data, self.ndim)
        counts = data.read(40, _size(shape)).reshape(shape)
        result.values[self.name] = counts if self.ndim else int(counts)  # type: ignore[index]

    def bits(self, shape: tuple[int, ...]) -> int:
        """Their width."""
        return 16 * self.ndim + 40 * _size(shape)


@dataclass(frozen=True)
class Direction:
    """One vector (d) or several (k, d): a scale each, and 2 to 6 bits a coordinate.

    Where the result has the value `NAME_se`, a standard error a coordinate, steps are not finer than its median.
    """

    name: str
    vector = True

    def write(self, out: BitWriter, result: Result, context: Context) -> None:
        """The shape, the bits a coordinate, the scales, the coordinates."""
        given = np.asarray(result.values[self.name])
        if given.dtype.kind != "f" or given.ndim not in (1, 2) or not given.size or not np.isfinite(given).all():
            raise InvalidInput(
                f"{self.name} has shape {given.shape} and type {given.dtype}; give finite floats (d) or (k, d)"
            )
        rows = np.atleast_2d(given).astype(np.float64)
        top = np.abs(rows).max(axis=1)
        if (top < POWERS[0]).any():
            raise InvalidInput(f"{self.name} is zero; there is no direction to send")
        bits = context.rules.vector_bits
        if f"{self.name}_se" in result.values:
            error = float(np.median(np.asarray(result.values[f"{self.name}_se"], np.float64)))
            levels = top.max() / error if error > 0 else np.inf
            bits = next((b for b in range(bits, 2, -1) if 2 ** (b - 1) - 1 <= levels), 2)
        out.write(given.ndim - 1, 1)
        _write_shape(out, rows.shape)
        out.write(bits, 3)
        # two digits: with more, the largest coordinate would be known better than the others
        step, mantissa = write_numbers(out, 1.05 * top, None, 2)
        scales, most = decimal_of(step, mantissa), 2 ** (bits - 1) - 1
        codes = np.clip(np.rint(rows / scales[:, None] * most), -most, most).astype(np.int64)
        out.write(codes + most, bits)

    def read(self, data: BitReader, result: Result) -> None:
        """The vectors."""
        many, shape, bits = data.one(1), _read_shape(data, 2), data.one(3)
        scales, _ = read_numbers(data, shape[0], False)
        most = 2 ** (bits - 1) - 1
        codes = data.read(bits, _size(shape)).reshape(shape)
        if bits < 2 or (codes > 2 * most).any():
            raise InvalidInput(f"{self.name} holds a code that no value has")
        rows = (codes - most) * (scales[:, None] / most)
        result.values[self.name] = rows if many else rows[0]  # type: ignore[index]

    def bits(self, shape: tuple[int, ...]) -> int:
        """Their width at 6 bits a coordinate."""
        k = shape[0] if len(shape) == 2 else 1
        return 36 + NUMBER_BITS * k + 6 * _size(shape)


@dataclass(frozen=True)
class References:
    """Places in the client's own prompts: (n, 2) prompt number and position."""

    name: str
    vector = False

    def write(self, out: BitWriter, result: Result, context: Context) -> None:
        """The number of places, then 24 and 20 bits each."""
        given = np.asarray(result.values[self.name])
        if given.dtype.kind not in "iu" or given.ndim != 2 or given.shape[1] != 2:
            raise InvalidInput(f"{self.name} has shape {given.shape} and type {given.dtype}; give integers (n, 2)")
        _write_shape(out, given.shape[:1])
        out.write(given[:, 0], 24)
        out.write(given[:, 1], 20)

    def read(self, data: BitReader, result: Result) -> None:
        """The places."""
        (n,) = _read_shape(data, 1)
        result.values[self.name] = np.stack([data.read(24, n), data.read(20, n)], axis=1)  # type: ignore[index]

    def bits(self, shape: tuple[int, ...]) -> int:
        """Their width."""
        return 16 + 44 * shape[0]


_METRICS = ("auroc", "accuracy", "balanced_accuracy", "f1", "log_loss")
_COUNTED = (Counts("rows"), Counts("prompts"), Counts("positives"), Counts("negatives"))

KINDS: dict[str, tuple[Field, ...]] = {
    "probe-evaluation": (*map(Number, _METRICS), *_COUNTED),
    "regression-evaluation": (*map(Number, ("r2", "mse", "mae", "pearson", "spearman")), *_COUNTED[:2]),
    "probe-sweep": (*map(Numbers, _METRICS), *_COUNTED[:2]),
    "confusion": (Counts("table", 2), Number("accuracy"), *_COUNTED[:2]),
    "sae-evaluation": (
        *map(Number, ("l0", "fvu", "explained_variance", "mse", "cosine", "dead_latents", "ce_loss_recovered")),
        Counts("frequency_histogram", 1), *_COUNTED[:2],
    ),
    "curve": (Numbers("x", bounded=False), Numbers("y"), *_COUNTED[:2]),
    "histogram": (Counts("counts", 1), Number("low"), Number("high"), *_COUNTED[:2]),
    "direction": (Direction("direction"), Number("bias"), *_COUNTED),
    "mean": (Direction("mean"), *_COUNTED[:2]),
    "summary": (*map(Number, ("mean", "sd", "minimum", "maximum", "norm", "similarity")), *_COUNTED[:2]),
    "group-means": (Numbers("means"), *_COUNTED[:2]),
    "rates": (Numbers("rates"), *_COUNTED[:2]),
    "latent": (
        Number("density"), Number("mean_active"), Number("maximum"), Numbers("histogram", bounded=False),
        References("contexts"), Numbers("activations", bounded=False), *_COUNTED[:2],
    ),
    "probe-rates": (Numbers("rates"), Numbers("scores"), *_COUNTED[:2]),
    "sae-cross-entropy": (
        *map(Number, ("ce_clean", "ce_sae", "ce_zero", "ce_recovered")), Counts("tokens"), Counts("prompts"),
    ),
}  # fmt: skip
"""Every kind of result that may leave, with its fields in the order sent. The place in this table is the kind's code,
so kinds are added at the end."""

TEXTS = "texts"
"""The kind of result that is no numbers: completions, coded by `textcode.encode`, in the value `coded`. `body.Texts` sends it."""


def write_result(out: BitWriter, result: Result, context: Context) -> None:
    """Append `result`, quantised.

    Raises:
        InvalidInput: its kind is not in `KINDS`, or a value is not one of the kind's fields.
    """
    fields = fields_of(result.kind)
    sent = {field.name for field in fields} | {
        f"{field.name}_{end}" for field in fields for end in ("low", "high", "se")
    }
    if unknown := set(result.values) - sent:
        raise InvalidInput(
            f"a {result.kind} has no {', '.join(sorted(unknown))}; it may have {', '.join(sorted(sent))}"
        )
    out.write(list(KINDS).index(result.kind), 8)
    for field in fields:
        present = field.name in result.values or (isinstance(field, Counts) and field.name in result.evidence)
        out.write(int(present), 1)
        if present:
            field.write(out, result, context)


def read_result(data: BitReader) -> Result:
    """What `write_result` wrote."""
    code = data.one(8)
    if code >= len(KINDS):
        raise InvalidInput(f"the body holds a result of unknown kind {code}; upgrade the client")
    result = Result(list(KINDS)[code], {}, {})
    for field in KINDS[result.kind]:
        if data.one(1):
            field.read(data, result)
    return result


def result_bytes(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of a body with a result of `kind` whose array fields have these shapes; absent fields count as present.

    Raises:
        InvalidInput: an unknown kind, or an array field without a shape.
    """
    bits = 8
    for field in fields_of(kind):
        arrays = not isinstance(field, Number) and not (isinstance(field, Counts) and field.ndim == 0)
        if arrays and field.name not in shapes:
            raise InvalidInput(f"the quote for a {kind} needs the shape of {field.name}; give a list of lengths")
        bits += 1 + field.bits(shapes.get(field.name, ()))
    return 1 + -(-bits // 8)


def fields_of(kind: str) -> tuple[Field, ...]:
    """The fields of a kind of result.

    Raises:
        InvalidInput: it may not leave.
    """
    if kind not in KINDS:
        raise InvalidInput(f"a result of kind {kind!r} may not leave; kinds that may are {', '.join(KINDS)}")
    return KINDS[kind]


def has_standard_errors(result: Result) -> bool:
    """Whether every float of `result` has an interval of a width above 0, which its rounding needs."""
    for field in fields_of(result.kind):
        if field.name not in result.values:
            continue
        if isinstance(field, Number):
            low, high = result.intervals.get(field.name, (0.0, 0.0))
            if not high > low:
                return False
        elif isinstance(field, Numbers):
            lows, highs = (np.asarray(result.values.get(f"{field.name}_{side}", 0.0)) for side in ("low", "high"))
            if not np.all(highs > lows):
                return False
    return True


def _scalar(name: str, value: Any) -> float:
    if isinstance(value, (bool, str)) or np.ndim(value):
        raise InvalidInput(f"{name} is a {type(value).__name__}; give one number")
    return float(value)


def _vector(name: str, value: Any) -> Floats:
    array = np.asarray(value)
    if array.ndim != 1 or array.dtype.kind not in "fiu" or len(array) > MAX_LENGTH:
        raise InvalidInput(
            f"{name} has shape {array.shape} and type {array.dtype}; give up to {MAX_LENGTH:,} numbers in one dimension"
        )
    return array.astype(np.float64)


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _write_shape(out: BitWriter, shape: tuple[int, ...]) -> None:
    if any(length > MAX_LENGTH for length in shape):
        raise InvalidInput(f"an array of shape {shape} is too long to leave; at most {MAX_LENGTH:,} a dimension")
    for length in shape:
        out.write(length, 16)


def _read_shape(data: BitReader, ndim: int) -> tuple[int, ...]:
    return tuple(data.one(16) for _ in range(ndim))
