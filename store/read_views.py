"""A run's reads as people look at them: lazy Datasets with the row coordinates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from millpond.store.dtypes import check_view_dtype
from millpond.store.errors import ReadNotFound
from millpond.store.lazy import ReadArray, block_array, coordinates
from millpond.store.rows import RowPlan

if TYPE_CHECKING:
    import xarray as xr


class Reads(Mapping[str, "xr.Dataset"]):
    """The reads of a view by name; nothing is read before it is computed."""

    def __init__(self, plan: RowPlan) -> None:
        self._plan = plan
        self._specs = {read.name: read for read in plan.spec.reads}

    def __getitem__(self, name: str) -> xr.Dataset:
        """A probe's `scores` (row, output); an SAE's `indices` and `values` (row, code), and `active` (row).

        Values are float32, whatever the run's data type.

        Raises:
            ReadNotFound: the run has no read of that name.
        """
        import xarray as xr

        if name not in self._specs:
            raise ReadNotFound(
                f"run {self._plan.spec.name!r} has no read {name!r}; it has {', '.join(self._specs) or 'none'}"
            )
        spec, read = self._plan.spec, self._specs[name]
        found = {}
        for array, shape in read.arrays(spec.dtype, spec.chunk_rows, spec.shard_rows).items():
            decoded = "float32" if read.array_dtype(array, spec.dtype) else None
            dtype = check_view_dtype("float32", spec.dtype) if decoded else np.dtype(shape.dtype)
            dims = ("row",) if shape.columns is None else ("row", shape.dimension)
            blocks = block_array(self._plan, ReadArray(self._plan, array, decoded), array, dtype, shape.columns)
            found[array.removeprefix(f"{name}.")] = xr.Variable(dims, blocks)
        about = {"run": spec.name, **read.model_dump(exclude_none=True)}
        return xr.Dataset(found, coordinates(self._plan), about)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)
