"""Lazy xarray views over a row plan, backed by Dask: one task a shard."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.store.dtypes import check_view_dtype, view_as
from millpond.store.objects import PARALLEL_REQUESTS
from millpond.store.rows import Piece, RowPlan
from millpond.store.shards import ArraySpec

if TYPE_CHECKING:
    import dask.array
    import xarray as xr

    from millpond.store.run import Run


@dataclass(frozen=True)
class Span:
    """What one task reads."""

    pieces: tuple[Piece, ...]

    def rows_by_url(self) -> dict[str, int]:
        """How many rows it reads below which URL."""
        rows: dict[str, int] = {}
        for piece in self.pieces:
            rows[piece.folder.url] = rows.get(piece.folder.url, 0) + piece.count
        return rows


class Reader(ABC):
    """Reads the values of a piece's chosen rows: picklable, and small however many pieces there are."""

    def for_span(self, span: Span) -> Reader:
        """A reader with no more than the pieces of `span` need."""
        return self

    @abstractmethod
    def read(self, piece: Piece) -> NDArray[Any]:
        """One value, or row of values, a chosen row."""

    def __call__(self, span: Span) -> NDArray[Any]:
        """The values of several pieces."""
        found = [self.read(piece) for piece in span.pieces]
        return found[0] if len(found) == 1 else np.concatenate(found)


class ReadArray(Reader):
    """Reads one of the run's arrays; activations in the data type asked for."""

    def __init__(self, plan: RowPlan, name: str, dtype: str | None = None) -> None:
        self.run = plan.folder
        self.name = name
        self.array: ArraySpec = plan.spec.arrays()[name]
        self.stored_dtype = plan.spec.dtype
        self.dtype = dtype

    def read(self, piece: Piece) -> NDArray[Any]:
        """Rows of the array."""
        stored = piece.read(self.name, self.array)
        return stored if self.dtype is None else view_as(stored, self.stored_dtype, self.dtype)

    def stored(self, span: Span, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """The same rows in their stored data type, for readers that decode them where they use them; into `out` if given."""
        if out is None:
            found = [piece.read(self.name, self.array) for piece in span.pieces]
            return found[0] if len(found) == 1 else np.concatenate(found)
        done = 0
        for piece in span.pieces:
            piece.read(self.name, self.array, out[done : done + piece.count])
            done += piece.count
        return out

    def divide(self, span: Span, rows: int) -> list[tuple[Span, int]]:
        """`span` in parts of at most `rows` stored rows, each with its number of chosen ones."""
        return [(Span((part,)), part.count) for piece in span.pieces for part in piece.divide(rows)]


def block_array(
    plan: RowPlan, read: Reader, name: str, dtype: np.dtype[Any], columns: int | None = None
) -> dask.array.Array:
    """A Dask array of the plan's rows whose blocks are what `read` returns, (n_rows,) or (n_rows, columns)."""
    import dask.array
    from dask.base import tokenize
    from dask.highlevelgraph import HighLevelGraph

    spans = plan.spans
    if not spans:
        return dask.array.from_array(np.empty((0,) if columns is None else (0, columns), dtype))
    marks = None if plan.marks is None else np.packbits(plan.marks)
    paths = [part.path for part in plan.parts]
    key = f"millpond-{name}-{tokenize(str(plan.folder), plan.spec.id, paths, plan.chosen, marks, name, str(dtype))}"
    tail = () if columns is None else (0,)
    layer = {(key, number, *tail): (read.for_span(Span(span)), Span(span)) for number, span in enumerate(spans)}
    row_chunks = tuple(sum(piece.count for piece in span) for span in spans)
    chunks = (row_chunks,) if columns is None else (row_chunks, (columns,))
    return dask.array.Array(HighLevelGraph.from_collections(key, layer), key, chunks, dtype=dtype)


def coordinates(plan: RowPlan) -> dict[str, xr.Variable]:
    """The lazy row coordinates `prompt`, `position` and `token_id`."""
    import xarray as xr

    dtype = np.dtype(np.int32)
    return {
        name: xr.Variable(("row",), block_array(plan, ReadArray(plan, name), name, dtype))
        for name in ("prompt", "position", "token_id")
    }


def activations(plan: RowPlan, hook: str, dtype: str = "float32") -> xr.DataArray:
    """The lazy activations of `hook`, dimensions (row, d_model).

    Raises:
        InvalidInput: `dtype` is neither float32 nor the run's.
    """
    import xarray as xr

    return xr.DataArray(
        activation_blocks(plan, hook, dtype),
        dims=("row", "d_model"),
        coords=coordinates(plan),
        name=hook,
        attrs=activation_attributes(plan, hook),
    )


def activation_blocks(plan: RowPlan, hook: str, dtype: str) -> dask.array.Array:
    """The Dask array of `activations`."""
    kind = check_view_dtype(dtype, plan.spec.dtype)
    return block_array(plan, ReadArray(plan, hook, dtype), hook, kind, plan.spec.d_model)


def activation_attributes(plan: RowPlan, hook: str) -> dict[str, Any]:
    """What an array of activations says of itself."""
    spec = plan.spec
    return {
        "run": spec.name,
        "run_id": spec.id,
        "hook": hook,
        "model": spec.provenance.get("model", ""),
        "dtype": spec.dtype,
    }


def read_all(plan: RowPlan, hook: str, dtype: str) -> NDArray[Any]:
    """All activations of `hook` in memory, read by several threads into one array."""
    out = np.empty((plan.n_rows, plan.spec.d_model), check_view_dtype(dtype, plan.spec.dtype))
    reader = ReadArray(plan, hook, dtype)
    pieces = [piece for span in plan.spans for piece in span]
    starts = np.cumsum([0, *(piece.count for piece in pieces)])

    def read(number: int) -> None:
        out[starts[number] : starts[number + 1]] = reader.read(pieces[number])

    with ThreadPoolExecutor(PARALLEL_REQUESTS, thread_name_prefix="millpond-read") as pool:
        list(pool.map(read, range(len(pieces))))
    return out


def dataset(run: Run, hooks: tuple[str, ...], dtype: str, *, reads: bool) -> xr.Dataset:
    """Hooks, and reads if asked for, as variables; the row coordinates and labels as coordinates."""
    import xarray as xr

    plan, spec = run.plan, run.plan.spec
    variables = {
        hook: xr.Variable(("row", "d_model"), activation_blocks(plan, hook, dtype), activation_attributes(plan, hook))
        for hook in hooks
    }
    for read in run.reads if reads else ():
        variables |= {f"{read}.{name}": values.variable for name, values in run.reads[read].items()}
    labels = {f"label_{name}": label.variable for name, label in run.labels.items()}
    about = {"run": spec.name, "model": spec.provenance.get("model", ""), "dtype": spec.dtype}
    return xr.Dataset(variables, {**coordinates(plan), **labels}, about)
