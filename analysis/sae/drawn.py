"""Chunks of rows as they were read, of which batches are drawn in a random order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.lazy_chunks import StoredBfloat16
from millpond.analysis.sae import kernels
from millpond.store.dtypes import decode, decode_into
from millpond.store.errors import InvalidInput

Chunk = NDArray[Any] | StoredBfloat16
Rows = NDArray[np.float32]

_INFINITE = 0x7F800000
"""The bits of the exponent, all set in infinity and NaN."""
_CHECKED_ROWS = 256


class DrawnRows:
    """Rows of chunks that lie one after another. They are copied, and bfloat16 is decoded, when they are drawn.

    Chunks with `names`, each with the number of its first row, are checked then too, while what was drawn is in
    the cache: a pass over what was just read would cost as much as reading it.
    """

    def __init__(self, chunks: Sequence[Chunk], names: Sequence[tuple[str, int]] = ()) -> None:
        self._given, self._names = chunks, names
        self._chunks = [chunk.bits if isinstance(chunk, StoredBfloat16) else np.asarray(chunk) for chunk in chunks]
        self._stored = "bfloat16" if isinstance(chunks[0], StoredBfloat16) else "float32"
        self._ends = np.cumsum([len(chunk) for chunk in chunks])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def draw(self, places: NDArray[np.int64]) -> Rows:
        """The rows at these places, float32; those of a chunk stand together, in the order of the places.

        Raises:
            InvalidInput: one of them holds NaN or infinity.
        """
        if len(self._chunks) == 1 and not self._names:
            return decode(self._chunks[0][places], self._stored)
        out = np.empty((len(places), self._chunks[0].shape[1]), np.float32)
        filled = 0
        for number, (chunk, end) in enumerate(zip(self._chunks, self._ends, strict=True)):
            start = end - len(chunk)
            here = places if len(self._chunks) == 1 else places[(places >= start) & (places < end)] - start
            self._draw(number, here, out[filled : filled + len(here)])
            filled += len(here)
        return out

    def _draw(self, number: int, places: NDArray[np.int64], out: Rows) -> None:
        chunk = self._chunks[number]
        if self._stored == "bfloat16" or chunk.dtype == np.float32:  # in one pass, with the check
            bits, shift = (chunk, 16) if self._stored == "bfloat16" else (chunk.view(np.uint32), 0)
            infinite = kernels.taken(bits, places, shift, out.view(np.uint32)) >= _INFINITE
        else:
            decode_into(chunk[places], self._stored, out)
            infinite = bool(self._names) and has_infinite(out)
        if infinite and self._names:
            check_finite(self._given[number], *self._names[number])


def check_finite(rows: Chunk, where: str, first: int | None) -> None:
    """Check that no row holds NaN or infinity; `first` is the number of the first one, for the message.

    Raises:
        InvalidInput: some do.
    """
    if has_infinite(rows):
        values = decode(rows.bits, "bfloat16") if isinstance(rows, StoredBfloat16) else rows
        bad = ~np.isfinite(values).all(axis=1)
        row = int(bad.argmax())
        total = "" if first is None else f" (row {first + row:,} of all)" if first else ""
        raise InvalidInput(
            f"{where} holds NaN or infinity in {int(bad.sum()):,} rows, first in its row {row:,}{total}; "
            "leave those rows out"
        )


def has_infinite(rows: Chunk) -> bool:
    """Whether some value is NaN or infinite."""
    if isinstance(rows, StoredBfloat16):  # all bits of the exponent are set
        exponent = np.uint16(_INFINITE >> 16)
        return any(bool(((part & exponent) == exponent).any()) for part in _slices(rows.bits))
    with np.errstate(all="ignore"):
        if np.isfinite(rows.sum(dtype=np.float32)):  # a NaN or infinity would be in the sum
            return False
    return not bool(np.isfinite(rows).all())


def _slices(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    return (array[start : start + _CHECKED_ROWS] for start in range(0, len(array), _CHECKED_ROWS))
