"""The proxy: what it passes on, what it refuses in any spelling, and what it counts. With the real program and a hostile server."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from millpond.hub.workspace.paths import TrustedFiles, is_allowed, is_plain
from millpond.hub.workspace.proxy_server import ProxyServer
from millpond.hub.workspace.routes import Route
from millpond.hub.workspace.settings import Workspace, WorkspaceLimits
from millpond.hub.workspace.usage import EVENT_BYTES, Usage
from millpond.store.errors import InvalidInput

from .browser import Loopback
from .conftest import free_port

REFUSED = [
    "/files/a.txt", "/files", "/%66iles/a.txt", "/%2566iles/a.txt", "/files%2Fa.txt", "//files/a.txt", "/./files/a.txt",
    "/lab/../files/a.txt", "/lab/..%2ffiles/a.txt", "/lab/%2e%2e/files/a.txt", "/FILES/a.txt", "/files;x/a.txt",
    "/\\files/a.txt", "/api/contents/..%2f..%2ffiles/a", "/api/contents/a/../../../files/a", "/api/contents/%2e%2e/a",
    "/nbconvert/html/a.ipynb", "/nbconvert/html/a.ipynb?download=true", "/api/nbconvert", "/view/a.html", "/api/terminals",
    "/terminals/websocket/1", "/terminals/1", "/lsp/status", "/proxy/8080/", "/tree", "/edit/a", "/metrics", "/lab/api/extensions",
    "/api/contentsx", "/lab/api/listings", "/apix", "/api/contents/a%00", "/api/contents/a%0d%0aSet-Cookie: x", "/service-worker.js",
]  # fmt: skip
PASSED = [
    "", "/", "/lab", "/lab/tree/a/b.ipynb", "/lab/workspaces/auto-x", "/lab/api/settings/@jupyterlab/apputils-extension:themes",
    "/lab/api/workspaces/default", "/lab/api/translations/default", "/api", "/api/status", "/api/me", "/api/kernels/0a/channels",
    "/api/contents/with%20space.ipynb", "/api/contents/100%25.txt/checkpoints", "/api/sessions", "/api/kernelspecs",
    "/kernelspecs/python3/logo-64x64.png", "/api/events/subscribe", "/oauth_callback", "/logout",
]  # fmt: skip


@pytest.mark.parametrize("path", REFUSED)
def test_refused_in_any_spelling(path):
    assert not is_allowed(path.partition("?")[0])


@pytest.mark.parametrize("path", PASSED)
def test_what_lab_needs_passes(path):
    assert path == "" or is_allowed(path)


def test_a_path_means_one_thing():
    assert is_plain("/a/b%20c/")
    for path in ("a", "/a//b", "/a/./b", "/a/%2e%2e/b", "/a%2fb", "/a%5cb", "/a\\b", "/a%00", "/ä", "/.."):
        assert not is_plain(path)


def test_trusted_files_stay_in_their_folders(tmp_path):
    root = tmp_path / "share/jupyter/lab/static"
    root.mkdir(parents=True)
    (root / "main.js").write_text("trusted")
    (tmp_path / "secret").write_text("x")
    (root / "link.js").symlink_to(tmp_path / "secret")
    files = TrustedFiles(tmp_path, tmp_path / "static")
    assert files.find("/static/lab/main.js") == root / "main.js"
    for path in (
        "/static/lab/link.js",
        "/static/lab/../../../../secret",
        "/static/lab/%2e%2e/x",
        "/static/lab/",
        "/static/lab",
    ):
        assert files.find(path) is None
    assert files.covers("/static/anything")


def test_usage_never_passes_the_limit_and_outlives_a_crash(tmp_path):
    usage = Usage(tmp_path / "usage", 100_000)
    sent = 0
    while usage.spend("ada", 900):
        sent += 900 + EVENT_BYTES
    assert 100_000 - 900 - EVENT_BYTES < sent <= 100_000
    assert usage.spend("bob", 900)
    again = Usage(tmp_path / "usage", 100_000)  # without close(): as after a crash
    assert not again.spend("ada", 900)
    assert again.spent("bob") >= 900 + EVENT_BYTES


class Hostile:
    """A server of a user that lies where it can, behind the real proxy."""

    def __init__(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="mp", dir="/tmp"))  # short: a socket's path
        self.settings = Workspace(
            state=folder,
            run=folder,
            origin=f"http://localhost:{(port := free_port())}",
            listen=f"127.0.0.1:{port}",
            limits=WorkspaceLimits(daily_bytes=1 << 20),
        )
        self.asked: list[str] = []
        self.cookies: list[str] = []

    async def __aenter__(self) -> Hostile:
        settings = self.settings
        for name in ("zones/ada", "hub", "proxy"):
            (settings.run / name).mkdir(parents=True)
        self.proxy = ProxyServer(settings, settings.state / "proxy")
        self.runners = []
        server = web.Application()
        server.router.add_get("/user/ada/api/kernels/flood/channels", self._flood)
        server.router.add_route("*", "/{path:.*}", self._serve)
        hub = web.Application()
        hub.router.add_route("*", "/{path:.*}", self._hub)
        for app, socket in ((server, settings.zone("ada") / "server.sock"), (hub, settings.hub_socket)):
            self.runners.append(runner := web.AppRunner(app))
            await runner.setup()
            await web.UnixSite(runner, str(socket)).start()
        self.runners.append(runner := web.AppRunner(self.proxy.public(), shutdown_timeout=0.1))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", int(settings.listen.rpartition(":")[2])).start()
        quoted = str(settings.zone("ada") / "server.sock").replace("/", "%2F")
        self.proxy.routes.add(
            Route("ada.localhost/user/ada/", f"http+unix://{quoted}:80", {"user": "ada", "server_name": ""})
        )
        self.proxy.routes.add(Route("/", "http://127.0.0.1:8901", {"hub": True}))
        self.http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(resolver=Loopback()))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.close()
        for runner in self.runners:
            await runner.cleanup()
        await self.proxy.close()
        shutil.rmtree(self.settings.state)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.raw_path)
        if "stream" in request.path:
            response = web.StreamResponse()
            await response.prepare(request)
            for _ in range(400):
                await response.write(b"x" * 10_000)
            return response
        response = web.Response(text="from the user", headers={"X-Forwarded-For": "lie"})
        response.headers.add("Set-Cookie", "mine=1; Path=/")
        response.headers.add("Set-Cookie", "tossed=1; Path=/; DOMAIN=localhost")
        response.headers.add("Set-Cookie", "tossed2=1; Path=/;domain =.localhost; Secure")
        return response

    async def _hub(self, request: web.Request) -> web.Response:
        self.asked.append(request.raw_path)
        return web.Response(text=f"the hub, for {request.headers['X-Forwarded-For']}")

    async def _flood(self, request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        for _ in range(400):
            await ws.send_bytes(b"x" * 10_000)
        return ws

    def url(self, path: str, host: str = "ada.localhost") -> str:
        return f"http://{host}:{self.settings.listen.rpartition(':')[2]}{path}"


def behind_proxy(steps):
    async def run():
        async with Hostile() as hostile:
            await steps(hostile)

    asyncio.run(run())


def test_a_tampered_server_cannot_serve_labs_files_or_toss_cookies():
    async def steps(hostile):
        async with hostile.http.get(hostile.url("/user/ada/static/lab/index.html")) as page:
            assert page.status == 200
            assert "from the user" not in await page.text()
        async with hostile.http.get(hostile.url("/user/ada/static/lab/evil.js")) as page:
            assert page.status == 404
        assert hostile.asked == []
        async with hostile.http.get(hostile.url("/user/ada/api/status")) as page:
            assert await page.text() == "from the user"
            assert page.headers.getall("Set-Cookie") == ["mine=1; Path=/"]
            assert "X-Forwarded-For" not in page.headers

    behind_proxy(steps)


def test_a_websocket_flood_is_closed_at_the_days_limit():
    async def steps(hostile):
        received = 0
        async with hostile.http.ws_connect(hostile.url("/user/ada/api/kernels/flood/channels"), max_msg_size=0) as ws:
            async for message in ws:
                received += len(message.data)
            assert ws.close_code == 1008
        assert (1 << 20) - 30_000 < received <= 1 << 20
        for _ in range(100):
            async with hostile.http.get(hostile.url("/user/ada/api/status")) as page:
                if page.status == 429:
                    break
        assert page.status == 429
        async with hostile.http.get(hostile.url("/hub/home", "localhost")) as page:
            assert page.status == 200  # the hub is still there

    behind_proxy(steps)


def test_a_long_body_is_cut_at_the_days_limit():
    async def steps(hostile):
        received = 0

        async def read():
            nonlocal received
            async with hostile.http.get(hostile.url("/user/ada/api/contents/stream")) as page:
                async for chunk in page.content.iter_any():
                    received += len(chunk)

        with pytest.raises(aiohttp.ClientError):
            await read()
        assert (1 << 20) - 200_000 < received <= 1 << 20

    behind_proxy(steps)


def test_hosts_and_origins():
    """DNS rebinding, requests that another origin's page makes, and headers that only the proxy may write."""

    async def steps(hostile):
        async def ask(method, host, **headers):
            async with hostile.http.request(
                method, hostile.url("/hub/x", "localhost"), headers={"Host": host, **headers}
            ) as page:
                return page.status

        host = hostile.settings.host
        assert await ask("GET", "evil.example") == 421
        assert await ask("GET", f"127.0.0.1:{host.rpartition(':')[2]}") == 421
        assert await ask("GET", host) == 200
        evil = f"http://ada.{host}"
        cookie = {"Cookie": "session=1"}
        assert await ask("POST", host, Origin=evil, **cookie) == 403
        assert await ask("POST", host, Origin="null", **cookie) == 403
        assert await ask("DELETE", host, **cookie, **{"Sec-Fetch-Site": "same-site"}) == 403
        assert await ask("POST", host, **cookie, **{"Sec-Fetch-Site": "cross-site"}) == 403
        assert await ask("POST", host, Origin=f"http://{host}", **cookie, **{"Sec-Fetch-Site": "same-origin"}) == 200
        assert await ask("POST", host, Authorization="token t") == 200
        mine = {"Host": f"ada.{host}", "Origin": f"http://bob.{host}", **cookie}
        async with hostile.http.post(hostile.url("/user/ada/api/sessions"), headers=mine) as page:
            assert page.status == 403  # another user's page, with ada's cookies
        hostile.asked.clear()
        async with hostile.http.get(
            hostile.url("/hub/x", "localhost"), headers={"X-Forwarded-For": "10.0.0.1"}
        ) as page:
            assert await page.text() == "the hub, for 127.0.0.1"

    behind_proxy(steps)


def test_routes_lead_nowhere_else():
    async def steps(hostile):
        routes = hostile.proxy.routes
        zone = str(hostile.settings.zone("bob") / "server.sock").replace("/", "%2F")
        for route in (
            Route("ada.localhost/user/ada/", "http://169.254.169.254", {"user": "ada"}),
            Route("ada.localhost/user/ada/", f"http+unix://{zone}:80", {"user": "ada"}),
            Route("x/", "http+unix://%2Frun%2Fmillpond%2Fhelper%2Fspawn.sock:80", {}),
            Route("gateway--service.localhost/services/gateway/", "http://127.0.0.1:22", {"service": "gateway"}),
        ):
            with pytest.raises(InvalidInput):
                routes.add(route)
        assert len(routes.all()) == 2

    behind_proxy(steps)
