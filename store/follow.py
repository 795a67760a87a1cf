"""Following an open run: views of what is new, each prompt in exactly one of them, until the run is sealed.

What a consumer was given is recorded before it is given, and that it was used after. So a consumer that dies is given
the same views again from the first that it had not used, and goes on after them.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millpond.store.errors import InvalidInput, LakeCorrupt
from millpond.store.objects import Storage

if TYPE_CHECKING:
    from millpond.store.run import Run

_GIVEN = "given-"
RELEASE_SECONDS = 60.0
"""A follower drops what it used, where retention says so, at most so often; or every grace period, if that is shorter."""


@dataclass(frozen=True)
class Consumed:
    """How far a consumer is."""

    views: int
    """Used; the number of the next one."""
    prompts: int
    rows: int


class Follower:
    """One consumer of a run: `views` gives, `use` records. Without a name nothing is recorded.

    Raises:
        InvalidInput: an argument cannot be used, or `run` is a view.
    """

    def __init__(
        self,
        run: Run,
        consumer: str | None = None,
        *,
        poll_s: float = 1.0,
        timeout_s: float | None = None,
        view_rows: int | None = None,
    ) -> None:
        from millpond.store.labels import check_label_name

        if poll_s <= 0:
            raise InvalidInput(f"poll_s is {poll_s}; give seconds above 0")
        if view_rows is not None and view_rows < 1:
            raise InvalidInput(f"view_rows is {view_rows}; give 1 or more")
        if run.plan.marks is not None or not np.array_equal(run.plan.chosen, run.snapshot.visible):
            raise InvalidInput(
                f"this is a view of run {run.name!r}; follow the run itself, and select from what it yields"
            )
        if consumer is not None:
            check_label_name(consumer)
        self.run, self.consumer = run, consumer
        self.poll_s, self.timeout_s, self.view_rows = poll_s, timeout_s, view_rows
        self._storage = run.plan.folder
        self._released = -float("inf")
        self.used = Consumed(0, 0, 0) if consumer is None else position(self._storage, consumer)
        """How far the consumer is."""

    def views(self) -> Iterator[tuple[int, Run]]:
        """Views with their numbers: first those that were given before and not used, then what is new."""
        seen: set[str] = set()
        number = 0
        if self.consumer is not None:
            seen = consumed(self._storage, self.consumer)
            number = self.used.views
            while (ids := _read(self._storage, self._given(number))) is not None:
                yield number, self._again(ids)
                seen.update(ids)
                number += 1
        yield from self._new(number, seen)

    def use(self, number: int) -> None:
        """Record that the views up to and with `number` were used; retention may drop them."""
        if self.consumer is None:
            return
        folder = f"consumers/{self.consumer}"
        for one in range(self.used.views, number + 1):
            record = self._storage.get(self._given(one))
            self._storage.put(f"{folder}/{one:08d}.parquet", record)
            self._storage.delete(self._given(one))
            table = pq.read_table(io.BytesIO(record))
            rows = int(table["n_rows"].to_numpy().sum())
            self.used = Consumed(one + 1, self.used.prompts + len(table), self.used.rows + rows)
        self._release()

    def _given(self, number: int) -> str:
        return f"consumers/{self.consumer}/{_GIVEN}{number:08d}.parquet"

    def _open(self) -> Run:
        from millpond.store.run import open_run

        return open_run(self._storage, lake=self.run.lake)

    def _again(self, ids: list[str]) -> Run:
        now = self._open()
        found = now.prompts["id"].isin(set(ids)).to_numpy()
        if int(found.sum()) != len(ids):
            raise LakeCorrupt(
                f"run {now.name!r}: {len(ids) - int(found.sum())} prompts that were given to consumer {self.consumer!r} "
                "are not there any more; follow under a new name"
            )
        return now.select(found)

    def _new(self, number: int, seen: set[str]) -> Iterator[tuple[int, Run]]:
        quiet = time.monotonic()
        while True:
            now = self._open()
            fresh = ~now.prompts["id"].isin(seen).to_numpy() if seen else np.ones(len(now.prompts), bool)
            for part in self._cut(now, fresh):
                view = now.select(part)
                if self.consumer is not None:
                    self._give(number, view)
                yield number, view
                seen.update(view.prompts["id"])
                number += 1
                quiet = time.monotonic()
            if now.state == "sealed":
                return
            if not fresh.any():
                if self.timeout_s is not None and time.monotonic() - quiet >= self.timeout_s:
                    return
                time.sleep(self.poll_s)

    def _cut(self, now: Run, fresh: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Iterator[np.ndarray]:
        """Marks of the prompts of each view, over those of `now`."""
        places = np.flatnonzero(fresh)
        rows = np.cumsum(now.prompts["n_rows"].to_numpy(np.int64)[places])
        start = 0
        while start < len(places):
            before = int(rows[start - 1]) if start else 0
            stop = len(places)
            if self.view_rows is not None:
                stop = min(int(np.searchsorted(rows, before + self.view_rows)) + 1, stop)
            marks = np.zeros(len(fresh), bool)
            marks[places[start:stop]] = True
            yield marks
            start = stop

    def _give(self, number: int, view: Run) -> None:
        """Record what is about to be given.

        Raises:
            InvalidInput: somebody else follows under the same name at the same time.
        """
        table = pa.table(
            {
                "id": pa.array(view.prompts["id"].astype(str).tolist(), pa.string()),
                "n_rows": pa.array(view.prompts["n_rows"].to_numpy(np.int64)),
            }
        )
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        used = self._storage.exists(f"consumers/{self.consumer}/{number:08d}.parquet")
        if used or not self._storage.create(self._given(number), buffer.getvalue()):
            raise InvalidInput(
                f"consumer {self.consumer!r} of {self._storage.url} is followed twice at once; give each its own name"
            )

    def _release(self) -> None:
        from millpond.store.collect import Collected, collect_dropped, note_collected
        from millpond.store.retention import drop_consumed, read_retention

        retention = read_retention(self._storage)
        if retention is None or time.monotonic() - self._released < min(RELEASE_SECONDS, retention.grace_s):
            return
        drop_consumed(self._storage)
        found = Collected()
        collect_dropped(self._storage, retention.grace_s, found)
        note_collected(self._storage, found)
        self._released = time.monotonic()


def consumers(run: Storage) -> list[str]:
    """The names under which a run was followed."""
    return list(run.folders("consumers"))


def consumed(run: Storage, consumer: str) -> set[str]:
    """The ids of the prompts that `consumer` has used."""
    return {one for table in _used(run, consumer) for one in table["id"].to_pylist()}


def position(run: Storage, consumer: str) -> Consumed:
    """How far `consumer` is."""
    tables = _used(run, consumer)
    rows = [table["n_rows"].to_numpy().sum() for table in tables if "n_rows" in table.column_names]
    return Consumed(len(tables), sum(len(table) for table in tables), int(sum(rows)))


def _used(run: Storage, consumer: str) -> list[pa.Table]:
    folder = f"consumers/{consumer}"
    names = [entry.path for entry in run.list(folder) if not entry.path.startswith(f"{folder}/{_GIVEN}")]
    return [pq.read_table(io.BytesIO(data)) for data in run.get_many(names) if data is not None]


def _read(run: Storage, path: str) -> list[str] | None:
    try:
        data = run.get(path)
    except FileNotFoundError:
        return None
    ids: list[str] = pq.read_table(io.BytesIO(data))["id"].to_pylist()
    return ids
