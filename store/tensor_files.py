"""Arrays in files of other tools: safetensors, NumPy and the Arrow files of Hugging Face datasets, read lazily."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from millpond.store.errors import InvalidInput

SAFETENSORS = {
    "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8", "I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
"""Names of data types; bfloat16 as its bits."""


def open_safetensors(path: Path) -> dict[str, tuple[str, NDArray[Any]]]:
    """Tensors by name, each with its safetensors data type, mapped from the file.

    Raises:
        InvalidInput: it is no safetensors file.
    """
    try:
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > min(path.stat().st_size, 100 << 20):
                raise ValueError("its header is longer than the file")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            shape, kind = tuple(entry["shape"]), np.dtype(SAFETENSORS[entry["dtype"]])
            if last - first != kind.itemsize * int(np.prod(shape, dtype=np.int64)):
                raise ValueError(f"{name} has {last - first} bytes for shape {shape} of {entry['dtype']}")
            mapped = np.memmap(path, kind, "r", 8 + length + first, shape) if last > first else np.empty(shape, kind)
            found[name] = (entry["dtype"], mapped)
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())
        raise InvalidInput(f"{path} cannot be read as safetensors ({type(error).__name__}: {why})") from error


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, NDArray[Any]]], metadata: Mapping[str, str]) -> None:
    """Write tensors with their safetensors data types."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (kind, values) in tensors.items():
        header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": [offset, offset + values.nbytes]}
        offset += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for _, values in tensors.values():
            handle.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def open_numpy(path: Path) -> dict[str, tuple[str, NDArray[Any]]]:
    """The arrays of a `.npy` file, by its stem, or of an `.npz` file; `.npy` is mapped from the file."""
    try:
        if path.suffix == ".npy":
            found = {path.stem: np.load(path, mmap_mode="r", allow_pickle=False)}
        else:
            with np.load(path, allow_pickle=False) as archive:
                found = {name: archive[name] for name in archive.files}
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path} cannot be read as NumPy ({' '.join(str(error).split())})") from error
    names = {np.dtype(numpy): kind for kind, numpy in SAFETENSORS.items() if kind != "BF16"}
    for name, array in found.items():
        if array.dtype not in names:
            raise InvalidInput(f"{path}: {name} has data type {array.dtype}; use float32, float16 or integers")
    return {name: (names[array.dtype], array) for name, array in found.items()}


def open_arrow(path: Path) -> Iterator[dict[str, tuple[str, NDArray[Any]]]]:
    """The record batches of an Arrow stream or file as arrays (rows, ...); nested lists must be of equal length."""
    try:
        with pa.memory_map(str(path)) as source:
            try:
                reader = pa.ipc.open_stream(source)
            except pa.ArrowInvalid:
                reader = pa.ipc.open_file(source)
            batches = (
                reader
                if hasattr(reader, "read_next_batch")
                else map(reader.get_batch, range(reader.num_record_batches))
            )
            for batch in batches:
                yield {name: _dense(path, name, batch.column(name)) for name in batch.schema.names}
    except (OSError, pa.ArrowInvalid) as error:
        raise InvalidInput(f"{path} cannot be read as Arrow ({' '.join(str(error).split())})") from error


def _dense(path: Path, name: str, column: Any) -> tuple[str, NDArray[Any]]:
    shape = [len(column)]
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    while (
        pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type)
    ):
        flat = column.flatten()
        width = len(flat) // max(len(column), 1)
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
        if column.null_count or (lengths != width).any():
            raise InvalidInput(f"{path}: {name} has lists of different lengths; give rows of one shape")
        shape.append(width)
        column = flat
    values = column.to_numpy(zero_copy_only=False)
    names = {np.dtype(numpy): kind for kind, numpy in SAFETENSORS.items() if kind != "BF16"}
    return names.get(values.dtype, "other"), values.reshape(shape)
