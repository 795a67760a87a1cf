"""Rows of several arrays that belong together, cut into blocks that passes read next to the data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.lazy_chunks import LazyChunks
from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    from typing import TypeAlias

    import dask.array
    import xarray as xr

    RowArray: TypeAlias = xr.DataArray | dask.array.Array | NDArray[Any] | "InMemory" | range

BLOCK_BYTES = 64 << 20
"""About how many bytes of the widest array, as NumPy sees it, make a block."""


class InMemory:
    """A NumPy array used by several passes, sent to a cluster once."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.values = values
        self._slices: tuple[Any, list[Any]] | None = None

    def on(self, client: Any, bounds: Sequence[tuple[int, int]]) -> list[Any]:
        """One future for each of the row ranges `bounds`, which the scheduler can make again if a worker is lost."""
        key = (client.id, tuple(bounds))
        if self._slices is None or self._slices[0] != key:
            self._slices = (key, hold(client, [self.values[start:stop] for start, stop in bounds]))
        return self._slices[1]


class Box:
    """Hides a value from Dask, which would walk through containers in search of graphs."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __getstate__(self) -> Any:
        return (self.value,)

    def __setstate__(self, state: Any) -> None:
        (self.value,) = state


def hold(client: Any, values: Sequence[Any]) -> list[Any]:
    """Futures of `values`, kept in the scheduler's task specifications.

    Scattered data dies with the last worker that holds it; this is computed again.
    """
    import dask

    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TB"}):
        return [client.submit(_same, Box(value), pure=False, key=_key(client, "hold")) for value in values]


def _same(box: Box) -> Box:
    return box


def _key(client: Any, what: str) -> str:
    import uuid

    return f"millpond-{what}-{uuid.uuid4().hex}"


class Source(ABC):
    """One of the arrays of an `AlignedRows`, without the rows."""

    @abstractmethod
    def read(self, block: Block, memory: Any) -> Any:
        """The rows of `block`; `memory` is what a task was given of an array in memory."""


@dataclass(frozen=True)
class Numbers(Source):
    """Row numbers."""

    first: int

    def read(self, block: Block, memory: Any) -> NDArray[Any]:
        """Counted from `first`."""
        return np.arange(self.first + block.start, self.first + block.stop)


@dataclass(frozen=True)
class Memory(Source):
    """A NumPy array, of which a task holds its own rows only."""

    def read(self, block: Block, memory: tuple[int, NDArray[Any]]) -> NDArray[Any]:
        """Sliced from the rows that the task holds, which begin at the row `memory[0]`."""
        first = memory[0]
        return memory[1][block.start - first : block.stop - first]


@dataclass(frozen=True)
class Chunks(Source):
    """A Dask array."""

    chunks: LazyChunks

    def read(self, block: Block, memory: Any) -> Any:
        """Read now."""
        return self.chunks.read_chunks(range(block.chunks[0], block.chunks[1]))[: block.stop - block.start]


@dataclass(frozen=True)
class Block:
    """Rows `start` to `stop` of every array, which lie in the chunks `chunks` (from, to) of the lazy ones."""

    start: int
    stop: int
    chunks: tuple[int, int]


class AlignedRows:
    """Arrays whose i-th rows belong together, cut into blocks of equal rows for passes.

    Lazy arrays (DataArray or Dask) must have equal row chunks; a block is one or more neighbouring
    chunks, about `block_bytes` of the widest array. NumPy arrays are sliced to match. A `range`
    yields row numbers. With `stored`, activations of a run that are kept as bfloat16 reach the pass
    as `StoredBfloat16`, undecoded.

    Raises:
        InvalidInput: no rows, different lengths, or different or unknown row chunks.
    """

    def __init__(self, *arrays: RowArray, block_bytes: int = BLOCK_BYTES, stored: bool = False) -> None:
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
        row_bytes = [_row_bytes(array) for array in plain]
        block_rows = max(1, block_bytes // max(row_bytes))
        self.memory = [array if isinstance(array, InMemory) else None for array in plain]
        self.sources = [_source(array, stored) for array in plain]
        read = [source.chunks for source in self.sources if isinstance(source, Chunks)]
        if read and all(chunks.divisible for chunks in read):  # a run's chunks are whole shards: too much for a task
            self.sources = [
                Chunks(source.chunks.divided(block_rows)) if isinstance(source, Chunks) else source
                for source in self.sources
            ]
            read = [source.chunks for source in self.sources if isinstance(source, Chunks)]
        chunks = read[0].sizes if read else _even_chunks(self.n_rows, block_rows)
        self.blocks = _make_blocks(chunks, block_rows)
        self.block_bytes = max(block.stop - block.start for block in self.blocks) * sum(row_bytes)
        """Bytes of the largest block of all arrays, decoded."""
        self._held: tuple[str, Any] | None = None

    def head(self, rows: int) -> AlignedRows:
        """The first block, cut to at most `rows` rows."""
        first = AlignedRows.__new__(AlignedRows)
        block = self.blocks[0]
        first.n_rows = min(rows, block.stop - block.start)
        first.memory, first.sources, first.block_bytes, first._held = self.memory, self.sources, self.block_bytes, None
        first.blocks = [Block(block.start, block.start + first.n_rows, block.chunks)]
        return first

    def local_memory(self) -> list[tuple[int, NDArray[Any]] | None]:
        """What the tasks in this process read arrays in memory from."""
        return [None if held is None else (0, held.values) for held in self.memory]

    def host(self, span: tuple[int, int], hosts: Mapping[str, str]) -> str | None:
        """Who holds most rows of the blocks from `span[0]` to before `span[1]`; `hosts` gives it by URL prefix."""
        rows: dict[str, int] = {}
        chunks = range(self.blocks[span[0]].chunks[0], self.blocks[span[1] - 1].chunks[1])
        for source in self.sources:
            if isinstance(source, Chunks):
                for url, count in source.chunks.rows_by_url(chunks).items():
                    fits = [prefix for prefix in hosts if url == prefix or url.startswith(f"{prefix}/")]
                    if fits:
                        host = hosts[max(fits, key=len)]
                        rows[host] = rows.get(host, 0) + count
        return max(rows, key=lambda host: (rows[host], host)) if rows else None

    def on(self, client: Any) -> Any:
        """A future of the sources and blocks, sent to `client`'s cluster once."""
        if self._held is None or self._held[0] != client.id:
            self._held = (client.id, hold(client, [(self.sources, self.blocks)])[0])
        return self._held[1]


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


def _source(array: Any, stored: bool) -> Source:
    if isinstance(array, _Range):
        return Numbers(array.numbers.start)
    return Memory() if isinstance(array, InMemory) else Chunks(LazyChunks(array, stored=stored))


def _row_bytes(array: Any) -> int:
    if isinstance(array, InMemory):
        array = array.values
    return max(1, int(array.nbytes) // max(1, int(array.shape[0])))


def _even_chunks(n_rows: int, block_rows: int) -> tuple[int, ...]:
    """At least a few blocks, so that small arrays still use several cores."""
    rows = max(1, min(block_rows, max(8192, -(-n_rows // 8))))
    return (rows,) * (n_rows // rows) + ((n_rows % rows,) if n_rows % rows else ())


def _make_blocks(chunks: Sequence[int], block_rows: int) -> list[Block]:
    """Neighbouring chunks together, as many as fit in `block_rows` and at least one."""
    blocks = []
    first = start = stop = 0
    for number, size in enumerate(chunks):
        if stop > start and stop - start + size > block_rows:
            blocks.append(Block(start, stop, (first, number)))
            first, start = number, stop
        stop += int(size)
    blocks.append(Block(start, stop, (first, len(chunks))))
    return blocks


def _listed(numbers: set[int]) -> str:
    return " and ".join(f"{number:,}" for number in sorted(numbers))


def _chunk_text(array: Any) -> str:
    sizes = array.chunks[0]
    return f"{sizes[0]:,} rows x {len(sizes)}" if len(set(sizes[:-1])) <= 1 else f"{len(sizes)} uneven chunks"


def read_ahead(
    sources: Sequence[Source], blocks: Sequence[Block], memory: Sequence[Any], stop: Callable[[], None]
) -> Iterator[list[Any]]:
    """The arrays of each block in turn; the next block is read while the caller works on one.

    `stop` is called before each block and may raise.
    """
    from concurrent.futures import ThreadPoolExecutor

    def read(block: Block) -> list[Any]:
        return [source.read(block, held) for source, held in zip(sources, memory, strict=True)]

    if len(blocks) == 1:
        stop()
        yield read(blocks[0])
        return
    with ThreadPoolExecutor(1, thread_name_prefix="millpond-read-ahead") as reader:
        ahead = reader.submit(read, blocks[0])
        for number in range(len(blocks)):
            stop()
            arrays = ahead.result()
            if number + 1 < len(blocks):
                ahead = reader.submit(read, blocks[number + 1])
            yield arrays
            del arrays
