"""The pass over bfloat16 rows that `stats.py` makes, compiled: each value is read once, and gathered into all totals.

Only where numba is installed, as it is beside vLLM; NumPy's way in `stats.py` gives the same and takes six times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled at its first call; kept on disk where numba finds a folder that it may write to."""
    # sums may be reordered, as vectors need it. Infinities and NaN keep their meaning, but isfinite does not: it subtracts
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
    made: Callable[..., Any]
    try:
        made = njit(cache=True, **options)(function)
    except RuntimeError:
        made = njit(**options)(function)
    return made


@intrinsic  # type: ignore[untyped-decorator]
def _value(typing_context: Any, bits: Any) -> Any:
    """A bfloat16's bits as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(word, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(types.uint16), generate


@_compiled
def absorb(
    rows: NDArray[np.uint16],
    place: int,
    signs: NDArray[np.float32],
    first: NDArray[np.int64],
    sketch: NDArray[np.float32],
    weights: NDArray[np.float64],
    mean: NDArray[np.float64],
    squares: NDArray[np.float64],
    largest: NDArray[np.uint16],
    norms: NDArray[np.float64],
    count: int,
    scratch: NDArray[np.float32],
) -> None:
    """Add `rows`, (n, d), to the totals of the `count` rows before them, in place.

    Moments are taken about the mean of the rows before, in float32 within a group of at most k rows, and merged in
    float64: far from the group's own mean that loses digits, but then the shift of the mean outweighs what is lost.

    Args:
        rows: bfloat16 bits, in C order.
        place: number of the first row among those that `signs` and `first` are for.
        signs: by group of k rows and bucket, (groups, k).
        first: bucket of each group's first row, (groups,).
        sketch: (k, d).
        weights: sum of the signs by bucket, (k,).
        mean: (d,).
        squares: sum of squares about the mean, (d,).
        largest: bits of the largest magnitude, (d,).
        norms: sum and largest of the rows' norms, (2,).
        count: rows before.
        scratch: (3, d), of any content.
    """
    n, d = rows.shape
    k = signs.shape[1]
    centre, away, squared = scratch[0], scratch[1], scratch[2]
    done = 0
    while done < n:
        group, filled = place // k, place % k
        taken = min(k - filled, n - done)
        total = count + taken
        away[:] = 0
        squared[:] = 0
        if count < k:  # too few for their mean to stand for those to come
            for i in range(done, done + taken):
                for c in range(d):
                    away[c] += _value(rows[i, c])
        for c in range(d):
            centre[c] = mean[c] if count >= k else (mean[c] * count + away[c]) / total
        away[:] = 0
        for i in range(done, done + taken):
            bucket = (first[group] + filled + i - done) % k
            sign = signs[group, bucket]
            weights[bucket] += sign
            row, sketched = rows[i], sketch[bucket]
            length = np.float32(0)
            for c in range(d):
                bits = row[c]
                value = _value(bits)
                shifted = value - centre[c]
                length += value * value
                away[c] += shifted
                squared[c] += shifted * shifted
                sketched[c] += sign * value
                largest[c] = max(largest[c], np.uint16(bits & np.uint16(0x7FFF)))
            norm = math.sqrt(np.float64(length))
            if not norm < np.inf:  # beyond float32's range when squared
                exact = 0.0
                for c in range(d):
                    exact += np.float64(_value(row[c])) ** 2
                norm = math.sqrt(exact)
            norms[0] += norm
            norms[1] = max(norms[1], norm)
        spread = np.float32(0)
        for c in range(d):
            spread += squared[c]
        if spread < np.inf:
            for c in range(d):
                offset = np.float64(away[c]) / taken
                inside = np.float64(squared[c]) - offset * offset * taken
                shift = centre[c] + offset - mean[c]
                squares[c] += inside + shift * shift * (count * (taken / total))
                mean[c] += shift * (taken / total)
        else:
            for c in range(d):
                exact = 0.0
                for i in range(done, done + taken):
                    exact += np.float64(_value(rows[i, c]))
                middle = exact / taken
                inside = 0.0
                for i in range(done, done + taken):
                    inside += (np.float64(_value(rows[i, c])) - middle) ** 2
                shift = middle - mean[c]
                squares[c] += inside + shift * shift * (count * (taken / total))
                mean[c] += shift * (taken / total)
        count = total
        place += taken
        done += taken
