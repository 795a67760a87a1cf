"""The real thing, once a session: helper, proxy, hub and meter as `millpond up` starts them, with two users logged in."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from millpond.hub.workspace.accounts import new_accounts
from millpond.hub.workspace.parts import helper_part, hub_part, make_folders, meter_part, proxy_part, write_hub_config
from millpond.hub.workspace.settings import Authentication, Workspace, WorkspaceLimits
from millpond.hub.workspace.supervise import Supervisor

from .browser import Browser

CAP = 1 << 30
SECRET = "the-activations-of-the-vault"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Front:
    """A running front, and the loop that its clients run in."""

    def __init__(self, state: Path) -> None:
        if os.geteuid() != 0 or shutil.which("bwrap") is None:
            pytest.skip("namespaces, users and quotas need root and bubblewrap (make test installs it)")
        self.run_folder = Path(f"/run/mpt{os.getpid()}")
        self.settings = Workspace(
            state=state,
            run=self.run_folder,
            origin=f"http://localhost:{(port := free_port())}",
            listen=f"127.0.0.1:{port}",
            gateway=f"127.0.0.1:{free_port()}",
            first_uid=53_000,
            limits=WorkspaceLimits(memory=1 << 30, home=32 << 20, scratch=64 << 20, daily_bytes=32 << 20),
            authentication=Authentication(groups={"researchers": ("ada", "bob"), "reviewers": ("bob",)}),
        )
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.reached: list[tuple[str, str, str]] = []
        self.browsers: dict[str, Browser] = {}

    def do(self, work: Coroutine[Any, Any, Any], seconds: float = 120) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(seconds)

    async def start(self) -> None:
        settings = self.settings
        self.file = make_folders(settings)
        accounts = settings.state / "hub" / "accounts.json"
        self.passwords = new_accounts(accounts, ["ada", "bob"])
        os.chown(accounts, settings.hub_uid, settings.front_gid)
        config = write_hub_config(settings, self.file)
        await self._start_gate()
        self.supervisor = Supervisor(
            [
                meter_part(settings, CAP, 10_000_000),
                helper_part(settings, self.file),
                proxy_part(settings, self.file),
                hub_part(settings, self.file, config, "t" * 40),
            ],
            settings.state / "logs",
        )
        await self.supervisor.start()

    async def _start_gate(self) -> None:
        """Something behind the meter that notes what reaches it: these tests are about who gets as far as that."""

        async def note(request: web.Request) -> web.Response:
            self.reached.append((request.method, request.path, request.headers.get("Cookie", "")))
            return web.Response(text="the gate", headers={"Set-Cookie": "gate=1; Path=/"})

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", note)
        self._gate = web.AppRunner(app)
        await self._gate.setup()
        await web.UnixSite(self._gate, str(self.settings.gateway_socket)).start()
        self.settings.gateway_socket.chmod(0o666)

    async def browser(self, user: str) -> Browser:
        """Logged in, with a server that runs."""
        browser = self.browsers[user] = Browser(self.settings.origin, user, self.passwords[user])
        await browser.login()
        running, message = await browser.spawn()
        assert running, message
        await browser.open()
        return browser

    async def stop(self) -> None:
        for browser in self.browsers.values():
            await browser.close()
        await self.supervisor.stop()
        await self._gate.cleanup()

    def close(self) -> None:
        self.do(self.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()
        shutil.rmtree(self.run_folder, ignore_errors=True)


@pytest.fixture(scope="session")
def front(tmp_path_factory):
    front = Front(tmp_path_factory.mktemp("front"))
    try:
        front.do(front.start())
        yield front
    finally:
        if hasattr(front, "supervisor"):
            front.close()


@pytest.fixture(scope="session")
def ada(front):
    return front.do(front.browser("ada"))


@pytest.fixture(scope="session")
def bob(front):
    return front.do(front.browser("bob"))


@pytest.fixture(scope="session")
def cell(front, ada):
    """Runs a cell in one kernel of ada's; returns what it printed."""
    kernel = front.do(ada.kernel())

    def run(code: str, seconds: float = 60) -> str:
        return front.do(ada.run(kernel, code, seconds), seconds + 10)

    return run
