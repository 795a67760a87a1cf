"""How a request becomes a handler's call and a `Sent` becomes a response: limits, scopes, and one way out.

A handler can answer in three ways: with what the `Door` charged (`Sent`), with bytes that are the same for everybody who
may ask (`Fixed`), or by sending a browser elsewhere (`Redirect`). Nothing else leaves.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import anyio
import anyio.to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from millpond.hub.auth import Identity, Scope
from millpond.hub.body import Closed, ErrorCode, Failure, decode, encode
from millpond.hub.ledger import Sent
from millpond.hub.policy import Disclosure
from millpond.hub.room import READ_SECONDS
from millpond.hub.shapes import Context
from millpond.store.errors import (
    BudgetSpent,
    GraphRefused,
    InvalidInput,
    JobNotFound,
    MillpondError,
    NotHeld,
    NotPermitted,
    QuotaExceeded,
    RunOpen,
    TooMany,
)

if TYPE_CHECKING:
    from millpond.hub.gateway import Gateway

logger = logging.getLogger(__name__)

MAX_BODY = 1 << 20
MAX_BULK = 64 << 20
"""Bytes of a request's body: of most, and of those that carry prompts, labels or a graph."""
MAX_DEPTH = 48
STATUS_CODES = {
    ErrorCode.BAD_REQUEST: 400, ErrorCode.NOT_FOUND: 404, ErrorCode.NOT_ALLOWED: 403, ErrorCode.TOO_LARGE: 413,
    ErrorCode.TOO_MANY: 429, ErrorCode.JOB_FAILED: 409, ErrorCode.BAD_GRAPH: 400, ErrorCode.BAD_RUN: 409,
    ErrorCode.NOT_REPRODUCED: 409, ErrorCode.UNAVAILABLE: 503, ErrorCode.VERSION: 400, ErrorCode.OVER_BUDGET: 402,
    ErrorCode.TIME_LIMIT: 409, ErrorCode.DISK_QUOTA: 429,
}  # fmt: skip
_CONTEXT = Context(Disclosure(), restricted=True)
_OCTETS = "application/octet-stream"


class NotAllowed(MillpondError):
    """The user may not do that."""


class NotThere(MillpondError):
    """There is nothing of that name that the user may know of."""


class NotYet(MillpondError):
    """There will be an answer later."""


class TooLarge(MillpondError):
    """The request is larger than the gateway takes."""


@dataclass(frozen=True)
class Fixed:
    """Bytes that depend on the installation and on who asks, and on nothing that the vault computed."""

    content: bytes
    media_type: str = "application/json"
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Redirect:
    """A browser is sent to a path of the gateway, or to the Hub's log-in."""

    to: str
    headers: tuple[tuple[str, str], ...] = ()


Reply = Sent | Fixed | Redirect


@dataclass(frozen=True)
class Call:
    """A request that has been let in."""

    gateway: Gateway
    identity: Identity | None
    params: Mapping[str, str]
    body: Any = None
    """Parsed JSON, or a form's fields."""
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    cookies: Mapping[str, str] = field(default_factory=dict)
    size: int = 0
    """Bytes of the request's body."""

    @property
    def who(self) -> Identity:
        """The user, of a handler that has a scope."""
        assert self.identity is not None
        return self.identity


Handler = Callable[[Call], Reply]


@dataclass(frozen=True)
class Endpoint:
    """One method of one path: what it needs, and what it does."""

    method: Literal["GET", "POST", "DELETE"]
    path: str
    scope: Scope | Literal["public"]
    handler: Handler
    takes: Literal["nothing", "json", "bulk", "form", "bulk form"] = "nothing"
    page: bool = False
    """For browsers: without a session they are sent to log in."""
    refused: Callable[[Call, Sent], Reply] | None = None
    """Makes a page of an error that was charged."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Its part of the OpenAPI description."""


class EndpointRoute(Route):
    """A route that knows its endpoint."""

    def __init__(self, endpoint: Endpoint, gateway: Gateway, prefix: str = "") -> None:
        self.declared = endpoint

        async def serve(request: Request) -> Response:
            return await answer(endpoint, gateway, request)

        super().__init__(prefix + endpoint.path, serve, methods=[endpoint.method])
        self.methods = {endpoint.method}  # Starlette adds HEAD to GET


async def answer(endpoint: Endpoint, gateway: Gateway, request: Request) -> Response:
    """Let the request in or not, call the handler in a thread, and send what it gives."""
    headers = {name.lower(): value for name, value in request.headers.items()}
    room, run = gateway.room, anyio.to_thread.run_sync
    try:
        identity = await run(gateway.gatekeeper.identify, headers, request.cookies, limiter=room.doors)
    except MillpondError:
        logger.exception("who asks cannot be told")
        return response(constant(ErrorCode.UNAVAILABLE), headers)
    user = "" if identity is None else identity.user
    large = endpoint.takes in ("bulk", "bulk form")
    async with room.reading(user, large=large):
        try:
            with anyio.fail_after(READ_SECONDS):
                data, refused = await _read(endpoint, request) if user or not large else (b"", False)
        except (ClientDisconnect, TimeoutError):
            return response(constant(ErrorCode.BAD_REQUEST), headers)
        async with room.working(user):
            reply = await run(
                _reply, endpoint, gateway, identity, request, headers, data, refused, limiter=room.threads
            )
    return response(reply, headers)


def response(reply: Reply, asked: Mapping[str, str]) -> Response:
    """The only place where a response is made; `asked` are the request's headers.

    Programs get two headers. The two that keep a browser from guessing types and from keeping answers are 58 bytes: a request
    with `Authorization` comes from no page and no address bar, and no shared cache may keep its answer (RFC 9111, 3.5).
    """
    if isinstance(reply, Sent):
        out = Response(reply.body, status_of(reply.body), media_type=_OCTETS)
    elif isinstance(reply, Fixed):
        out = Response(reply.content, reply.status, media_type=reply.media_type)
    else:
        out = Response(b"", 303, headers={"location": reply.to})
    for name, value in () if isinstance(reply, Sent) else reply.headers:
        out.headers.append(name, value)
    if "authorization" not in asked:
        out.headers.setdefault("cache-control", "no-store")
        out.headers["x-content-type-options"] = "nosniff"
    return out


def status_of(body: bytes) -> int:
    """The HTTP status code, which a body's type decides."""
    found = decode(body) if len(body) <= 2 else None
    if isinstance(found, Failure):
        return STATUS_CODES[found.code]
    return 402 if isinstance(found, Closed) else 200


def constant(code: ErrorCode) -> Sent:
    """An error that says nothing of the vault, to somebody who cannot be charged."""
    return Sent(encode(Failure(code), _CONTEXT), 0, 0)


def error_code(error: Exception) -> ErrorCode:
    """What a client is told of an exception."""
    for kind, code in (
        (NotAllowed, ErrorCode.NOT_ALLOWED), (NotPermitted, ErrorCode.NOT_ALLOWED),
        (NotThere, ErrorCode.NOT_FOUND), (NotHeld, ErrorCode.NOT_FOUND),
        (JobNotFound, ErrorCode.NOT_FOUND), (NotYet, ErrorCode.UNAVAILABLE), (TooLarge, ErrorCode.TOO_LARGE),
        (TooMany, ErrorCode.TOO_MANY), (QuotaExceeded, ErrorCode.DISK_QUOTA),
        (BudgetSpent, ErrorCode.OVER_BUDGET), (GraphRefused, ErrorCode.BAD_GRAPH),
        (RunOpen, ErrorCode.BAD_RUN), (InvalidInput, ErrorCode.BAD_REQUEST),
    ):  # fmt: skip
        if isinstance(error, kind):
            return code
    return ErrorCode.UNAVAILABLE


def parse_json(data: bytes) -> Any:
    """JSON without what JSON does not have: NaN, infinities, lone surrogates; and neither deep nor with NUL.

    Raises:
        InvalidInput: it is something else.
    """
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"the body is no JSON: {type(error).__name__}") from None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise InvalidInput(f"the body is nested deeper than {MAX_DEPTH}")
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.keys()
                inner += one.values()
            elif isinstance(one, list):
                inner += one
            elif isinstance(one, str) and not one.isascii():
                try:
                    one.encode()
                except UnicodeEncodeError:
                    raise InvalidInput("the body holds half of a surrogate pair") from None
            if isinstance(one, str) and "\0" in one:
                raise InvalidInput("the body holds a NUL character")
        level = inner
    return value


def _refuse(text: str) -> float:
    raise ValueError(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("not finite")
    return value


async def _read(endpoint: Endpoint, request: Request) -> tuple[bytes, bool]:
    """The body, and whether it is larger than the endpoint takes."""
    limit = {"nothing": 0, "json": MAX_BODY, "bulk": MAX_BULK, "form": MAX_BODY, "bulk form": MAX_BULK}[endpoint.takes]
    length = request.headers.get("content-length", "")
    if length.isdigit() and len(length) < 20 and int(length) > limit:
        return b"", True
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            return b"", True
        parts.append(part)
    return b"".join(parts), False


def _reply(
    endpoint: Endpoint,
    gateway: Gateway,
    identity: Identity | None,
    request: Request,
    headers: Mapping[str, str],
    data: bytes,
    too_large: bool,
) -> Reply:
    if identity is None and endpoint.scope != "public":
        return gateway.log_in(request.url.path) if endpoint.page else constant(ErrorCode.NOT_ALLOWED)
    call = Call(gateway, identity, request.path_params, None, request.query_params, headers, request.cookies)
    try:
        if too_large:
            raise TooLarge("the request is too large")
        call = _with_body(call, endpoint, data)
        if identity is not None and endpoint.scope != "public":
            _check(endpoint, gateway, call, identity)
        return endpoint.handler(call)
    except Exception as error:  # whatever a handler raises: nothing of an exception may be sent
        sent = refuse(error, gateway, identity, call.params, f"{endpoint.method} {endpoint.path}")
        return endpoint.refused(call, sent) if endpoint.refused else sent


def refuse(error: Exception, gateway: Gateway, identity: Identity | None, params: Mapping[str, str], what: str) -> Sent:
    """What is sent in place of an answer, charged to whoever asked; why is said in the vault's log."""
    code = error_code(error)
    if code is ErrorCode.UNAVAILABLE and not isinstance(error, NotYet):
        logger.error("%s", what, exc_info=error)
    else:
        logger.info("%s: %s: %s", what, type(error).__name__, error)
    return gateway.failure(code, identity, params.get("project")) if identity else constant(code)


def _check(endpoint: Endpoint, gateway: Gateway, call: Call, identity: Identity) -> None:
    if endpoint.scope not in identity.scopes:
        raise NotAllowed(f"{endpoint.scope} is not among the scopes")
    if endpoint.method != "GET":
        form = str(call.body.get("csrf_token", "")) if endpoint.takes.endswith("form") else ""
        if not gateway.gatekeeper.meant(identity, call.headers, form):
            raise NotAllowed("the request does not come from the gateway's own pages")


def _with_body(call: Call, endpoint: Endpoint, data: bytes) -> Call:
    body: Any = None
    if endpoint.takes in ("json", "bulk"):
        body = parse_json(data)
        if not isinstance(body, dict):
            raise InvalidInput("the body must be a JSON object")
    elif endpoint.takes.endswith("form"):
        from urllib.parse import parse_qsl

        try:
            body = dict(parse_qsl(data.decode("utf-8"), keep_blank_values=True, max_num_fields=1000))
        except ValueError as error:
            raise InvalidInput("the body is no form") from error
    elif data:
        raise InvalidInput("the request has a body, which it must not have")
    return Call(call.gateway, call.identity, call.params, body, call.query, call.headers, call.cookies, len(data))
