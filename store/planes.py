"""A block of stored rows as float32, and what NumPy makes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.store.dtypes import decode, decode_into

Float64 = NDArray[np.float64]


class Scratch:
    """Room for one block of rows as float32, reused: fresh memory would cost as much as the arithmetic."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.float32)

    def rows(self, count: int, d_model: int) -> NDArray[np.float32]:
        """Room for so many rows."""
        if self._memory.size < count * d_model:
            self._memory = np.empty(count * d_model, np.float32)
        return self._memory[: count * d_model].reshape(count, d_model)

    def planes(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        """Room for `decode_planes` of stored rows (n, d_model): (planes, n, d_model / planes)."""
        if self._memory.size < stored.size:
            self._memory = np.empty(stored.size, np.float32)
        planes = 2 if stored.dtype == np.uint16 and stored.shape[1] % 2 == 0 else 1
        return self._memory[: stored.size].reshape(planes, len(stored), -1)


def decode_planes(stored: NDArray[Any], planes: NDArray[np.float32]) -> None:
    """Stored rows (n, d_model) as float32 (planes, n, d_model / planes): dimension i is in plane i modulo their number.

    Two neighbouring bfloat16 are one 32-bit word, whose halves two plain operations on whole words separate.
    """
    if len(planes) == 1:
        decode_into(stored, "bfloat16" if stored.dtype == np.uint16 else stored.dtype.name, planes[0])
        return
    words, (even, odd) = stored.view("<u4"), planes.view(np.uint32)
    np.left_shift(words, _HALF_WORD, out=even)
    np.bitwise_and(words, _UPPER_HALF, out=odd)


_HALF_WORD, _UPPER_HALF = np.uint32(16), np.uint32(0xFFFF0000)


def moments(planes: NDArray[np.float32], n: int) -> tuple[Float64, Float64]:
    """Mean of n rows, to which zeros may be added, and the sum of squares about it, from float32 sums."""
    sums = np.ones(planes.shape[1], np.float32) @ planes
    squares = np.einsum("pij,pij->pj", planes, planes)
    mean = sums.T.reshape(-1).astype(np.float64) / n
    return mean, squares.T.reshape(-1).astype(np.float64) - n * mean**2


def largest(stored: NDArray[Any]) -> Float64:
    """Largest magnitude in each dimension.

    As signed integers the bits of positive values ascend; as unsigned ones those of negative values do, above them.
    """
    signed, unsigned = ("<i2", "<u2") if stored.itemsize == 2 else ("<i4", "<u4")
    positive = np.maximum(stored.view(signed).max(0), 0).view(unsigned)
    negative = stored.view(unsigned).max(0) & np.iinfo(signed).max
    return decode_stored(np.maximum(positive, negative).view(stored.dtype)).astype(np.float64)


def decode_stored(stored: NDArray[Any]) -> NDArray[np.float32]:
    """Stored rows as float32; uint16 is bfloat16 bits."""
    return decode(stored, "bfloat16" if stored.dtype == np.uint16 else stored.dtype.name)
