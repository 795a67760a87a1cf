"""The durable queue of jobs in the hub's database: priorities, turns between users, limits, cancellation.

Every change is one transaction, so that a process killed at any moment leaves a job as it was before or after. On
PostgreSQL workers skip jobs that others are claiming; on SQLite the one writer holds the database.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from millpond.hub.database import open_database
from millpond.hub.limits import Limits
from millpond.hub.tables import JOB_EVENTS, JOBS, QUEUE_USERS
from millpond.hub.transitions import FINAL, follow
from millpond.store.errors import InvalidInput, JobNotFound, LeaseLost, TooMany
from millpond.store.logs import of_job
from millpond.store.queue import QueuedJob, State

logger = logging.getLogger(__name__)

ID_BYTES = 8
_JSON_FIELDS = ("spec", "progress", "result")


class ProjectJob(QueuedJob):
    """A job with whom it is for; both are empty for the vault's own jobs."""

    project: str = ""
    user: str = ""
    priority: int = 0
    seconds: float | None = None
    """How long one claim of it may last; None for as long as it takes."""


@dataclass(frozen=True)
class Event:
    """What happened to a job."""

    at: float
    """Seconds since 1970."""
    event: str
    """Of `transitions.TRANSITIONS`."""
    state: State
    """The state after it."""
    progress: Mapping[str, Any]


class SqlQueue:
    """The `JobQueue` in a database; further claims of the same job, and of one user's jobs, wait for each other."""

    def __init__(
        self,
        database: sa.Engine | str,
        *,
        limits: Limits | None = None,
        max_attempts: int = 5,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Open the queue.

        Args:
            database: from `open_database`, or its URL.
            limits: of each user.
            max_attempts: claims of a job after which it fails: a job that kills its workers must not kill all of them.
            now: the clock, seconds since 1970.
        """
        self.engine = open_database(database) if isinstance(database, str) else database
        self.limits = limits or Limits()
        self.max_attempts = max_attempts
        self._now = now
        self._reader = self.engine.execution_options(write=False)

    def submit(
        self,
        kind: str,
        spec: Mapping[str, Any],
        *,
        model: str = "",
        project: str = "",
        user: str = "",
        priority: int = 0,
        check: Callable[[sa.Connection], None] | None = None,
    ) -> str:
        """Queue a job; returns its id, 16 random hexadecimal digits, once it is durable.

        Args:
            kind: of the job.
            spec: what to do, as JSON values.
            model: the base model that its worker must run; empty if any worker will do.
            project: whose it is.
            user: who asks.
            priority: a higher one is claimed first.
            check: refuses the job by what it raises; nobody else submits for the project meanwhile.

        Raises:
            TooMany: `user` or `project` has as many jobs waiting as are allowed.
        """
        job = ProjectJob(
            id=secrets.token_hex(ID_BYTES),
            kind=_text(kind),
            spec=dict(spec),
            model=_text(model),
            state=follow("submit", None),
            submitted=self._now(),
            project=_text(project),
            user=_text(user),
            priority=priority,
            seconds=self.limits.seconds,
        )
        with self.engine.begin() as connection:
            for what, row, mine, allowed in (
                (f"user {job.user!r}", job.user, JOBS.c.user == job.user, self.limits.queued),
                (f"project {project!r}", _of_project(project), JOBS.c.project == project, self.limits.project_queued),
            ):
                self._lock(connection, row)
                waiting = connection.scalar(_count(mine, JOBS.c.state == "queued")) or 0
                if job.user and waiting >= allowed:
                    raise TooMany(f"{what} has {waiting} jobs waiting and {allowed} are allowed; wait or cancel some")
            if check is not None:
                check(connection)
            connection.execute(JOBS.insert().values(_row(job)))
            self._record(connection, job, "submit")
        _tell(job, "submitted")
        return job.id

    def claim(
        self, worker: str, kinds: Collection[str], lease_seconds: float, models: Collection[str] = ()
    ) -> ProjectJob | None:
        """Take a job of one of `kinds` that is queued or whose lease ran out; None if there is none.

        It needs no model, or one of `models`, the names of what the worker serves; jobs of other models wait for theirs.
        Of the highest priority; of the user who has the fewest under way, and among those who was served longest ago;
        of that user the oldest.
        """
        while True:
            with self.engine.begin() as connection:
                now = self._now()
                job = self._next(connection, kinds, models, now)
                if job is None:
                    return None
                if job.attempts >= self.max_attempts:
                    error = f"its workers ended {job.attempts} times without a word, the last one {job.worker!r}"
                    _tell(self._change(connection, job, "give up", error=error), "given up")
                    continue
                self._lock(connection, job.user)
                self._lock(connection, _of_project(job.project))
                # only now nobody else counts these jobs; whoever did may have taken the last place since
                if job.user and self._full(connection, job, now):
                    continue
                served = QUEUE_USERS.update().where(QUEUE_USERS.c.name == job.user).values(served=now)
                connection.execute(served)
                claimed = self._change(
                    connection,
                    job,
                    "claim",
                    attempts=job.attempts + 1,
                    worker=_text(worker),
                    lease_until=now + lease_seconds,
                )
            _tell(claimed, "claimed")
            return claimed

    def heartbeat(self, job: QueuedJob, lease_seconds: float, progress: Mapping[str, Any]) -> None:
        """Renew the lease of a claimed job.

        Raises:
            LeaseLost: the claim ran out and the job was claimed again, or it ended or was cancelled, or took too long.
        """
        self.holds(job)  # ends it if it has lasted too long
        with self._held(job) as (connection, current):
            self._change(
                connection, current, "heartbeat", lease_until=self._now() + lease_seconds, progress=dict(progress)
            )

    def holds(self, job: QueuedJob) -> bool:
        """Whether the claim that `job` is still counts; one that has lasted longer than the job may ends here, failed."""
        with self._reader.connect() as connection:
            current = self._find(connection, job.id)
            if current.state != "claimed" or current.attempts != job.attempts:
                return False
            if current.seconds is None or self._now() - self._claimed_at(connection, job.id) <= current.seconds:
                return True
        try:
            with self._held(job) as (connection, current):
                error = f"TimeLimit: it ran for more than {current.seconds:,.0f} s, which the policy file allows"
                ended = self._change(connection, current, "time out", error=error)
            _tell(ended, "timed out")
        except LeaseLost:  # it has ended meanwhile
            pass
        return False

    def finish(
        self, job: QueuedJob, result: Mapping[str, Any], *, also: Callable[[sa.Connection], None] | None = None
    ) -> None:
        """End a claimed job well; `also` writes what belongs to its end, in the same transaction.

        Raises:
            LeaseLost: as for `heartbeat`; neither the result nor `also` counts.
        """
        with self._held(job) as (connection, current):
            ended = self._change(connection, current, "finish", result=dict(result))
            if also is not None:
                also(connection)
        _tell(ended, "finished")

    def hand_over(self, job: QueuedJob, kind: str, model: str = "") -> None:
        """Queue a claimed job again as one of `kind` that needs `model`, or none, for somebody else to go on with.

        Raises:
            LeaseLost: as for `heartbeat`.
        """
        with self._held(job) as (connection, current):
            queued = self._change(
                connection, current, "hand over", kind=_text(kind), model=_text(model), worker=None, lease_until=0.0
            )
        _tell(queued, "handed over")

    def fail(self, job: QueuedJob, error: str) -> None:
        """End a claimed job that cannot be done.

        Raises:
            LeaseLost: as for `heartbeat`.
        """
        with self._held(job) as (connection, current):
            ended = self._change(connection, current, "fail", error=_text(error))
        _tell(ended, "failed")

    def cancel(self, job_id: str) -> ProjectJob:
        """Cancel a job that has not ended, and return it; one that has ended is returned as it is.

        Raises:
            JobNotFound: there is none of that id.
        """
        with self.engine.begin() as connection:
            job = self._find(connection, job_id, lock=True)
            if job.state in FINAL:
                return job
            cancelled = self._change(connection, job, "cancel")
        _tell(cancelled, "cancelled")
        return cancelled

    def get(self, job_id: str) -> ProjectJob:
        """The job as it stands now.

        Raises:
            JobNotFound: there is none of that id.
        """
        with self._reader.connect() as connection:
            return self._find(connection, job_id)

    def jobs(
        self,
        *,
        project: str | None = None,
        user: str | None = None,
        state: State | None = None,
        kind: str | None = None,
    ) -> list[ProjectJob]:
        """Every job, or those of a project, a user, in a state or of a kind, oldest first."""
        query = sa.select(JOBS).order_by(JOBS.c.seq)
        wanted = ((JOBS.c.project, project), (JOBS.c.user, user), (JOBS.c.state, state), (JOBS.c.kind, kind))
        for column, value in wanted:
            query = query if value is None else query.where(column == value)
        with self._reader.connect() as connection:
            return [_job(row) for row in connection.execute(query)]

    def history(self, job_id: str) -> tuple[Event, ...]:
        """Everything that happened to a job, oldest first; heartbeats only where the progress changed.

        Raises:
            JobNotFound: there is none of that id.
        """
        query = sa.select(JOB_EVENTS).where(JOB_EVENTS.c.job == job_id).order_by(JOB_EVENTS.c.seq)
        with self._reader.connect() as connection:
            self._find(connection, job_id)
            rows = connection.execute(query).all()
        return tuple(Event(row.at, row.event, row.state, json.loads(row.progress)) for row in rows)

    def _next(
        self, connection: sa.Connection, kinds: Collection[str], models: Collection[str], now: float
    ) -> ProjectJob | None:
        """The job whose turn it is, locked."""
        busy = (
            sa.select(JOBS.c.user, sa.func.count().label("running"))
            .where(JOBS.c.state == "claimed", JOBS.c.lease_until > now)
            .group_by(JOBS.c.user)
            .subquery()
        )
        crowded = (
            sa.select(JOBS.c.project, sa.func.count().label("running"))
            .where(JOBS.c.state == "claimed", JOBS.c.lease_until > now)
            .group_by(JOBS.c.project)
            .subquery()
        )
        running = sa.func.coalesce(busy.c.running, 0)
        room = sa.and_(
            running < self.limits.running, sa.func.coalesce(crowded.c.running, 0) < self.limits.project_running
        )
        claimable = sa.or_(JOBS.c.state == "queued", sa.and_(JOBS.c.state == "claimed", JOBS.c.lease_until <= now))
        query = (
            sa.select(JOBS)
            .join(QUEUE_USERS, QUEUE_USERS.c.name == JOBS.c.user)
            .outerjoin(busy, busy.c.user == JOBS.c.user)
            .outerjoin(crowded, crowded.c.project == JOBS.c.project)
            .where(JOBS.c.kind.in_(kinds), JOBS.c.model.in_(["", *map(_text, models)]), claimable)
            .where(sa.or_(room, JOBS.c.user == ""))
            .order_by(JOBS.c.priority.desc(), running, QUEUE_USERS.c.served, JOBS.c.seq)
            .limit(1)
            .with_for_update(of=JOBS, skip_locked=True)
        )
        row = connection.execute(query).first()
        return None if row is None else _job(row)

    def _lock(self, connection: sa.Connection, name: str) -> None:
        """Wait until nobody else counts the jobs of a user or a project; SQLite has locked the database already."""
        query = sa.select(QUEUE_USERS.c.name).where(QUEUE_USERS.c.name == name).with_for_update()
        if connection.execute(query).first() is None:
            if connection.dialect.name == "postgresql":
                from sqlalchemy.dialects.postgresql import insert

                new = insert(QUEUE_USERS).values(name=name, served=0.0).on_conflict_do_nothing()
                connection.execute(new)
                connection.execute(query)
            else:
                connection.execute(QUEUE_USERS.insert().values(name=name, served=0.0))

    def _full(self, connection: sa.Connection, job: ProjectJob, now: float) -> bool:
        """Whether the job's user or project has as many under way as are allowed."""
        under_way = (JOBS.c.state == "claimed", JOBS.c.lease_until > now)
        of_user = connection.scalar(_count(JOBS.c.user == job.user, *under_way)) or 0
        of_project = connection.scalar(_count(JOBS.c.project == job.project, *under_way)) or 0
        return of_user >= self.limits.running or of_project >= self.limits.project_running

    def _claimed_at(self, connection: sa.Connection, job_id: str) -> float:
        claims = (JOB_EVENTS.c.job == job_id, JOB_EVENTS.c.event == "claim")
        return float(connection.scalar(sa.select(sa.func.max(JOB_EVENTS.c.at)).where(*claims)) or 0.0)

    @contextmanager
    def _held(self, job: QueuedJob) -> Iterator[tuple[sa.Connection, ProjectJob]]:
        """A transaction in which the claim that `job` is still counts."""
        with self.engine.begin() as connection:
            current = self._find(connection, job.id, lock=True)
            if current.state != "claimed" or current.attempts != job.attempts:
                raise LeaseLost(
                    f"job {job.id}: claim {job.attempts} of {job.worker!r} no longer counts: it is {current.state}, "
                    f"claim {current.attempts} of {current.worker!r}; stop working on it"
                )
            yield connection, current

    def _find(self, connection: sa.Connection, job_id: str, *, lock: bool = False) -> ProjectJob:
        query = sa.select(JOBS).where(JOBS.c.id == job_id)
        row = None if "\0" in job_id else connection.execute(query.with_for_update() if lock else query).first()
        if row is None:
            raise JobNotFound(f"job {job_id!r} is not in the queue; check the id")
        return _job(row)

    def _change(self, connection: sa.Connection, job: ProjectJob, event: str, **changes: Any) -> ProjectJob:
        changed = job.model_copy(update={"state": follow(event, job.state), **changes})
        connection.execute(JOBS.update().where(JOBS.c.id == job.id).values(_row(changed)))
        if event != "heartbeat" or changed.progress != job.progress:
            self._record(connection, changed, event)
        return changed

    def _record(self, connection: sa.Connection, job: ProjectJob, event: str) -> None:
        row = {"job": job.id, "at": self._now(), "event": event, "state": job.state}
        connection.execute(JOB_EVENTS.insert().values(row | {"progress": _encode(job.progress)}))


def _tell(job: ProjectJob, event: str) -> None:
    """Log what has become of a job."""
    with of_job(job.id):
        logger.info(event, extra={"kind": job.kind, "attempt": job.attempts, "worker": job.worker})


def _count(*conditions: sa.ColumnElement[bool]) -> sa.Select[Any]:
    return sa.select(sa.func.count()).select_from(JOBS).where(*conditions)


def _of_project(name: str) -> str:
    """The project's row among the users'."""
    return f"project:{name}"


def _row(job: ProjectJob) -> dict[str, Any]:
    row = job.model_dump()
    return row | {name: None if row[name] is None else _encode(row[name]) for name in _JSON_FIELDS}


def _job(row: sa.Row[Any]) -> ProjectJob:
    found = dict(row._mapping)
    del found["seq"]
    for name in _JSON_FIELDS:
        found[name] = None if found[name] is None else json.loads(found[name])
    return ProjectJob.model_validate(found)


def _encode(value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"what is kept of a job must be JSON: {error}") from error


def _text(value: str) -> str:
    """`value` as both databases can keep it: PostgreSQL takes no NUL, UTF-8 no lone surrogate."""
    return value.encode("utf-8", "replace").decode().replace("\0", "�")
