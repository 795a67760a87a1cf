"""The executor: takes jobs from the queue, runs them next to the data, and writes what they come to.

A job's answers are written in the transaction that ends it, and sent by the gateway only. Killed before that, the job is
taken over when its lease has run out and run again; killed after, nothing is left to do.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from millpond.analysis.cluster import lake_cluster, with_workers
from millpond.analysis.passes import running
from millpond.hub.answers import Answers, Kept, kept_answers
from millpond.hub.body import curve_code
from millpond.hub.database import open_database
from millpond.hub.kinds import KINDS, Job, Outcome, parse_job
from millpond.hub.kinds.steps import LAST
from millpond.hub.limits import job_limits
from millpond.hub.policy import Policy, read_policy
from millpond.hub.projects import Projects
from millpond.hub.queue import ProjectJob, SqlQueue
from millpond.hub.rules import judge
from millpond.hub.settings import Settings
from millpond.hub.vault import Vault
from millpond.store.configuration import read_configuration
from millpond.store.errors import Cancelled, LeaseLost, MillpondError
from millpond.store.lake import Lake, open_lake
from millpond.store.logs import of_job

logger = logging.getLogger(__name__)

EXECUTED = frozenset(name for name, kind in KINDS.items() if kind.runs_on == "executor") | LAST
_STEPS = 16


@dataclass
class Workshop:
    """What an executor opens once."""

    settings: Settings
    policy: Policy = field(init=False)
    engine: sa.Engine = field(init=False)
    queue: SqlQueue = field(init=False)
    projects: Projects = field(init=False)
    answers: Answers = field(init=False)
    lake: Lake = field(init=False)

    def __post_init__(self) -> None:
        self.policy = read_policy(self.settings.policy)
        self.engine = open_database(self.settings.database)
        self.queue = SqlQueue(self.engine, limits=job_limits(self.settings, self.policy))
        self.projects = Projects(self.engine)
        self.answers = Answers(self.engine)
        self.lake = open_lake(self.settings.lake)

    @contextmanager
    def cluster(self) -> Iterator[Any]:
        """A client of the Dask cluster that the lake declares, or of `workers` on this machine; None for neither."""
        declared, workers = read_configuration(self.lake).cluster, self.settings.workers
        if declared is None and not workers:
            yield None
            return
        with lake_cluster(self.lake, with_workers(declared, workers) if workers else declared) as client:
            yield client

    def vault(self, job: ProjectJob, stop: threading.Event | None = None) -> Vault:
        """The job's project's vault, with labels as they were when it was submitted."""
        pins, dictionary = job.spec["pins"], self.settings.dictionary
        return Vault(self.lake, self.projects, self.policy, job.project, job.id, pins, stop, dictionary)

    def keep(self, job: ProjectJob, parsed: Job, vault: Vault, outcome: Outcome) -> tuple[Kept, ...]:
        """The answers as they are to be written."""
        if not outcome.answers:
            return ()
        disclosure = self.policy.disclosure
        verdicts = [judge(one.result, one.evidence, (), disclosure) for one in outcome.answers]
        return kept_answers(
            job.id,
            outcome.answers,
            project=job.project,
            run=vault.subject(parsed),
            specification={"job": job.spec["job"], "pins": job.spec["pins"], "data": vault.data(parsed)},
            models=tuple(job.spec["models"]),
            verdicts=verdicts,
        )


class Executor:
    """Runs jobs one after the other. Several executors, on one machine or many, share the queue."""

    def __init__(self, settings: Settings, *, told: Callable[[str], None] = logger.info) -> None:
        self.workshop = Workshop(settings)
        self.settings = settings
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.told = told
        self.took: Callable[[ProjectJob], None] = lambda _: None
        """Told of each job that is begun."""
        self.gave: Callable[[bool], None] = lambda _: None
        """Told whether it ended well."""
        self._stopped = threading.Event()

    def run(self, *, until_empty: bool = False) -> int:
        """Take jobs until `stop`, or until there are none; returns how many ended well."""
        ended = 0
        queue, settings = self.workshop.queue, self.settings
        with self.workshop.cluster() as client:
            while not self._stopped.is_set():
                claimed = queue.claim(self.name, EXECUTED, settings.lease_seconds)
                if claimed is not None:
                    self.took(claimed)
                    with of_job(claimed.id):
                        well = self._run(claimed, client)
                    self.gave(well)
                    ended += well
                elif until_empty:
                    break
                else:
                    self._stopped.wait(settings.poll_seconds)
        return ended

    def stop(self) -> None:
        """End after the job under way; from any thread or a signal handler."""
        self._stopped.set()

    def _run(self, claimed: ProjectJob, client: Any) -> bool:
        self.told(f"job {claimed.id}: {claimed.kind}, attempt {claimed.attempts}")
        queue, stop = self.workshop.queue, threading.Event()
        try:
            with self._heartbeats(claimed, stop) as progress:
                outcome, kept = self._do(claimed, client, stop, progress)
            self._finish(claimed, outcome, kept)
        except (Cancelled, LeaseLost):
            self.told(f"job {claimed.id}: cancelled, another executor's, or out of time; stopped")
            return False
        except Exception as error:  # whatever a job raises ends that job alone; its text stays in the vault
            if not isinstance(error, MillpondError):
                logger.exception("job %s", claimed.id)
            self.told(f"job {claimed.id}: {type(error).__name__}: {error}")
            try:
                queue.fail(claimed, f"{type(error).__name__}: {error}"[:2000])
            except LeaseLost:
                self.told(f"job {claimed.id}: another executor's")
            return False
        return True

    def _do(
        self, claimed: ProjectJob, client: Any, stop: threading.Event, progress: Progress
    ) -> tuple[Outcome, tuple[Kept, ...]]:
        parsed = parse_job(claimed.spec["job"])
        vault = self.workshop.vault(claimed, stop)

        def figure(share: float, value: float) -> None:
            if vault.figures:
                progress.figure(share, value)

        with running(client, in_process=client is None, cancel=stop, on_progress=progress.passes, on_figure=figure):
            outcome = parsed.run(vault, progress)
            vault.check()
        return outcome, self.workshop.keep(claimed, parsed, vault, outcome)

    def _finish(self, claimed: ProjectJob, outcome: Outcome, kept: tuple[Kept, ...]) -> None:
        """Answers, handles and the end of the job in one transaction."""
        workshop = self.workshop

        def also(connection: sa.Connection) -> None:
            for made in outcome.made:
                workshop.projects.hold(
                    claimed.project, made.kind, made.name, made.target,
                    model=made.model, detail=made.detail, connection=connection,
                )  # fmt: skip
            workshop.answers.keep(connection, kept, user=claimed.user)

        refused = sum(one.verdict.outcome == "refuse" for one in kept)
        result = {"answers": len(kept), "refused": refused, "made": [[one.kind, one.name] for one in outcome.made]}
        workshop.queue.finish(claimed, result, also=also)

    @contextmanager
    def _heartbeats(self, claimed: ProjectJob, stop: threading.Event) -> Iterator[Progress]:
        """Renew the lease, and tell each new sixteenth, from a thread; `stop` is set when the lease is lost."""
        queue, lease = self.workshop.queue, self.settings.lease_seconds
        ended, moved = threading.Event(), threading.Event()
        progress = Progress(moved.set)

        def renew() -> None:
            last = time.monotonic()
            while not ended.is_set():
                moved.wait(min(lease / 4, 1.0))
                if ended.is_set():
                    return
                try:
                    if not moved.is_set() and time.monotonic() - last < lease / 4:
                        if not queue.holds(claimed):
                            stop.set()
                            return
                        continue
                    moved.clear()
                    told = {"share": progress.step / _STEPS} | ({"curve": progress.curve} if progress.curve else {})
                    queue.heartbeat(claimed, lease, told)
                    last = time.monotonic()
                except LeaseLost:
                    stop.set()
                    return
                except sa.exc.SQLAlchemyError:  # the database is away for a moment; the lease tells for how long
                    logger.exception("job %s: no heartbeat", claimed.id)

        thread = threading.Thread(target=renew, name="millpond-heartbeat", daemon=True)
        thread.start()
        try:
            yield progress
        finally:
            ended.set()
            moved.set()
            thread.join()


class Progress:
    """How far a job is, in sixteenths that only rise."""

    def __init__(self, moved: Callable[[], None]) -> None:
        self.step = 0
        self.curve: list[int] = []
        """What a training has reached in each sixteenth of its work, as `body.TrainingCurve` codes it."""
        self._moved = moved
        self._share = 0.0
        self._floor = 0.0
        self._pass = ""

    def __call__(self, share: float) -> None:
        """The share of the work that is done."""
        self._floor = max(self._floor, share)
        self._see(share)

    def passes(self, description: str, done: int, total: int) -> None:
        """A pass has done so many blocks. Nobody knows how many passes come: each takes a seventh of what is left."""
        if done >= total:
            self._floor += (1 - self._floor) / 7
        self._see(self._floor + (1 - self._floor) / 7 * (done / total if total and done < total else 0))

    def figure(self, share: float, value: float) -> None:
        """A training's FVU; the first of each sixteenth is kept."""
        place = min(_STEPS - 1, math.floor(share * _STEPS))
        if place >= len(self.curve):
            self.curve = [*self.curve, *[curve_code(value)] * (place + 1 - len(self.curve))]
            self._moved()

    def _see(self, share: float) -> None:
        self._share = max(self._share, min(share, 1.0))
        step = min(_STEPS - 1, math.floor(self._share * _STEPS))
        if step > self.step:
            self.step = step
            self._moved()


def verify_release(settings: Settings, job_id: str) -> list[tuple[int, str]]:
    """Run a finished job again and compare what it gives with what left; for each answer its number and what was found.

    `same`: the released bytes were reproduced. `kept`: nothing left yet, what is kept was reproduced. `differs`.

    Raises:
        JobNotFound: there is no such job.
        InvalidInput: it has not ended well, or it is a capture.
    """
    from millpond.hub.answers import pack_result
    from millpond.hub.body import encode
    from millpond.hub.ledger import Ledger
    from millpond.hub.release import body_of
    from millpond.hub.shapes import Context
    from millpond.store.errors import InvalidInput

    workshop = Workshop(settings)
    job = workshop.queue.get(job_id)
    if job.state != "finished" or job.kind not in EXECUTED:
        raise InvalidInput(f"job {job_id} is a {job.kind} that is {job.state}; give one with answers that has finished")
    ledger = Ledger(settings.database, workshop.policy)
    parsed, vault = parse_job(job.spec["job"]), workshop.vault(job)
    with workshop.cluster() as client, running(client, in_process=client is None):
        outcome = parsed.run(vault, lambda _: None)
    again = {one.number: one for one in workshop.keep(job, parsed, vault, outcome)}
    found = []
    for kept in workshop.answers.of(job_id):
        one = again.get(kept.number)
        released = ledger.known(kept.question.key)
        if one is None or json.dumps(one.question.specification) != json.dumps(kept.question.specification):
            found.append((kept.number, "differs"))
        elif released is not None:
            context = Context(workshop.policy.disclosure, one.evidence.prompts_are == "restricted")
            same = encode(body_of(one.result), context) == released.body
            found.append((kept.number, "same" if same else "differs"))
        else:
            same = pack_result(one.result) == pack_result(kept.result)
            found.append((kept.number, "kept" if same else "differs"))
    ledger.close()
    return found
