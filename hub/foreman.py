"""Keeps an executor's process at work, and ends it when it cannot be told to stop: no job lasts longer than it may.

A pass or a training looks up between blocks and stops by itself; what does not (a solver, a regular expression, a library that
never returns) is ended with the process that runs it, its Dask workers included, and a new process takes the next job.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing as mp
import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import sqlalchemy as sa

from millpond.hub.database import open_database
from millpond.hub.queue import ProjectJob, SqlQueue
from millpond.hub.settings import Settings
from millpond.store.logs import log_to

logger = logging.getLogger(__name__)

GRACE_SECONDS = 20.0
"""How long a process may work on a claim that does not count any more."""
_LOOK_SECONDS = 1.0


class Foreman:
    """Runs one executor's process after the other."""

    def __init__(
        self, settings: Settings, *, grace_seconds: float = GRACE_SECONDS, told: Callable[[str], None] = print
    ) -> None:
        self.settings = settings
        self.grace_seconds = grace_seconds
        self.told = told
        self.ended = 0
        """Jobs that ended well."""
        self._queue = SqlQueue(open_database(settings.database))
        self._process: Any = None
        self._stopped = False

    def run(self, *, until_empty: bool = False) -> int:
        """Work until `stop`, or until there are no jobs; returns 0, or how a process ended that died idle.

        A process that dies while it works on a job is replaced; one that dies idle is not: something is wrong with the
        settings or the machine.
        """
        context = mp.get_context("spawn")
        while True:
            here, there = context.Pipe()
            self._process = context.Process(
                target=_work, args=(self.settings, until_empty, there, os.getpid()), name="millpond-executor"
            )
            self._process.start()
            there.close()
            if self._stopped:  # while it was made
                self._process.terminate()
            try:
                replaced = self._watch(here)
            finally:
                self._end()
                here.close()
            if self._stopped or not replaced:
                return 0 if self._stopped else int(self._process.exitcode or 0)

    def stop(self) -> None:
        """End after the job under way; from any thread or a signal handler."""
        self._stopped = True
        if self._process is not None and self._process.is_alive():
            self._process.terminate()

    def _watch(self, pipe: Connection) -> bool:
        """Listen until the process has ended or must be; whether another one is to take its place."""
        job: ProjectJob | None = None
        lost_at: float | None = None
        while True:
            try:
                if pipe.poll(_LOOK_SECONDS):
                    what, value = pipe.recv()
                    if what == "told":
                        self.told(value)
                    elif what == "job":
                        job, lost_at = value, None
                    else:
                        self.ended += value
                        job = None
            except (EOFError, ConnectionResetError):
                self._process.join()
                if job is not None:
                    self.told(f"job {job.id}: its process ended with status {self._process.exitcode}")
                return job is not None
            try:
                if job is None or self._queue.holds(job):
                    continue
            except sa.exc.SQLAlchemyError:  # the database is away for a moment
                logger.exception("job %s", job and job.id)
                continue
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > self.grace_seconds:
                self.told(f"job {job.id}: it is over and its process goes on; ended")
                return True

    def _end(self) -> None:
        """Make sure that nothing of the process is left."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()  # one that did not come so far as to lead a group
        self._process.join()


def _work(settings: Settings, until_empty: bool, pipe: Connection, foreman: int) -> None:
    """An executor, in a process of its own that does not outlive the foreman's."""
    from millpond.hub.executor import Executor

    os.setsid()  # so that the Dask workers end with it
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != foreman:
        return
    most = settings.memory_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    log_to()
    executor = Executor(settings, told=lambda text: pipe.send(("told", text)))
    executor.took = lambda job: pipe.send(("job", job))
    executor.gave = lambda well: pipe.send(("ended", int(well)))
    signal.signal(signal.SIGTERM, lambda *_: executor.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe.send(("told", f"executor {executor.name} is ready"))
    executor.run(until_empty=until_empty)


def run_executor(settings: Settings, *, until_empty: bool = False, told: Callable[[str], None] = print) -> int:
    """Run an executor until it is interrupted (after the job under way), or until there are no jobs; 0 if that went well.

    Raises:
        InvalidInput: a setting cannot be used.
    """
    foreman = Foreman(settings, told=told)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: foreman.stop())
    return foreman.run(until_empty=until_empty)
