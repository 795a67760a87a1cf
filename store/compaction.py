"""Compaction: folds commit records into the pages of a new manifest version.

Two compactors at once do no harm, because only one can create a version; the lease saves the other's work. Pages
of one level are merged eightfold, so a run of n commits has O(log n) pages and each segment is rewritten as often.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence

import pandas as pd
import pyarrow as pa

from millpond.store.files import encode_document
from millpond.store.manifest import Part, encode_record
from millpond.store.objects import Storage
from millpond.store.snapshot import commit_id, fold, held_ids, load_snapshot, read_commits
from millpond.store.stats import HookStatistics, add_statistics
from millpond.store.versions import (
    Segments,
    VersionRecord,
    dropped_statistics,
    page_columns,
    read_page_file,
    version_path,
    write_page,
)

log = logging.getLogger(__name__)

FANOUT = 8
MOST_PROMPTS = 1 << 21
"""Pages are not merged into larger ones than this, so no compaction takes long."""
LEASE_SECONDS = 60.0
BATCH = 1024
"""Commits folded into one version at most."""


def compact(run: Storage, *, least: int = 1, lease_s: float = LEASE_SECONDS) -> int:
    """Fold the commits of the open run in `run` into a new version, if there are `least` of them.

    Does nothing while somebody else holds a lease younger than `lease_s` seconds. Returns the number of commits folded.
    """
    if not _take_lease(run, lease_s):
        return 0
    try:
        return _compact(run, least)
    finally:
        run.delete("lease.json")


def _take_lease(run: Storage, lease_s: float) -> bool:
    """Create the lease; one older than `lease_s` seconds by the store's clock is a dead compactor's."""
    document = encode_document({"holder": uuid.uuid4().hex})
    if run.create("lease.json", document):
        return True
    try:
        expired = run.head("lease.json").modified < run.now() - lease_s
    except FileNotFoundError:
        expired = False
    if not expired:
        return False
    run.delete("lease.json")
    return run.create("lease.json", document)


def _compact(run: Storage, least: int) -> int:
    while True:
        commits = sorted((entry for entry in run.list("commits") if entry.size), key=lambda entry: entry.path)
        if len(commits) < least:
            return 0
        snapshot = load_snapshot(run, tail=False)
        if snapshot.manifest is not None:
            return 0
        held = held_ids(snapshot)
        stale = [entry.path for entry in commits if commit_id(entry.path) in held]
        fresh = [entry.path for entry in commits if commit_id(entry.path) not in held][:BATCH]
        if not fresh:
            run.delete(stale)
            return 0
        parts = read_commits(run, fresh)
        if parts is None:
            continue
        tail = fold(run, snapshot, parts)
        prompts = tail.prompts.assign(dropped=False)
        version = _extend(run, snapshot.version, list(snapshot.spec.arrays()), parts, prompts)
        if run.create(version_path(version.number), encode_record(version)):
            run.delete([*stale, *fresh])
            log.info("compacted", extra={"run": run.name, "version": version.number, "commits": len(parts)})
            return len(parts)


def _extend(
    run: Storage, version: VersionRecord, arrays: list[str], parts: Sequence[Part], prompts: pd.DataFrame
) -> VersionRecord:
    """The next version: the same pages, then one of `parts`, merged where a level is full."""
    number = version.number + 1
    pages = list(version.pages)
    level, segments = 0, Segments.of(list(parts), arrays)
    statistics: dict[str, HookStatistics] = {}
    while True:
        same = pages[-(FANOUT - 1) :]
        full = len(same) == FANOUT - 1 and all(page.level == level for page in same)
        if not full or sum(page.prompts for page in same) + len(prompts) > MOST_PROMPTS:
            break
        older = [page_columns(read_page_file(run, page, ".segments.parquet")) for page in same]
        segments = Segments(pa.concat_tables([*older, segments.table], promote_options="default"))
        for page in same:
            add_statistics(statistics, dropped_statistics(run, page))
        tables = [page_columns(read_page_file(run, page, ".prompts.parquet")).to_pandas() for page in same]
        prompts = pd.concat([*tables, prompts], ignore_index=True)
        del pages[-(FANOUT - 1) :]
        level += 1
    path = f"index/{number:016x}-{uuid.uuid4().hex}"
    pages.append(write_page(run, path, level, segments, prompts, statistics))
    return VersionRecord(run=version.run, number=number, pages=tuple(pages))
