"""Loops over the active entries on a CPU, compiled: what PyTorch lacks, or does in several passes.

Entries are those of a CSR pattern: `crow` says where each row starts among them, `col` is ascending in a row.
Two inner loops are written in LLVM's vectors of `LANES` numbers, which it maps to the machine's: its own vectoriser gives
them up. They stand here because Numba's cache looks at this file alone for changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Floats = NDArray[np.float32]
Words = NDArray[np.uint16] | NDArray[np.uint32]
Numbers = NDArray[Any]

LANES = 64
_ONE = np.uint64(1)
_FREE = ("reassoc", "contract")
"""What a sum's order and rounding may change by."""


def _compiled(**options: Any) -> Callable[[Function], Function]:
    """Compile at the first call, and keep the result beside this file or in the user's cache where one can be written."""

    def compile_(function: Function) -> Function:
        try:
            made: Function = numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # no such folder
            made = numba.njit(nogil=True, **options)(function)
        return made

    return compile_


def _vector(context: Any, builder: Any, kind: Any, array: Any, places: list[Any]) -> Any:
    """Where `LANES` numbers of an array begin; those of its last dimension have to lie side by side."""
    made = context.make_array(kind)(context, builder, array)
    place = cgutils.get_item_pointer(context, builder, kind, made, places, wraparound=False)
    return builder.bitcast(place, ir.VectorType(place.type.pointee, LANES).as_pointer())


def _load(context: Any, builder: Any, kind: Any, array: Any, places: list[Any]) -> Any:
    loaded = builder.load(_vector(context, builder, kind, array, places))
    loaded.align = kind.dtype.bitwidth // 8
    return loaded


def _repeated(builder: Any, number: Any) -> Any:
    vector = ir.VectorType(number.type, LANES)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.IntType(32)(0))
    order = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), order)


@intrinsic  # type: ignore[untyped-decorator]
def _marks(typing: Any, ordered: Any, row: Any, column: Any, least: Any, limits: Any) -> Any:
    """Bits of the numbers of `ordered[row, column:]` that are above `least` and above theirs of `limits[column:]`."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        ordered, row, column, least, limits = values
        kinds = signature.args
        found = _load(context, builder, kinds[0], ordered, [row, column])
        greater = builder.icmp_signed if isinstance(kinds[0].dtype, types.Integer) else builder.fcmp_ordered
        above_least = greater(">", found, _repeated(builder, least))
        above_limits = greater(">", found, _load(context, builder, kinds[4], limits, [column]))
        return builder.bitcast(builder.and_(above_least, above_limits), ir.IntType(LANES))

    return types.uint64(ordered, row, column, least, limits), generate


@intrinsic  # type: ignore[untyped-decorator]
def _count(typing: Any, marks: Any) -> Any:
    """How many bits are 1."""
    return types.int64(marks), lambda context, builder, signature, values: builder.ctpop(values[0])


@intrinsic  # type: ignore[untyped-decorator]
def _lowest(typing: Any, marks: Any) -> Any:
    """Place of the lowest bit that is 1, or how many bits there are."""
    return types.int64(marks), lambda context, builder, signature, values: builder.cttz(values[0], ir.IntType(1)(0))


@intrinsic  # type: ignore[untyped-decorator]
def _of_latent(
    typing: Any, latent: Any, first: Any, last: Any, row: Any, codes: Any, part: Any, table: Any, slopes: Any, out: Any
) -> Any:
    """`by_latent` of one latent, of arrays with `LANES` columns."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        latent, first, last, row, codes, part, table, slopes, out = values
        kinds, zero, index = signature.args, ir.FloatType()(0.0), first.type
        ours = _load(context, builder, kinds[6], table, [latent, index(0)])
        total = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(zero.type, [zero.type, ours.type]), f"llvm.vector.reduce.fadd.v{LANES}f32"
        )

        def entry(number: int, array: Any, place: Any) -> Any:
            kind = kinds[number]
            made = context.make_array(kind)(context, builder, array)
            return cgutils.get_item_pointer(context, builder, kind, made, [place], wraparound=False)

        held = cgutils.alloca_once_value(builder, ir.Constant(ours.type, [zero] * LANES))
        with cgutils.for_range_slice(builder, first, last, index(1)) as (place, _):
            here = builder.sext(builder.load(entry(3, row, place)), index)
            error = _load(context, builder, kinds[5], part, [here, index(0)])
            code = _repeated(builder, builder.load(entry(4, codes, place)))
            builder.store(builder.fadd(builder.load(held), builder.fmul(code, error, flags=_FREE), flags=_FREE), held)
            product = builder.call(total, [zero, builder.fmul(error, ours, flags=_FREE)], fastmath=_FREE)
            slope = entry(7, slopes, place)
            builder.store(builder.fadd(builder.load(slope), product), slope)
        written = builder.store(builder.load(held), _vector(context, builder, kinds[8], out, [latent, index(0)]))
        written.align = 4
        return context.get_dummy_value()

    return types.void(latent, first, last, row, codes, part, table, slopes, out), generate


@_compiled()
def above(ordered: Numbers, of_rows: Numbers, of_columns: Numbers, start: int, crow: Longs, col: Ints) -> int:
    """The entries above the limits of their row and of their column; returns `start` and how many there are.

    `crow`, (rows,), receives where each row starts, the first at `start`; `col` has room for all of them.
    """
    rows, columns = ordered.shape
    whole = columns // LANES * LANES
    found = 0
    for row in range(rows):
        crow[row] = start + found
        for column in range(0, whole, LANES):
            marks = _marks(ordered, row, column, of_rows[row], of_columns)
            stop = found + _count(marks)
            others = marks & (marks - _ONE)
            # few have more than two, which is all that is asked: whether there is one cannot be guessed
            col[found], col[found + 1] = column + _lowest(marks), column + _lowest(others)
            for place in range(found + 2, stop):
                others &= others - _ONE
                col[place] = column + _lowest(others)
            found = stop
        for column in range(whole, columns):
            if ordered[row, column] > max(of_rows[row], of_columns[column]):
                col[found] = column
                found += 1
    return start + found


@_compiled(fastmath={"reassoc", "contract"})
def by_latent(
    first: int,
    last: int,
    starts: Longs,
    row: Ints,
    codes: Floats,
    part: Floats,
    table: Floats,
    slopes: Floats,
    out: Floats,
) -> None:
    """Of the entries of latents `first` to `last`: their rows of `part`, summed with weights, and multiplied with those of `table`.

    Entries are sorted by latent. The sums of `codes` times rows of `part` are written to `out`, a row each latent; the dot
    products of the entry's row of `part` and the latent's of `table` are added to `slopes`. One gather serves both.
    """
    width = part.shape[1]
    for latent in range(first, last):
        if width == LANES:
            _of_latent(latent, starts[latent], starts[latent + 1], row, codes, part, table, slopes, out)
            continue
        out[latent] = 0
        for entry in range(starts[latent], starts[latent + 1]):
            product = np.float32(0)
            for j in range(width):
                error = part[row[entry], j]
                out[latent, j] += codes[entry] * error
                product += error * table[latent, j]
            slopes[entry] += product


@_compiled()
def kept(mask: NDArray[np.bool_], crow: Longs, col: Ints, values: Floats, new: tuple[Longs, Ints, Floats]) -> None:
    """Write the entries that `mask` marks to `new`."""
    new_crow, new_col, new_values = new
    found = 0
    for row in range(len(crow) - 1):
        new_crow[row] = found
        for entry in range(crow[row], crow[row + 1]):
            if mask[entry]:
                new_col[found], new_values[found] = col[entry], values[entry]
                found += 1
    new_crow[-1] = found


@_compiled(fastmath={"reassoc", "contract"})
def add_sampled(
    first: int, last: int, crow: Longs, col: Ints, left: Floats, right: Floats, tile: int, values: Floats
) -> None:
    """Add to `values` of rows `first` to `last` the entries of `left @ right.T`, by so many rows of `right` at a time."""
    width = left.shape[1]
    reached = crow[first:last].copy()
    for stop in range(tile, len(right) + tile, tile):
        for row in range(first, last):
            entry = end = reached[row - first]
            while end < crow[row + 1] and col[end] < stop:
                end += 1
            reached[row - first] = end
            while entry + 4 <= end:  # four at a time share what is read of `left`
                c0, c1, c2, c3 = col[entry], col[entry + 1], col[entry + 2], col[entry + 3]
                s0 = s1 = s2 = s3 = np.float32(0)
                for j in range(width):
                    x = left[row, j]
                    s0 += x * right[c0, j]
                    s1 += x * right[c1, j]
                    s2 += x * right[c2, j]
                    s3 += x * right[c3, j]
                values[entry] += s0
                values[entry + 1] += s1
                values[entry + 2] += s2
                values[entry + 3] += s3
                entry += 4
            while entry < end:
                c0 = col[entry]
                s0 = np.float32(0)
                for j in range(width):
                    s0 += left[row, j] * right[c0, j]
                values[entry] += s0
                entry += 1


@_compiled()
def transposed(crow: Longs, col: Ints, starts: Longs, row: Ints, order: Ints) -> None:
    """Sort entries by column, those of one by row: `starts`, (columns + 1,), their rows, and their places before."""
    starts[:] = 0
    for entry in range(len(col)):
        starts[col[entry] + 1] += 1
    for column in range(len(starts) - 1):
        starts[column + 1] += starts[column]
    reached = starts[:-1].copy()
    for number in range(len(crow) - 1):
        for entry in range(crow[number], crow[number + 1]):
            place = reached[col[entry]]
            reached[col[entry]] = place + 1
            row[place], order[place] = number, entry


@_compiled(fastmath={"reassoc", "contract"})
def take_across(gradient: Floats, rows: Floats) -> float:
    """Take from each row of `gradient` what is along the row of norm 1 of `rows`; returns the norm of what is left."""
    total = 0.0
    for row in range(gradient.shape[0]):
        along = np.float32(0)
        for j in range(gradient.shape[1]):
            along += gradient[row, j] * rows[row, j]
        left = np.float32(0)
        for j in range(gradient.shape[1]):
            across = gradient[row, j] - along * rows[row, j]
            gradient[row, j] = across
            left += across * across
        total += float(left)
    return math.sqrt(total)


@_compiled(fastmath={"reassoc", "contract"})
def normalise(rows: Floats) -> None:
    """Scale each row to norm 1."""
    for row in range(rows.shape[0]):
        total = np.float32(0)
        for j in range(rows.shape[1]):
            total += rows[row, j] * rows[row, j]
        scale = np.float32(1) / np.sqrt(total)
        for j in range(rows.shape[1]):
            rows[row, j] *= scale


@_compiled()
def taken(bits: Words, places: Longs, shift: int, out: Words) -> int:
    """Copy rows of `bits` to `out`, (places, width), shifted to the left; returns the largest word there but for its sign.

    By 16 that makes float32 of bfloat16. Infinity and NaN are the floats whose words but for the sign are largest.
    """
    top, by, but_sign = np.uint32(0), np.uint32(shift), np.uint32(0x7FFFFFFF)
    for row in range(len(places)):
        place = places[row]
        for j in range(bits.shape[1]):
            word = np.uint32(np.uint32(bits[place, j]) << by)
            out[row, j] = word
            top = max(top, np.uint32(word & but_sign))
    return int(top)
