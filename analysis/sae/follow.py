"""Training batches of a run that is still being captured."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.sae.batches import Batch, filled
from millpond.analysis.sae.drawn import check_finite
from millpond.store.dtypes import decode
from millpond.store.errors import InvalidInput
from millpond.store.follow import Follower
from millpond.store.lazy import activation_attributes
from millpond.store.stream import reader_threads

if TYPE_CHECKING:
    from millpond.store.rows import Piece
    from millpond.store.run import Run


@dataclass(frozen=True)
class FollowedHook:
    """One of the hooks of followed batches, where an array would say what it is."""

    width: int
    attrs: dict[str, Any]


class FollowedBatches:
    """See `following`."""

    repeatable = False

    def __init__(
        self, run: Run, hooks: tuple[str, ...], batch_rows: int, follower: Follower, seed: int, buffer_bytes: int
    ) -> None:
        if batch_rows < 1:
            raise InvalidInput(f"batch_rows is {batch_rows}; give 1 or more")
        self.hooks = hooks
        """In the order of each batch."""
        self.batch_size = batch_rows
        self.widths: tuple[int, ...] = (run.d_model,) * len(hooks)
        self.by_hook = {hook: FollowedHook(run.d_model, activation_attributes(run.plan, hook)) for hook in hooks}
        self.attrs = self.by_hook[hooks[0]].attrs
        self._run, self._follower, self._seed = run, follower, seed
        self._group_rows = max(buffer_bytes // (8 * sum(self.widths)), 1)
        self._ends: deque[tuple[int, int]] = deque()
        """Number of each view that is not used up, and the rows given with its last one, from the first view on."""

    def batches(self, step: int = 0) -> Generator[Batch]:
        """See `Source.batches`; views that are not used up, by what `saved` was told, are read again.

        Raises:
            InvalidInput: no consumer is named, or it has used rows behind `step` already.
        """
        follower = self._follower
        if step and follower.consumer is None:
            raise InvalidInput("consumer is not given, so what was trained on is not known; name one to resume")
        skip = step * self.batch_size - follower.used.rows
        if skip < 0:
            raise InvalidInput(
                f"consumer {follower.consumer!r} has used {follower.used.rows:,} rows, batch {step} begins at row "
                f"{step * self.batch_size:,}: those between may be dropped; go on from the latest checkpoint, or follow "
                "under a new name"
            )
        self._ends.clear()
        rest: Batch = tuple(np.empty((0, width), np.float32) for width in self.widths)
        for rows in self._groups(skip):
            begin = min(self.batch_size - len(rest[0]), len(rows[0]))
            rest = tuple(np.concatenate([left, new[:begin]]) for left, new in zip(rest, rows, strict=True))
            if len(rest[0]) < self.batch_size:
                continue
            yield rest
            stop = begin + (len(rows[0]) - begin) // self.batch_size * self.batch_size
            for first in range(begin, stop, self.batch_size):
                yield tuple(array[first : first + self.batch_size] for array in rows)
            rest = tuple(array[stop:].copy() for array in rows)

    def saved(self, step: int) -> None:
        """See `Source.saved`: views all of whose rows came before batch `step` count as used."""
        number = None
        while self._ends and self._ends[0][1] <= step * self.batch_size:
            number, _ = self._ends.popleft()
        if number is not None:
            self._follower.use(number)

    def __iter__(self) -> Iterator[Any]:
        start = -(-self._follower.used.rows // self.batch_size)  # what was used ends within the batch before
        for step, batch in enumerate(self.batches(start), start):
            yield batch[0] if len(self.hooks) == 1 else dict(zip(self.hooks, batch, strict=True))
            self.saved(step + 1)

    def _groups(self, skip: int) -> Iterator[list[NDArray[np.float32]]]:
        """Mixed rows of each hook, of one view after another, from row `skip` of the first on; one is read ahead."""
        end = self._follower.used.rows
        with reader_threads(1, "sae-reader") as reader:
            for number, view in self._follower.views():
                end += view.n_rows
                self._ends.append((number, end))
                pieces = _pieces(view)
                sizes = [piece.count for piece in pieces]
                order = np.random.default_rng([self._seed, number]).permutation(len(pieces))
                coming: deque[tuple[Future[list[NDArray[np.float32]]], int]] = deque()
                for group, chunks in enumerate(filled(order, sizes, self._group_rows)):
                    rows = sum(sizes[chunk] for chunk in chunks)
                    if skip >= rows:
                        skip -= rows
                        continue
                    chosen = [pieces[chunk] for chunk in chunks]
                    key = [self._seed, number, group]
                    coming.append((reader.submit(self._read, chosen, rows, key), skip))
                    skip = 0
                    if len(coming) > 1:
                        yield _from(*coming.popleft())
                for last in coming:
                    yield _from(*last)

    def _read(self, pieces: list[Piece], total: int, key: list[int]) -> list[NDArray[np.float32]]:
        """The rows of some pieces, in the permutation that `key` is the seed of."""
        spec = self._run.plan.spec
        place = np.random.default_rng(key).permutation(total)
        groups = []
        for hook, width in zip(self.hooks, self.widths, strict=True):
            rows, done = np.empty((total, width), np.float32), 0
            for piece in pieces:
                part = decode(piece.read(hook, spec.activation_array), spec.dtype)
                check_finite(part, f"{hook} of run {spec.name!r}", piece.first)
                rows[place[done : done + len(part)]] = part
                done += len(part)
            groups.append(rows)
        return groups

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        return {
            "widths": list(self.widths),
            "batch_size": self.batch_size,
            "run": self._run.plan.spec.id,
            "hooks": list(self.hooks),
            "consumer": self._follower.consumer,
            "seed": self._seed,
            "group_rows": self._group_rows,
        }


def _pieces(view: Run) -> list[Piece]:
    """The rows of a view by chunk, in an order that does not depend on what is committed or compacted meanwhile."""
    plan = view.plan
    table = plan.table(plan.spec.chunk_rows)
    pieces = [plan.piece(table[int(number)]) for number in np.flatnonzero(plan.counts(table))]
    return sorted(pieces, key=lambda piece: (piece.folder.url, piece.start))


def _from(group: Future[list[NDArray[np.float32]]], skip: int) -> list[NDArray[np.float32]]:
    return [rows[skip:] for rows in group.result()]


def following(
    run: Run,
    hook: str | Sequence[str],
    batch_rows: int = 4096,
    *,
    consumer: str | None = None,
    seed: int = 0,
    buffer_bytes: int = 512 << 20,
    view_rows: int | None = None,
    poll_s: float = 1.0,
    timeout_s: float | None = None,
) -> FollowedBatches:
    """Batches (batch_rows, d_model) of an open run as it grows, to be given to `fit`; they end when it is sealed.

    Every row is given once, mixed with those that were committed about when it was: what is new is read in
    random order of its chunks, through half of `buffer_bytes` (at least a chunk). An incomplete last batch is
    left out. The batches depend on when rows were committed; under a consumer's name that is recorded, so a
    training that is killed and resumed goes on with exactly the next batch, until the run is sealed. What a
    checkpoint holds counts as used, and retention (`Lake.retain`) may drop it.

    Args:
        run: the run itself, not a view.
        hook: one name, or several for `train_together`, whose rows are then aligned.
        batch_rows: rows a batch.
        consumer: a name under which what was used is recorded, see `Run.follow`.
        seed: of the order.
        buffer_bytes: of float32 rows, of all hooks.
        view_rows: what is new is used, and may be dropped, so many rows at a time; by default eight times what
            is mixed at once.
        poll_s: seconds between looks while there is nothing new.
        timeout_s: end after so long without anything new.

    Raises:
        HookNotCaptured: the run does not hold a hook.
        InvalidInput: an argument cannot be used.
    """
    hooks = tuple(str(run[name].name) for name in ([hook] if isinstance(hook, str) else hook))
    if not hooks or len(set(hooks)) < len(hooks):
        raise InvalidInput(f"hook is {hook!r}; name one or several hooks, each once")
    rows = view_rows or max(buffer_bytes // (run.d_model * len(hooks)), 1)
    follower = Follower(run, consumer, poll_s=poll_s, timeout_s=timeout_s, view_rows=rows)
    return FollowedBatches(run, hooks, batch_rows, follower, seed, buffer_bytes)
