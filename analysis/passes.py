"""Passes over rows: map blocks of rows to small statistics next to the data, and combine them in a fixed order.

Every analysis is a few of these passes. A pass may serve many hooks, labels and hyper-parameters; each
block is read once in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    from typing import TypeAlias

    import dask.array
    import xarray as xr
    from dask.delayed import Delayed

    RowArray: TypeAlias = xr.DataArray | dask.array.Array | NDArray[Any] | "InMemory" | range

BLOCK_BYTES = 64 << 20

MapFunction = Callable[..., Any]
"""`(state, *blocks) -> statistics`; picklable, pure, returns arrays, numbers, or dicts and tuples of them."""
Combine = Callable[[Any, Any], Any]


class InMemory:
    """A NumPy array used by several passes, sent to a cluster once."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.values = values
        self._remote: tuple[str, Any] | None = None

    def on(self, client: Any) -> Any:
        """The array as an argument of a task: a future on `client`'s cluster, or boxed where there is none."""
        if client is None:
            return _Box(self.values)
        if self._remote is None or self._remote[0] != client.id:
            self._remote = (client.id, _scatter(client, self.values))
        return self._remote[1]


class AlignedRows:
    """Arrays whose i-th rows belong together, cut into blocks of equal rows for passes.

    Lazy arrays (DataArray or Dask) must have equal row chunks; a block is one or more neighbouring
    chunks, about `block_bytes` of the widest array. NumPy arrays are sliced to match. A `range`
    yields row numbers.

    Raises:
        InvalidInput: no rows, different lengths, or different or unknown row chunks.
    """

    def __init__(self, *arrays: RowArray, block_bytes: int = BLOCK_BYTES) -> None:
        plain = [_plain(array) for array in arrays]
        lengths = {len(array.values) if isinstance(array, InMemory) else int(array.shape[0]) for array in plain}
        if len(lengths) != 1:
            raise InvalidInput(f"the arrays have {_listed(lengths)} rows; give arrays with one row for each token")
        self.n_rows = lengths.pop()
        if not self.n_rows:
            raise InvalidInput("the arrays have 0 rows; give at least one")
        lazy = [array for array in plain if _is_lazy(array)]
        for array in lazy[1:]:
            if array.chunks[0] != lazy[0].chunks[0]:
                raise InvalidInput(
                    f"row chunks differ: {_chunk_text(lazy[0])} and {_chunk_text(array)}; "
                    "rechunk one with .chunk() or .rechunk() so that they are equal"
                )
        widest = max(_row_bytes(array) for array in plain)
        block_rows = max(1, block_bytes // widest)
        chunks = lazy[0].chunks[0] if lazy else _even_chunks(self.n_rows, block_rows)
        self.blocks = _make_blocks([_source(array) for array in plain], chunks, block_rows)

    def head(self, rows: int) -> AlignedRows:
        """The first block, cut to at most `rows` rows."""
        first = AlignedRows.__new__(AlignedRows)
        block = self.blocks[0]
        first.n_rows = min(rows, block.stop - block.start)
        first.blocks = [_Block(block.sources, block.start, block.start + first.n_rows)]
        return first


@dataclass(frozen=True)
class Pass:
    """One map and reduction: `function(state, *blocks)` over every block of `rows`, combined in block order."""

    rows: AlignedRows
    function: MapFunction
    state: Any = None
    combine: Combine | None = None
    """How two neighbouring statistics become one; `add` when not given."""


def run_pass(one: Pass, *, description: str = "pass", progress: bool = True) -> Any:
    """Run one pass; see `run_passes`."""
    return run_passes([one], description=description, progress=progress)[0]


def run_passes(passes: Sequence[Pass], *, description: str = "pass", progress: bool = True) -> list[Any]:
    """Run several passes at once and return the statistics of each.

    Runs on the active `dask.distributed` client if there is one, else on Dask's threads (or on what
    `dask.config` says). One task a block reads it and maps it, so at most one block a worker thread
    is in memory; statistics are combined in a binary tree over the block order, so the result does
    not depend on which task ends first. Memory is bounded by
    `threads * (max(block_bytes, widest chunk) + temporaries of the map) + (threads + log2(blocks)) * statistics`.
    The bar counts blocks on threads and passes on a cluster.
    """
    import dask
    from dask.base import get_scheduler
    from tqdm.auto import tqdm

    owner = getattr(get_scheduler(), "__self__", None)
    client = owner if hasattr(owner, "scatter") else None
    n_blocks = sum(len(one.rows.blocks) for one in passes)
    bar = tqdm(
        total=n_blocks, desc=description, unit="block", delay=1.0, leave=False, disable=None if progress else True
    )
    with ExitStack() as stack:
        stack.enter_context(bar)
        tick = None if client is not None else _Ticker(bar)
        if client is None and n_blocks > 1:
            stack.enter_context(one_blas_thread())
        totals = [_graph(one, client, tick) for one in passes]
        done = dask.compute(*totals)
        if client is not None:
            bar.update(n_blocks)
    return [box.value for box in done]


def add(left: Any, right: Any) -> Any:
    """Sum two statistics of the same shape: numbers, arrays, or dicts and tuples of them."""
    if isinstance(left, dict):
        return {name: add(value, right[name]) for name, value in left.items()}
    if isinstance(left, tuple):
        return tuple(add(a, b) for a, b in zip(left, right, strict=True))
    return left + right


def join(left: list[Any], right: list[Any]) -> list[Any]:
    """Concatenate two lists of per-block values, in block order."""
    return left + right


class _Box:
    """Hides a value from Dask, which would walk through containers in search of graphs."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __getstate__(self) -> Any:
        return (self.value,)

    def __setstate__(self, state: Any) -> None:
        (self.value,) = state


class _Ticker:
    def __init__(self, bar: Any) -> None:
        self.bar, self.lock = bar, threading.Lock()

    def __call__(self) -> None:
        with self.lock:
            self.bar.update()


class _Source:
    """One of the arrays of an `AlignedRows`."""

    def read(self, block: _Block, memory: Any) -> NDArray[Any]:
        raise NotImplementedError


class _Numbers(_Source):
    def __init__(self, first: int) -> None:
        self.first = first

    def read(self, block: _Block, memory: Any) -> NDArray[Any]:
        return np.arange(self.first + block.start, self.first + block.stop)


class _Sliced(_Source):
    def __init__(self, held: InMemory) -> None:
        self.held = held

    def read(self, block: _Block, memory: NDArray[Any]) -> NDArray[Any]:
        return memory[block.start : block.stop]


class LazyChunks:
    """The row chunks of a Dask array, each with the small graph that reads it, whole rows at a time."""

    def __init__(self, array: dask.array.Array) -> None:
        import dask
        from dask.optimization import cull

        if array.ndim == 2:
            array = array.rechunk({1: -1})
        (array,) = dask.optimize(array)
        graph = dict(array.__dask_graph__())
        keys = [(array.name, number, *(0,) * (array.ndim - 1)) for number in range(len(array.chunks[0]))]
        self.sizes = tuple(int(size) for size in array.chunks[0])
        self._parts = [(cull(graph, [key])[0], key) for key in keys]

    def take(self, numbers: Iterable[int]) -> LazyChunks:
        """Some of the chunks, in the order given."""
        chosen = LazyChunks.__new__(LazyChunks)
        numbers = list(numbers)
        chosen.sizes = tuple(self.sizes[number] for number in numbers)
        chosen._parts = [self._parts[number] for number in numbers]
        return chosen

    def read(self) -> NDArray[Any]:
        """All chunks, one after another, in this thread."""
        import dask

        read = [np.asarray(dask.get(graph, [key])[0]) for graph, key in self._parts]
        return read[0] if len(read) == 1 else np.concatenate(read)


class _Lazy(_Source):
    def __init__(self, chunks: LazyChunks) -> None:
        self.chunks = chunks

    def read(self, block: _Block, memory: Any) -> NDArray[Any]:
        return self.chunks.read()[: block.stop - block.start]


class _Block:
    """Rows `start` to `stop` of every array; plain, so that Dask passes it on unread."""

    def __init__(self, sources: Sequence[_Source], start: int, stop: int) -> None:
        self.sources, self.start, self.stop = sources, start, stop

    def held(self) -> list[InMemory]:
        return [source.held for source in self.sources if isinstance(source, _Sliced)]

    def remote(self) -> _Block:
        """The block without the arrays that the cluster already holds."""
        sources = [_Sliced(InMemory(np.empty(0))) if isinstance(s, _Sliced) else s for s in self.sources]
        return _Block(sources, self.start, self.stop)


def _map_block(
    function: MapFunction, state: _Box, block: _Block, tick: Callable[[], None] | None, *memory: _Box
) -> _Box:
    values = iter(memory)
    arrays = [s.read(block, next(values).value if isinstance(s, _Sliced) else None) for s in block.sources]
    result = function(state.value, *arrays)
    if tick is not None:
        tick()
    return _Box(result)


def _combine(combine: Combine, left: _Box, right: _Box) -> _Box:
    return _Box(combine(left.value, right.value))


def _graph(one: Pass, client: Any, tick: Callable[[], None] | None) -> Delayed:
    from dask import delayed

    state = _Box(one.state) if client is None else _scatter(client, one.state)
    memory = [held.on(client) for held in one.rows.blocks[0].held()]
    mapped = delayed(_map_block, pure=False)
    parts = [
        mapped(one.function, state, block if client is None else block.remote(), tick, *memory)
        for block in one.rows.blocks
    ]
    combined = delayed(_combine, pure=False)
    while len(parts) > 1:
        pairs = [combined(one.combine or add, *parts[i : i + 2]) for i in range(0, len(parts) - 1, 2)]
        parts = pairs + parts[len(pairs) * 2 :]
    return parts[0]


def _scatter(client: Any, value: Any) -> Any:
    return client.scatter([_Box(value)], broadcast=True, hash=False)[0]


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Blocks already use every core; threads inside BLAS would only wait for each other.

    The small factorisations between passes gain little from a second thread, and lose much on a busy machine.
    """
    import scipy.linalg  # noqa: F401  # threadpool_limits sees only the BLAS copies that are loaded; SciPy brings its own
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1, user_api="blas"):
        yield


def _is_lazy(array: Any) -> bool:
    return hasattr(array, "__dask_graph__")


def _plain(array: Any) -> Any:
    """The array under a DataArray or pandas object: a Dask array, a range, or memory."""
    if isinstance(array, InMemory | range):
        plain: Any = _Range(array) if isinstance(array, range) else array
    else:
        data = getattr(array, "data", array) if hasattr(array, "dims") else array
        plain = data if _is_lazy(data) else InMemory(np.asarray(data))
    if _is_lazy(plain) and any(np.isnan(size) for size in plain.chunks[0]):
        raise InvalidInput("the row chunks of a Dask array are unknown; call .compute_chunk_sizes() on it first")
    return plain


class _Range:
    """A `range` with the little of an array's interface that is needed here."""

    def __init__(self, numbers: range) -> None:
        if numbers.step != 1:
            raise InvalidInput(f"row numbers go up by {numbers.step}; give a range with step 1")
        self.numbers, self.shape, self.nbytes = numbers, (len(numbers),), 8 * len(numbers)


def _source(array: Any) -> _Source:
    if isinstance(array, _Range):
        return _Numbers(array.numbers.start)
    return _Sliced(array) if isinstance(array, InMemory) else _Lazy(LazyChunks(array))


def _row_bytes(array: Any) -> int:
    if isinstance(array, InMemory):
        array = array.values
    return max(1, int(array.nbytes) // max(1, int(array.shape[0])))


def _even_chunks(n_rows: int, block_rows: int) -> tuple[int, ...]:
    """At least a few blocks, so that small arrays still use several cores."""
    rows = max(1, min(block_rows, max(8192, -(-n_rows // 8))))
    return (rows,) * (n_rows // rows) + ((n_rows % rows,) if n_rows % rows else ())


def _make_blocks(sources: Sequence[_Source], chunks: Sequence[int], block_rows: int) -> list[_Block]:
    """Neighbouring chunks together, as many as fit in `block_rows` and at least one."""
    blocks = []
    first = start = stop = 0
    for number, size in enumerate(chunks):
        if stop > start and stop - start + size > block_rows:
            blocks.append(_block(sources, range(first, number), start, stop))
            first, start = number, stop
        stop += int(size)
    blocks.append(_block(sources, range(first, len(chunks)), start, stop))
    return blocks


def _block(sources: Sequence[_Source], chunks: range, start: int, stop: int) -> _Block:
    return _Block([_Lazy(s.chunks.take(chunks)) if isinstance(s, _Lazy) else s for s in sources], start, stop)


def _listed(numbers: set[int]) -> str:
    return " and ".join(f"{number:,}" for number in sorted(numbers))


def _chunk_text(array: Any) -> str:
    sizes = array.chunks[0]
    return f"{sizes[0]:,} rows x {len(sizes)}" if len(set(sizes[:-1])) <= 1 else f"{len(sizes)} uneven chunks"
