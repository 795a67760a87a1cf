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

from millpond.store.dtypes import check_view_dtype, decode, to_torch
from millpond.store.errors import InvalidInput
from millpond.store.rows import RowPlan
from millpond.store.shards import read_rows

if TYPE_CHECKING:
    import torch.utils.data

Rows = NDArray[Any]
READERS = 2
"""Threads that read."""


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
    reads nothing of what came before. Two groups are held, and what a batch takes from a third.
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
            entry = next(groups, None)
            ahead = entry and loader.submit(entry)
            left: dict[str, Rows] = {}
            try:
                while entry and ahead:
                    rows = {hook: values[entry.skip :] for hook, values in ahead.result().items()}
                    entry = next(groups, None)
                    ahead = entry and loader.submit(entry)
                    begin = 0
                    if left:  # only this batch lies in two groups: joining it alone copies no whole buffer
                        begin = self.batch_rows - _length(left)
                        left = {hook: np.concatenate([left[hook], rows[hook][:begin]]) for hook in self.hooks}
                        if _length(left) < self.batch_rows:
                            continue
                        yield left
                    whole = begin + (_length(rows) - begin) // self.batch_rows * self.batch_rows
                    for first in range(begin, whole, self.batch_rows):
                        yield {hook: values[first : first + self.batch_rows] for hook, values in rows.items()}
                    left = {hook: values[whole:].copy() for hook, values in rows.items()}
                    left = left if _length(left) else {}
                    rows = {}
            finally:
                if ahead:
                    ahead.cancel()


def _length(rows: Mapping[str, Rows]) -> int:
    return len(next(iter(rows.values())))


class _Pending:
    """A group whose pieces are being read."""

    def __init__(self, rows: dict[str, Rows], parts: Sequence[Future[None]]) -> None:
        self._rows, self._parts = rows, parts

    def result(self) -> dict[str, Rows]:
        for part in self._parts:
            part.result()
        return self._rows

    def cancel(self) -> None:
        for part in self._parts:
            part.cancel()


class _Loader:
    """Reads groups: every piece of every hook is one task of the readers."""

    def __init__(self, stream: ActivationStream, readers: ThreadPoolExecutor) -> None:
        self.stream, self.readers = stream, readers
        self._epoch = -1
        self._order: NDArray[np.int64] = np.zeros(0, np.int64)
        self._before: NDArray[np.int64] = np.zeros(0, np.int64)

    def submit(self, group: _Group) -> _Pending:
        stream = self.stream
        if group.epoch != self._epoch:
            self._epoch, (self._order, self._before) = group.epoch, stream._order(group.epoch)
        n = group.stop - group.start
        rows = {hook: np.empty((n, stream.plan.spec.d_model), stream._kind) for hook in stream.hooks}
        place = np.random.default_rng([stream.seed, group.epoch, group.number, stream.rank, stream.world]).permutation(
            n
        )
        first = int(np.searchsorted(self._before, group.start, "right")) - 1
        last = int(np.searchsorted(self._before, group.stop, "left"))
        tasks = []
        for index in range(first, last):
            low = max(int(self._before[index]), group.start)
            high = min(int(self._before[index + 1]), group.stop)
            chunk = int(stream._chunks[self._order[index]])
            inside = slice(low - int(self._before[index]), high - int(self._before[index]))
            target = place[low - group.start : high - group.start]
            tasks.append(self.readers.submit(self._load, chunk, inside, target, rows))
        return _Pending(rows, tasks)

    def _load(self, chunk: int, inside: slice, target: NDArray[np.int64], rows: dict[str, Rows]) -> None:
        """The chosen rows `inside` of a chunk, to their places in the group."""
        plan, stream = self.stream.plan, self.stream
        block = stream._table[chunk]
        mask = plan.mask(block)
        held = np.arange(block.stop - block.start)[mask][inside]
        low, high = int(held[0]), int(held[-1]) + 1
        folder = plan.folder / plan.parts[block.part].path
        for hook in stream.hooks:
            stored = read_rows(folder / hook, plan.spec.activation_array, block.start + low, block.start + high)
            if len(held) < high - low:
                stored = stored[held - low]
            if stream.dtype == "float32":
                rows[hook][target] = decode(stored, plan.spec.dtype)
            else:
                rows[hook].view(stored.dtype)[target] = stored


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
