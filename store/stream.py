"""Shuffled batches for trainers: whole chunks in random order, mixed in a bounded buffer."""

from __future__ import annotations

import math
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.store.dtypes import check_view_dtype, decode_into, to_torch
from millpond.store.errors import InvalidInput
from millpond.store.rows import RowPlan
from millpond.store.shards import read_rows, read_rows_to

if TYPE_CHECKING:
    import torch.utils.data

Rows = NDArray[Any]
READERS = 2
"""Threads that read."""
TASK_BYTES = 8 << 20
"""What a thread reads before it looks for something else to do."""
PAGE_BYTES = 4096
"""Memory begins at a multiple: the system copies a seventh faster to pages than across them."""


@contextmanager
def reader_threads(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads that a generator reads ahead with.

    They are not waited for: an abandoned generator is closed by the garbage collector, perhaps while its thread holds
    one of the locks that joining a thread takes.
    """
    readers = ThreadPoolExecutor(count, thread_name_prefix=name)
    try:
        yield readers
    finally:
        readers.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class _Group:
    """Rows that are mixed together: an interval of an epoch's chunks laid end to end."""

    epoch: int
    number: int
    start: int
    stop: int
    skip: int
    """Rows, after mixing, that were given out before."""


class ActivationStream(Iterator[Any]):
    """Batches in an order that the seed decides; the next group of chunks is read meanwhile.

    In each epoch the chunks are permuted and laid end to end. Rank r of w takes the r-th of w equal
    intervals of that sequence, so ranks are disjoint, together they are all rows, and they differ by at
    most a row. Its interval is cut into groups of `buffer_rows` rows, each permuted, and batches are cut
    from the groups laid end to end, epoch after epoch. So every step is reached by counting: resuming
    reads nothing of what came before. Two groups are held as they are stored; a batch is a copy of its rows.
    """

    def __init__(
        self,
        plan: RowPlan,
        hooks: str | tuple[str, ...],
        batch_rows: int,
        *,
        seed: int = 0,
        epochs: int | None = None,
        buffer_rows: int = 65_536,
        rank: int = 0,
        world: int = 1,
        dtype: str = "float32",
        state: Mapping[str, Any] | None = None,
    ) -> None:
        names = (hooks,) if isinstance(hooks, str) else hooks
        for name, value, least in (
            ("batch_rows", batch_rows, 1),
            ("seed", seed, 0),
            ("epochs", epochs, 0),
            ("buffer_rows", buffer_rows, 1),
            ("world", world, 1),
            ("rank", rank, 0),
        ):
            if value is not None and value < least:
                raise InvalidInput(f"{name} is {value}; give {least} or more")
        if rank >= world:
            raise InvalidInput(f"rank is {rank}; give 0 to {world - 1}, world being {world}")
        if plan.n_rows // world < batch_rows:
            raise InvalidInput(
                f"batch_rows is {batch_rows}; give 1 to {plan.n_rows // world}, the rows of this view of {plan.spec.name!r}"
                + (f" for each of {world} ranks" if world > 1 else "")
            )
        self.plan = plan
        self.hooks = names
        self.batch_rows = batch_rows
        self.seed = seed
        self.epochs = epochs
        self.buffer_rows = max(buffer_rows, batch_rows, 2 * plan.spec.chunk_rows)
        self.rank, self.world = rank, world
        self.dtype = dtype
        self._kind = check_view_dtype(dtype, plan.spec.dtype)
        self._single = isinstance(hooks, str)
        table = plan.table(plan.spec.chunk_rows)
        counts = plan.counts(table)
        self._table, self._chunks, self._counts = table, np.flatnonzero(counts), counts[counts > 0]
        self._share = plan.n_rows * rank // world, plan.n_rows * (rank + 1) // world
        self._fingerprint = self._identify()
        stored = plan.spec.activation_array.dtype
        rows = min(self.buffer_rows, self._share[1] - self._share[0])
        self._stored = _Memory((rows, plan.spec.d_model), np.dtype(stored), 3 * len(names))
        self._decoded = _Memory((batch_rows, plan.spec.d_model), self._kind, 3 * len(names))
        self.step = 0 if state is None else self._restore(state)
        """Batches given out so far."""
        self._batches = self._make_batches(self.step)

    def _identify(self) -> str:
        """Tells two streams apart whose batches differ."""
        paths = [(part.path, part.rows) for part in self.plan.parts]
        order = (self.plan.spec.id, paths, self.seed, self.buffer_rows, self.batch_rows, self.rank, self.world)
        digest = sha256(repr(order).encode())
        digest.update(np.packbits(self.plan.chosen if self.plan.marks is None else self.plan.marks).data)
        return digest.hexdigest()[:16]

    def state(self) -> dict[str, Any]:
        """Where the stream is, to be given to `run.stream(state=...)` with the same arguments; small, and JSON."""
        return {"step": self.step, "stream": self._fingerprint}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where another stream with the same arguments was when it gave `state`; reads nothing.

        Raises:
            InvalidInput: the state is that of another stream.
        """
        step = self._restore(state)
        self._batches.close()
        self.step, self._batches = step, self._make_batches(step)

    def _restore(self, state: Mapping[str, Any]) -> int:
        step = state.get("step")
        if set(state) != {"step", "stream"} or not isinstance(step, int) or step < 0:
            raise InvalidInput(f"state is {dict(state)!r}; give what stream.state() returned")
        if state["stream"] != self._fingerprint:
            raise InvalidInput(
                f"state is that of another stream ({state['stream']}, not {self._fingerprint}); give the same view of the "
                "same run, seed, batch_rows, buffer_rows, rank and world"
            )
        return step

    def __iter__(self) -> ActivationStream:
        return self

    def __repr__(self) -> str:
        epochs = "without end" if self.epochs is None else f"{self.epochs} epochs"
        return (
            f"<ActivationStream of run {self.plan.spec.name!r}, {', '.join(self.hooks)}: batches of {self.batch_rows:,} rows, "
            f"{epochs}, {self.step:,} given out>"
        )

    def __next__(self) -> Any:
        batch = next(self._batches)
        self.step += 1
        return batch if not self._single else batch[self.hooks[0]]

    def torch(self) -> torch.utils.data.IterableDataset[Any]:
        """The same batches as tensors, for `DataLoader(..., batch_size=None)` without worker processes."""
        return _torch_dataset(self)

    def _groups(self, skip: int) -> Iterator[_Group]:
        """The groups from row `skip` of this rank's endless sequence on."""
        first, last = self._share
        epoch, skip = divmod(skip, last - first)
        start = first + skip // self.buffer_rows * self.buffer_rows
        skip %= self.buffer_rows
        while self.epochs is None or epoch < self.epochs:
            while start < last:
                stop = min(start + self.buffer_rows, last)
                yield _Group(epoch, (start - first) // self.buffer_rows, start, stop, skip)
                start, skip = stop, 0
            epoch, start = epoch + 1, first

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The chunks of an epoch in their order, and the rows before each."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._chunks))
        return order, np.concatenate([[0], np.cumsum(self._counts[order])])

    def _make_batches(self, step: int) -> Generator[dict[str, Rows]]:
        groups = self._groups(step * self.batch_rows)
        with reader_threads(READERS, "millpond-stream") as readers:
            loader = _Loader(self, readers)
            ahead = loader.submit(next(groups, None))
            batch: dict[str, Rows] = {}
            filled = 0
            try:
                while ahead:
                    held, ahead = ahead.result(), None
                    wanted = True
                    at = held.skip
                    while at < held.count:
                        take = min(self.batch_rows - filled, held.count - at)
                        parts = {hook: rows[at : at + take] for hook, rows in held.rows.items()}
                        at += take
                        if take < self.batch_rows:  # a batch that goes on in the next group
                            if not filled:
                                batch = {
                                    hook: np.empty((self.batch_rows, *rows.shape[1:]), rows.dtype)
                                    for hook, rows in parts.items()
                                }
                            for hook, rows in parts.items():
                                batch[hook][filled : filled + take] = rows
                            filled = (filled + take) % self.batch_rows
                            if filled:
                                continue
                            parts, batch = batch, {}
                        # the next group is begun when the batch before this group's first was given back, so that it can
                        # have the memory of the group before
                        if wanted and at == held.count:
                            ahead, wanted = loader.submit(next(groups, None)), False
                        yield self._as_asked(parts)
                        del parts
                        if wanted:
                            ahead, wanted = loader.submit(next(groups, None)), False
                    if wanted:  # no batch ended in it
                        ahead = loader.submit(next(groups, None))
                    del held  # its memory is used again when no batch of it is left
            finally:
                if ahead:
                    ahead.cancel()

    def _as_asked(self, stored: dict[str, Rows]) -> dict[str, Rows]:
        """A batch in the stream's dtype."""
        spec = self.plan.spec
        if self.dtype == spec.dtype:
            return {hook: rows.view(self._kind) for hook, rows in stored.items()}
        given = {}
        for hook, rows in stored.items():
            given[hook] = self._decoded.take()
            decode_into(rows, spec.dtype, given[hook])
        return given


class _Memory:
    """Arrays of one shape whose memory is used again when nobody holds a view, tensor or buffer of them.

    New memory has to be mapped and zeroed by the system, which takes longer than reading rows into it.
    """

    def __init__(self, shape: tuple[int, int], dtype: np.dtype[Any], most: int) -> None:
        self._shape, self._dtype, self._most = shape, dtype, most
        self._blocks: list[Rows] = []  # which NumPy makes the base of every view of a view of them
        self._alone = _uses([np.empty(0)], 0)

    def take(self) -> Rows:
        """An array with any values."""
        for number in range(len(self._blocks)):
            if _uses(self._blocks, number) <= self._alone:
                return self._array(self._blocks[number])
        block = np.empty(math.prod(self._shape) * self._dtype.itemsize + PAGE_BYTES, np.uint8)
        self._blocks = [*self._blocks, block][-self._most :]
        return self._array(block)

    def _array(self, block: Rows) -> Rows:
        start = -block.ctypes.data % PAGE_BYTES
        return block[start : start + len(block) - PAGE_BYTES].view(self._dtype).reshape(self._shape)


def _uses(arrays: list[Rows], number: int) -> int:
    return sys.getrefcount(arrays[number])


@dataclass(frozen=True)
class _Pending:
    """A group whose pieces are being read."""

    rows: dict[str, Rows]
    """As they are stored, of each hook, in the group's order."""
    count: int
    skip: int
    tasks: Sequence[Future[None]]

    def result(self) -> _Pending:
        """The group once its rows are there."""
        for task in self.tasks:
            task.result()
        return self

    def cancel(self) -> None:
        for task in self.tasks:
            task.cancel()


class _Loader:
    """Reads groups: a few chunks are one task of the readers, which puts their rows where the group's order wants them."""

    def __init__(self, stream: ActivationStream, readers: ThreadPoolExecutor) -> None:
        self.stream, self.readers = stream, readers
        self._array = array = stream.plan.spec.activation_array
        self._chunks = max(TASK_BYTES // (array.row_bytes * array.chunk_rows * len(stream.hooks)), 1)
        self._epoch = -1
        self._order: NDArray[np.int64] = np.zeros(0, np.int64)
        self._before: NDArray[np.int64] = np.zeros(0, np.int64)

    def submit(self, group: _Group | None) -> _Pending | None:
        if group is None:
            return None
        stream = self.stream
        if group.epoch != self._epoch:
            self._epoch, (self._order, self._before) = group.epoch, stream._order(group.epoch)
        n = group.stop - group.start
        rows = {hook: stream._stored.take()[:n] for hook in stream.hooks}
        place = np.random.default_rng([stream.seed, group.epoch, group.number, stream.rank, stream.world]).permutation(
            n
        )
        first = int(np.searchsorted(self._before, group.start, "right")) - 1
        last = int(np.searchsorted(self._before, group.stop, "left"))
        parts = []
        for index in range(first, last):
            low = max(int(self._before[index]), group.start)
            high = min(int(self._before[index + 1]), group.stop)
            chunk = int(self._order[index])
            inside = slice(low - int(self._before[index]), high - int(self._before[index]))
            parts.append((chunk, inside, place[low - group.start : high - group.start]))
        tasks = [
            self.readers.submit(self._load, parts[begin : begin + self._chunks], rows)
            for begin in range(0, len(parts), self._chunks)
        ]
        return _Pending(rows, n, group.skip, tasks)

    def _load(self, parts: Sequence[tuple[int, slice, NDArray[np.int64]]], target: dict[str, Rows]) -> None:
        for chunk, inside, place in parts:
            self._load_chunk(chunk, inside, place, target)

    def _load_chunk(self, chunk: int, inside: slice, place: NDArray[np.int64], target: dict[str, Rows]) -> None:
        """The chosen rows `inside` of a chunk, the number of which counts those that have any, to their places."""
        plan = self.stream.plan
        block = self.stream._table[int(self.stream._chunks[chunk])]
        whole = self.stream._counts[chunk] == block.stop - block.start
        mask = slice(None) if whole else plan.mask(block)
        held = None if isinstance(mask, slice) else np.flatnonzero(mask)[inside]
        low, high = (inside.start, inside.stop) if held is None else (int(held[0]), int(held[-1]) + 1)
        folder = plan.folder / plan.parts[block.part].path
        for hook, rows in target.items():
            if held is None or len(held) == high - low:
                read_rows_to(folder / hook, self._array, block.start + low, rows, place)
            else:
                stored = read_rows(folder / hook, self._array, block.start + low, block.start + high)
                rows[place] = stored[held - low]


def _torch_dataset(stream: ActivationStream) -> torch.utils.data.IterableDataset[Any]:
    import torch.utils.data

    class TorchStream(torch.utils.data.IterableDataset[Any]):
        """Tensors that share the batches' memory."""

        def __iter__(self) -> Iterator[Any]:
            if torch.utils.data.get_worker_info() is not None:
                raise InvalidInput("num_workers is not 0; the stream reads ahead by itself: use num_workers=0")
            for batch in stream:
                if isinstance(batch, dict):
                    yield {hook: to_torch(rows) for hook, rows in batch.items()}
                else:
                    yield to_torch(batch)

        def state_dict(self) -> dict[str, Any]:
            """As torchdata's stateful loaders expect."""
            return stream.state()

    return TorchStream()
