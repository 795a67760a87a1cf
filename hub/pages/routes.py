"""The paths of the pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from millpond.hub.auth import Scope
from millpond.hub.pages import jobs, reviews
from millpond.hub.pages.shell import STATIC, static
from millpond.hub.pages.view import View, page, refused_page
from millpond.hub.serving import Endpoint, Fixed, Handler, Redirect

_P = "/p/{project}"


def _static(name: str) -> Handler:
    return lambda _: static(name)


def _page(
    method: Literal["GET", "POST"],
    path: str,
    scope: Scope,
    handler: Callable[[View], Fixed | Redirect],
    takes: Literal["nothing", "form", "bulk form"] = "nothing",
) -> Endpoint:
    return Endpoint(method, path, scope, page(handler, path), takes, page=True, refused=refused_page)


PAGES: tuple[Endpoint, ...] = (
    _page("GET", "/", "read", jobs.home),
    _page("GET", _P, "read", jobs.runs),
    _page("GET", f"{_P}/submit", "run", jobs.form),
    _page("POST", f"{_P}/submit", "run", jobs.submit, "bulk form"),
    _page("GET", f"{_P}/jobs", "read", jobs.jobs),
    _page("GET", f"{_P}/jobs/{{job}}", "read", jobs.job),
    _page("POST", f"{_P}/jobs/{{job}}/cancel", "run", jobs.cancel, "form"),
    _page("GET", f"{_P}/jobs/{{job}}/answers/{{number}}", "read", jobs.answer),
    _page("GET", f"{_P}/reviews", "review", reviews.reviews),
    _page("GET", f"{_P}/reviews/{{job}}/{{number}}", "review", reviews.review),
    _page("POST", f"{_P}/reviews/{{job}}/{{number}}", "review", reviews.decide, "form"),
    _page("GET", f"{_P}/budget", "read", reviews.budget),
    _page("GET", "/audit", "admin", reviews.audit),
    *(Endpoint("GET", f"/pages/{name}", "public", _static(name)) for name in STATIC),
)
"""What browsers see. Log-in and log-out are in `hub/logins.py`."""
