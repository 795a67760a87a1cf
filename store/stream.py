"""Shuffled batches for trainers: whole chunks in random order, mixed in a bounded buffer."""

from __future__ import annotations

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
from millpond.store.shards import read_rows

if TYPE_CHECKING:
    import torch.utils.data

Rows = NDArray[Any]
READERS = 2
"""Threads that read."""
DECODE_BYTES = 1 << 18
"""Rows are decoded so many stored bytes at a time, which a core's cache holds."""


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
                    held = ahead.result()
                    ahead = loader.submit(next(groups, None))
                    at = held.skip
                    while at < len(held.order):
                        if not filled:
                            shape = (self.batch_rows, self.plan.spec.d_model)
                            batch = {hook: np.empty(shape, self._kind) for hook in self.hooks}
                        take = min(self.batch_rows - filled, len(held.order) - at)
                        for hook, rows in batch.items():
                            self._gather(held.rows[hook], held.order[at : at + take], rows[filled : filled + take])
                        at, filled = at + take, (filled + take) % self.batch_rows
                        if not filled:
                            yield batch
                    loader.reuse(held)
            finally:
                if ahead:
                    ahead.cancel()

    def _gather(self, stored: Rows, order: NDArray[np.int64], out: Rows) -> None:
        """The rows `order` of a group, as the stream's dtype; mode "clip" because NumPy buffers `out` otherwise."""
        spec = self.plan.spec
        if self.dtype == spec.dtype:
            np.take(stored, order, axis=0, out=out.view(stored.dtype), mode="clip")
            return
        step = max(DECODE_BYTES // spec.activation_array.row_bytes, 1)
        for first in range(0, len(order), step):
            rows = np.take(stored, order[first : first + step], axis=0)
            decode_into(rows, spec.dtype, out[first : first + step])


@dataclass(frozen=True)
class _Pending:
    """A group whose pieces are being read."""

    rows: dict[str, Rows]
    """As they are stored, chunk after chunk; of each hook."""
    order: NDArray[np.int64]
    """Which of them is the group's first, second and so on."""
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
    """Reads groups, into two buffers that take turns: every chunk is one task of the readers."""

    def __init__(self, stream: ActivationStream, readers: ThreadPoolExecutor) -> None:
        self.stream, self.readers = stream, readers
        self._array = stream.plan.spec.activation_array
        self._free: list[dict[str, Rows]] = []
        self._epoch = -1
        self._order: NDArray[np.int64] = np.zeros(0, np.int64)
        self._before: NDArray[np.int64] = np.zeros(0, np.int64)

    def reuse(self, group: _Pending) -> None:
        """Read another group to where this one is."""
        self._free.append(group.rows)

    def _buffer(self) -> dict[str, Rows]:
        if self._free:
            return self._free.pop()
        stream = self.stream
        first, last = stream._share
        shape = min(stream.buffer_rows, last - first), stream.plan.spec.d_model
        return {hook: np.empty(shape, self._array.dtype) for hook in stream.hooks}

    def submit(self, group: _Group | None) -> _Pending | None:
        if group is None:
            return None
        stream = self.stream
        if group.epoch != self._epoch:
            self._epoch, (self._order, self._before) = group.epoch, stream._order(group.epoch)
        n = group.stop - group.start
        rows = self._buffer()
        mixed = np.random.default_rng([stream.seed, group.epoch, group.number, stream.rank, stream.world])
        order = np.empty(n, np.int64)
        order[mixed.permutation(n)] = np.arange(n)
        first = int(np.searchsorted(self._before, group.start, "right")) - 1
        last = int(np.searchsorted(self._before, group.stop, "left"))
        tasks = []
        for index in range(first, last):
            low = max(int(self._before[index]), group.start)
            high = min(int(self._before[index + 1]), group.stop)
            chunk = int(self._order[index])
            inside = slice(low - int(self._before[index]), high - int(self._before[index]))
            target = {hook: values[low - group.start : high - group.start] for hook, values in rows.items()}
            tasks.append(self.readers.submit(self._load, chunk, inside, target))
        return _Pending(rows, order, group.skip, tasks)

    def _load(self, chunk: int, inside: slice, target: dict[str, Rows]) -> None:
        """The chosen rows `inside` of a chunk, the number of which counts those that have any."""
        plan = self.stream.plan
        block = self.stream._table[int(self.stream._chunks[chunk])]
        whole = self.stream._counts[chunk] == block.stop - block.start
        mask = slice(None) if whole else plan.mask(block)
        held = None if isinstance(mask, slice) else np.flatnonzero(mask)[inside]
        low, high = (inside.start, inside.stop) if held is None else (int(held[0]), int(held[-1]) + 1)
        folder = plan.folder / plan.parts[block.part].path
        for hook, rows in target.items():
            place = folder / hook, self._array, block.start + low, block.start + high
            if held is None or len(held) == high - low:
                read_rows(*place, out=rows)
            else:
                np.take(read_rows(*place), held - low, axis=0, out=rows, mode="clip")


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
