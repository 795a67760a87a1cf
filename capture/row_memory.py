"""Memory for captured rows, used again: the first touch of fresh pages costs more than the copy into them."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SMALL_BYTES = 1 << 16
"""The allocator keeps such pieces itself."""


class RowMemory:
    """Gives out arrays, and takes their memory back when the last view of one is gone, in whatever thread.

    Args:
        most_bytes: kept for later at most.
    """

    def __init__(self, most_bytes: int = 1 << 28) -> None:
        self._most_bytes = most_bytes
        self._returned: deque[bytearray] = deque()  # by finalizers: appending is atomic, and waits for nobody
        self._free: list[bytearray] = []

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array of any content; to be called from one thread at a time."""
        count = int(np.prod(shape))
        if count * dtype.itemsize < _SMALL_BYTES:
            return np.empty(shape, dtype)
        memory = self._memory(count * dtype.itemsize)
        # NumPy lets a view of a view hold the first array of the line, which is this one: the memory is no array
        array: NDArray[Any] = np.frombuffer(memory, dtype, count)
        weakref.finalize(array, self._returned.append, memory).atexit = False
        return array.reshape(shape)

    def _memory(self, size: int) -> bytearray:
        while self._returned:
            self._free.append(self._returned.popleft())
        fits = [memory for memory in self._free if size <= len(memory) <= 2 * size]
        if fits:
            found = min(fits, key=len)
            self._free = [memory for memory in self._free if memory is not found]
            return found
        step = 1 << max(size.bit_length() - 3, 12)
        made = -(-size // step) * step  # sizes come in steps, so that one fits again
        while self._free and sum(map(len, self._free)) + made > self._most_bytes:
            self._free.pop(0)
        return bytearray(made)
