"""How a browser logs in: with a log-in token where there is a token file, through the Hub where there is one."""

from __future__ import annotations

import hmac
from http.cookies import SimpleCookie
from urllib.parse import quote

from millpond.hub.pages.shell import render
from millpond.hub.serving import Call, Endpoint, Fixed, NotAllowed, Redirect, Reply


def show_login(call: Call) -> Reply:
    """The form, or the way to the Hub's."""
    target = _target(call)
    if call.gateway.hub is None:
        return _form(call, target)
    url, state = call.gateway.hub.login_url(target)
    keeper = call.gateway.gatekeeper
    return Redirect(url, (("set-cookie", f"{keeper.state_cookie}={state}; {keeper.cookie_flags}; Max-Age=600"),))


def log_in(call: Call) -> Reply:
    """Open a session for whoever has a log-in token; only from the gateway's own page."""
    gateway = call.gateway
    if gateway.hub is not None or call.headers.get("origin") != gateway.gatekeeper.origin:
        raise NotAllowed("log in from the gateway's page")
    key = gateway.gatekeeper.sessions.open(str(call.body.get("token", "")))
    if key is None:
        return _form(
            call, _target(call), "This token logs nobody in: it is another kind of token, or has expired.", 403
        )
    return Redirect(_target(call), (_cookie(call, key),))


def come_back(call: Call) -> Reply:
    """A browser comes from the Hub with a code."""
    gateway = call.gateway
    state, code = call.query.get("state", ""), call.query.get("code", "")
    known = call.cookies.get(gateway.gatekeeper.state_cookie, "")
    if gateway.hub is None or not state or not hmac.compare_digest(state.encode(), known.encode()):
        raise NotAllowed("this log-in was not begun here")
    found = gateway.hub.finish(code, state)
    key = None if found is None else gateway.gatekeeper.sessions.open(found[0])
    if found is None or key is None:
        raise NotAllowed("the Hub does not let this user in")
    return Redirect(_safe(found[1]) or gateway.prefix + "/", (_cookie(call, key),))


def log_out(call: Call) -> Reply:
    """End the session."""
    keeper = call.gateway.gatekeeper
    keeper.sessions.close(call.cookies.get(keeper.cookie, ""))
    cookie = f"{keeper.cookie}=; {keeper.cookie_flags}; Max-Age=0"
    return Redirect(f"{call.gateway.prefix}/login", (("set-cookie", cookie),))


LOGINS = (
    Endpoint("GET", "/login", "public", show_login),
    Endpoint("POST", "/login", "public", log_in, "form"),
    Endpoint("GET", "/oauth_callback", "public", come_back),
    Endpoint("POST", "/logout", "read", log_out, "form"),
)


def _form(call: Call, target: str, problem: str = "", status: int = 200) -> Fixed:
    next_path = quote(target, safe="/")
    return render("login.html", status, base=call.gateway.prefix, next=next_path, problem=problem)


def _cookie(call: Call, key: str) -> tuple[str, str]:
    keeper = call.gateway.gatekeeper
    SimpleCookie()[keeper.cookie] = key  # raises for what a cookie cannot hold
    return ("set-cookie", f"{keeper.cookie}={key}; {keeper.cookie_flags}")


def _target(call: Call) -> str:
    return _safe(call.query.get("next", "")) or call.gateway.prefix + "/"


def _safe(path: str) -> str:
    """`path`, if it is one of this origin; nothing otherwise."""
    plain = path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable() and path.isascii()
    return path if plain and "\\" not in path else ""
