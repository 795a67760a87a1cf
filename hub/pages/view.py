"""One request for a page: what it asks of the API, what that cost, and how it is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar
from urllib.parse import quote

from millpond.hub.body import Body, Closed, ErrorCode, Failure, decode
from millpond.hub.ledger import Sent
from millpond.hub.pages.shell import render
from millpond.hub.projects import Right
from millpond.hub.serving import Call, Fixed, Handler, NotThere, Redirect, Reply, refuse, status_of

PER_PAGE = 20
_PROBLEMS: Mapping[ErrorCode, tuple[str, str]] = {
    ErrorCode.BAD_REQUEST: ("That cannot be done", "Something in the request is not possible. Go back and check it."),
    ErrorCode.NOT_FOUND: ("Not found", "There is nothing here that you may see."),
    ErrorCode.NOT_ALLOWED: ("Not allowed", "Your role, or this session, does not allow it."),
    ErrorCode.TOO_LARGE: ("Too large", "Send less at once."),
    ErrorCode.TOO_MANY: ("Too many jobs", "Wait for some of your jobs to end, or cancel some."),
    ErrorCode.JOB_FAILED: ("The job failed", "It could not be done. Its specification says what was asked."),
    ErrorCode.TIME_LIMIT: (
        "The job took too long",
        "It was ended: it ran longer than a job may. Ask for less at once.",
    ),
    ErrorCode.DISK_QUOTA: ("No room", "What you or the project has sent takes all the room that is allowed."),
    ErrorCode.BAD_GRAPH: ("The graph is refused", "See the documentation of graphs for what is allowed."),
    ErrorCode.BAD_RUN: ("The run cannot be used", "It is open, or does not hold what was asked for."),
    ErrorCode.NOT_REPRODUCED: ("Not reproduced", "The job gave another result this time."),
    ErrorCode.UNAVAILABLE: ("Not available now", "Try again later."),
    ErrorCode.VERSION: ("Another version", "The gateway was upgraded. Load the page again."),
    ErrorCode.OVER_BUDGET: (
        "Over the budget",
        "This could cost more than is left. Ask for less, or wait for next week.",
    ),
}
_SPENT = ("A budget is spent", "Nothing more is sent until next week, or until two people raise the cap.")
_One = TypeVar("_One")


class Refused(Exception):
    """The API answered with an error; the page says so."""

    def __init__(self, sent: Sent, code: ErrorCode | None) -> None:
        self.sent = sent
        self.code = code
        super().__init__(code)


class View:
    """What a page's handler works with."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.gateway = call.gateway
        self.cost = 0
        """Bytes charged so far."""

    @property
    def user(self) -> str:
        """Who looks."""
        return self.call.who.user

    @property
    def project(self) -> str:
        """Of the page; empty for pages without one."""
        return self.call.params.get("project", "")

    def ask(self, method: str, path: str, body: Any = None, **params: str) -> Body:
        """What the API answers to this user, who is charged as a client would be.

        Raises:
            Refused: with an error.
        """
        call = replace(self.call, params={**self.call.params, **params}, body=body)
        return self.take(_api()[method, path](call))

    def take(self, reply: object) -> Body:
        """The body that was charged; a page shows nothing of the vault that did not come through here."""
        assert isinstance(reply, Sent)
        self.cost += reply.charged
        body = decode(reply.body)
        if isinstance(body, Failure | Closed):
            raise Refused(reply, body.code if isinstance(body, Failure) else None)
        return body

    def send(self, body: Body, models: Sequence[str] = ()) -> Body:
        """`body`, charged to the user, as it was sent."""
        return self.take(self.gateway.send(body, self.call.who, self.project or None, models))

    def refused(self, error: Exception) -> ErrorCode | None:
        """What is said of an error, charged unless the API has charged for it; None if a budget is spent."""
        if isinstance(error, Refused):
            return error.code
        sent = refuse(error, self.gateway, self.call.identity, self.call.params, "page")
        self.cost += sent.charged
        found = decode(sent.body)
        return found.code if isinstance(found, Failure) else None

    def enter(self, right: Right) -> None:
        """Raises NotThere or NotAllowed unless the user's role in the project has `right`."""
        self.gateway.enter(self.call.who, self.project, right)

    def path(self, *parts: str) -> str:
        """A path of the project's pages."""
        return "/".join([self.gateway.prefix, "p", quote(self.project, safe=""), *parts])

    def page_of(self, things: Sequence[_One]) -> tuple[Sequence[_One], dict[str, int]]:
        """Those on the page asked for, and the numbers of the page and the last one."""
        pages = max(-(-len(things) // PER_PAGE), 1)
        page = self.page_number(pages)
        return things[(page - 1) * PER_PAGE : page * PER_PAGE], {"page": page, "pages": pages}

    def page_number(self, pages: int) -> int:
        """The page asked for, from 1 to `pages`."""
        given = self.call.query.get("page", "1")
        if not given.isdecimal() or len(given) > 9 or not 1 <= int(given) <= pages:
            raise NotThere(f"there is no page {given!r}")
        return int(given)

    def show(self, template: str, *, code: int = 200, **values: Any) -> Fixed:
        """The page."""
        who = self.call.identity
        shown = {"base": self.gateway.prefix, "project": self.project, "cost": self.cost}
        if who is not None:
            shown |= {"user": who.user, "csrf": who.csrf, "admin": "admin" in who.scopes}
        return render(template, code, **shown | values)


@cache
def _api() -> Mapping[tuple[str, str], Handler]:
    from millpond.hub.api import ENDPOINTS

    return {(one.method, one.path.removeprefix("/api/v1")): one.handler for one in ENDPOINTS}


def page(handler: Callable[[View], Fixed | Redirect], path: str) -> Handler:
    """A handler of the gateway, which shows an error as a page and says what it cost."""

    def run(call: Call) -> Reply:
        view = View(call)
        try:
            return handler(view)
        except Refused as refused:
            return problem(refused.sent, view)
        except Exception as error:
            sent = refuse(error, call.gateway, call.identity, call.params, f"{path} (page)")
            view.cost += sent.charged
            return problem(sent, view)

    return run


def refused_page(call: Call, sent: Sent) -> Fixed:
    """The page of a request that was not let in."""
    view = View(call)
    view.cost = sent.charged
    return problem(sent, view)


def problem(sent: Sent, view: View) -> Fixed:
    """The page of an error that was charged."""
    found = decode(sent.body)
    title, remedy = _PROBLEMS[found.code] if isinstance(found, Failure) else _SPENT
    return view.show("problem.html", code=status_of(sent.body), title=title, remedy=remedy)


def problem_text(code: ErrorCode | None) -> str:
    """What a page says of an error."""
    title, remedy = _SPENT if code is None else _PROBLEMS[code]
    return f"{title}. {remedy}"
