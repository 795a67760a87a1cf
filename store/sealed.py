"""Writing a sealed run at once, array after array: for copies, imports and materialised views."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from millpond.store.configuration import check_quota
from millpond.store.dtypes import STORED_AS
from millpond.store.errors import CaptureFailed, InvalidInput
from millpond.store.manifest import ArrayChecksums, Manifest, Part, RunSpec, encode_record
from millpond.store.objects import Storage
from millpond.store.prompts import write_prompt_table
from millpond.store.segment import all_finite, array_attributes, write_statistics
from millpond.store.shards import ArrayRecord, ArrayWriter, write_group
from millpond.store.stats import HookStatistics, add_statistics

if TYPE_CHECKING:
    from millpond.store.lake import Lake
    from millpond.store.run import Run

log = logging.getLogger(__name__)

STATISTICS_THREADS = 2
"""Threads that gather statistics of a block while it is written: they take longer than the writing."""
Blocks = Callable[[str], Iterable[NDArray[Any]]]
Check = Callable[[str, Sequence[tuple[int, int]]], None]


def write_sealed(
    lake: Lake,
    name: str,
    *,
    like: Mapping[str, Any],
    table: pd.DataFrame,
    blocks: Blocks,
    prompt_labels: tuple[str, ...] = (),
    check: Check | None = None,
) -> Run:
    """Create the run `name` and fill it; after an error there is no such run.

    Args:
        lake: where it goes.
        name: of the run.
        like: arguments of `Lake.create_run`.
        table: its prompt table, whose `n_rows` are the rows of each prompt in order.
        blocks: array name to its rows in blocks, as they are stored.
        prompt_labels: columns of the table that are labels.
        check: is given the name of each array, and size and crc32c of its shards; what it raises leaves no run.

    Raises:
        InvalidInput: the rows are not finite, or not those that the table counts.
        QuotaExceeded: the lake does not allow so many bytes; nothing was made.
    """
    arrays = [array for read in like.get("reads", ()) for array in read.arrays(like["dtype"], 1, 1).values()]
    row_bytes = len(like["hooks"]) * like["d_model"] * np.dtype(STORED_AS[like["dtype"]]).itemsize
    row_bytes += sum(array.row_bytes for array in arrays)
    check_quota(lake, {name: int(table["n_rows"].sum()) * row_bytes})
    spec = lake.create_run(name, **like, filling=True)
    try:
        _fill(lake.run_storage(name), spec, table, blocks, prompt_labels, check)
    except BaseException:
        lake.delete(name)
        raise
    return lake[name]


def _fill(
    run: Storage,
    spec: RunSpec,
    table: pd.DataFrame,
    blocks: Blocks,
    prompt_labels: tuple[str, ...],
    check: Check | None,
) -> None:
    data = f"data-{uuid.uuid4().hex}"
    rows = int(table["n_rows"].sum())
    arrays, metadata = {}, {}
    statistics: dict[str, HookStatistics] = {}
    for name, array in spec.arrays().items():
        record = _write_array(run / f"{data}/{name}", spec, name, table, blocks, statistics)
        if record.rows != rows:
            raise InvalidInput(f"{name} of run {spec.name!r} has {record.rows} rows, but its prompts have {rows}")
        if check is not None:
            check(name, record.shards)
        arrays[name] = ArrayChecksums.of(record)
        metadata[name] = array.metadata(record.rows, array_attributes(spec, name))
    prompt_table = write_prompt_table(run / data, table)
    write_group(run / data, metadata, {"millpond:run": spec.name})
    part = Part(
        path=data,
        rows=rows,
        prompts=len(table),
        arrays=arrays,
        prompt_table=prompt_table,
        statistics=write_statistics(run / data, statistics),
    )
    manifest = Manifest(
        run=spec,
        sealed=datetime.now(UTC).isoformat(timespec="seconds"),
        data=part,
        prompt_labels=prompt_labels,
        counts={
            "rows": rows,
            "prompts": len(table),
            "rows_asked": rows,
            "tokens": int(table["n_tokens"].sum()),
        },
    )
    if not run.create("manifest.json", encode_record(manifest)):
        raise CaptureFailed(f"run {spec.name!r} was sealed by somebody else while it was written")
    log.info("sealed", extra={"run": spec.name, "rows": rows, "prompts": len(table)})


def _write_array(
    folder: Storage,
    spec: RunSpec,
    name: str,
    table: pd.DataFrame,
    blocks: Blocks,
    statistics: dict[str, HookStatistics],
) -> ArrayRecord:
    """Write one array; the statistics of a hook are gathered beside, and added to `statistics`."""
    gathered = [HookStatistics(spec.d_model, int(spec.id, 16) + n) for n in range(STATISTICS_THREADS)]
    floats = {array for read in spec.reads for array in read.float_arrays}
    writer = ArrayWriter(folder, spec.arrays()[name], array_attributes(spec, name))

    def gather(found: HookStatistics, rows: NDArray[Any]) -> None:
        _check_finite(name, spec, rows)
        found.update(rows)

    try:
        with ThreadPoolExecutor(STATISTICS_THREADS) as beside:
            for block in _prompt_blocks(table) if name == "prompt" else blocks(name):
                looks: list[Future[None]] = []
                if name in spec.hooks:
                    parts = np.array_split(block, STATISTICS_THREADS)
                    looks = [beside.submit(gather, found, part) for found, part in zip(gathered, parts, strict=True)]
                elif name in floats:
                    _check_finite(name, spec, block)
                writer.append(block)
                for look in looks:
                    look.result()
        record = writer.finish()
    finally:
        writer.close()
    if name in spec.hooks:
        for found in gathered:
            add_statistics(statistics, {name: found})
    return record


def _check_finite(name: str, spec: RunSpec, rows: NDArray[Any]) -> None:
    if not all_finite(rows):
        raise InvalidInput(f"{name} of run {spec.name!r} holds an infinity or NaN; leave such rows out")


def _prompt_blocks(table: pd.DataFrame) -> Iterable[NDArray[Any]]:
    yield np.repeat(np.arange(len(table), dtype=np.int32), table["n_rows"].to_numpy(np.int64))
