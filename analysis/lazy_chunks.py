"""The chunks of a lazy array, read one by one without its graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import dask.array


@dataclass(frozen=True)
class StoredBfloat16:
    """Rows as the lake stores them: bfloat16 bits (rows, d_model). `millpond.analysis.tiles` decodes them in the cache."""

    bits: NDArray[np.uint16]

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and width."""
        return self.bits.shape

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, rows: slice) -> StoredBfloat16:
        return StoredBfloat16(self.bits[rows])


class LazyChunks:
    """The row chunks of a Dask array, each with the small graph that reads it, whole rows at a time.

    When every chunk is one call of the same function, as in a run's arrays, only that function and the
    arguments are kept, so that many chunks pickle small.
    """

    def __init__(self, array: dask.array.Array, *, stored: bool = False) -> None:
        import dask
        from dask.optimization import cull

        if array.ndim == 2 and len(array.chunks[1]) > 1:
            array = array.rechunk({1: -1})
        (array,) = dask.optimize(array)
        graph = dict(array.__dask_graph__())
        keys = [(array.name, number, *(0,) * (array.ndim - 1)) for number in range(len(array.chunks[0]))]
        self.sizes = tuple(int(size) for size in array.chunks[0])
        self._reader, self._parts = _one_reader([graph[key] for key in keys])
        if self._reader is None:
            self._parts = [(cull(graph, [key])[0], key) for key in keys]
        self._stored = stored and hasattr(self._reader, "stored")

    @property
    def reader(self) -> Any:
        """The function of which every chunk is one call; None if there is no such one."""
        return self._reader

    @property
    def divisible(self) -> bool:
        """Whether the chunks can be read in smaller parts, as a run's can."""
        return hasattr(self._reader, "divide")

    def divided(self, rows: int) -> LazyChunks:
        """The same rows in chunks of at most about `rows`."""
        parts = [part for span in self._parts for part in self._reader.divide(span, rows)]
        chosen = LazyChunks.__new__(LazyChunks)
        chosen.sizes = tuple(count for _, count in parts)
        chosen._reader, chosen._stored = self._reader, self._stored
        chosen._parts = [part for part, _ in parts]
        return chosen

    def take(self, numbers: Iterable[int]) -> LazyChunks:
        """Some of the chunks, in the order given."""
        chosen = LazyChunks.__new__(LazyChunks)
        numbers = list(numbers)
        chosen.sizes = tuple(self.sizes[number] for number in numbers)
        chosen._reader, chosen._stored = self._reader, self._stored
        chosen._parts = [self._parts[number] for number in numbers]
        return chosen

    def rows_by_url(self, numbers: Iterable[int]) -> dict[str, int]:
        """How many rows of these chunks lie below which URL; empty for arrays that are no run's."""
        rows: dict[str, int] = {}
        if self.divisible:
            for number in numbers:
                for url, count in self._parts[number].rows_by_url().items():
                    rows[url] = rows.get(url, 0) + count
        return rows

    def read(self) -> Any:
        """All chunks, one after another, in this thread."""
        return self.read_chunks(range(len(self._parts)))

    def memory(self, rows: int) -> NDArray[Any] | None:
        """Memory for so many stored rows, which `read_to` may fill again and again; None if that cannot be done."""
        if not self._stored:
            return None
        return np.empty((rows, self._reader.array.columns), self._reader.array.dtype)

    def read_to(self, number: int, memory: NDArray[Any] | None) -> Any:
        """As `read_chunks` of one chunk, into the first rows of what `memory` gave."""
        if memory is None:
            return self.read_chunks([number])
        rows = self._reader.stored(self._parts[number], memory[: self.sizes[number]])
        return StoredBfloat16(rows) if rows.dtype == np.uint16 else rows

    def read_chunks(self, numbers: Iterable[int]) -> Any:
        """Some of the chunks; `StoredBfloat16` if stored rows were asked for and are bfloat16."""
        import dask

        parts = [self._parts[number] for number in numbers]
        if self._reader is None:
            read = [np.asarray(dask.get(graph, [key])[0]) for graph, key in parts]
        elif self._stored:
            read = [self._reader.stored(argument) for argument in parts]
        else:
            read = [self._reader(argument) for argument in parts]
        rows = read[0] if len(read) == 1 else np.concatenate(read)
        return StoredBfloat16(rows) if self._stored and rows.dtype == np.uint16 else rows


def _one_reader(tasks: Sequence[Any]) -> tuple[Any, list[Any]]:
    """The function that all tasks call and the argument of each; (None, []) if they are not of that kind."""
    functions, arguments = [], []
    for task in tasks:
        args: tuple[Any, ...] = getattr(task, "args", ())
        if len(args) != 1 or getattr(task, "kwargs", None) or getattr(task, "dependencies", True):
            return None, []
        functions.append(task.func)
        arguments.append(args[0])
    return (functions[0], arguments) if all(one is functions[0] for one in functions) else (None, [])
