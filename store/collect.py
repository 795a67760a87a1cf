"""Garbage collection: removes what no reader can see and no writer can still show.

An uncommitted segment is fenced first, by creating its commit record empty: from then on its writer cannot commit
it, however long it slept, so no clock decides what is safe. Clocks only decide how long readers keep what they
opened, and all times compared are the store's own.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import chain, pairwise

from millpond.store.commits import GRACE_SECONDS, commit_path
from millpond.store.errors import InvalidInput, LakeCorrupt
from millpond.store.manifest import Manifest, RunSpec, read_record
from millpond.store.objects import Entry, Storage
from millpond.store.retention import drop_consumed, read_retention, unneeded_segments
from millpond.store.snapshot import held_ids, load_snapshot
from millpond.store.versions import VersionRecord, latest_version, read_version, version_number

log = logging.getLogger(__name__)


@dataclass
class Collected:
    """What `collect_run` removed, or would remove."""

    paths: list[str] = field(default_factory=list)
    """Folders (segments, data) and single objects below the run."""
    bytes: int = 0
    problem: LakeCorrupt | None = None
    """Why nothing was looked at."""


def collect_run(run: Storage, *, grace_s: float = GRACE_SECONDS, dry_run: bool = False) -> Collected:
    """Remove what is older than `grace_s` seconds and cannot be seen, nor become visible, any more.

    Rows that the run's retention does not keep are dropped first.

    Raises:
        InvalidInput: `grace_s` is negative.
    """
    if grace_s < 0:
        raise InvalidInput(f"grace_s is {grace_s}; give seconds, 0 or more")
    spec = read_record(run, "run.json", RunSpec)
    before = run.now() - grace_s if grace_s else math.inf  # a store may tell times in whole seconds
    found = Collected()
    try:
        manifest = read_record(run, "manifest.json", Manifest)
    except FileNotFoundError:
        if not dry_run:
            drop_consumed(run)
        _collect_open(run, spec, before, found, dry_run)
        collect_dropped(run, grace_s, found, dry_run=dry_run)
    else:
        if run.head("manifest.json").modified <= before:
            _collect_sealed(run, manifest, found, dry_run)
    if not dry_run:
        for folder in ("", "commits", "manifests", "index", "segments"):
            run.sweep(folder, before)
        note_collected(run, found)
    return found


def note_collected(run: Storage, found: Collected) -> None:
    """Write the event of a collection that removed anything."""
    if found.paths:
        log.info("collected", extra={"run": run.name, "objects": len(found.paths), "bytes": found.bytes})


def _groups(run: Storage, folder: str) -> dict[str, list[Entry]]:
    """The objects below each folder right below `folder`, and those that are not finished."""
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in chain(run.list(folder), run.unfinished(folder)):
        groups["/".join(entry.path.split("/")[: folder.count("/") + 2])].append(entry)
    return groups


def _collect_sealed(run: Storage, manifest: Manifest, found: Collected, dry_run: bool) -> None:
    """After sealing, everything that only the open run needed, and the data of sealings that came second."""
    folders = ["segments", "commits", "manifests", "index"]
    folders += [name for name in run.folders() if name.startswith("data-") and name != manifest.data.path]
    for folder in folders:
        entries = list(run.list(folder))
        if entries or folder in run.folders():
            _note(found, folder, entries)
            if not dry_run:
                run.delete_tree(folder)
    if not dry_run:
        run.delete("lease.json")


def _note(found: Collected, path: str, entries: list[Entry]) -> None:
    found.paths.append(path)
    found.bytes += sum(entry.size for entry in entries)


def _collect_open(run: Storage, spec: RunSpec, before: float, found: Collected, dry_run: bool) -> None:
    groups = _groups(run, "segments")  # listed first: what appears later is in flight
    versions, entries = _retained(run, spec, before, found, dry_run)
    _collect_pages(run, versions, entries, found, dry_run)
    idle = {path: held for path, held in groups.items() if max(entry.modified for entry in held) <= before}
    visible = _visible(run)
    if visible is None:
        return  # sealed meanwhile
    orphans = {path: held for path, held in idle.items() if path.rpartition("/")[2] not in visible}
    if dry_run:
        for path, held in orphans.items():
            _note(found, path, held)
        return
    fenced = {path: held for path, held in orphans.items() if _fence(run, path.rpartition("/")[2])}
    if not fenced:
        return
    # A segment may have been committed, compacted and its record deleted before the fence went up; then a
    # version holds it by now. After the fence that cannot happen any more.
    visible = _visible(run)
    if visible is None:
        return
    for path, held in fenced.items():
        segment = path.rpartition("/")[2]
        if segment in visible:
            run.delete(commit_path(segment))
            continue
        run.delete_tree(path)
        _note(found, path, held)


def collect_dropped(run: Storage, grace_s: float, found: Collected, *, dry_run: bool = False) -> None:
    """Remove the objects of segments that retention dropped more than `grace_s`, or its own grace period, ago."""
    snapshot = load_snapshot(run, tail=False)
    if snapshot.manifest is not None:
        return
    retention = read_retention(run)
    grace = grace_s if retention is None else min(grace_s, retention.grace_s)
    for path in unneeded_segments(run, snapshot, run.now() - grace if grace else math.inf):
        _note(found, path, list(run.list(path)))
        if not dry_run:
            run.delete_tree(path)


def _visible(run: Storage) -> set[str] | None:
    snapshot = load_snapshot(run)
    return held_ids(snapshot) if snapshot.manifest is None else None


def _fence(run: Storage, segment: str) -> bool:
    """Whether the segment can never be committed from now on."""
    if run.create(commit_path(segment), b""):
        return True
    try:
        return run.head(commit_path(segment)).size == 0  # fenced before, by a collection that was interrupted
    except FileNotFoundError:
        return False  # compacted meanwhile


def _retained(
    run: Storage, spec: RunSpec, before: float, found: Collected, dry_run: bool
) -> tuple[list[VersionRecord], list[Entry]]:
    """The versions that readers may hold, after removing those superseded before `before`, and the pages before that."""
    pages = list(run.list("index"))
    entries = sorted(run.list("manifests"), key=lambda entry: -version_number(entry.path))
    keep: list[Entry] = entries[:1]
    gone: list[Entry] = []
    for newer, entry in pairwise(entries):
        (keep if newer.modified > before else gone).append(entry)
    for entry in gone:
        _note(found, entry.path, [entry])
    if not dry_run:
        run.delete([entry.path for entry in gone])
    versions = [read_version(run, version_number(entry.path)) for entry in keep]
    return [*versions, latest_version(run, spec.id)], pages


def _collect_pages(
    run: Storage, versions: list[VersionRecord], entries: list[Entry], found: Collected, dry_run: bool
) -> None:
    """Pages that no version names and none will: those for a version that exists already."""
    named = {page.path for version in versions for page in version.pages}
    latest = max(version.number for version in versions)
    gone = []
    for entry in entries:
        name = entry.path.rpartition("/")[2].split(".")[0]
        if f"index/{name}" not in named and int(name.split("-")[0], 16) <= latest:
            gone.append(entry.path)
            _note(found, entry.path, [entry])
    if not dry_run:
        run.delete(gone)
