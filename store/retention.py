"""Retention `consumed`: rows of an open run that its consumers have used are dropped; their prompts' ids stay taken.

A segment is dropped by the next manifest version, whose pages say so, when every prompt that it shows was used by
each consumer that `retention.json` names. Its objects go a grace period later, for those who opened a version before.
The ids stay in the pages (tombstones), so a dropped request that is sent again does not become visible again, and a
resumed capture does not capture it again.
"""

from __future__ import annotations

import logging
import math
import uuid
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from millpond.store.capture_spec import first_problem
from millpond.store.commits import GRACE_SECONDS, is_closing
from millpond.store.compaction import compact
from millpond.store.errors import InvalidInput, LakeCorrupt
from millpond.store.files import decode_document, encode_document
from millpond.store.follow import consumed
from millpond.store.labels import check_label_name
from millpond.store.manifest import encode_record
from millpond.store.objects import Storage
from millpond.store.snapshot import Snapshot, load_snapshot
from millpond.store.stats import HookStatistics, add_statistics, unpack_statistics
from millpond.store.versions import (
    PageRecord,
    Segments,
    VersionRecord,
    dropped_statistics,
    latest_version,
    page_columns,
    read_page_file,
    read_version,
    version_number,
    version_path,
    write_page,
)

log = logging.getLogger(__name__)

RETENTION = "retention.json"


class Retention(BaseModel):
    """Which rows of a run need not be kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    consumed_by: tuple[str, ...] = Field(min_length=1)
    """Names under which the run is followed; rows that all of them have used may go."""
    grace_s: float = Field(default=GRACE_SECONDS, ge=0)
    """How long readers that opened the run before may go on reading them."""


@dataclass(frozen=True)
class Dropped:
    """What `drop_consumed` took away."""

    segments: int = 0
    prompts: int = 0
    rows: int = 0


def read_retention(run: Storage) -> Retention | None:
    """The retention of a run; None if all rows are kept.

    Raises:
        InvalidInput: it cannot be used.
    """
    try:
        data = run.get(RETENTION)
    except FileNotFoundError:
        return None
    where = f"{run.url}/{RETENTION}"
    try:
        return Retention.model_validate(decode_document(data, where))
    except ValidationError as error:
        raise InvalidInput(f"{where}: {first_problem(error)}") from error


def write_retention(run: Storage, retention: Retention | None) -> None:
    """Replace the retention of a run; None keeps all rows that are there."""
    if retention is None:
        run.delete(RETENTION)
        log.info("retention", extra={"run": run.name, "consumed_by": [], "grace_s": None})
        return
    for name in retention.consumed_by:
        check_label_name(name)
    document = retention.model_dump(mode="json")
    run.put(RETENTION, encode_document(document))
    log.info("retention", extra={"run": run.name, **document})


def drop_consumed(run: Storage) -> Dropped:
    """Drop the segments of an open run that its retention does not keep; their objects go with `collect_dropped`."""
    retention = read_retention(run)
    if retention is None or is_closing(run):
        return Dropped()
    used = set.intersection(*(consumed(run, name) for name in retention.consumed_by))
    if not used:
        return Dropped()
    compact(run)  # only what is in a version can be dropped: there, what is visible does not change
    while True:
        snapshot = load_snapshot(run, tail=False)
        if snapshot.manifest is not None:
            return Dropped()
        before = snapshot.version
        try:
            pages, total = _pages_without(run, before, used)
        except (FileNotFoundError, LakeCorrupt):
            if latest_version(run, before.run).number == before.number:
                raise
            continue  # dropped and collected by somebody else meanwhile
        if not total.segments:
            return total
        version = VersionRecord(run=before.run, number=before.number + 1, pages=pages)
        if run.create(version_path(version.number), encode_record(version)):
            log.info("dropped", extra={"run": run.name, "version": version.number, **vars(total)})
            return total


def _pages_without(run: Storage, version: VersionRecord, used: set[str]) -> tuple[tuple[PageRecord, ...], Dropped]:
    pages, total = [], Dropped()
    for page in version.pages:
        record, dropped = _without(run, page, used, version.number + 1)
        pages.append(record)
        total = Dropped(total.segments + dropped.segments, total.prompts + dropped.prompts, total.rows + dropped.rows)
    return tuple(pages), total


def _without(run: Storage, page: PageRecord, used: set[str], number: int) -> tuple[PageRecord, Dropped]:
    """The page after dropping what was used; written anew if that is anything."""
    segments = page_columns(read_page_file(run, page, ".segments.parquet"))
    before = segments["dropped"].to_numpy().astype(bool)
    if before.all():
        return page, Dropped()
    prompts = page_columns(read_page_file(run, page, ".prompts.parquet")).to_pandas()
    owner = np.repeat(np.arange(len(segments)), segments["prompts"].to_numpy())
    visible = prompts["visible"].to_numpy(bool)
    wanted = visible & ~prompts["id"].isin(used).to_numpy()
    new = ~before & (np.bincount(owner[wanted], minlength=len(segments)) == 0)
    if not new.any():
        return page, Dropped()
    gone = visible & new[owner]
    prompts = prompts.assign(visible=visible & ~gone, dropped=prompts["dropped"].to_numpy(bool) | gone)
    statistics = dropped_statistics(run, page)
    for row in np.flatnonzero(new):
        add_statistics(statistics, _statistics(run, Segments(segments), int(row)))
    place = segments.column_names.index("dropped")
    segments = segments.set_column(place, "dropped", pa.array(before | new, pa.bool_()))
    path = f"index/{number:016x}-{uuid.uuid4().hex}"
    record = write_page(run, path, page.level, Segments(segments), prompts, statistics)
    return record, Dropped(int(new.sum()), int(gone.sum()), int(prompts["n_rows"][gone].sum()))


def _statistics(run: Storage, segments: Segments, row: int) -> dict[str, HookStatistics]:
    part = segments.part(row)
    return {} if part.statistics is None else unpack_statistics(run.get(f"{part.path}/statistics.safetensors"))


def unneeded_segments(run: Storage, snapshot: Snapshot, before: float) -> list[str]:
    """The paths of dropped segments that no version superseded after `before` shows, and that still have objects."""
    gone = {path.rpartition("/")[2] for path in snapshot.parts.paths[snapshot.dropped_parts].tolist()}
    gone &= set(run.folders("segments"))
    if not gone:
        return []
    latest = {page.path for page in snapshot.version.pages}
    newer = math.inf  # when the next version appeared
    seen: set[str] = set()
    for entry in run.list("manifests"):  # the latest first
        number = version_number(entry.path)
        if newer > before and number < snapshot.version.number:
            try:
                for page in read_version(run, number).pages:
                    if page.path not in latest | seen:
                        seen.add(page.path)
                        gone -= _shown(run, page)
            except (FileNotFoundError, LakeCorrupt):  # another collector, with a shorter grace period, was here
                log.debug("version %d of %s was collected meanwhile", number, run.url)
        newer = entry.modified
    return [f"segments/{name}" for name in sorted(gone)]


def _shown(run: Storage, page: PageRecord) -> set[str]:
    """The ids of the segments of a page that are not dropped in it."""
    table = page_columns(read_page_file(run, page, ".segments.parquet"), ["id", "dropped"])
    marks: NDArray[np.bool_] = table["dropped"].to_numpy().astype(bool)
    return set(table["id"].to_numpy()[~marks].tolist())
