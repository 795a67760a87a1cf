"""The way from a worker to the lake: a bounded queue and one writing thread."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress

from millpond.store.segment import CapturedRequest, RunWriter


class LakeSink:
    """Writes captured requests in the background; `put` blocks while too much is waiting.

    The engine's step waits in `put`, so a lake slower than the model slows the scheduler down
    instead of filling memory. After an error nothing more is written and `error` says why.
    """

    def __init__(self, writer: RunWriter, max_bytes: int = 1 << 30) -> None:
        self.error: str | None = None
        self._writer = writer
        self._max_bytes = max_bytes
        self._waiting: deque[CapturedRequest] = deque()
        self._bytes = 0
        self._commit_asked = 0
        self._commits_done = 0
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="millpond-sink", daemon=True)
        self._thread.start()

    def put(self, request: CapturedRequest) -> None:
        """Queue one request; blocks while more than `max_bytes` are waiting."""
        with self._change:
            self._change.wait_for(lambda: self._bytes < self._max_bytes or self.error is not None)
            if self.error is not None:
                return  # the caller reports it
            self._waiting.append(request)
            self._bytes += _size(request)
            self._change.notify_all()

    def commit(self) -> tuple[int, int]:
        """Make everything queued so far durable and visible; returns rows and prompts committed in all."""
        with self._change:
            self._commit_asked += 1
            asked = self._commit_asked
            self._change.notify_all()
            self._change.wait_for(lambda: self._commits_done >= asked or self.error is not None)
        return self._writer.committed_rows, self._writer.committed_prompts

    def _run(self) -> None:
        try:
            while True:
                with self._change:
                    self._change.wait_for(lambda: self._waiting or self._commit_asked > self._commits_done)
                    request = self._waiting.popleft() if self._waiting else None
                    asked = self._commit_asked
                if request is not None:
                    self._writer.append(request)
                    with self._change:
                        self._bytes -= _size(request)
                        self._change.notify_all()
                else:
                    self._writer.commit()
                    with self._change:
                        self._commits_done = asked
                        self._change.notify_all()
        except BaseException as error:  # the thread's only way to tell: the next confirm or commit reports it
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            with self._change:
                self.error = f"writing to the lake failed: {reason}"
                self._waiting.clear()
                self._bytes = 0
                self._change.notify_all()
            with suppress(OSError):  # nothing of it is visible; sealing or deleting the run sweeps what is left
                self._writer.discard()


def _size(request: CapturedRequest) -> int:
    return sum(rows.nbytes for rows in request.activations.values())
