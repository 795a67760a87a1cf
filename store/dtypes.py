"""How activation dtypes are stored: bfloat16 as its bits, because Zarr has no portable bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.store.errors import InvalidInput

STORED_AS = {"bfloat16": "uint16", "float16": "float16", "float32": "float32"}
"""Activation dtype to the Zarr (and NumPy) data type of its array."""


def check_dtype(dtype: str) -> str:
    """`dtype`, if activations may have it.

    Raises:
        InvalidInput: otherwise.
    """
    if dtype not in STORED_AS:
        raise InvalidInput(f"dtype {dtype!r} cannot be stored; use one of {', '.join(STORED_AS)}")
    return dtype


def decode(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Stored values of activation dtype `dtype` as float32, exactly."""
    if dtype == "bfloat16":
        bits: NDArray[np.uint32] = stored.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return stored.astype(np.float32, copy=False)


def encode_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bfloat16 bits nearest to float32 `values`, ties to even; a NaN stays a NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))
