"""Merging the segments of an open run into one group, with as few bytes moved as can be."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from millpond.store.manifest import ArrayChecksums, Part
from millpond.store.objects import PARALLEL_REQUESTS, Storage
from millpond.store.prompts import write_prompt_table
from millpond.store.segment import array_attributes, write_statistics
from millpond.store.shards import (
    ArrayRecord,
    ArraySpec,
    ArrayWriter,
    check_shards,
    object_crc32c,
    read_rows,
    write_group,
)
from millpond.store.snapshot import Snapshot
from millpond.store.stats import HookStatistics, unpack_statistics

READ_BYTES = 32 << 20
"""Rows read at once while they are packed anew."""


@dataclass(frozen=True)
class _Extent:
    """Consecutive rows of a segment, of visible prompts."""

    segment: int
    start: int
    stop: int


class Merge:
    """The order in which a run's visible rows are merged: segments of whole shards first, then all other rows.

    A kept segment has no row too many and none that is not visible, so its prompts are whole in it, and every
    prompt's rows stay together.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.spec = snapshot.spec
        self._records = list(snapshot.records())
        prompt_of = np.concatenate([[0], np.cumsum(snapshot.parts.prompts)]).astype(np.int64)
        self._kept: list[int] = []
        self._packed: list[_Extent] = []
        orders: list[list[NDArray[np.int64]]] = [[], []]
        for number, part in enumerate(self._records):
            if snapshot.dropped_parts[number]:
                continue
            numbers = np.arange(prompt_of[number], prompt_of[number + 1])
            visible = snapshot.visible[numbers]
            keep = part.rows > 0 and part.rows % self.spec.shard_rows == 0 and bool(visible.all())
            if keep:
                self._kept.append(number)
            else:
                self._packed += _extents(number, snapshot.n_rows[numbers], visible)
            orders[0 if keep else 1].append(numbers[visible])
        gathered = all(
            part.statistics is not None
            for part, dropped in zip(self._records, snapshot.dropped_parts, strict=True)
            if not dropped
        )
        hooks = self.spec.hooks if gathered else ()
        self._statistics = {hook: HookStatistics(self.spec.d_model) for hook in hooks}
        self.order: NDArray[np.int64] = np.concatenate([*orders[0], *orders[1], np.empty(0, np.int64)]).astype(np.int64)
        """The snapshot's numbers of the prompts, as they come in the merged group."""

    def write(self, run: Storage, data: str, table: pd.DataFrame) -> Part:
        """Write the group `data` of `run` with the prompts `table`, which has the merged order."""
        numbers = np.repeat(np.arange(len(table), dtype=np.int32), table["n_rows"].to_numpy(np.int64))
        arrays, metadata = {}, {}
        for name, array in self.spec.arrays().items():
            if name == "prompt":
                record = _write_rows(run / f"{data}/{name}", array, {}, iter([numbers]))
            else:
                record = self._merge_array(run, data, name, array)
            arrays[name] = ArrayChecksums.of(record)
            metadata[name] = array.metadata(record.rows, array_attributes(self.spec, name))
        prompt_table = write_prompt_table(run / data, table)
        statistics = write_statistics(run / data, self._statistics)
        write_group(run / data, metadata, {"millpond:run": self.spec.name})
        return Part(
            path=data,
            rows=len(numbers),
            prompts=len(table),
            arrays=arrays,
            prompt_table=prompt_table,
            statistics=statistics,
        )

    def _merge_array(self, run: Storage, data: str, name: str, array: ArraySpec) -> ArrayRecord:
        copies = [
            (f"{self._records[number].path}/{name}/{array.shard_path(shard)}", checksum)
            for number in self._kept
            for shard, checksum in enumerate(self._records[number].arrays[name].shards)
        ]
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            list(
                pool.map(
                    lambda copy: run.copy(copy[1][0], f"{data}/{name}/{array.shard_path(copy[0])}"), enumerate(copies)
                )
            )
        if name in self._statistics:
            for number in self._kept:
                path = f"{self._records[number].path}/statistics.safetensors"
                self._statistics[name].merge(unpack_statistics(run.get(path))[name])
        attributes = array_attributes(self.spec, name)
        return _write_rows(
            run / f"{data}/{name}", array, attributes, self._rows(run, name, array), [sums for _, sums in copies]
        )

    def _rows(self, run: Storage, name: str, array: ArraySpec) -> Iterator[NDArray[Any]]:
        """The rows to pack, in blocks.

        Raises:
            LakeCorrupt: a shard does not have its checksum.
        """
        limit = max(READ_BYTES // array.row_bytes, 1)
        checked = -1
        for extent in self._packed:
            record = self._records[extent.segment]
            folder = run / f"{record.path}/{name}"
            if checked != extent.segment:  # packed anew they get checksums of their own, which must not hide damage
                checked, shards = extent.segment, record.arrays[name].shards
                found = [object_crc32c(folder, array.shard_path(number)) for number in range(len(shards))]
                check_shards(f"{record.path}/{name}", shards, found)
            for start in range(extent.start, extent.stop, limit):
                rows = read_rows(folder, array, start, min(start + limit, extent.stop))
                if name in self._statistics:
                    self._statistics[name].update(rows)
                yield rows


def _extents(segment: int, n_rows: NDArray[np.int64], visible: NDArray[np.bool_]) -> list[_Extent]:
    """The stretches of visible rows of a segment whose prompts have `n_rows` rows."""
    ends = np.cumsum(n_rows)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], visible, [False]]).astype(np.int8)))
    stretches = ((int(ends[low] - n_rows[low]), int(ends[high - 1])) for low, high in edges.reshape(-1, 2))
    return [_Extent(segment, start, stop) for start, stop in stretches if stop > start]


def _write_rows(
    folder: Storage,
    array: ArraySpec,
    attributes: dict[str, Any],
    blocks: Iterator[NDArray[Any]],
    kept: list[tuple[int, int]] | None = None,
) -> ArrayRecord:
    writer = ArrayWriter(folder, array, attributes, kept=kept or [])
    try:
        for block in blocks:
            writer.append(block)
        return writer.finish()
    finally:
        writer.close()
