"""One capture a run at a time: a file lock where the lake is a folder, a lease where it is a store over a network.

Rows are right without it, since a prompt becomes visible once; it keeps two captures from doing the same work and from
counting each other's rows.
"""

from __future__ import annotations

import fcntl
import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from millpond.store.errors import RunBusy, StorageFailed
from millpond.store.files import encode_document
from millpond.store.objects import Storage
from millpond.store.posix import LocalStorage

logger = logging.getLogger(__name__)
LEASE_SECONDS = 60.0
_LEASE = "capture.json"


def only_capture(run: Storage) -> AbstractContextManager[Callable[[], None]]:
    """Holds the capture lock of the run in `run`; yields what checks that it is still held.

    Raises:
        RunBusy: another capture holds it, or has taken over.
    """
    return _flock(run.path) if isinstance(run, LocalStorage) else _lease(run)


@contextmanager
def _flock(folder: Path) -> Iterator[Callable[[], None]]:
    """The system releases it however this process ends."""
    with (folder / "capture.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunBusy(f"run {folder.name!r} is being captured by another process; wait for it to end") from None
        yield lambda: None


@contextmanager
def _lease(run: Storage) -> Iterator[Callable[[], None]]:
    """An object that is written again every quarter of the lease; an old one is a dead capture's."""
    mine = encode_document({"holder": uuid.uuid4().hex})
    if not _take(run, mine):
        raise RunBusy(
            f"run {run.name!r} is being captured by another process; wait for it to end, or {LEASE_SECONDS:.0f} s after it "
            "was killed"
        )
    ended, lost = threading.Event(), threading.Event()

    def renew() -> None:
        while not ended.wait(LEASE_SECONDS / 4):
            try:
                if run.get(_LEASE) != mine:
                    lost.set()
                    return
                run.put(_LEASE, mine)
            except FileNotFoundError:
                lost.set()
                return
            except StorageFailed as error:  # nobody else can take it over either
                logger.warning("run %r: its lease was not renewed: %s", run.name, error)

    def check() -> None:
        if lost.is_set():
            raise RunBusy(
                f"run {run.name!r} was taken over by another capture while this one stood still; stop this one"
            )

    thread = threading.Thread(target=renew, name="millpond-lease", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        ended.set()
        thread.join()
        if not lost.is_set():
            with suppress(StorageFailed):  # then it runs out
                run.delete(_LEASE)


def _take(run: Storage, mine: bytes) -> bool:
    if run.create(_LEASE, mine):
        return True
    with suppress(FileNotFoundError):
        if run.head(_LEASE).modified > run.now() - LEASE_SECONDS:
            return False
    run.delete(_LEASE)
    return run.create(_LEASE, mine)
