"""How numbers are rounded to what their standard error supports, and written: an integer times a step of 1, 2 or 5 tens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.hub.bits import BitReader, BitWriter
from millpond.store.errors import InvalidInput

Floats = NDArray[np.float64]

_DECADES = range(-12, 13)
_STEPS = np.array([float(f"{digit}e{decade}") for decade in _DECADES for digit in (1, 2, 5)])
POWERS = np.array([float(f"1e{decade}") for decade in range(-12, 16)])
_STEP_BITS, _MANTISSA_BITS, _MOST = 7, 11, 999
_UNDEFINED = 2 * _MOST + 1
NUMBER_BITS = _STEP_BITS + _MANTISSA_BITS
INTERVAL_BITS = 2 * _MANTISSA_BITS
Z95 = 1.959963984540054


def write_numbers(out: BitWriter, values: Floats, intervals: Floats | None, digits: int) -> tuple[Any, Any]:
    """Steps, mantissas and bounds' mantissas; NaN is one code, infinities and what is beyond 1e14 are refused."""
    columns = values[:, None] if intervals is None else np.concatenate([values[:, None], intervals], axis=1)
    if np.isinf(columns).any() or (np.abs(np.nan_to_num(columns)) >= 1e12).any():
        raise InvalidInput("a number is infinite or beyond 1e12, which no result that may leave is")
    top = np.nan_to_num(np.abs(columns)).max(axis=1) if columns.size else np.zeros(0)
    decade = np.clip(np.searchsorted(POWERS, top, "right") - 1, 0, None)
    need = POWERS[np.clip(decade - digits + 1, 0, None)]
    if intervals is not None:
        errors = np.nan_to_num(intervals[:, 1] - intervals[:, 0]) / (2 * Z95)
        if (errors < 0).any():
            raise InvalidInput("an interval's lower bound is above its upper one")
        need = np.maximum(need, errors)
    step = np.minimum(np.searchsorted(_STEPS, need, "left"), len(_STEPS) - 1)
    mantissa = np.rint(np.nan_to_num(columns) / _STEPS[step][:, None])
    grow = np.abs(mantissa).max(axis=1, initial=0) > _MOST  # 999.7 rounds to 1000
    step = np.where(grow, np.minimum(step + 1, len(_STEPS) - 1), step)
    mantissa = np.rint(np.nan_to_num(columns) / _STEPS[step][:, None])
    codes = np.where(np.isnan(columns), _UNDEFINED, mantissa + _MOST).astype(np.int64)
    out.write(step, _STEP_BITS)
    out.write(codes, _MANTISSA_BITS)
    return step, codes[:, 0] - _MOST


def read_numbers(data: BitReader, count: int, has_interval: bool) -> tuple[Floats, Floats | None]:
    """What `write_numbers` wrote: the values, and their bounds."""
    step = data.read(_STEP_BITS, count)
    codes = data.read(_MANTISSA_BITS, count * (3 if has_interval else 1)).reshape(count, -1)
    if (step >= len(_STEPS)).any() or (codes > _UNDEFINED).any():
        raise InvalidInput("the body holds a number that no value has")
    columns = np.where(codes == _UNDEFINED, np.nan, decimal_of(step[:, None], codes - _MOST))
    return columns[:, 0], columns[:, 1:] if has_interval else None


def decimal_of(step: Any, mantissa: Any) -> Floats:
    """The decimal itself: an integer over or times a power of ten, which floating point rounds correctly."""
    digit, decade = np.array([1, 2, 5])[step % 3], step // 3 + _DECADES[0]
    whole = (mantissa * digit).astype(np.float64)
    down, up = 10.0 ** np.clip(-decade, 0, None), 10.0 ** np.clip(decade, 0, None)
    return np.asarray(whole / down * up)
