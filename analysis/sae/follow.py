"""Training batches of a run that is still being captured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from millpond.analysis.sae.batches import Batch, ShuffledBatches
from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    from millpond.store.run import Run


class FollowedBatches:
    """See `following`."""

    repeatable = False

    def __init__(
        self,
        run: Run,
        hook: str,
        batch_rows: int,
        consumer: str | None,
        seed: int,
        buffer_bytes: int,
        poll_s: float,
        timeout_s: float | None,
    ) -> None:
        if batch_rows < 1:
            raise InvalidInput(f"batch_rows is {batch_rows}; give 1 or more")
        self._hook = str(run[hook].name)
        self._run, self._consumer, self._seed, self._buffer_bytes = run, consumer, seed, buffer_bytes
        self._views = run.follow(consumer, poll_s=poll_s, timeout_s=timeout_s)
        self.batch_size = batch_rows
        self.widths: tuple[int, ...] = (run.d_model,)

    def batches(self, step: int = 0) -> Iterator[Batch]:
        """See `Source.batches`: what was consumed under the consumer's name is not given again."""
        if step and self._consumer is None:
            raise InvalidInput("consumer is not given, so what was trained on is not known; name one to resume")
        rest = np.empty((0, *self.widths), np.float32)
        for rows in self._groups():
            begin = min(self.batch_size - len(rest), len(rows))
            rest = np.concatenate([rest, rows[:begin]])
            if len(rest) < self.batch_size:
                continue
            yield (rest,)
            stop = begin + (len(rows) - begin) // self.batch_size * self.batch_size
            for first in range(begin, stop, self.batch_size):
                yield (rows[first : first + self.batch_size],)
            rest = rows[stop:].copy()

    def __iter__(self) -> Iterator[Any]:
        for (rows,) in self.batches():
            yield rows

    def _groups(self) -> Iterator[Any]:
        """Mixed rows of one view after another."""
        for number, view in enumerate(self._views):
            if view.n_rows:
                shuffled = ShuffledBatches(
                    [view[self._hook]], 1, seed=self._seed + number, buffer_bytes=self._buffer_bytes
                )
                for (rows,) in shuffled.once():
                    yield rows

    def describe(self) -> dict[str, Any]:
        """See `Source.describe`."""
        return {
            "widths": list(self.widths),
            "batch_size": self.batch_size,
            "run": self._run.plan.spec.id,
            "hook": self._hook,
            "consumer": self._consumer,
        }


def following(
    run: Run,
    hook: str,
    batch_rows: int = 4096,
    *,
    consumer: str | None = None,
    seed: int = 0,
    buffer_bytes: int = 512 << 20,
    poll_s: float = 1.0,
    timeout_s: float | None = None,
) -> FollowedBatches:
    """Batches (batch_rows, d_model) of an open run as it grows, to be given to `fit`; they end when it is sealed.

    Every row is given once, mixed with those that were committed about when it was: what is new is read in
    random order of its chunks, through half of `buffer_bytes` (at least a chunk). An incomplete last batch is
    left out. The batches depend on when rows were committed, so a training is not repeated to the bit.

    Args:
        run: the run itself, not a view.
        hook: one name.
        batch_rows: rows a batch.
        consumer: a name under which what was used is recorded, see `Run.follow`: a resumed training goes on behind
            it, and so does not see again (nor repeat) what was used since its checkpoint.
        seed: of the order.
        buffer_bytes: of float32 rows.
        poll_s: seconds between looks while there is nothing new.
        timeout_s: end after so long without anything new.

    Raises:
        HookNotCaptured: the run does not hold `hook`.
        InvalidInput: an argument cannot be used.
    """
    return FollowedBatches(run, hook, batch_rows, consumer, seed, buffer_bytes, poll_s, timeout_s)
