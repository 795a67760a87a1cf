"""How a browser logs in: with a log-in token where there is a token file, through the Hub where there is one."""

from __future__ import annotations

import hmac
from http.cookies import SimpleCookie
from urllib.parse import quote

from millpond.hub.serving import Call, Endpoint, Fixed, NotAllowed, Redirect, Reply

_STATE = "millpond-state"
_FORM = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Log in - Millpond</title>
</head>
<body>
<main>
<h1>Log in to Millpond</h1>
<form method="post" action="login?next={next}">
<p><label for="token">Log-in token</label></p>
<p><input id="token" name="token" type="password" autocomplete="current-password" required autofocus></p>
<p><button>Log in</button></p>
</form>
</main>
</body>
</html>
"""
_HEADERS = (
    ("content-security-policy", "default-src 'none'; form-action 'self'; frame-ancestors 'none'"),
    ("referrer-policy", "same-origin"),
)


def show_login(call: Call) -> Reply:
    """The form, or the way to the Hub's."""
    target = _target(call)
    if call.gateway.hub is None:
        page = _FORM.replace("{next}", quote(target, safe="/"))
        return Fixed(page.encode(), "text/html; charset=utf-8", headers=_HEADERS)
    url, state = call.gateway.hub.login_url(target)
    return Redirect(url, (("set-cookie", f"{_STATE}={state}; {call.gateway.gatekeeper.cookie_flags}; Max-Age=600"),))


def log_in(call: Call) -> Reply:
    """Open a session for whoever has a log-in token; only from the gateway's own page."""
    gateway = call.gateway
    if gateway.hub is not None or call.headers.get("origin") != gateway.gatekeeper.origin:
        raise NotAllowed("log in from the gateway's page")
    key = gateway.gatekeeper.sessions.open(str(call.body.get("token", "")))
    if key is None:
        raise NotAllowed("the token logs nobody in")
    return Redirect(_target(call), (_cookie(call, key),))


def come_back(call: Call) -> Reply:
    """A browser comes from the Hub with a code."""
    gateway = call.gateway
    state, code = call.query.get("state", ""), call.query.get("code", "")
    known = call.cookies.get(_STATE, "")
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
