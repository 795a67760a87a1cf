"""The queue for capture workers, over HTTP inside the vault.

Not part of the gateway: what is said here is neither charged nor meant to leave. It listens on a Unix socket or an
address of the vault, and a worker's token allows it to claim, renew, finish and fail jobs of its own kinds.
"""

from __future__ import annotations

import hashlib
import secrets
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from millpond.hub.kinds.steps import WORK, next_step
from millpond.hub.queue import ProjectJob, SqlQueue
from millpond.store.capture_spec import first_problem
from millpond.store.errors import InvalidInput, JobNotFound, LeaseLost, MillpondError, NotPermitted
from millpond.store.queue import QueuedJob

MOST_BODY_BYTES = 8 << 20
_STATUS: Mapping[type[MillpondError], int] = {NotPermitted: 403, JobNotFound: 404, LeaseLost: 409}

Finished = Callable[[ProjectJob, Mapping[str, Any], sa.Connection], None]
"""Told of a job that a worker ends well, its result, and the transaction that ends it."""


class Worker(BaseModel):
    """One worker's credential."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    """The worker's."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of its token."""
    kinds: frozenset[str] = Field(min_length=1)
    """The kinds of jobs that it may claim."""
    submit: bool = False
    """Whether it may also submit and look at jobs of these kinds: for operators, not for workers."""


class _Workers(BaseModel):
    model_config = ConfigDict(extra="forbid")

    workers: tuple[Worker, ...] = ()


def read_workers(path: Path) -> tuple[Worker, ...]:
    """The credentials in a TOML file of `[[workers]]`.

    Raises:
        InvalidInput: it cannot be read, or two have the same token.
    """
    try:
        found = _Workers.model_validate(tomllib.loads(path.read_text())).workers
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}; make it with millpond queue token") from error
    except ValidationError as error:
        raise InvalidInput(f"{path}: {first_problem(error)}") from error
    except ValueError as error:
        raise InvalidInput(f"{path} is no TOML file: {error}") from error
    if len({worker.sha256 for worker in found}) < len(found):
        raise InvalidInput(f"{path}: two workers have the same token; make one each")
    return found


def new_worker(name: str, kinds: Iterable[str], *, submit: bool = False) -> tuple[str, Worker]:
    """A new token, and the credential that keeps only its hash."""
    token = secrets.token_urlsafe(32)
    digest = hashlib.sha256(token.encode()).hexdigest()
    return token, Worker(name=name, sha256=digest, kinds=frozenset(kinds), submit=submit)


class _Wish(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Submit(_Wish):
    kind: str
    spec: dict[str, Any]
    model: str = ""


class _Claim(_Wish):
    worker: str = Field(max_length=256)
    kinds: list[str] = Field(min_length=1, max_length=64)
    models: list[str] = Field(max_length=64)
    lease_seconds: float = Field(gt=0, le=3600)


class _Held(_Wish):
    worker: str | None
    attempts: int


class _Heartbeat(_Held):
    lease_seconds: float = Field(gt=0, le=3600)
    progress: dict[str, Any]


class _Finish(_Held):
    result: dict[str, Any]


class _Fail(_Held):
    error: str


@dataclass(frozen=True)
class _Api:
    queue: SqlQueue
    workers: Mapping[str, Worker]
    finished: Finished | None

    async def submit(self, request: Request) -> JSONResponse:
        return await self._answer(request, _Submit, self._submit)

    async def claim(self, request: Request) -> JSONResponse:
        return await self._answer(request, _Claim, self._claim)

    async def get(self, request: Request) -> JSONResponse:
        return await self._answer(request, _Wish, self._get)

    async def heartbeat(self, request: Request) -> JSONResponse:
        return await self._answer(request, _Heartbeat, self._heartbeat)

    async def finish(self, request: Request) -> JSONResponse:
        return await self._answer(request, _Finish, self._finish)

    async def fail(self, request: Request) -> JSONResponse:
        return await self._answer(request, _Fail, self._fail)

    async def _answer(
        self, request: Request, kind: type[BaseModel], act: Callable[[Worker, Any, str], dict[str, Any]]
    ) -> JSONResponse:
        try:
            worker = self._check_worker(request)
            wish = kind.model_validate_json(await _body(request) or b"{}")
            found = await run_in_threadpool(act, worker, wish, request.path_params.get("job", ""))
        except ValidationError as error:
            return _problem(InvalidInput(first_problem(error)))
        except MillpondError as error:
            return _problem(error)
        return JSONResponse(found)

    def _check_worker(self, request: Request) -> Worker:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        worker = self.workers.get(hashlib.sha256(token.encode()).hexdigest())
        if kind.lower() != "bearer" or worker is None:
            raise NotPermitted("the token is unknown; make one with millpond queue token")
        return worker

    def _submit(self, worker: Worker, wish: _Submit, _: str) -> dict[str, Any]:
        _check_operator(worker)
        _check_kinds(worker, [wish.kind])
        return {"id": self.queue.submit(wish.kind, wish.spec, model=wish.model)}

    def _claim(self, worker: Worker, wish: _Claim, _: str) -> dict[str, Any]:
        _check_kinds(worker, wish.kinds)
        job = self.queue.claim(wish.worker, wish.kinds, wish.lease_seconds, wish.models)
        return {"job": None if job is None else _shown(job)}

    def _get(self, worker: Worker, _: _Wish, job: str) -> dict[str, Any]:
        _check_operator(worker)
        return {"job": _shown(self._find(worker, job))}

    def _heartbeat(self, worker: Worker, wish: _Heartbeat, job: str) -> dict[str, Any]:
        self.queue.heartbeat(self._claimed(worker, wish, job), wish.lease_seconds, wish.progress)
        return {}

    def _finish(self, worker: Worker, wish: _Finish, job: str) -> dict[str, Any]:
        claim, finished = self._claimed(worker, wish, job), self.finished
        if _handed_over(claim):
            self.queue.hand_over(claim, *next_step(claim.kind, claim.spec[WORK]))
            return {}
        also = None if finished is None else lambda connection: finished(claim, wish.result, connection)
        self.queue.finish(claim, wish.result, also=also)
        return {}

    def _fail(self, worker: Worker, wish: _Fail, job: str) -> dict[str, Any]:
        self.queue.fail(self._claimed(worker, wish, job), wish.error)
        return {}

    def _claimed(self, worker: Worker, wish: _Held, job: str) -> ProjectJob:
        """The job as the worker claimed it; the queue checks the claim once more, in the transaction."""
        return self._find(worker, job).model_copy(update={"attempts": wish.attempts, "worker": wish.worker})

    def _find(self, worker: Worker, job_id: str) -> ProjectJob:
        job = self.queue.get(job_id)
        known = {
            job.kind,
            *job.spec.get(WORK, {}),
        }  # of one that was handed over, its worker is told that its claim is over
        if not known & worker.kinds:
            raise JobNotFound(f"job {job_id!r} is not in the queue; check the id")
        return job


def create_queue_app(queue: SqlQueue, workers: Iterable[Worker], *, finished: Finished | None = None) -> Starlette:
    """The ASGI application that `store.http_queue.HttpQueue` talks to."""
    api = _Api(queue, {worker.sha256: worker for worker in workers}, finished)
    return Starlette(
        routes=[
            Route("/jobs", api.submit, methods=["POST"]),
            Route("/claim", api.claim, methods=["POST"]),
            Route("/jobs/{job:path}", api.get, methods=["GET"]),
            *(
                Route(f"/jobs/{{job:path}}/{event}", getattr(api, event), methods=["POST"])
                for event in ("heartbeat", "finish", "fail")
            ),
        ]
    )


def _check_operator(worker: Worker) -> None:
    if not worker.submit:
        raise NotPermitted(f"the token of {worker.name!r} may only work on jobs; use one made with --submit")


def _check_kinds(worker: Worker, kinds: Iterable[str]) -> None:
    others = sorted(set(kinds) - worker.kinds)
    if others:
        raise NotPermitted(f"the token of {worker.name!r} is for {sorted(worker.kinds)}, not for {others[0]!r}")


def _shown(job: ProjectJob) -> dict[str, Any]:
    """What a worker is told: nothing of whom the job is for, and of one that is handed on its own part."""
    told = job.model_dump(mode="json", include=set(QueuedJob.model_fields))
    return told | {"spec": job.spec[WORK][job.kind]} if _handed_over(job) else told


def _handed_over(job: ProjectJob) -> bool:
    """Whether somebody else goes on when the worker is done."""
    return job.kind in job.spec.get(WORK, {})


async def _body(request: Request) -> bytes:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MOST_BODY_BYTES:
            raise InvalidInput(f"the request has over {MOST_BODY_BYTES:,} bytes; tell less at once")
    return bytes(data)


def _problem(error: MillpondError) -> JSONResponse:
    kind = type(error).__name__
    status = next((code for of, code in _STATUS.items() if isinstance(error, of)), 400)
    return JSONResponse({"error": kind, "message": str(error)}, status_code=status)
