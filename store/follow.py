"""Following an open run: views of what is new, each prompt in exactly one of them, until the run is sealed."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millpond.store.errors import InvalidInput
from millpond.store.objects import Storage

if TYPE_CHECKING:
    from millpond.store.run import Run


def follow(run: Run, consumer: str | None, poll_s: float, timeout_s: float | None) -> Iterator[Run]:
    """See `Run.follow`; the views are pinned: what happens to the run later does not change them."""
    from millpond.store.labels import check_label_name
    from millpond.store.run import Run as _Run
    from millpond.store.run import open_run

    if poll_s <= 0:
        raise InvalidInput(f"poll_s is {poll_s}; give seconds above 0")
    if run.plan.marks is not None or not np.array_equal(run.plan.chosen, run.snapshot.visible):
        raise InvalidInput(f"this is a view of run {run.name!r}; follow the run itself, and select from what it yields")
    storage = run.plan.folder
    if consumer is not None:
        check_label_name(consumer)

    def views() -> Iterator[Run]:
        seen = set() if consumer is None else consumed(storage, consumer)
        quiet = time.monotonic()
        while True:
            now = open_run(storage, lake=run.lake)
            fresh = ~now.prompts["id"].isin(seen).to_numpy() if seen else np.ones(len(now.prompts), bool)
            if fresh.any():
                chosen = now.plan.chosen.copy()
                chosen[np.flatnonzero(chosen)] = fresh
                view = _Run(now.plan.select_prompts(chosen), now.snapshot, run.lake)
                yield view
                seen |= set(view.prompts["id"])
                if consumer is not None:
                    _record(storage, consumer, view)
                quiet = time.monotonic()
            elif timeout_s is not None and time.monotonic() - quiet >= timeout_s:
                return
            if now.state == "sealed":
                return
            if not fresh.any():
                time.sleep(poll_s)

    return views()


def consumers(run: Storage) -> list[str]:
    """The names under which a run was followed."""
    return list(run.folders("consumers"))


def consumed(run: Storage, consumer: str) -> set[str]:
    """The ids of the prompts that `consumer` has used."""
    names = [entry.path for entry in run.list(f"consumers/{consumer}")]
    ids: set[str] = set()
    for data in run.get_many(names):
        if data is not None:
            ids.update(pq.read_table(io.BytesIO(data))["id"].to_pylist())
    return ids


def _record(run: Storage, consumer: str, view: Run) -> None:
    """Note what was used.

    Raises:
        InvalidInput: somebody else follows under the same name at the same time.
    """
    number = sum(1 for _ in run.list(f"consumers/{consumer}"))
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": pa.array(view.prompts["id"].astype(str).tolist(), pa.string())}), buffer)
    if not run.create(f"consumers/{consumer}/{number:08d}.parquet", buffer.getvalue()):
        raise InvalidInput(f"consumer {consumer!r} of {run.url} is followed twice at once; give each its own name")
