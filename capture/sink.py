"""The way from a worker to the lake: a bounded queue and one writing thread."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from millpond.store.segment import CapturedRequest, RunWriter

logger = logging.getLogger(__name__)
_SLOW_SECONDS = 5.0


@dataclass(frozen=True)
class SinkCounts:
    """What a sink has done and has before it."""

    queued_requests: int
    queued_bytes: int
    committed: dict[str, tuple[int, int]]
    """Rows and requests by run."""
    lost: dict[str, int]
    """Requests by run whose rows could not be written."""


@dataclass
class _Destination:
    """One run that is written."""

    writer: RunWriter
    rows: list[tuple[str, str, int]] = field(default_factory=list)
    """Prompt's id, capture id and number of rows of every request that is written but not committed."""
    since: float = 0.0
    """When the oldest of `rows` was written."""


class LakeSink:
    """Writes captured requests in the background; `put` blocks while too much is waiting.

    The engine's step waits in `put`, so a lake slower than the model slows the scheduler down
    instead of filling memory. A write that fails takes every request with it that its run had not
    committed; `poll` names them. The next request of that run starts a new segment.

    Args:
        open_run: opens a run for writing, by name.
        max_bytes: activations that may wait.
        commit_seconds: requests are committed at most this long after they were written; None leaves
            that to `commit` and to full segments.
    """

    def __init__(
        self, open_run: Callable[[str], RunWriter], max_bytes: int = 1 << 30, commit_seconds: float | None = None
    ) -> None:
        self._waited = 0.0
        self._waits_since: float | None = None
        self.written_bytes = 0
        self.busy = 0.0
        """Seconds that the writing thread has worked."""
        self._open_run = open_run
        self._max_bytes = max_bytes
        self._commit_seconds = commit_seconds
        self._waiting: deque[tuple[str, str, CapturedRequest]] = deque()
        self._bytes = 0
        self._destinations: dict[str, _Destination] = {}
        self._committed: dict[str, int] = {}
        self._failed: dict[str, str] = {}
        self._totals: dict[str, tuple[int, int]] = {}
        self._lost: dict[str, int] = {}
        self._error: str | None = None
        self._writing: tuple[str, float] | None = None
        """Run that is being written, and since when."""
        self._told = False
        """Whether it was said that this write takes long."""
        self._commit_asked = 0
        self._commits_done = 0
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="millpond-sink", daemon=True)
        self._thread.start()

    def put(self, run: str, capture_id: str, request: CapturedRequest) -> None:
        """Queue one request for `run`; blocks while more than `max_bytes` are waiting.

        `poll` tells of it by its capture id: two runs may hold prompts of one id.
        """
        started = time.perf_counter()
        self._waits_since = started
        with self._change:
            while not self._change.wait_for(lambda: self._bytes < self._max_bytes, _SLOW_SECONDS):
                logger.warning("the engine has waited %.0f s for the lake (run %r)", time.perf_counter() - started, run)
            self._waiting.append((run, capture_id, request))
            self._bytes += request.nbytes
            self._change.notify_all()
        waited = time.perf_counter() - started
        self._waits_since = None
        self._waited += waited
        if waited > 1:
            logger.warning("the engine waited %.1f s for the lake (run %r)", waited, run)

    def commit(self) -> tuple[int, int, str | None]:
        """Make everything queued so far durable and visible.

        Returns:
            Rows and prompts committed since the sink was made, and why requests were lost since the last call, if any were.
        """
        with self._change:
            self._commit_asked += 1
            asked = self._commit_asked
            self._change.notify_all()
            while not self._change.wait_for(lambda: self._commits_done >= asked, _SLOW_SECONDS):
                self._tell_if_slow()
            error, self._error = self._error, None
            rows = sum(rows for rows, _ in self._totals.values())
            prompts = sum(prompts for _, prompts in self._totals.values())
        return rows, prompts, error

    def poll(self, capture_ids: Iterable[str] | None = None) -> tuple[dict[str, int], dict[str, str]]:
        """Committed requests with their rows, and failed ones with the reason; each is told once.

        Args:
            capture_ids: leave the others to whoever else asks; None takes all.
        """
        self._tell_if_slow()
        with self._change:
            if capture_ids is None:
                committed, self._committed = self._committed, {}
                failed, self._failed = self._failed, {}
            else:
                asked = list(capture_ids)
                committed = {name: self._committed.pop(name) for name in asked if name in self._committed}
                failed = {name: self._failed.pop(name) for name in asked if name in self._failed}
        return committed, failed

    @property
    def waited(self) -> float:
        """Seconds that `put` has blocked in all, the wait under way included."""
        since = self._waits_since
        return self._waited + (0.0 if since is None else time.perf_counter() - since)

    def counts(self) -> SinkCounts:
        """What is done and what waits; from any thread."""
        with self._change:
            return SinkCounts(len(self._waiting), self._bytes, dict(self._totals), dict(self._lost))

    @property
    def error(self) -> str | None:
        """Why requests were lost since the last `commit`, if any were."""
        return self._error

    def _run(self) -> None:
        _leave_the_models_cores()
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting or self._commit_asked > self._commits_done, self._pause())
                run, capture_id, request = self._waiting.popleft() if self._waiting else (None, "", None)
                asked = self._commit_asked
            started = time.perf_counter()
            if run is not None and request is not None:
                self._guard(run, capture_id, request)
                with self._change:
                    self._bytes -= request.nbytes
                    self._change.notify_all()
            elif asked > self._commits_done:
                self._commit_older_than(0.0)
                with self._change:
                    self._commits_done = asked
                    self._change.notify_all()
            if self._commit_seconds is not None:
                self._commit_older_than(self._commit_seconds)
            self.busy += time.perf_counter() - started

    def _pause(self) -> float | None:
        pending = [destination.since for destination in self._destinations.values() if destination.rows]
        if self._commit_seconds is None or not pending:
            return None
        return max(min(pending) + self._commit_seconds - time.monotonic(), 0.0)

    def _commit_older_than(self, seconds: float) -> None:
        for run, destination in list(self._destinations.items()):
            if destination.rows and time.monotonic() - destination.since >= seconds:
                self._guard(run, "", None)

    def _guard(self, run: str, capture_id: str, request: CapturedRequest | None) -> None:
        """Write one request of `run`, or commit the run; a failure is told to those concerned."""
        destination = self._destinations.get(run)
        self._writing = (run, time.monotonic())
        try:
            if destination is None:
                writer = self._open_run(run)
                destination = self._destinations[run] = _Destination(writer)
            if request is not None:
                if not destination.rows:
                    destination.since = time.monotonic()
                destination.rows.append((request.id, capture_id, len(request.positions)))
                destination.writer.append(request)
                self.written_bytes += request.nbytes
            else:
                destination.writer.commit()
            self._settle(run, destination)
            if self._told:
                logger.warning("run %r: the lake answers again", run)
        except Exception as error:  # the thread's only way to tell is through poll and commit
            self._lose(run, destination, capture_id, error)
        finally:
            self._writing, self._told = None, False

    def _tell_if_slow(self) -> None:
        """Log, once, that a write has not ended for a while."""
        writing = self._writing
        if writing is not None and not self._told and time.monotonic() - writing[1] > _SLOW_SECONDS:
            self._told = True
            logger.warning(
                "run %r: the lake has not answered for %.0f s; its rows wait in memory", writing[0], _SLOW_SECONDS
            )

    def _settle(self, run: str, destination: _Destination) -> None:
        """Tell of what the writer has committed."""
        new = destination.writer.just_committed  # not always the first ones: some wait for what fills a segment
        if new:
            done = [(name, rows) for prompt, name, rows in destination.rows if prompt in new]
            destination.rows = [row for row in destination.rows if row[0] not in new]
            destination.since = time.monotonic()
            with self._change:
                self._committed.update(done)
                rows, prompts = self._totals.get(run, (0, 0))
                self._totals[run] = (rows + sum(n for _, n in done), prompts + len(done))

    def _lose(self, run: str, destination: _Destination | None, capture_id: str, error: Exception) -> None:
        reason = f"writing to the lake failed: {_reason(error)}"
        logger.error("run %r: %s", run, reason)
        lost = {capture_id} if destination is None else set()
        if destination is not None:
            self._settle(run, destination)  # a segment that became full before the failure stays
            lost.update(name for _, name, _ in destination.rows)
            del self._destinations[run]
        with self._change:
            self._failed.update(dict.fromkeys(lost, reason))
            self._lost[run] = self._lost.get(run, 0) + len(lost)
            self._error = reason
        if destination is not None:
            with suppress(Exception):  # nothing of it is visible; sealing or deleting the run sweeps what is left
                destination.writer.discard()


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _leave_the_models_cores() -> None:
    """Let this thread run wherever the parent process may.

    vLLM binds a worker on the CPU to the cores that compute, and every thread that it starts with it, while it keeps others free
    for the scheduler, which is idle most of the time (vllm/utils/ompmultiprocessing.py).
    """
    with suppress(OSError):  # the parent has ended
        os.sched_setaffinity(0, os.sched_getaffinity(0) | os.sched_getaffinity(os.getppid()))
