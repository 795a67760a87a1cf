"""Chunks of rows as they were read, of which batches are drawn in a random order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.lazy_chunks import StoredBfloat16
from millpond.store.dtypes import decode, decode_into

Chunk = NDArray[Any] | StoredBfloat16
Rows = NDArray[np.float32]

_INFINITE = np.uint16(0x7F80)
_CHECKED_ROWS = 256


class DrawnRows:
    """Rows of chunks that lie one after another. They are copied, and bfloat16 is decoded, when they are drawn."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = [chunk.bits if isinstance(chunk, StoredBfloat16) else np.asarray(chunk) for chunk in chunks]
        self._stored = "bfloat16" if isinstance(chunks[0], StoredBfloat16) else "float32"
        self._ends = np.cumsum([len(chunk) for chunk in chunks])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def draw(self, places: NDArray[np.int64]) -> Rows:
        """The rows at these places, float32; those of a chunk stand together, in the order of the places."""
        if len(self._chunks) == 1:
            return decode(self._chunks[0][places], self._stored)
        out = np.empty((len(places), self._chunks[0].shape[1]), np.float32)
        filled = 0
        for chunk, end in zip(self._chunks, self._ends, strict=True):
            start = end - len(chunk)
            here = places[(places >= start) & (places < end)]
            decode_into(chunk[here - start], self._stored, out[filled : filled + len(here)])
            filled += len(here)
        return out


def has_infinite(rows: Chunk) -> bool:
    """Whether some value is NaN or infinite."""
    if isinstance(rows, StoredBfloat16):  # all bits of the exponent are set
        return any(bool(((part & _INFINITE) == _INFINITE).any()) for part in _slices(rows.bits))
    with np.errstate(all="ignore"):
        if np.isfinite(rows.sum(dtype=np.float32)):  # a NaN or infinity would be in the sum
            return False
    return not bool(np.isfinite(rows).all())


def _slices(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    return (array[start : start + _CHECKED_ROWS] for start in range(0, len(array), _CHECKED_ROWS))
