"""The statistics of a run: those of its parts, merged when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from millpond.store.errors import InvalidInput, LakeCorrupt
from millpond.store.hooks import summarize_hooks
from millpond.store.objects import PARALLEL_REQUESTS
from millpond.store.stats import HookStatistics, add_statistics, unpack_statistics
from millpond.store.versions import dropped_statistics

if TYPE_CHECKING:
    from millpond.store.run import Run

STATISTICS_FILE = "statistics.safetensors"


class RunStatistics(Mapping[str, HookStatistics]):
    """`HookStatistics` by hook, over all rows of a run, those that retention dropped too; reads them once."""

    def __init__(self, run: Run) -> None:
        if run.plan.marks is not None or run.n_rows != int(run.snapshot.n_rows[run.snapshot.visible].sum()):
            raise InvalidInput(f"this is a view of run {run.name!r}; statistics are those of the whole run: open it")
        self._run = run

    @cached_property
    def _merged(self) -> dict[str, HookStatistics]:
        run = self._run
        total = {hook: HookStatistics(run.d_model) for hook in run.hooks}
        snapshot = run.snapshot
        paths = [f"{path}/{STATISTICS_FILE}" for path in snapshot.parts.paths[~snapshot.dropped_parts].tolist()]
        for start in range(0, len(paths), PARALLEL_REQUESTS):
            some = paths[start : start + PARALLEL_REQUESTS]
            for path, data in zip(some, run.plan.folder.get_many(some), strict=True):
                if data is None:
                    raise InvalidInput(f"run {run.name!r} has no statistics ({path}); it was captured without them")
                found = unpack_statistics(data)
                for hook in run.hooks:
                    if hook not in found or found[hook].d_model != run.d_model:
                        raise LakeCorrupt(f"{run.plan.folder}/{path} has no statistics of {hook}; restore it")
                    total[hook].merge(found[hook])
        for page in snapshot.version.pages:
            add_statistics(total, dropped_statistics(run.plan.folder, page))
        if any(found.count != int(snapshot.parts.rows.sum()) for found in total.values()):
            raise InvalidInput(f"run {run.name!r} has no statistics of its dropped rows; it was captured without them")
        return total

    def __getitem__(self, hook: str) -> HookStatistics:
        return self._merged[self._run._one(hook)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._run.hooks)

    def __len__(self) -> int:
        return len(self._run.hooks)

    def __repr__(self) -> str:
        return (
            f"<RunStatistics of run {self._run.name!r}, {summarize_hooks(self._run.hooks)}: {self._run.n_rows:,} rows>"
        )
