"""The spawn helper: the one part that is root, and does nothing but start and stop workspaces.

    python -m millpond.hub.workspace.helper WORKSPACE.json

It listens on a unix socket and heeds only the hub's user. A request is one line of JSON, a reply too:

    {"do": "start", "user": "ada", "environment": {...}}   {"ok": true, "socket": "/run/millpond/zones/ada/server.sock"}
    {"do": "stop", "user": "ada", "now": false}             {"ok": true}
    {"do": "poll", "user": "ada"}                           {"ok": true, "running": true, "code": null}

There is no other request. What runs, as whom and with which view of the machine is decided here; the hub gives a name and the
values of variables that are listed below.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import re
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any

from millpond.hub.workspace.cgroups import leftovers, remove_parent
from millpond.hub.workspace.seccomp import program
from millpond.hub.workspace.session import Session
from millpond.hub.workspace.settings import HUB_PORT, Workspace, is_user, read_workspace
from millpond.hub.workspace.users import UserNumbers
from millpond.store.errors import InvalidInput, IsolationFailed, MillpondError

_LOG = logging.getLogger(__name__)
ENVIRONMENT = frozenset(
    f"JUPYTERHUB_{name}"
    for name in (
        *("ACTIVITY_URL", "API_TOKEN", "API_URL", "BASE_URL", "CLIENT_ID", "COOKIE_HOST_PREFIX_ENABLED"),
        *("COOKIE_OPTIONS", "DEFAULT_URL", "HOST", "OAUTH_ACCESS_SCOPES", "OAUTH_CALLBACK_URL"),
        *("OAUTH_CLIENT_ALLOWED_SCOPES", "OAUTH_SCOPES", "PUBLIC_HUB_URL", "PUBLIC_URL", "SERVER_NAME"),
        *("SERVICE_PREFIX", "SERVICE_URL", "USER"),
    )
)
"""The variables that the hub may give a server."""
_VALUE = re.compile(r"[\x20-\x7e]{0,8192}")
_LINE = 1 << 18


class Helper:
    """The sessions, by user."""

    def __init__(self, settings: Workspace) -> None:
        self.settings = settings
        self.numbers = UserNumbers(settings.state / "users.json", settings.first_uid + 100)
        self.sessions: dict[str, Session] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection's requests."""
        peer: socket.socket = writer.get_extra_info("socket")
        _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        try:
            while uid == self.settings.hub_uid and (line := await reader.readline()):
                writer.write(json.dumps(await self._answer(line)).encode() + b"\n")
                await writer.drain()
        except (OSError, ValueError):
            pass
        finally:
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            user = request.get("user") if isinstance(request, dict) else None
            if not isinstance(user, str) or not is_user(user):
                raise InvalidInput(f"user is {user!r}; names have small letters, digits and single hyphens")
            known = {"start": {"environment"}, "stop": {"now"}, "poll": set()}.get(request.get("do"))
            if known is None or set(request) - {"do", "user", *known}:
                raise InvalidInput("a request has do (start, stop or poll), user, and what its kind allows")
            if request["do"] == "poll":
                return self._poll(user)
            async with self._locks.setdefault(user, asyncio.Lock()):
                if request["do"] == "start":
                    return await self._start(user, check_environment(user, request.get("environment")))
                return await self._stop(user, now=request.get("now") is True)
        except (MillpondError, ValueError) as error:
            _LOG.warning("refused or failed: %s", error)
            return {"ok": False, "error": str(error)}
        except Exception as error:
            _LOG.exception("a request failed")
            return {"ok": False, "error": f"the spawn helper failed: {type(error).__name__}: {error}"}

    async def _start(self, user: str, environment: dict[str, str]) -> dict[str, Any]:
        if user in self.sessions:
            await self.sessions.pop(user).stop(now=True)
        session = Session(self.settings, user, self.numbers.number(user))
        place = await session.start(environment)
        self.sessions[user] = session
        _LOG.info("%s has a workspace", user)
        return {"ok": True, "socket": str(place)}

    async def _stop(self, user: str, *, now: bool) -> dict[str, Any]:
        session = self.sessions.pop(user, None)
        if session is not None:
            await session.stop(now=now)
            _LOG.info("the workspace of %s is gone", user)
        return {"ok": True}

    def _poll(self, user: str) -> dict[str, Any]:
        session = self.sessions.get(user)
        if session is None:
            return {"ok": True, "running": False, "code": 0}
        return {"ok": True, "running": not session.ended.is_set(), "code": session.code}

    async def close(self) -> None:
        """Stop every workspace."""
        await asyncio.gather(*(session.stop() for session in self.sessions.values()), return_exceptions=True)


def check_environment(user: str, given: object) -> dict[str, str]:
    """The variables if each is known, printable and names this user's own server; raises InvalidInput."""
    if not isinstance(given, dict):
        raise InvalidInput("environment is missing; give an object of strings")
    if strange := set(given) - ENVIRONMENT:
        raise InvalidInput(f"environment: {', '.join(sorted(map(str, strange)))} cannot be given to a workspace")
    for name, value in given.items():
        if not isinstance(value, str) or not _VALUE.fullmatch(value):
            raise InvalidInput(f"environment: {name} must be printable text of at most 8192 characters")
    hub = f"http://127.0.0.1:{HUB_PORT}/"
    expected = {"JUPYTERHUB_USER": user, "JUPYTERHUB_SERVICE_PREFIX": f"/user/{user}/"}
    for name, value in expected.items():
        if given.get(name) != value:
            raise InvalidInput(f"environment: {name} is {given.get(name)!r}, not {value!r}")
    if not given.get("JUPYTERHUB_API_URL", "").startswith(hub):
        raise InvalidInput(f"environment: JUPYTERHUB_API_URL does not begin with {hub}")
    return dict(given)


def _end_with_parent() -> None:
    """Be told to stop when `millpond up` is gone, however it went."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _own_mounts() -> None:
    """Take a mount namespace of our own: homes appear nowhere else, and are gone when this process is."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) or libc.mount(b"none", b"/", None, (1 << 14) | (1 << 18), None):  # MS_REC | MS_PRIVATE
        raise IsolationFailed(f"cannot make a mount namespace: {os.strerror(ctypes.get_errno())}")


def _prepare(settings: Workspace) -> None:
    """Folders, and what an earlier helper left running."""
    for name, mode in (("zones", 0o755), ("homes", 0o700), ("masks", 0o755), ("helper", 0o750)):
        (settings.run / name).mkdir(parents=True, exist_ok=True)
        (settings.run / name).chmod(mode)
    os.chown(settings.run / "helper", 0, settings.front_gid)
    (settings.state / "homes").mkdir(exist_ok=True)
    (settings.state / "homes").chmod(0o700)
    (settings.state / "logs").mkdir(exist_ok=True)
    for group in leftovers(settings.run.name):
        if is_user(group.folders[0].name):
            group.kill(signal.SIGKILL)
            with contextlib.suppress(OSError):
                group.remove()


async def serve(settings: Workspace) -> None:
    """Serve until a signal comes."""
    helper = Helper(settings)
    settings.helper_socket.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(helper.handle, settings.helper_socket, limit=_LINE)
    os.chown(settings.helper_socket, 0, settings.front_gid)
    settings.helper_socket.chmod(0o660)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    print(f"helper: {settings.helper_socket}", flush=True)  # noqa: T201 - says that it is ready
    await stopped.wait()
    server.close()
    await helper.close()


def main() -> int:
    """Run the helper; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if len(sys.argv) != 2 or os.geteuid() != 0:
        print("helper: give the settings' file, as root", file=sys.stderr)  # noqa: T201
        return 2
    try:
        settings = read_workspace(Path(sys.argv[1]))
        _end_with_parent()
        program()  # refuses a machine that it has no filter for
        _own_mounts()
        _prepare(settings)
    except MillpondError as error:
        print(f"helper: {error}", file=sys.stderr)  # noqa: T201
        return 2
    asyncio.run(serve(settings))
    remove_parent(settings.run.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
