"""The rows of one request while it runs: written where they are handed on from, without a copy in between."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from millpond.capture.row_memory import RowMemory


class KeptRows:
    """Rows of one request at all its hook points, as a run stores them, in the order in which they were computed.

    Args:
        n_hooks: hook points.
        expected: rows of each that there is room for; more cost a copy.
        d_model: width of a row.
        dtype: the model's.
        memory: where the rows are.
    """

    def __init__(self, n_hooks: int, expected: int, d_model: int, dtype: torch.dtype, memory: RowMemory) -> None:
        self._memory = memory
        self._rows = memory.array((n_hooks, expected, d_model), as_stored(torch.empty(0, dtype=dtype)).dtype)
        self._count = 0

    def room(self, count: int) -> NDArray[Any]:
        """Where the next `count` rows go, (n_hooks, count, d_model); they count once `take` is told of them."""
        n_hooks, space, d_model = self._rows.shape
        if self._count + count > space:
            grown = self._memory.array((n_hooks, max(2 * space, self._count + count), d_model), self._rows.dtype)
            grown[:, : self._count] = self._rows[:, : self._count]
            self._rows = grown
        return self._rows[:, self._count : self._count + count]

    def take(self, count: int) -> None:
        """The next `count` rows are in their room."""
        self._count += count

    def __len__(self) -> int:
        """Rows of each hook point."""
        return self._count

    def of(self, number: int) -> NDArray[Any]:
        """All rows of one hook point, (n_rows, d_model), without a copy."""
        return self._rows[number, : self._count]


def as_stored(rows: Tensor) -> NDArray[Any]:
    """The same memory as a run stores it: bfloat16 as its bits."""
    if rows.dtype == torch.bfloat16:
        rows = rows.view(torch.uint16)
    stored: NDArray[Any] = rows.numpy()
    return stored


def as_computed(stored: NDArray[Any], dtype: torch.dtype) -> Tensor:
    """The same memory as the model computes it."""
    return torch.from_numpy(stored).view(dtype)
