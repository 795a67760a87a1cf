"""The statistics of a run: those of its parts, merged when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from millpond.store.errors import InvalidInput, LakeCorrupt
from millpond.store.objects import PARALLEL_REQUESTS
from millpond.store.stats import HookStatistics, unpack_statistics

if TYPE_CHECKING:
    from millpond.store.run import Run

STATISTICS_FILE = "statistics.safetensors"


class RunStatistics(Mapping[str, HookStatistics]):
    """`HookStatistics` by hook, over all rows of a run; reads the parts' statistics files once."""

    def __init__(self, run: Run) -> None:
        if run.plan.marks is not None or run.n_rows != int(run.snapshot.n_rows[run.snapshot.visible].sum()):
            raise InvalidInput(f"this is a view of run {run.name!r}; statistics are those of the whole run: open it")
        self._run = run

    @cached_property
    def _merged(self) -> dict[str, HookStatistics]:
        run = self._run
        total = {hook: HookStatistics(run.d_model) for hook in run.hooks}
        paths = [f"{part.path}/{STATISTICS_FILE}" for part in run.plan.parts]
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
        return total

    def __getitem__(self, hook: str) -> HookStatistics:
        return self._merged[self._run._one(hook)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._run.hooks)

    def __len__(self) -> int:
        return len(self._run.hooks)
