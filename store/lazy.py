"""Lazy xarray views over a row plan, backed by Dask."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.store.rows import Block, RowPlan

if TYPE_CHECKING:
    import dask.array
    import xarray as xr

Reader = Callable[[Block], NDArray[Any]]


class _ReadBlock:
    """Reads one block of a lazy array: picklable, and small however many blocks there are."""

    def __init__(self, plan: RowPlan, name: str) -> None:
        self.plan = plan
        self.name = name

    def __call__(self, block: Block) -> NDArray[Any]:
        return self.plan.read(self.name, block)

    def stored(self, block: Block) -> NDArray[Any]:
        """The same rows in their stored data type, for readers that decode them where they use them."""
        return self.plan.read_stored(self.name, block)


def block_array(
    plan: RowPlan, read: Reader, name: str, dtype: np.dtype[Any], columns: int | None = None
) -> dask.array.Array:
    """A Dask array of the plan's rows whose blocks are what `read` returns, (n_rows,) or (n_rows, columns)."""
    import dask.array
    from dask.base import tokenize
    from dask.highlevelgraph import HighLevelGraph

    blocks = [(block, count) for block in plan.blocks() if (count := plan.count(block))]
    key = f"millpond-{name}-{tokenize(plan.folder, plan.spec.id, [p.path for p in plan.parts], plan.chosen, name)}"
    tail = () if columns is None else (0,)
    layer = {(key, number, *tail): (read, block) for number, (block, _) in enumerate(blocks)}
    row_chunks = tuple(count for _, count in blocks) or (0,)
    if not blocks:
        empty = np.empty((0,) if columns is None else (0, columns), dtype)
        return dask.array.from_array(empty)
    chunks = (row_chunks,) if columns is None else (row_chunks, (columns,))
    return dask.array.Array(HighLevelGraph.from_collections(key, layer), key, chunks, dtype=dtype)


def coordinates(plan: RowPlan) -> dict[str, xr.Variable]:
    """The lazy row coordinates `prompt`, `position` and `token_id`."""
    import xarray as xr

    dtype = np.dtype(np.int32)
    return {
        name: xr.Variable(("row",), block_array(plan, _ReadBlock(plan, name), name, dtype))
        for name in ("prompt", "position", "token_id")
    }


def activations(plan: RowPlan, hook: str) -> xr.DataArray:
    """The lazy activations of `hook`: float32, dimensions (row, d_model)."""
    import xarray as xr

    spec = plan.spec
    data = block_array(plan, _ReadBlock(plan, hook), hook, np.dtype(np.float32), spec.d_model)
    attributes = {
        "run": spec.name,
        "run_id": spec.id,
        "hook": hook,
        "model": spec.provenance.get("model", ""),
        "dtype": spec.dtype,
    }
    return xr.DataArray(data, dims=("row", "d_model"), coords=coordinates(plan), name=hook, attrs=attributes)
