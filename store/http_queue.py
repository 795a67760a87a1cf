"""The queue of another process, over HTTP: what a capture worker holds instead of the hub's database.

Only the standard library, and only hosts of the vault: the queue's server is not the gateway, and no user reaches it.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from millpond.store.errors import InvalidInput, JobNotFound, LeaseLost, NotPermitted, StorageFailed, TooMany
from millpond.store.queue import FolderQueue, JobQueue, QueuedJob

TOKEN_VARIABLE = "MILLPOND_WORKER_TOKEN"
_ERRORS = {error.__name__: error for error in (InvalidInput, JobNotFound, LeaseLost, NotPermitted, TooMany)}


def is_address(queue: str) -> bool:
    """Whether `queue` is the address of a queue's server and not a folder."""
    return queue.startswith(("http://", "https://", "unix:"))


def open_queue(queue: str) -> JobQueue:
    """The queue at an address, with the token in `MILLPOND_WORKER_TOKEN`, or in a folder.

    Raises:
        InvalidInput: the address or the folder cannot be used, or there is no token.
    """
    if not is_address(queue):
        return FolderQueue(queue)
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        raise InvalidInput(f"queue {queue!r} asks for a token; put it into {TOKEN_VARIABLE} (millpond queue token)")
    return HttpQueue(queue, token)


class HttpQueue:
    """A `JobQueue` behind `hub/queue_api.py`. A server that does not answer is asked again for a while."""

    def __init__(self, address: str, token: str, *, patience_seconds: float = 60.0) -> None:
        """Nothing is connected yet.

        Args:
            address: `http://HOST:PORT`, `https://...` or `unix:/PATH`.
            token: of a worker, from `millpond queue token`.
            patience_seconds: how long a server that does not answer is asked again; heartbeats are not repeated.

        Raises:
            InvalidInput: the address is none of these, or the token cannot be one.
        """
        parts = urlsplit(address)
        named = parts.path if parts.scheme == "unix" else parts.hostname
        if parts.scheme not in ("http", "https", "unix") or not named:
            raise InvalidInput(f"queue {address!r} is no address; give http://HOST:PORT or unix:/PATH")
        if not token.isascii() or not token.isprintable():
            raise InvalidInput("the queue's token holds characters that no token has; copy it again")
        self.address = address
        self._parts = parts
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._patience = patience_seconds

    def submit(self, kind: str, spec: Mapping[str, Any], *, model: str = "") -> str:
        """Queue a job that needs `model`, or none; returns its id, once it is durable. Most workers' tokens do not allow it.

        Raises:
            NotPermitted: the token does not allow it.
        """
        # not repeated once it was sent: the job may be there
        answer = self._call("POST", "/jobs", {"kind": kind, "spec": dict(spec), "model": model}, repeat=False)
        return str(answer["id"])

    def claim(
        self, worker: str, kinds: Collection[str], lease_seconds: float, models: Collection[str] = ()
    ) -> QueuedJob | None:
        """Take the job of one of `kinds`, of no model or one of `models`, whose turn it is; None if there is none.

        Raises:
            NotPermitted: the token is not for these kinds.
        """
        wish = {
            "worker": worker, "kinds": sorted(kinds), "models": sorted(models), "lease_seconds": lease_seconds
        }  # fmt: skip
        job = self._call("POST", "/claim", wish)["job"]  # an answer that is lost leaves a claim that runs out
        return None if job is None else QueuedJob.model_validate(job)

    def heartbeat(self, job: QueuedJob, lease_seconds: float, progress: Mapping[str, Any]) -> None:
        """Renew the lease of a claimed job; raises LeaseLost."""
        self._end(job, "heartbeat", {"lease_seconds": lease_seconds, "progress": dict(progress)}, patience=0.0)

    def finish(self, job: QueuedJob, result: Mapping[str, Any]) -> None:
        """End a claimed job well; raises LeaseLost."""
        self._end(job, "finish", {"result": dict(result)})

    def fail(self, job: QueuedJob, error: str) -> None:
        """End a claimed job that cannot be done; raises LeaseLost."""
        self._end(job, "fail", {"error": error})

    def get(self, job_id: str) -> QueuedJob:
        """The job as it stands now; raises JobNotFound."""
        return QueuedJob.model_validate(self._call("GET", f"/jobs/{quote(job_id, safe='')}", None)["job"])

    def _end(self, job: QueuedJob, event: str, about: Mapping[str, Any], *, patience: float | None = None) -> None:
        claim = {"attempts": job.attempts, "worker": job.worker, **about}
        self._call("POST", f"/jobs/{quote(job.id, safe='')}/{event}", claim, patience=patience)

    def _call(
        self, method: str, path: str, body: Any, *, repeat: bool = True, patience: float | None = None
    ) -> dict[str, Any]:
        try:
            data = None if body is None else json.dumps(body, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"what is told to a queue must be JSON: {error}") from error
        deadline, pause = time.monotonic() + (self._patience if patience is None else patience), 0.1
        while True:
            connection = self._connection()
            sent = False
            try:
                connection.connect()
                sent = True
                connection.request(method, path, data, self._headers)
                response = connection.getresponse()
                status, answer = response.status, response.read()
                problem = f"it answered {status}"
            except (OSError, http.client.HTTPException) as error:
                status, problem = 599, str(error) or type(error).__name__
            finally:
                connection.close()
            if status < 500:
                return self._answer(status, answer)
            if time.monotonic() + pause > deadline or (sent and not repeat):
                raise StorageFailed(f"queue {self.address} cannot be reached: {problem}; is `millpond queue serve` up?")
            time.sleep(pause)
            pause = min(2 * pause, 2.0)

    def _answer(self, status: int, answer: bytes) -> dict[str, Any]:
        try:
            found = json.loads(answer)
            if status == 200 and isinstance(found, dict):
                return found
            kind, message = _ERRORS[found["error"]], str(found["message"])
        except (ValueError, KeyError, TypeError) as error:
            raise StorageFailed(
                f"queue {self.address} answered {status} with {answer[:80]!r}; is it a queue's address?"
            ) from error
        raise kind(message)

    def _connection(self) -> http.client.HTTPConnection:
        if self._parts.scheme == "unix":
            return _UnixConnection(self._parts.path)
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        return kind(str(self._parts.hostname), self._parts.port, timeout=30)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket's path."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
