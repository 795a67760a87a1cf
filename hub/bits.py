"""Fixed-width integers packed into bytes, most significant bit first; the last byte is filled with zeros."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from millpond.store.errors import InvalidInput

Integers = NDArray[np.int64]


class BitWriter:
    """Collects integers and packs them."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.uint8]] = []

    def write(self, values: int | Integers, width: int) -> None:
        """Append `values`, each from 0 to 2**width - 1, in `width` bits."""
        array = np.atleast_1d(np.asarray(values, np.int64)).ravel()
        if len(array) and (array.min() < 0 or int(array.max()) >> width):
            raise InvalidInput(f"a value between {array.min()} and {array.max()} does not fit {width} bits")
        shifts = np.arange(width - 1, -1, -1)
        self._parts.append((array[:, None] >> shifts & 1).astype(np.uint8).ravel())

    def done(self) -> bytes:
        """The packed bytes."""
        return np.packbits(np.concatenate([np.empty(0, np.uint8), *self._parts])).tobytes()


class BitReader:
    """Reads them back, and refuses what `BitWriter` would not have written."""

    def __init__(self, data: bytes) -> None:
        self._bits = np.unpackbits(np.frombuffer(data, np.uint8))
        self._at = 0

    def read(self, width: int, count: int) -> Integers:
        """The next `count` integers of `width` bits.

        Raises:
            InvalidInput: there are not so many.
        """
        end = self._at + width * count
        if end > len(self._bits):
            raise InvalidInput(f"the body ends after {len(self._bits)} bits; {end} were expected")
        bits = self._bits[self._at : end].reshape(count, width).astype(np.int64)
        self._at = end
        return np.asarray(bits @ (1 << np.arange(width - 1, -1, -1, dtype=np.int64)))

    def one(self, width: int) -> int:
        """The next integer of `width` bits."""
        return int(self.read(width, 1)[0])

    def check_end(self) -> None:
        """Raise InvalidInput unless only the filling of the last byte is left, and it is zeros."""
        rest = self._bits[self._at :]
        if len(rest) > 7 or rest.any():
            raise InvalidInput(f"the body goes on for {len(rest)} bits after its end")
