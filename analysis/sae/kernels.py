"""Loops over the active entries on a CPU, compiled: what PyTorch lacks, or does in several passes.

Entries are those of a CSR pattern: `crow` says where each row starts among them, `col` is ascending in a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Floats = NDArray[np.float32]
Words = NDArray[np.uint16] | NDArray[np.uint32]
Numbers = NDArray[Any]

_ONES, _ONE, _TOP = np.uint64(0x0101010101010101), np.uint64(1), np.uint64(56)


def _compiled(**options: Any) -> Callable[[Function], Function]:
    """Compile at the first call, and keep the result beside this file or in the user's cache where one can be written."""

    def compile_(function: Function) -> Function:
        try:
            made: Function = numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # no such folder
            made = numba.njit(nogil=True, **options)(function)
        return made

    return compile_


@_compiled()
def above(ordered: Numbers, of_rows: Numbers, of_columns: Numbers, start: int, crow: Longs, col: Ints) -> int:
    """The entries above the limits of their row and of their column; returns `start` and how many there are.

    `crow`, (rows,), receives where each row starts, the first at `start`; `col` has room for all of them.
    """
    rows, columns = ordered.shape
    words = np.zeros(-(-columns // 8), np.uint64)
    marks, some = words.view(np.uint8), np.empty(len(words), np.int64)
    found = 0
    for row in range(rows):
        crow[row] = start + found
        for column in range(columns):
            marks[column] = ordered[row, column] > max(of_rows[row], of_columns[column])
        count = 0
        for place in range(len(words)):  # few have a mark, and which cannot be guessed: no branch
            some[count] = place
            count += words[place] != 0
        for number in range(count):
            left = words[some[number]]
            while left:
                below = (left - _ONE) & ~left
                col[found] = 8 * some[number] + np.int64((below & _ONES) * _ONES >> _TOP)  # bytes below the lowest 1
                found += 1
                left &= left - _ONE
    return start + found


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
