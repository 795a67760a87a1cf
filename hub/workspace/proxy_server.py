"""The proxy: what browsers connect to. A process of its own, so that a restart of the hub cuts nobody off.

    python -m millpond.hub.workspace.proxy_server WORKSPACE.json

It counts every byte of every body and websocket frame that a user's server sends to the browser, and stops at the day's limit;
asks a user's server only for what paths.py lists; serves Lab's files itself; and keeps origins apart: it refuses changes that a
page of another origin asks for, and cookies that a notebook server sets for anybody but itself. All this is the second layer:
what a workspace knows is bounded by the gateway and the egress meter, not here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import signal
import ssl
import sys
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import jupyter_server
from aiohttp import ClientTimeout, WSMsgType, web
from multidict import CIMultiDict
from yarl import URL

from millpond.hub.workspace.paths import TrustedFiles, is_allowed, is_plain
from millpond.hub.workspace.routes import Route, Routes
from millpond.hub.workspace.settings import Workspace, read_workspace
from millpond.hub.workspace.usage import Usage
from millpond.store.errors import InvalidInput, MillpondError

_LOG = logging.getLogger(__name__)
_HOP = frozenset(
    (
        *("connection", "content-encoding", "content-length", "forwarded", "host", "keep-alive", "proxy-authenticate"),
        *("proxy-authorization", "sec-websocket-accept", "sec-websocket-extensions", "sec-websocket-key"),
        *("sec-websocket-protocol", "sec-websocket-version", "te", "trailer", "transfer-encoding", "upgrade"),
        *("x-forwarded-for", "x-forwarded-host", "x-forwarded-port", "x-forwarded-proto", "x-real-ip", "x-scheme"),
    )
)
"""Headers between two neighbours, which are not passed on, and those that only the proxy may write."""
_SPENT = "Today's limit of bytes from this workspace is reached; it opens again at midnight UTC."
_SAFE = ("GET", "HEAD", "OPTIONS")


class ProxyServer:
    """The program's two applications: the public one, and the hub's."""

    def __init__(self, settings: Workspace, state: Path) -> None:
        self.settings = settings
        self.routes = Routes(state / "routes.json", settings)
        self.usage = Usage(state / "usage.sqlite", settings.limits.daily_bytes)
        self.files = TrustedFiles(Path(sys.prefix), Path(jupyter_server.__file__).parent / "static")
        self._sessions: dict[Path | None, aiohttp.ClientSession] = {}
        parts = urlsplit(settings.origin)
        self._scheme, self._host = parts.scheme, parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)

    def public(self) -> web.Application:
        """For browsers."""
        app = web.Application(client_max_size=1 << 28)
        app.router.add_route("*", "/{path:.*}", self.handle)
        return app

    def api(self) -> web.Application:
        """For the hub."""
        app = web.Application()
        app.router.add_get("/routes", self._list)
        app.router.add_put("/routes", self._add)
        app.router.add_delete("/routes", self._remove)
        return app

    async def _list(self, _: web.Request) -> web.Response:
        return web.json_response(self.routes.all())

    async def _add(self, request: web.Request) -> web.Response:
        try:
            self.routes.add(Route(**await request.json()))
        except (InvalidInput, TypeError) as error:
            _LOG.warning("%s", error)
            return web.json_response({"error": str(error)}, status=400)
        return web.json_response({})

    async def _remove(self, request: web.Request) -> web.Response:
        self.routes.remove((await request.json())["routespec"])
        return web.json_response({})

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer a browser."""
        host = (request.host or "").rpartition(":")[0] or request.host
        if host != self._host and not host.endswith(f".{self._host}"):
            return web.Response(status=421, text="This host is not served here.\n")
        path = request.raw_path.partition("?")[0]
        route = self.routes.find(host, path)
        if route is None:
            return web.Response(status=503, text="The hub is starting; try again in a moment.\n")
        if self._foreign(request):
            return web.Response(status=403, text="Another site asked for this change.\n")
        if route.user is None:
            if not is_plain(path):
                return web.Response(status=400, text="This address is spelled in a way that is not served.\n")
        else:
            rest = path[len(route.path) - 1 :]
            if self.files.covers(rest):
                return self._file(request, rest)
            if not is_allowed(rest):
                return web.Response(status=403, text="Not available from a workspace: files stay in it.\n")
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return await self._websocket(request, route)
        return await self._http(request, route)

    def _foreign(self, request: web.Request) -> bool:
        """Whether the page of another origin asks for a change, or opens a websocket, with this browser's cookies."""
        upgrade = request.headers.get("Upgrade", "").lower() == "websocket"
        if (request.method in _SAFE and not upgrade) or "Cookie" not in request.headers:
            return False
        site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
        if origin is not None and origin != f"{self._scheme}://{request.host}":
            return True
        return site not in (None, "same-origin", "none")

    def _file(self, request: web.Request, path: str) -> web.StreamResponse:
        file = self.files.find(path) if request.method in ("GET", "HEAD") else None
        if file is None:
            return web.Response(status=404)
        return web.FileResponse(file, headers={"Cache-Control": "max-age=3600", "X-Content-Type-Options": "nosniff"})

    def _session(self, route: Route) -> aiohttp.ClientSession:
        place = self.routes.socket(route)
        if place not in self._sessions:
            connector: aiohttp.BaseConnector = (
                aiohttp.TCPConnector(limit=0) if place is None else aiohttp.UnixConnector(str(place), limit=0)
            )
            self._sessions[place] = aiohttp.ClientSession(
                connector=connector, timeout=ClientTimeout(total=None, sock_connect=10), cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False, skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            )  # fmt: skip
        return self._sessions[place]

    def _request_headers(self, request: web.Request, route: Route) -> CIMultiDict[str]:
        dropped = _HOP | {name.strip().lower() for name in request.headers.get("Connection", "").split(",")}
        headers = CIMultiDict((name, value) for name, value in request.headers.items() if name.lower() not in dropped)
        if route.user is not None:
            headers["Accept-Encoding"] = "identity"  # so that what is counted is what is said
        headers["Host"] = request.host
        headers["X-Forwarded-For"] = request.remote or ""
        headers["X-Forwarded-Host"] = request.host
        headers["X-Forwarded-Port"] = str(self._port)
        headers["X-Forwarded-Proto"] = self._scheme
        return headers

    def _target(self, request: web.Request, route: Route, scheme: str) -> str:
        place = self.routes.socket(route)
        return f"{scheme}://{urlsplit(route.target).netloc if place is None else 'workspace'}{request.raw_path}"

    def _pay(self, route: Route, count: int) -> bool:
        return route.user is None or self.usage.spend(route.user, count)

    async def _http(self, request: web.Request, route: Route) -> web.StreamResponse:
        url = self._target(request, route, "http")
        headers = self._request_headers(request, route)
        body = request.content if request.body_exists else None
        if request.content_length is not None and body is not None:
            headers["Content-Length"] = str(request.content_length)
        try:
            async with self._session(route).request(
                request.method, URL(url, encoded=True), headers=headers, data=body, allow_redirects=False
            ) as up:
                passed = list(_response_headers(up.headers.items(), route))
                response = web.StreamResponse(status=up.status, reason=up.reason, headers=CIMultiDict(passed))
                if encoding := up.headers.get("Content-Encoding"):
                    response.headers["Content-Encoding"] = encoding
                if not self._pay(route, sum(len(name) + len(value) for name, value in passed) + len(up.reason or "")):
                    return web.Response(status=429, text=_SPENT)
                if up.headers.get("Content-Length", "").isdigit():
                    response.content_length = int(up.headers["Content-Length"])
                await response.prepare(request)
                async for chunk in up.content.iter_any():
                    if not self._pay(route, len(chunk)):
                        if request.transport is not None:
                            request.transport.abort()
                        return response
                    await response.write(chunk)
                await response.write_eof()
                return response
        except (aiohttp.ClientConnectorError, aiohttp.ServerDisconnectedError):
            return web.Response(status=503, text="This server is not running; start it from the hub's page.\n")
        except aiohttp.ClientError as error:
            _LOG.warning("%s %s: %s", request.method, route.routespec, error)
            return web.Response(status=502)

    async def _websocket(self, request: web.Request, route: Route) -> web.StreamResponse:
        protocols = [
            part.strip() for part in request.headers.get("Sec-WebSocket-Protocol", "").split(",") if part.strip()
        ]
        try:
            up = await self._session(route).ws_connect(
                URL(self._target(request, route, "ws"), encoded=True), headers=self._request_headers(request, route), protocols=protocols,
                max_msg_size=0, compress=0, autoping=False,
            )  # fmt: skip
        except aiohttp.WSServerHandshakeError as error:
            return web.Response(status=error.status)
        except aiohttp.ClientError:
            return web.Response(status=503)
        chosen = (up.protocol,) if up.protocol else ()
        down = web.WebSocketResponse(protocols=chosen, max_msg_size=0, compress=False, autoping=False)
        await down.prepare(request)
        ways = [asyncio.create_task(self._inward(down, up)), asyncio.create_task(self._outward(up, down, route))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            for end in (up, down):
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(end.close(), 2)
        return down

    async def _inward(self, down: web.WebSocketResponse, up: aiohttp.ClientWebSocketResponse) -> None:
        async for message in down:
            await _pass_on(message, up)

    async def _outward(self, up: aiohttp.ClientWebSocketResponse, down: web.WebSocketResponse, route: Route) -> None:
        async for message in up:
            if not self._pay(route, _length(message)):
                await down.close(code=1008, message=b"today's limit of bytes is reached")
                return
            await _pass_on(message, down)
        if up.close_code is not None:
            await down.close(
                code=up.close_code if 1000 <= up.close_code < 5000 and up.close_code not in (1005, 1006) else 1001
            )

    async def close(self) -> None:
        """Note the counts and end all connections."""
        for session in self._sessions.values():
            await session.close()
        self.usage.close()


def _length(message: aiohttp.WSMessage) -> int:
    return len(message.data.encode() if isinstance(message.data, str) else message.data or b"")


async def _pass_on(message: aiohttp.WSMessage, end: aiohttp.ClientWebSocketResponse | web.WebSocketResponse) -> None:
    if message.type == WSMsgType.TEXT:
        await end.send_str(message.data)
    elif message.type == WSMsgType.BINARY:
        await end.send_bytes(message.data)
    elif message.type == WSMsgType.PING:
        await end.ping(message.data)
    elif message.type == WSMsgType.PONG:
        await end.pong(message.data)


def _response_headers(headers: Iterable[tuple[str, str]], route: Route) -> Iterable[tuple[str, str]]:
    """What may be said to the browser: from a notebook server, no cookie for another host than its own."""
    for name, value in headers:
        lower = name.lower()
        if lower in _HOP:
            continue
        if route.user is not None and lower == "set-cookie" and re.search(r";\s*domain\s*=", value, re.IGNORECASE):
            continue
        yield name, value
    if route.user is None and route.data.get("service"):
        yield "Content-Security-Policy", "frame-ancestors 'none'"
        yield "X-Frame-Options", "DENY"


async def serve(settings: Workspace) -> None:
    """Serve until a signal comes."""
    proxy = ProxyServer(settings, settings.state / "proxy")
    context = None
    if settings.tls is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(settings.tls.certificate, settings.tls.key)
    runners = [web.AppRunner(app, access_log=None, shutdown_timeout=2) for app in (proxy.public(), proxy.api())]
    for runner in runners:
        await runner.setup()
    host, _, port = settings.listen.rpartition(":")
    settings.proxy_socket.unlink(missing_ok=True)
    await web.TCPSite(runners[0], host.strip("[]"), int(port), ssl_context=context).start()
    await web.UnixSite(runners[1], str(settings.proxy_socket)).start()
    settings.proxy_socket.chmod(0o660)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    print(f"proxy: {settings.origin} at {settings.listen}", flush=True)  # noqa: T201 - says that it is ready
    await stopped.wait()
    for runner in runners:
        await runner.cleanup()
    await proxy.close()


def main() -> int:
    """Run the proxy; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if len(sys.argv) != 2:
        print("proxy: give the settings' file", file=sys.stderr)  # noqa: T201
        return 2
    try:
        asyncio.run(serve(read_workspace(Path(sys.argv[1]))))
    except (MillpondError, OSError) as error:
        print(f"proxy: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
