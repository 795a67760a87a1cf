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
from millpond.store.files import encode_document
from millpond.store.manifest import Part, RunSpec, encode_record
from millpond.store.objects import Storage

log = logging.getLogger(__name__)

GRACE_SECONDS = 3600.0
"""How long readers may go on reading what was superseded, and writers may leave a segment untouched."""


def new_segment_id() -> str:
    """A name that nobody else gives: 32 hexadecimal digits, those of one writer ascending."""
    return f"{time.time_ns() // 1000:014x}{secrets.token_hex(9)}"


def commit_path(segment: str) -> str:
    """The document that makes a segment visible."""
    return f"commits/{segment}.json"


def check_open(run: Storage, spec: RunSpec) -> None:
    """Check that rows can be added to a run.

    Raises:
        InvalidInput: it is sealed, being sealed or deleted, or of an older format.
    """
    if spec.version == 1:
        raise InvalidInput(
            f"run {spec.name!r} is of format version 1, which is read and sealed but does not grow; capture into a new run"
        )
    if run.exists("manifest.json"):
        raise InvalidInput(f"run {spec.name!r} is sealed and cannot grow; capture into a new run")
    if is_closing(run):
        raise InvalidInput(
            f"run {spec.name!r} is being sealed or deleted and cannot grow; if that was interrupted, seal or delete it "
            "again, or capture into a new run"
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
    run.put(path, encode_document({"why": why}))
    return path


def reopen_run(run: Storage, why: str) -> None:
    """Take back what was closed for that reason."""
    run.delete([entry.path for entry in run.list("closing") if entry.path.startswith(f"closing/{why}-")])


def commit(run: Storage, spec: RunSpec, segment: str, part: Part) -> None:
    """Make a segment visible, durably and at once; after an error it may be visible or not.

    Raises:
        CaptureFailed: the run was closed meanwhile, or the segment was collected as abandoned.
    """
    if not run.create(commit_path(segment), encode_record(part)):
        raise CaptureFailed(
            f"run {spec.name!r}: segment {segment} of {part.rows} rows was collected as abandoned before it was committed; "
            "capture its requests again, and give garbage collection a longer grace period"
        )
    if is_closing(run):
        raise CaptureFailed(
            f"run {spec.name!r} was sealed before {part.rows} rows were committed; capture them into a new run"
        )
    log.info("committed", extra={"run": spec.name, "segment": segment, "rows": part.rows, "prompts": part.prompts})
