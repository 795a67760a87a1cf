"""The wire: one HTTP session with the gateway, whose every answer is a body of the closed set, or the error in it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from millpond.hub.body import Body, BudgetLeft, Closed, ErrorCode, Failure, JobStatus, Withheld, decode
from millpond.hub.policy import Charges
from millpond.store.errors import (
    BudgetSpent,
    GatewayRefused,
    GatewayUnavailable,
    GraphRefused,
    InReview,
    InvalidInput,
    MillpondError,
    NotReleased,
    QuotaExceeded,
)

MEDIA_TYPE = "application/octet-stream"
_ATTEMPTS = 5
_LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=60.0)
"""A connection outlives the longest pause between looks at a job: the meter counts each handshake."""
_FIRST_WAIT = 0.2
T = TypeVar("T", bound=Body)

_ERRORS: dict[ErrorCode, tuple[type[MillpondError], str]] = {
    ErrorCode.BAD_REQUEST: (
        InvalidInput,
        "the gateway could not use the request; check names, conditions and parameters",
    ),
    ErrorCode.NOT_FOUND: (
        GatewayRefused,
        "not found: it does not exist, or is not this project's; look at lake.runs(), and at the project's name",
    ),
    ErrorCode.NOT_ALLOWED: (
        GatewayRefused,
        "not allowed: the token is unknown, expired or lacks the scope; get a new one and set MILLPOND_TOKEN",
    ),
    ErrorCode.TOO_LARGE: (QuotaExceeded, "the request is too large; send it in parts"),
    ErrorCode.TIME_LIMIT: (GatewayRefused, "the job ran longer than a job may, and was ended; ask for less at once"),
    ErrorCode.DISK_QUOTA: (
        QuotaExceeded,
        "what you or the project has sent takes all the room there is; reuse handles of prompts, or ask an operator",
    ),
    ErrorCode.TOO_MANY: (QuotaExceeded, "too many jobs of yours are waiting; let some finish, or cancel them"),
    ErrorCode.JOB_FAILED: (
        GatewayRefused,
        "the job failed; run the same lines on lake.twin(run), where errors are shown in full",
    ),
    ErrorCode.BAD_GRAPH: (GraphRefused, "the vault refused the graph; use allowed operators and smaller shapes"),
    ErrorCode.BAD_RUN: (
        InvalidInput,
        "the run cannot be used so: is it sealed, and does it hold the hook and the label?",
    ),
    ErrorCode.NOT_REPRODUCED: (GatewayRefused, "running the job again gave other bytes; tell an operator"),
    ErrorCode.UNAVAILABLE: (GatewayUnavailable, "the gateway cannot do this now; try again later"),
    ErrorCode.VERSION: (GatewayUnavailable, "the gateway speaks another version; install the same Millpond as it"),
    ErrorCode.OVER_BUDGET: (
        BudgetSpent,
        "the job may cost more than is left of a budget; lake.budget() says how much that is, lake.quote(job) what it costs",
    ),
}


@dataclass
class Connection:
    """A session with the gateway as one user in one project."""

    url: str
    token: str | None = field(repr=False)
    project: str | None = None
    timeout: float = 30.0
    charged: int = 0
    """Bytes that what was received has cost at most, by the default charges; a repeated answer costs less."""
    retries: int = _ATTEMPTS
    left: BudgetLeft | None = None
    """As it was at `left_at`, when `left_charged` were charged."""
    left_at: float = 0.0
    left_charged: int = 0
    _charges: Charges = field(default_factory=Charges)

    def __post_init__(self) -> None:
        headers = {"Accept": MEDIA_TYPE} | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
        if self.url.startswith("unix:"):
            path = self.url.removeprefix("unix:").replace("//", "/")
            transport = httpx.HTTPTransport(
                uds=path, verify=False, limits=_LIMITS
            )  # no TLS on a socket, so no certificates to load
            self._http = httpx.Client(
                transport=transport,
                base_url="http://millpond",
                headers=headers,
                timeout=self.timeout,
                trust_env=False,
                verify=False,  # noqa: S501
            )
        elif self.url.startswith(("http://", "https://")):
            self._http = httpx.Client(
                base_url=self.url.rstrip("/"), headers=headers, timeout=self.timeout, limits=_LIMITS
            )
        else:
            raise InvalidInput(f"the gateway's address is {self.url!r}; give http://, https:// or unix:PATH")

    def close(self) -> None:
        """End the session."""
        self._http.close()

    def constant(self, path: str) -> dict[str, Any]:
        """Declared data as JSON, which is not charged.

        Raises:
            GatewayRefused: the token does not allow it.
            GatewayUnavailable: no gateway answers there.
        """
        response = self._send("GET", path)
        if response.headers.get("content-type", "").startswith(MEDIA_TYPE):
            self._open(response)
        try:
            found = response.json()
        except ValueError:
            found = None
        if response.status_code != 200 or not isinstance(found, dict):
            raise GatewayUnavailable(
                f"{self.url} answers {response.status_code} and not as a gateway; check MILLPOND_URL"
            )
        return found

    def ask(self, wanted: type[T], method: str, path: str, payload: Any = None) -> T:
        """The body that answers a request in the project.

        Raises:
            MillpondError: what the body says instead.
            GatewayUnavailable: nobody answers.
        """
        body = self.open(method, path, payload)
        if not isinstance(body, wanted):
            raise GatewayUnavailable(f"the gateway answered with a {type(body).__name__}; upgrade the client")
        return body

    def open(self, method: str, path: str, payload: Any = None) -> Body:
        """The body itself, unless it is an error."""
        return self._open(self._send(method, f"/api/v1/p/{self.project}/{path}", payload))

    def budget(self, max_age: float = 0.0) -> BudgetLeft:
        """What is left, asked for again if what is known is older than `max_age` seconds."""
        if self.left is None or time.monotonic() - self.left_at > max_age:
            self.left = self.ask(BudgetLeft, "GET", "budget")
            self.left_at, self.left_charged = time.monotonic(), self.charged
        return self.left

    @property
    def left_about(self) -> int | None:
        """Bytes left this week, as far as this session knows."""
        return None if self.left is None else max(0, self.left.user_week - (self.charged - self.left_charged))

    def _open(self, response: httpx.Response) -> Body:
        if not response.headers.get("content-type", "").startswith(MEDIA_TYPE):
            raise GatewayUnavailable(
                f"{self.url} answers {response.status_code} and not as a gateway; check MILLPOND_URL"
            )
        body = decode(response.content)
        if not isinstance(body, Closed):
            fixed = 0 if isinstance(body, JobStatus) else self._charges.response_bytes
            self.charged += len(response.content) + fixed
        if isinstance(body, Failure):
            kind, text = _ERRORS[body.code]
            raise kind(text)
        if isinstance(body, Closed):
            raise BudgetSpent(
                "a budget is spent: wait for the next week, or have two people raise the cap (millpond budget)"
            )
        return body

    def _send(self, method: str, path: str, payload: Any = None) -> httpx.Response:
        """Asks again while the gateway restarts: what was not sent at all, or only reads."""
        content = None if payload is None else json.dumps(payload, allow_nan=False).encode()
        headers = {} if content is None else {"Content-Type": "application/json"}
        lost = ""
        for attempt in range(self.retries):
            if attempt:
                time.sleep(_FIRST_WAIT * 2 ** (attempt - 1))
            try:
                return self._http.request(method, path, content=content, headers=headers)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                problem: Exception = error
            except httpx.TransportError as error:
                problem = error
                if method != "GET":
                    lost = "; the request may have arrived: lake.jobs() lists what was submitted"
                    break
        raise GatewayUnavailable(
            f"the gateway at {self.url} does not answer ({type(problem).__name__}: {problem}); check MILLPOND_URL, "
            "and whether it runs" + lost
        ) from problem


def check_released(bodies: list[Any]) -> None:
    """Check that no answer was held back.

    Raises:
        InReview: a reviewer must decide about one.
        NotReleased: the gate refuses one; the message names rules and remedies.
    """
    held = [body.verdict for body in bodies if isinstance(body, Withheld)]
    for outcome, error, text in (
        ("refuse", NotReleased, "the gate refuses this result"),
        ("review", InReview, "a reviewer must decide about this result; ask the future again later"),
    ):
        for verdict in held:
            if verdict.outcome == outcome:
                raise error(f"{text}. {verdict.remedies()}")
