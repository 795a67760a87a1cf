"""The gateway as a service of a real JupyterHub: its tokens, its scopes, and a browser's log-in through it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from tests.hub.gatehouse import Gatehouse

from millpond.hub.auth import Gatekeeper, HubTokens
from millpond.hub.body import ErrorCode, Failure, Handles, decode

SCOPES = ("read", "run", "review", "admin")
SECRET = "0123456789abcdef" * 4
PREFIX = "/services/millpond/"
CONFIG = '''
from jupyterhub.proxy import Proxy

class NoProxy(Proxy):
    """Nobody comes through a proxy here: the test asks the hub and the gateway themselves."""
    should_start = False
    async def add_route(self, routespec, target, data): pass
    async def delete_route(self, routespec): pass
    async def get_all_routes(self): return {{}}

c = get_config()
c.JupyterHub.proxy_class = NoProxy
c.JupyterHub.bind_url = "http://127.0.0.1:{public}"
c.JupyterHub.hub_bind_url = "http://127.0.0.1:{port}"
c.JupyterHub.db_url = "sqlite:///hub.sqlite"
c.JupyterHub.cookie_secret_file = "cookie_secret"
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.Authenticator.allow_existing_users = True
c.JupyterHub.custom_scopes = {{f"custom:millpond:{{s}}": {{"description": s}} for s in {scopes}}}
c.JupyterHub.services = [
    {{"name": "millpond", "url": "{origin}", "api_token": "{secret}", "oauth_no_confirm": True,
     "oauth_redirect_uri": "{origin}{prefix}oauth_callback",
     "oauth_client_allowed_scopes": [f"custom:millpond:{{s}}" for s in {scopes}]}},
    {{"name": "operator", "api_token": "{admin}"}},
]
c.JupyterHub.load_groups = {{"researchers": {{"users": ["ada", "ben"]}}, "reviewers": {{"users": ["rex"]}}}}
c.JupyterHub.load_roles = [
    {{"name": "researcher", "groups": ["researchers"],
     "scopes": ["access:services!service=millpond", "custom:millpond:read", "custom:millpond:run"]}},
    {{"name": "reviewer", "groups": ["reviewers"],
     "scopes": ["access:services!service=millpond", "custom:millpond:read", "custom:millpond:review", "tokens!user"]}},
    {{"name": "operator", "services": ["operator"], "scopes": ["admin:users", "tokens"]}},
]
'''


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class Hub:
    def __init__(self, folder, origin):
        self.port = free_port()
        admin = "fedcba9876543210" * 4
        text = CONFIG.format(
            port=self.port, public=free_port(), scopes=SCOPES, origin=origin, secret=SECRET, prefix=PREFIX, admin=admin
        )
        (folder / "jupyterhub_config.py").write_text(text)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTERHUB_")}
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jupyterhub", "-f", "jupyterhub_config.py"],
                cwd=folder, env=environment, stdout=log, stderr=log,
            )  # fmt: skip
        self.log = folder / "log"
        self.api = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}/hub/api",
            headers={"Authorization": f"token {admin}"},
            trust_env=False,
        )
        end = time.monotonic() + 60
        while True:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            try:
                if self.api.get("/").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)

    def token(self, user, *scopes):
        wanted = (
            {"scopes": [f"custom:millpond:{one}" for one in scopes] + ["access:services!service=millpond"]}
            if scopes
            else {}
        )
        reply = self.api.post(f"/users/{user}/tokens", json=wanted)
        assert reply.status_code == 201, reply.text
        return reply.json()["token"]

    def stop(self):
        self.api.close()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(20)


@pytest.fixture(scope="module")
def hub():
    with tempfile.TemporaryDirectory(prefix="jh", dir="/tmp") as name:
        port = free_port()
        origin = f"http://127.0.0.1:{port}"
        found = Hub(Path(name), origin)
        found.gateway_port, found.origin = port, origin
        try:
            for user in ("ada", "ben", "rex", "eve"):
                found.api.post(f"/users/{user}")
            yield found
        finally:
            found.stop()


@pytest.fixture
def environment(hub, monkeypatch):
    for name, value in {
        "API_TOKEN": SECRET, "API_URL": f"http://127.0.0.1:{hub.port}/hub/api", "SERVICE_NAME": "millpond",
        "SERVICE_PREFIX": PREFIX, "CLIENT_ID": "service-millpond", "BASE_URL": "/",
        "OAUTH_CALLBACK_URL": f"{hub.origin}{PREFIX}oauth_callback",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"JUPYTERHUB_{name}", value)


@pytest.mark.slow
def test_the_hubs_tokens_stand_for_its_users_and_their_scopes(hub, environment):
    tokens = HubTokens(cache_seconds=0)
    ada = tokens.identify(hub.token("ada"))
    assert (ada.user, ada.scopes, ada.session) == ("ada", {"read", "run"}, False)
    assert tokens.identify(hub.token("ada", "read")).scopes == {"read"}
    assert tokens.identify(hub.token("eve")) is None  # in no group: no access to the service
    assert tokens.identify("nonsense") is None
    assert tokens.identify(SECRET) is None  # a service is no user
    own = hub.token("rex")
    rex = Gatekeeper(tokens, hub.origin).identify({"authorization": f"token {own}"}, {})
    assert "review" in rex.scopes
    assert not rex.session  # it inherits the scope, and is no browser
    assert tokens.identify(own, login=True) is None
    gone = hub.token("ben")
    assert tokens.identify(gone).user == "ben"
    assert hub.api.delete("/users/ben").status_code == 204
    assert tokens.identify(gone) is None


@pytest.mark.slow
def test_a_browser_logs_in_through_the_hub_and_can_then_review(hub, environment, tmp_path):
    with Gatehouse(tmp_path, port=hub.gateway_port, jupyterhub=True) as gate:
        browser = gate.client()
        on_hub = httpx.Client(base_url=f"http://127.0.0.1:{hub.port}", trust_env=False)
        with on_hub:
            page = on_hub.get("/hub/login")
            xsrf = re.search(r'name="_xsrf" value="([^"]+)"', page.text).group(1)
            done = on_hub.post("/hub/login", data={"username": "rex", "password": "x", "_xsrf": xsrf})
            assert done.status_code == 302, done.text
            away = browser.get(f"{PREFIX}login?next={PREFIX}x").headers["location"]
            assert away.startswith("/hub/api/oauth2/authorize?")
            back = on_hub.get(away)
            assert back.status_code == 302, back.text
        code = urlsplit(back.headers["location"])
        assert code.path == f"{PREFIX}oauth_callback"
        stranger = gate.client()
        assert stranger.get(f"{code.path}?{code.query}").status_code == 403  # another browser's log-in
        arrived = browser.get(f"{code.path}?{code.query}")
        assert (arrived.status_code, arrived.headers["location"]) == (303, f"{PREFIX}x")
        assert browser.get(f"{code.path}?{code.query}").status_code == 403  # once
        api = f"{PREFIX}api/v1/p/one"
        assert decode(browser.get(f"{api}/reviews").content) == Handles(())
        path, yes = f"{api}/reviews/{'0' * 16}/0", {"decision": "approved"}
        held = next(iter(gate.app.state.gateway.gatekeeper.sessions._held.values()))
        mine = {"X-CSRF-Token": held.csrf, "Origin": gate.origin}
        assert decode(browser.post(path, json=yes, headers=mine).content) == Failure(ErrorCode.NOT_FOUND)
        assert decode(browser.post(path, json=yes, headers=mine | {"Origin": "null"}).content) == Failure(
            ErrorCode.NOT_ALLOWED
        )
        own = gate.client(Authorization=f"Bearer {hub.token('rex')}")
        assert decode(own.get(f"{api}/reviews").content) == Handles(())
        assert decode(own.post(path, json=yes).content) == Failure(ErrorCode.NOT_ALLOWED)
