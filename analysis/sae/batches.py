"""Shuffled training batches, through a bounded buffer, from any step on."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.lazy_chunks import LazyChunks
from millpond.analysis.sae.drawn import DrawnRows, check_finite
from millpond.store.errors import InvalidInput
from millpond.store.stream import ActivationStream, reader_threads

Rows = NDArray[np.float32]
Batch = tuple[Rows, ...]
"""The same rows of each hook, (batch_size, width)."""
Memory = Sequence[NDArray[Any] | None]
"""What chunks of each array are read into, where they can be."""


class Source(Protocol):
    """Batches of one or several hooks, aligned by row."""

    batch_size: int
    widths: tuple[int, ...]
    """Width of each hook."""
    repeatable: bool
    """Whether `batches(step)` may be called again."""

    def batches(self, step: int) -> Generator[Batch]:
        """Batches from number `step` on; the same ones each time. Where it is closed first, its memory serves the next."""
        ...

    def saved(self, step: int) -> None:
        """Batches before number `step` will not be asked for again, because a checkpoint holds what came of them."""
        ...

    def describe(self) -> dict[str, Any]:
        """What decides the batches, to be compared with that of a checkpoint."""
        ...


class ShuffledBatches:
    """Endless batches of the rows of arrays that are aligned by row, each row once an epoch.

    Arrays that fit in `buffer_bytes` are read once and permuted anew in each epoch. Of larger ones, chunks
    are taken in random order, as many as fill half the buffer are mixed and permuted, and the next ones are
    read meanwhile; at least one chunk is held, however small the buffer. Batches run on over the ends of
    groups and epochs. Everything is decided by the seed and the chunks, so any step can be reached by
    counting rows. Of several ranks each reads chunks (or, of arrays in memory, rows) of its own.

    Raises:
        InvalidInput: too few rows, arrays that do not align, or NaN or infinity, named by chunk and row.
    """

    repeatable = True

    def __init__(
        self, arrays: Sequence[Any], batch_size: int, *, seed: int, buffer_bytes: int, rank: int = 0, world: int = 1
    ) -> None:
        plain = [getattr(array, "data", array) if hasattr(array, "dims") else array for array in arrays]
        shapes = [tuple(int(size) for size in np.shape(array)) for array in plain]
        for shape in shapes:
            if len(shape) != 2:
                raise InvalidInput(f"X has shape {shape}; give (rows, d_model)")
            if shape[0] != shapes[0][0]:
                raise InvalidInput(
                    f"the arrays have {shapes[0][0]:,} and {shape[0]:,} rows; give views of the same prompts and positions"
                )
        self.n_rows = shapes[0][0]
        self.widths = tuple(shape[1] for shape in shapes)
        if self.n_rows < batch_size * world:
            raise InvalidInput(
                f"X has {self.n_rows:,} rows, less than one batch of {batch_size * world:,}; lower batch_size"
            )
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        lazy = [hasattr(array, "__dask_graph__") for array in plain]
        if any(lazy) and not all(lazy):
            raise InvalidInput("some arrays are lazy and some in memory; give all of one kind")
        self._held: list[DrawnRows] | None = None
        self._lazy: list[LazyChunks] = []
        self._memory: tuple[Memory, Memory] | None = None
        if not lazy[0]:
            held = [np.asarray(array) for array in plain]
            for array in held:
                check_finite(array, "X", 0)
            self._held = [DrawnRows([array]) for array in held]
            return
        self._lazy = [LazyChunks(array, stored=True) for array in plain]
        for chunks in self._lazy[1:]:
            if chunks.sizes != self._lazy[0].sizes:
                raise InvalidInput("the arrays' row chunks differ; rechunk them alike, or give views of the same run")
        self._sizes = self._lazy[0].sizes
        self._starts = np.cumsum((0, *self._sizes))
        self._fits = 4 * sum(self.widths) * self.n_rows <= buffer_bytes
        self._group_rows = buffer_bytes // (8 * sum(self.widths))
        if not self._fits and world > len(self._sizes):
            raise InvalidInput(f"{world} workers share {len(self._sizes)} chunks; use as many workers at most")

    def batches(self, step: int = 0) -> Generator[Batch]:
        """Yield the batches from number `step` on."""
        rest: Batch = tuple(np.empty((0, width), np.float32) for width in self.widths)
        for group, order in self._groups(step * self.batch_size):

            def taken(first: int, stop: int, group: list[DrawnRows] = group, order: NDArray[np.int64] = order) -> Batch:
                return tuple(rows.draw(order[first:stop]) for rows in group)

            start, count = 0, len(order)
            if len(rest[0]):
                start = min(self.batch_size - len(rest[0]), count)
                rest = tuple(np.concatenate(pair) for pair in zip(rest, taken(0, start), strict=True))
                if len(rest[0]) < self.batch_size:
                    continue
                yield rest
            stop = start + (count - start) // self.batch_size * self.batch_size
            for first in range(start, stop, self.batch_size):
                yield taken(first, first + self.batch_size)
            rest = taken(stop, count)

    __iter__ = batches

    def saved(self, step: int) -> None:
        """See `Source.saved`; rows stay where they are."""

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        chunks = None if self._held is not None and not self._lazy else list(self._sizes)
        return {
            "rows": self.n_rows,
            "widths": list(self.widths),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "workers": self.world,
            "chunks": chunks,
        }

    def _groups(self, skip: int) -> Iterator[tuple[list[DrawnRows], NDArray[np.int64]]]:
        """Rows in memory and the order in which to draw them, from row `skip` on."""
        if self._held is None and self._fits:
            self._held = self._read(range(len(self._sizes)), [None] * len(self._lazy))
        if self._held is not None:
            yield from self._permutations(skip)
        schedule = self._schedule(skip)
        with reader_threads(1, "sae-reader") as reader:
            key, chunks, first = next(schedule)
            here, there = memory = self._memory or self._fresh()
            self._memory = None  # while it is used
            coming = reader.submit(self._read, chunks, here)
            try:
                while True:
                    group = coming.result()
                    order = np.random.default_rng(key).permutation(len(group[0]))[first:]
                    key, chunks, first = next(schedule)
                    here, there = there, here  # fresh memory costs as much as what is read into it
                    coming = reader.submit(self._read, chunks, here)
                    yield group, order
            finally:
                wait([coming])
                self._memory = memory

    def _fresh(self) -> tuple[Memory, Memory]:
        """Memory for two groups of each array."""
        most = max(self._group_rows, *self._sizes)
        here, there = ([chunks.memory(most) for chunks in self._lazy] for _ in range(2))
        return here, there

    def _permutations(self, skip: int) -> Iterator[tuple[list[DrawnRows], NDArray[np.int64]]]:
        assert self._held is not None
        mine = len(range(self.rank, self.n_rows, self.world))
        epoch, skip = divmod(skip, mine)
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.n_rows)
            yield self._held, order[self.rank :: self.world][skip:]
            epoch, skip = epoch + 1, 0

    def _schedule(self, skip: int) -> Iterator[tuple[list[int], list[int], int]]:
        """Seed of the permutation, chunks, and rows to skip, of each group from row `skip` on."""
        epoch = 0
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self._sizes))[self.rank :: self.world]
            if skip >= (total := sum(self._sizes[number] for number in order)):
                skip -= total
            else:
                for number, chunks in enumerate(filled(order, self._sizes, self._group_rows)):
                    rows = sum(self._sizes[chunk] for chunk in chunks)
                    if skip >= rows:
                        skip -= rows
                        continue
                    yield [self.seed, epoch, number, self.rank], chunks, skip
                    skip = 0
            epoch += 1

    def _read(self, numbers: Sequence[int], memory: Memory) -> list[DrawnRows]:
        """The chunks of each array, read into its `memory`; their rows are checked to be finite when they are drawn."""
        names = [(f"chunk {number} of X", int(self._starts[number])) for number in numbers]
        groups = []
        for chunks, room in zip(self._lazy, memory, strict=True):
            parts, done = [], 0
            for number in numbers:
                parts.append(chunks.read_to(number, None if room is None else room[done:]))
                done += self._sizes[number]
            groups.append(DrawnRows(parts, names))
        return groups


class StreamBatches:
    """The batches of a `run.stream`, from where it is when it is given.

    Resuming goes to a step by counting and reads nothing of what came before, so the stream has to be
    given anew from the same place.
    """

    repeatable = False

    def __init__(self, stream: ActivationStream) -> None:
        self._stream = stream
        self._start = stream.state()
        self.batch_size = stream.batch_rows
        self.widths = (stream.plan.spec.d_model,) * len(stream.hooks)

    def batches(self, step: int = 0) -> Generator[Batch]:
        """See `Source.batches`."""
        self._stream.restore(self._start | {"step": self._start["step"] + step})
        for number, batch in enumerate(self._stream, step):
            yield _as_batch(batch, self.widths, number)

    def saved(self, step: int) -> None:
        """See `Source.saved`; rows stay where they are."""

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        hooks = list(self._stream.hooks)
        return {"widths": list(self.widths), "batch_size": self.batch_size, "hooks": hooks, "start": self._start}


class GivenBatches:
    """Batches that the caller made: an iterable of arrays, or of tuples or dicts of arrays aligned by row.

    Resuming skips what was used, so the iterable has to begin where it began before. Iterators are read
    once; of others the first batches are read again to set the threshold.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self._given = batches
        self.repeatable = not isinstance(batches, Iterator)
        opening = iter(batches)
        first = next(opening, None)
        if first is None:
            raise InvalidInput("X has no batches; give at least one")
        self._opening: Iterator[Any] | None = opening
        self._first = first
        checked = _as_batch(first, None, 0)
        self.batch_size, self.widths = len(checked[0]), tuple(rows.shape[1] for rows in checked)

    def batches(self, step: int = 0) -> Generator[Batch]:
        """See `Source.batches`."""
        if self._opening is None:
            if not self.repeatable:
                raise InvalidInput(
                    "this iterable of batches can be read once only; give an array or run[hook] to resume"
                )
            stream, number = iter(self._given), 0
        else:
            stream, number = _chain(self._first, self._opening), 0
            self._opening = None
        for batch in stream:
            if number >= step:
                yield _as_batch(batch, self.widths, number)
            number += 1

    def saved(self, step: int) -> None:
        """See `Source.saved`; rows stay where they are."""

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        return {"widths": list(self.widths), "batch_size": self.batch_size}


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _as_batch(batch: Any, widths: tuple[int, ...] | None, number: int) -> Batch:
    parts = tuple(batch.values()) if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else (batch,)
    found: Batch = tuple(np.asarray(part, np.float32) for part in parts)
    for position, rows in enumerate(found):
        width = None if widths is None else widths[position]
        if rows.ndim != 2 or width not in (None, rows.shape[1]):
            raise InvalidInput(f"a batch has shape {rows.shape}; give (rows, {width or 'd_model'}), the same for all")
        check_finite(rows, f"batch {number}", None)
    return found


def filled(order: NDArray[np.int64], sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Cut `order` into groups of at most `limit` rows and at least one chunk."""
    group: list[int] = []
    rows = 0
    for number in order.tolist():
        if group and rows + sizes[number] > limit:
            yield group
            group, rows = [], 0
        group.append(number)
        rows += sizes[number]
    if group:
        yield group
