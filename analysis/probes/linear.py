"""What every probe is once fitted: linear scores of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.tiles import Rows, tile_rows, tiles

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Linear:
    """Scores of one probe, one column for two classes or a number, else one a class."""

    coef: Vector
    """(k, d), in the rows' own units."""
    intercept: Vector
    """(k,)"""
    shift: Vector
    """What rows are shifted by before scoring, so that large means do not cancel."""
    intercept_shifted: Vector
    """Scores are `(x - shift) @ coef.T + intercept_shifted`."""
    n_iter: int = 1
    """Passes over the training rows in which this probe took part."""
    converged: bool = True

    @classmethod
    def of_shifted(
        cls, coef: Vector, intercept: Vector, shift: Vector, n_iter: int = 1, converged: bool = True
    ) -> Linear:
        """From weights and intercepts that belong to shifted rows."""
        return cls(coef, intercept - coef @ shift, shift, intercept, n_iter, converged)


def stack(linears: Sequence[Linear], *, exact: bool = False) -> tuple[Any, ...]:
    """State of `scores` for several probes of equal shift, their columns side by side."""
    return (
        linears[0].shift,
        np.concatenate([one.coef for one in linears]).T,
        np.concatenate([one.intercept_shifted for one in linears]),
        exact,
    )


def scores(state: tuple[Any, ...], x: Rows) -> NDArray[Any]:
    """Scores (rows, columns) of one block in the data type of its rows; with `exact` sums are float64.

    Predicted numbers may be far from 0, where float32 is coarse; log-odds are not.
    """
    shift, weights, intercepts, exact = state
    rows = tile_rows(x.shape[1], weights.shape[1])
    out = np.empty((len(x), weights.shape[1]), np.float64 if exact or is_double(x) else np.float32)
    low: Any = None
    for where, tile in tiles(x, shift if shift.any() else None, rows=rows):
        if low is None:
            low = weights.astype(tile.dtype)
        np.add(tile @ low, intercepts.astype(out.dtype), out=out[where])
    return out


def is_double(x: Rows) -> bool:
    """Whether rows are float64, and so are their scores."""
    return isinstance(x, np.ndarray) and x.dtype == np.float64
