"""Gram matrices of wide rows: only the upper triangle, tile by tile, with one accumulator a task."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.tiles import Rows, tiles

TILE = 1280
"""Columns of a tile row; above twice that, half of the work and memory of a full matrix is saved."""
_BUFFER_ROWS = 2048


def gram_bytes(width: int, itemsize: int) -> int:
    """Bytes of the upper tiles of a Gram matrix of `width` columns."""
    return sum((min(width, start + TILE) - start) * (width - start) * itemsize for start in range(0, width, TILE))


class UpperGram:
    """Sums x' x over rows in float64 from float32 products, or with `coarse` in float32 from bfloat16 products.

    Coarse sums keep about three digits, which is enough for a preconditioner, at four times the speed on CPUs
    with bfloat16 matrix units; rows should be centred before. `parts` are the tile rows of the upper triangle.
    """

    def __init__(self, width: int, *, coarse: bool = False) -> None:
        self.width, self.coarse = width, coarse
        dtype = np.float32 if coarse else np.float64
        self.starts = range(0, width, TILE)
        self.parts = tuple(np.zeros((min(width, s + TILE) - s, width - s), dtype) for s in self.starts)
        self._buffer: Any = None
        self._filled = 0

    @np.errstate(over="ignore", invalid="ignore")
    def update(self, x: NDArray[Any]) -> None:
        """Take in rows (n, width), float32 or float64."""
        if not self.coarse:
            for start, part in zip(self.starts, self.parts, strict=True):
                part += x[:, start : start + TILE].T @ x[:, start:]
            return
        import torch

        if self._buffer is None:
            self._buffer = torch.empty((_BUFFER_ROWS, self.width), dtype=torch.bfloat16)
        while len(x):
            taken = torch.from_numpy(x[: _BUFFER_ROWS - self._filled])
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            x = x[len(taken) :]
            if self._filled == _BUFFER_ROWS:
                self._flush()

    def _flush(self) -> None:
        import torch

        rows = self._buffer[: self._filled]
        for start, part in zip(self.starts, self.parts, strict=True):
            torch.from_numpy(part).add_(rows[:, start : start + TILE].t() @ rows[:, start:])
        self._filled = 0

    def result(self) -> tuple[NDArray[Any], ...]:
        """The tile rows."""
        if self._filled:
            self._flush()
        return self.parts


def whole(parts: tuple[NDArray[Any], ...], width: int, *, symmetric: bool = True) -> NDArray[Any]:
    """The matrix whose upper tiles `parts` are; without `symmetric` only its upper triangle is right."""
    out = np.zeros((width, width), parts[0].dtype)
    for start, part in zip(range(0, width, TILE), parts, strict=True):
        out[start : start + len(part), start:] = part
        if symmetric:
            out[start:, start : start + len(part)] = part.T
    return out


class Covariance:
    """Accumulates the count, sum and Gram matrix of `rows - shift`; the state is `shift`."""

    def __init__(self, shift: NDArray[np.float64]) -> None:
        self.shift, self.n = shift, 0
        self.total = np.zeros(len(shift))
        self.gram = UpperGram(len(shift))

    def update(self, x: Rows) -> None:
        """Take in a block (n, width)."""
        self.n += len(x)
        for _, tile in tiles(x, self.shift, rows=_slice_rows(x)):
            self.total += tile.sum(axis=0, dtype=np.float64)
            self.gram.update(tile)

    def result(self) -> tuple[int, NDArray[np.float64], tuple[NDArray[Any], ...]]:
        """Rows, sum, and tile rows of the Gram matrix."""
        return self.n, self.total, self.gram.result()


def _slice_rows(x: Rows) -> int:
    """Products for a Gram matrix want as many rows as columns, at least a few thousand where they are narrow."""
    return max(1024, min(8192, (32 << 20) // (4 * x.shape[1])))


@np.errstate(over="ignore", invalid="ignore")
def covariance_of(
    found: tuple[int, NDArray[np.float64], tuple[NDArray[Any], ...]],
) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
    """Rows, mean and covariance (n - 1) of what `Covariance` summed; the mean is that of the shifted rows.

    Where squares have overflowed, the covariance is not finite.
    """
    n, total, parts = found
    mean = total / n
    out = whole(parts, len(total))
    out -= n * np.outer(mean, mean)
    out /= max(n - 1, 1)
    return n, mean, out


def first_mean(state: None, x: Rows, *_: Any) -> NDArray[np.float64]:
    """Mean of a block's finite columns, 0 elsewhere: what rows are shifted by, so that large means do not cancel."""
    total = np.zeros(x.shape[1])
    for __, tile in tiles(x):
        total += tile.sum(axis=0, dtype=np.float64)
    return np.where(np.isfinite(total), total / len(x), 0.0)
