"""A durable queue of declared jobs: what workers and submitters agree on, and the queue in a folder.

A job is *queued*, then *claimed* by one worker under a lease that its heartbeats renew, then *finished*
or *failed*. A claim whose lease ran out (its worker was killed) may be claimed again: whoever runs jobs
must be able to run one twice. An old claim can no longer change anything: every call checks it.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from millpond.store.errors import InvalidInput, JobNotFound, LeaseLost
from millpond.store.files import encode_document, read_json, write_whole
from millpond.store.posix import sync_folder

State = Literal["queued", "claimed", "finished", "failed", "cancelled"]


class QueuedJob(BaseModel):
    """One job and where it stands."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    kind: str = Field(min_length=1)
    """Which runner it is for, such as `capture`."""
    spec: dict[str, Any]
    """What is to be done, as the job's kind declares it."""
    model: str = ""
    """The base model that its worker must run, as `capture_spec.ModelSection.base` names it; empty if any worker will do."""
    state: State = "queued"
    submitted: float
    """Seconds since 1970, as every time here."""
    attempts: int = 0
    """How often it was claimed; with the id, it names one claim."""
    worker: str | None = None
    """Who claimed it last."""
    lease_until: float = 0.0
    progress: dict[str, Any] = {}
    """What the last heartbeat told."""
    result: dict[str, Any] | None = None
    error: str | None = None
    """Why it failed."""


class JobQueue(Protocol):
    """What every queue of jobs does, wherever it lives."""

    def submit(self, kind: str, spec: Mapping[str, Any], *, model: str = "") -> str:
        """Queue a job that needs `model`, or none; returns its id, once it is durable."""

    def claim(
        self, worker: str, kinds: Collection[str], lease_seconds: float, models: Collection[str] = ()
    ) -> QueuedJob | None:
        """Take the oldest job of one of `kinds` that is queued or whose lease ran out; None if there is none.

        It needs no model, or one of `models`, the names of what the worker serves; jobs of other models stay as they are.
        """

    def heartbeat(self, job: QueuedJob, lease_seconds: float, progress: Mapping[str, Any]) -> None:
        """Renew the lease of a claimed job.

        Raises:
            LeaseLost: the claim ran out and the job was claimed again, or it ended.
        """

    def finish(self, job: QueuedJob, result: Mapping[str, Any]) -> None:
        """End a claimed job well.

        Raises:
            LeaseLost: as for `heartbeat`; the result was not taken.
        """

    def fail(self, job: QueuedJob, error: str) -> None:
        """End a claimed job that cannot be done.

        Raises:
            LeaseLost: as for `heartbeat`.
        """

    def get(self, job_id: str) -> QueuedJob:
        """The job as it stands now.

        Raises:
            JobNotFound: there is none of that id.
        """


class FolderQueue:
    """A queue in a folder of one machine: a file a job, in a folder a state.

    Every change holds one lock, which the kernel drops with its process, and ends with one atomic rename,
    so that a kill leaves a job as it was before or after.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, max_attempts: int = 5, now: Callable[[], float] = time.time
    ) -> None:
        """Open the queue in `folder`, made if it is missing.

        Args:
            folder: on a local file system.
            max_attempts: claims of a job after which it fails: a job that kills its workers must not kill all of them.
            now: the clock.

        Raises:
            InvalidInput: the folder cannot be used.
        """
        self.folder = Path(folder)
        self.max_attempts = max_attempts
        self._now = now
        try:
            for state in ("queued", "claimed", "finished", "failed"):
                (self.folder / state).mkdir(parents=True, exist_ok=True)
            (self.folder / "lock").touch()
        except OSError as error:
            raise InvalidInput(
                f"queue {os.fspath(folder)!r} cannot be used: {error.strerror}; name a folder that you may write"
            ) from error

    def submit(self, kind: str, spec: Mapping[str, Any], *, model: str = "") -> str:
        """Queue a job that needs `model`, or none; returns its id, once it is durable."""
        now = self._now()
        # ids sort by time: a folder's listing is the queue's order
        job = QueuedJob(
            id=f"{int(now * 1e6):016d}-{uuid.uuid4().hex[:12]}", kind=kind, spec=dict(spec), model=model, submitted=now
        )
        self._write(job)
        return job.id

    def claim(
        self, worker: str, kinds: Collection[str], lease_seconds: float, models: Collection[str] = ()
    ) -> QueuedJob | None:
        """Take the oldest job of one of `kinds` that is queued or whose lease ran out; None if there is none.

        It needs no model, or one of `models`, the names of what the worker serves; jobs of other models stay as they are.
        """
        with self._locked():
            for path in sorted([*self._files("queued"), *self._files("claimed")], key=lambda path: path.name):
                job = self._read(path)
                if job.kind not in kinds or (job.model and job.model not in models):
                    continue
                if job.state == "claimed" and job.lease_until > self._now():
                    continue
                if job.attempts >= self.max_attempts:
                    error = f"its workers ended {job.attempts} times without a word, the last one {job.worker!r}"
                    self._move(job, state="failed", error=error)
                    continue
                return self._move(
                    job,
                    state="claimed",
                    attempts=job.attempts + 1,
                    worker=worker,
                    lease_until=self._now() + lease_seconds,
                )
        return None

    def heartbeat(self, job: QueuedJob, lease_seconds: float, progress: Mapping[str, Any]) -> None:
        """Renew the lease of a claimed job; raises LeaseLost."""
        with self._held(job) as current:
            self._move(current, lease_until=self._now() + lease_seconds, progress=dict(progress))

    def finish(self, job: QueuedJob, result: Mapping[str, Any]) -> None:
        """End a claimed job well; raises LeaseLost."""
        with self._held(job) as current:
            self._move(current, state="finished", result=dict(result))

    def fail(self, job: QueuedJob, error: str) -> None:
        """End a claimed job that cannot be done; raises LeaseLost."""
        with self._held(job) as current:
            self._move(current, state="failed", error=error)

    def get(self, job_id: str) -> QueuedJob:
        """The job as it stands now; raises JobNotFound."""
        with self._locked():
            return self._find(job_id)

    def jobs(self) -> list[QueuedJob]:
        """Every job, oldest first."""
        with self._locked():
            states = ("queued", "claimed", "finished", "failed")
            paths = sorted((path for state in states for path in self._files(state)), key=lambda path: path.name)
            return [self._read(path) for path in paths]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("r+b") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # falls with the process, however that ends
            yield

    @contextmanager
    def _held(self, job: QueuedJob) -> Iterator[QueuedJob]:
        with self._locked():
            current = self._find(job.id)
            if current.state != "claimed" or current.attempts != job.attempts:
                raise LeaseLost(
                    f"job {job.id}: claim {job.attempts} of {job.worker!r} no longer counts: it is {current.state}, "
                    f"claim {current.attempts} of {current.worker!r}; stop working on it"
                )
            yield current

    def _files(self, state: str) -> list[Path]:
        return list((self.folder / state).glob("[!.]*.json"))

    def _find(self, job_id: str) -> QueuedJob:
        if "/" not in job_id and "\0" not in job_id:
            for state in ("finished", "failed", "claimed", "queued"):
                path = self.folder / state / f"{job_id}.json"
                if path.exists():
                    return self._read(path)
        raise JobNotFound(f"job {job_id!r} is not in the queue {str(self.folder)!r}; check the id")

    def _read(self, path: Path) -> QueuedJob:
        # the folder decides: a kill between writing and renaming leaves a job where it was
        return QueuedJob.model_validate({**read_json(path), "state": path.parent.name})

    def _write(self, job: QueuedJob) -> None:
        write_whole(self.folder / job.state / f"{job.id}.json", encode_document(job.model_dump(mode="json")))

    def _move(self, job: QueuedJob, **changes: Any) -> QueuedJob:
        changed = job.model_copy(update=changes)
        source = self.folder / job.state / f"{job.id}.json"
        write_whole(source, encode_document(changed.model_dump(mode="json")))
        if changed.state != job.state:
            source.rename(self.folder / changed.state / source.name)
            sync_folder(self.folder / changed.state)
            sync_folder(self.folder / job.state)
        return changed
