"""Shuffled training batches from a lazy array, through a bounded buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.passes import LazyChunks
from millpond.store.errors import InvalidInput

Batch = NDArray[np.float32]


class ShuffledBatches:
    """Endless batches (batch_size, d_model) of an array's rows, each row once an epoch.

    An array that fits in `buffer_bytes` is read once and permuted anew in each epoch. Of a larger one,
    chunks are taken in random order, as many as fill half the buffer are mixed and permuted, and the
    next ones are read meanwhile; at least one chunk is held, however small the buffer. Batches run on
    over the ends of groups and epochs.
    """

    def __init__(self, array: Any, batch_size: int, *, seed: int, buffer_bytes: int) -> None:
        data = array.data if hasattr(array, "dims") else array
        self.n_rows, self.d_in = (int(size) for size in data.shape)
        if self.n_rows < batch_size:
            raise InvalidInput(f"X has {self.n_rows:,} rows, less than one batch of {batch_size:,}; lower batch_size")
        self.batch_size, self.seed, self.buffer_bytes = batch_size, seed, buffer_bytes
        self._lazy = LazyChunks(data) if hasattr(data, "__dask_graph__") else None
        self._held = None if self._lazy else np.asarray(data)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the beginning; the same ones each time."""
        rest = np.empty((0, self.d_in), np.float32)
        for group, order in self._groups():
            start = 0
            if len(rest):
                start = min(self.batch_size - len(rest), len(order))
                rest = np.concatenate([rest, group[order[:start]]])
                if len(rest) < self.batch_size:
                    continue
                yield rest
            stop = start + (len(order) - start) // self.batch_size * self.batch_size
            for first in range(start, stop, self.batch_size):
                yield group[order[first : first + self.batch_size]].astype(np.float32, copy=False)
            rest = group[order[stop:]].astype(np.float32, copy=False)

    def _groups(self) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
        """Rows in memory and the order in which to take them."""
        if self._lazy and 4 * self.d_in * self.n_rows <= self.buffer_bytes:
            self._held = self._lazy.read()
        rng = np.random.default_rng(self.seed)
        if self._held is not None:
            while True:
                yield self._held, rng.permutation(self.n_rows)
        with ThreadPoolExecutor(1, thread_name_prefix="sae-reader") as reader:
            loads = self._loads(rng)
            coming = reader.submit(next(loads).read)
            while True:
                group = coming.result()
                coming = reader.submit(next(loads).read)
                yield group, rng.permutation(len(group))

    def _loads(self, rng: np.random.Generator) -> Iterator[LazyChunks]:
        """Chunks to read together, of epoch after epoch; the generator of their order is its own."""
        assert self._lazy is not None
        rng = rng.spawn(1)[0]
        sizes = self._lazy.sizes
        limit = self.buffer_bytes // (8 * self.d_in)
        while True:
            for numbers in _filled(rng.permutation(len(sizes)), sizes, limit):
                yield self._lazy.take(numbers)


def _filled(order: NDArray[np.int64], sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Cut `order` into groups of at most `limit` rows and at least one chunk."""
    group: list[int] = []
    rows = 0
    for number in order.tolist():
        if group and rows + sizes[number] > limit:
            yield group
            group, rows = [], 0
        group.append(number)
        rows += sizes[number]
    yield group
