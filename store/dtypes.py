"""How activation dtypes are stored: bfloat16 as its bits, because Zarr has no portable bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    import torch

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


def decode_into(stored: NDArray[Any], dtype: str, out: NDArray[np.float32]) -> None:
    """As `decode`, into contiguous `out`."""
    if dtype == "bfloat16":
        np.left_shift(stored, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        out[...] = stored


def encode_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bfloat16 bits nearest to float32 `values`, ties to even; a NaN stays a NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def check_view_dtype(dtype: str, stored: str) -> np.dtype[Any]:
    """The NumPy data type of rows stored as `stored` and viewed as `dtype`; bfloat16 is `ml_dtypes.bfloat16`.

    Raises:
        InvalidInput: `dtype` is neither float32 nor `stored`.
    """
    if dtype not in ("float32", stored):
        raise InvalidInput(f"dtype {dtype!r} is not a view of rows stored as {stored}; use float32 or {stored}")
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    kind: np.dtype[Any] = np.dtype(dtype)
    return kind


def view_as(stored: NDArray[Any], dtype: str, wanted: str) -> NDArray[Any]:
    """Stored values of activation dtype `dtype` as float32, or without a copy as what they are."""
    if wanted == "float32":
        return decode(stored, dtype)
    return stored.view(check_view_dtype(wanted, dtype))


def to_torch(rows: NDArray[Any]) -> torch.Tensor:
    """A tensor that shares the memory of `rows`; torch takes no `ml_dtypes` arrays itself."""
    import torch

    if rows.dtype.name == "bfloat16":
        return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(rows)
