"""Making segments visible: one document a segment, created conditionally, so the first who names it decides.

The document of segment S is `commits/<S>.json`. Its writer creates it with the segment's record; garbage collection
creates it empty, which means that S never will be visible. Whoever closes a run, to seal or to delete it, first
creates a document below `closing/` and then reads the commits; a writer first commits and then looks there. So a
commit that was acknowledged is one that the closer has seen.
"""

from __future__ import annotations

import logging
import secrets
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from millpond.store.errors import CaptureFailed, InvalidInput
from millpond.store.manifest import Part, RunSpec, encode_record
from millpond.store.objects import Storage

log = logging.getLogger(__name__)

GRACE_SECONDS = 3600.0
"""How long readers may go on reading what was superseded, and writers may leave a segment untouched."""

FILLING = "filling"
"""Why a run is closed from the beginning: its rows come from whoever created it, who seals it too."""


def new_segment_id() -> str:
    """A name that nobody else gives: 32 hexadecimal digits, those of one writer ascending."""
    return f"{time.time_ns() // 1000:014x}{secrets.token_hex(9)}"


def commit_path(segment: str) -> str:
    """The document that makes a segment visible."""
    return f"commits/{segment}.json"


def check_open(run: Storage, spec: RunSpec) -> None:
    """Check that rows can be added to a run.

    Raises:
        InvalidInput: it is sealed, being sealed or deleted, a copy or an import, or of an older format.
    """
    if spec.version == 1:
        raise InvalidInput(
            f"run {spec.name!r} is of format version 1, which is read and sealed but does not grow; capture into a new run"
        )
    if run.exists("manifest.json"):
        raise InvalidInput(f"run {spec.name!r} is sealed and cannot grow; capture into a new run")
    check_filled(run, spec.name)
    if is_closing(run):
        raise InvalidInput(
            f"run {spec.name!r} is being sealed or deleted and cannot grow; if that was interrupted, seal or delete it "
            "again, or capture into a new run"
        )


def is_unfilled(run: Storage) -> bool:
    """Whether the run is a copy or an import that is being written, or that was interrupted."""
    filling = any(entry.path.startswith(f"closing/{FILLING}-") for entry in run.list("closing"))
    return filling and not run.exists("manifest.json")


def check_filled(run: Storage, name: str) -> None:
    """Check that the run is no copy or import that has not all its rows.

    Raises:
        InvalidInput: it is one.
    """
    if is_unfilled(run):
        raise InvalidInput(
            f"run {name!r} is a copy or an import that is being written, or was interrupted; then remove it with "
            f"millpond rm LAKE {name} --grace 0, and make it again"
        )


def is_closing(run: Storage) -> bool:
    """Whether somebody began to seal or to delete the run, and did not take it back."""
    return any(True for _ in run.list("closing"))


@contextmanager
def closing(run: Storage, why: str) -> Iterator[None]:
    """Keeps writers from committing; taken back only if what is done inside fails.

    After a kill it stays: the run then takes no rows until it is sealed.
    """
    path = close_run(run, why)
    try:
        yield
    except Exception:
        run.delete(path)
        raise


def close_run(run: Storage, why: str) -> str:
    """Keep writers from committing; returns the document that says so."""
    path = f"closing/{why}-{uuid.uuid4().hex}.json"
    run.put(path, b"")  # its name says why; and what is empty can be written on a full disk, to free it
    return path


def reopen_run(run: Storage, why: str) -> None:
    """Take back what was closed for that reason."""
    run.delete([entry.path for entry in run.list("closing") if entry.path.startswith(f"closing/{why}-")])


def check_wanted(run: Storage, spec: RunSpec, segment: str) -> None:
    """Check that a segment was not collected while it was written.

    Raises:
        CaptureFailed: it was.
    """
    try:
        fenced = run.head(commit_path(segment)).size == 0
    except FileNotFoundError:
        return
    if fenced:
        raise CaptureFailed(_abandoned(spec, segment))


def _abandoned(spec: RunSpec, segment: str) -> str:
    return (
        f"run {spec.name!r}: segment {segment} was collected as abandoned before it was committed; capture its requests "
        "again, and give garbage collection a longer grace period"
    )


def commit(run: Storage, spec: RunSpec, segment: str, part: Part) -> None:
    """Make a segment visible, durably and at once; after an error it may be visible or not.

    Raises:
        CaptureFailed: the run was closed meanwhile, or the segment was collected as abandoned.
    """
    if not run.create(commit_path(segment), encode_record(part)):
        raise CaptureFailed(_abandoned(spec, segment))
    if is_closing(run):
        raise CaptureFailed(
            f"run {spec.name!r} was sealed before {part.rows} rows were committed; capture them into a new run"
        )
    log.info("committed", extra={"run": spec.name, "segment": segment, "rows": part.rows, "prompts": part.prompts})
