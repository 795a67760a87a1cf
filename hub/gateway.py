"""The gateway: the only process that clients reach. `create_app` is the ASGI application, `serve` runs it."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from millpond.hub.answers import Answers, Kept, Review
from millpond.hub.auth import Gatekeeper, HubTokens, Identity, TokenFile
from millpond.hub.body import Body, ErrorCode, Failure, JobStatus, Withheld
from millpond.hub.database import open_database
from millpond.hub.ledger import Ledger, Payer, Sent
from millpond.hub.limits import job_limits
from millpond.hub.policy import read_policy
from millpond.hub.projects import RIGHTS, Projects, Right
from millpond.hub.queue import ProjectJob, SqlQueue
from millpond.hub.release import Door, body_of
from millpond.hub.room import Room
from millpond.hub.rules import Rule, Verdict
from millpond.hub.serving import (
    Endpoint,
    EndpointRoute,
    NotAllowed,
    NotThere,
    NotYet,
    Redirect,
    constant,
    error_code,
    response,
)
from millpond.hub.settings import Settings
from millpond.hub.states import curve_at, selects_too_few, settled_at, state_at
from millpond.hub.uploads import Uploads
from millpond.hub.vault import Vault
from millpond.store.errors import InvalidInput, JobNotFound
from millpond.store.lake import open_lake

if TYPE_CHECKING:
    from millpond.hub.textmodel import TextModel

logger = logging.getLogger(__name__)

NOBODYS = "~"
"""Pays for answers to members of no project; no project can be called so."""
KEEP_SECONDS = 120
"""How long an idle connection is kept."""


class Gateway:
    """What handlers work with."""

    def __init__(self, settings: Settings) -> None:
        """Open the database and the lake.

        Raises:
            InvalidInput: a setting cannot be used.
        """
        self.settings = settings
        self.policy = read_policy(settings.policy)
        if not self.policy.models:
            raise InvalidInput(f"the policy file {settings.policy} has no models; declare each that the lake holds")
        self.engine = open_database(settings.database)
        self.ledger = Ledger(settings.database, self.policy)
        self.door = Door(self.ledger)
        self.projects = Projects(self.engine)
        self.queue = SqlQueue(self.engine, limits=job_limits(settings, self.policy))
        self.uploads = Uploads(self.engine, per_user=settings.max_user_bytes, per_project=settings.max_project_bytes)
        self.answers = Answers(self.engine)
        self.lake = open_lake(settings.lake)
        self.dictionary = None if settings.dictionary is None else Path(settings.dictionary).read_bytes()
        self.prefix = ""
        self.hub: HubTokens | None = None
        if settings.jupyterhub is not None:
            self.hub = HubTokens(cache_seconds=settings.jupyterhub.cache_seconds)
            self.prefix = os.environ.get("JUPYTERHUB_SERVICE_PREFIX", "/").rstrip("/")
            self.gatekeeper = Gatekeeper(self.hub, settings.origin)
        else:
            assert settings.tokens is not None
            self.gatekeeper = Gatekeeper(TokenFile(settings.tokens), settings.origin)
        self.room = Room()

    @cached_property
    def text_model(self) -> TextModel:
        """What completions are coded with; made when a reviewer first looks at some.

        Raises:
            InvalidInput: the settings have no dictionary.
        """
        from millpond.hub.textmodel import TextModel

        if self.dictionary is None:
            raise InvalidInput("the settings have no dictionary, so no text can be read")
        return TextModel(self.dictionary)

    def close(self) -> None:
        """Close the connections."""
        self.ledger.close()
        self.engine.dispose()

    def enter(self, identity: Identity, project: str, right: Right) -> Vault:
        """The project's vault, for a member whose role has `right`.

        Raises:
            NotThere: there is no such project, or the user is no member of it.
            NotAllowed: the member's role does not have the right.
        """
        role = self.projects.role(project, identity.user)
        if role is None:
            raise NotThere("no such project")
        if right not in RIGHTS[role]:
            raise NotAllowed(f"the role has no right to {right}")
        return Vault(self.lake, self.projects, self.policy, project)

    def payer(self, identity: Identity, project: str | None, models: Sequence[str] = ()) -> Payer:
        """Who pays for an answer: of named models, else of all that the project may use, else of all."""
        member = project is not None and self.projects.role(project, identity.user) is not None
        held = models or (self.projects.models(project) if member and project else ())
        known = tuple(sorted(model for model in held if model in self.policy.models))
        return Payer(identity.user, project if member and project else NOBODYS, known or tuple(self.policy.models))

    def send(self, body: Body, identity: Identity, project: str | None, models: Sequence[str] = ()) -> Sent:
        """The body, charged."""
        return self.door.send(body, self.payer(identity, project, models))

    def failure(self, code: ErrorCode, identity: Identity, project: str | None) -> Sent:
        """An error, charged like any body."""
        try:
            return self.send(Failure(code), identity, project)
        except Exception:  # what cannot be charged is not said: the caller learns that nothing works
            logger.exception("an error could not be charged")
            return constant(ErrorCode.UNAVAILABLE)

    def job(self, project: str, job: str) -> ProjectJob:
        """A job of the project.

        Raises:
            NotThere: there is none, or it is another's.
        """
        try:
            found = self.queue.get(job)
        except JobNotFound:
            raise NotThere("no such job") from None
        if found.project != project:
            raise NotThere("no such job")
        return found

    def status(self, identity: Identity, job: ProjectJob) -> Sent:
        """The job's state at the end of the last slot."""
        history, reviews = self.queue.history(job.id), self.answers.of_job(job.id)
        return self.door.status(
            job.id,
            lambda ms: state_at(job, history, reviews, ms),
            self._elapsed_ms(job),
            self.payer(identity, job.project),
        )

    def curve(self, identity: Identity, job: ProjectJob) -> Sent:
        """How the job's training did up to the end of the last slot."""
        history = self.queue.history(job.id)
        payer = self.payer(identity, job.project, tuple(job.spec.get("models", ())))
        return self.door.curve(job.id, lambda ms: curve_at(job, history, ms), self._elapsed_ms(job), payer)

    def seen(self, job: ProjectJob) -> JobStatus:
        """The state that a client may know of: that at the end of the last slot."""
        history, reviews = self.queue.history(job.id), self.answers.of_job(job.id)
        return settled_at(job, history, reviews, self._elapsed_ms(job), self.policy.charges)

    def answer(self, identity: Identity, job: ProjectJob, number: int) -> Sent:
        """An answer of a job that is seen to have ended: released, withheld, or why there is none.

        Raises:
            NotYet: it has not ended.
            NotHeld: it has no answer of that number.
        """
        state = self.seen(job).state
        if state in ("queued", "running"):
            raise NotYet("the job has not ended")
        if selects_too_few(job):
            return self.send(Withheld(Verdict("refuse", (Rule.TOO_FEW_PROMPTS,))), identity, job.project)
        if state in ("failed", "cancelled"):
            late = any(event.event == "time out" for event in self.queue.history(job.id))
            return self.send(Failure(ErrorCode.TIME_LIMIT if late else ErrorCode.JOB_FAILED), identity, job.project)
        kept = self.answers.find(job.id, number)
        payer = self.payer(identity, job.project, kept.models)
        review = self.answers.review(job.id, number)
        if review is not None and review.state == "approved":
            return self.door.release(kept.question, kept.result, kept.evidence, payer, approved=True)[1]
        if review is not None:
            outcome: Literal["review", "refuse"] = "review" if review.state == "waiting" else "refuse"
            return self.door.send(Withheld(Verdict(outcome, review.rules)), payer)
        verdict, sent = self.door.release(kept.question, kept.result, kept.evidence, payer)
        if verdict.outcome == "review":
            self.answers.ask(kept, job.user)
        return sent

    def look(self, identity: Identity, project: str, job: str, number: int) -> tuple[Kept, Sent]:
        """What a reviewer is shown of an answer, charged to the reviewer.

        Raises:
            NotAllowed: it is no reviewer in a browser's session.
            NotThere, NotHeld: there is no such answer.
        """
        self._check_reviewer(identity, project)
        kept = self.answers.find(self.job(project, job).id, number)
        restricted = kept.evidence.prompts_are == "restricted"
        payer = self.payer(identity, project, kept.models)
        return kept, self.door.send(body_of(kept.result), payer, restricted=restricted)

    def decide(
        self, identity: Identity, project: str, job: str, number: int, decision: Literal["approved", "denied"]
    ) -> Review:
        """A reviewer's decision about an answer that waits.

        Raises:
            NotAllowed: it is no reviewer in a browser's session, or whoever asked for the job.
            NotThere, NotHeld: nothing of that name waits.
        """
        self._check_reviewer(identity, project)
        return self.answers.decide(self.job(project, job).id, number, decision, by=identity.user)

    def log_in(self, path: str) -> Redirect:
        """Where a browser without a session is sent."""
        return Redirect(f"{self.prefix}/login?next={quote(path, safe='/')}")

    def _check_reviewer(self, identity: Identity, project: str) -> None:
        self.enter(identity, project, "review")
        if not identity.session:
            raise NotAllowed("reviews are decided in the browser")

    def _elapsed_ms(self, job: ProjectJob) -> int:
        import time

        return max(0, int((time.time() - job.submitted) * 1000))


def create_app(settings: Settings, endpoints: Sequence[Endpoint] | None = None) -> Starlette:
    """The application.

    Args:
        settings: as read from the file.
        endpoints: in place of all that there are, for tests of what surrounds them.

    Raises:
        InvalidInput: a setting cannot be used.
    """
    from millpond.hub.api import ENDPOINTS
    from millpond.hub.pages.routes import PAGES

    gateway = Gateway(settings)
    every = (*ENDPOINTS, *PAGES) if endpoints is None else tuple(endpoints)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        gateway.close()

    async def refused(request: Request, error: Exception) -> Response:
        known = isinstance(error, HTTPException) and error.status_code in (404, 405)
        return response(constant(ErrorCode.NOT_FOUND if known else error_code(error)), request.headers)

    app = Starlette(
        routes=[EndpointRoute(endpoint, gateway, gateway.prefix) for endpoint in every],
        lifespan=lifespan,
        exception_handlers={HTTPException: refused},
    )
    app.router.redirect_slashes = False
    app.state.gateway = gateway
    return app


def server_options(settings: Settings) -> dict[str, Any]:
    """Uvicorn's options: no header that says when or by what, no reading of forwarded addresses, no log of requests.

    Connections are kept: each new one costs the meter's budget a TLS handshake.
    """
    from millpond.hub.one_write import OneWrite
    from millpond.hub.queue_commands import listen_at, serve_tls

    return {
        **listen_at(settings.listen), **serve_tls(settings.certificate, settings.key),
        "log_level": "warning", "access_log": False, "server_header": False,
        "date_header": False, "proxy_headers": False, "ws": "none",
        "http": OneWrite, "timeout_keep_alive": KEEP_SECONDS,
    }  # fmt: skip


def serve(settings: Settings) -> None:
    """Run the gateway until interrupted."""
    import uvicorn

    logger.info("millpond %s at %s", version("millpond"), settings.listen)
    uvicorn.run(create_app(settings), **server_options(settings))
