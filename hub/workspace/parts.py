"""The parts that `millpond up` runs, as whom, and what each can see; docs/workspace.md has the table."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import aiohttp

from millpond.hub import meter as meter_program
from millpond.hub.workspace import relay as relay_program
from millpond.hub.workspace.sandbox import Sandbox, python_path
from millpond.hub.workspace.settings import Workspace
from millpond.hub.workspace.supervise import Part


def make_folders(settings: Workspace) -> Path:
    """Make every part's folders with their owners; returns the settings' file that the parts read."""
    state, run, front = settings.state, settings.run, settings.front_gid
    owned = [
        (state, 0, 0, 0o755),
        (state / "logs", 0, 0, 0o755),
        (state / "hub", settings.hub_uid, front, 0o700),
        (state / "proxy", settings.proxy_uid, front, 0o700),
        (state / "meter", settings.meter_uid, settings.meter_uid, 0o700),
        (run, 0, 0, 0o755),
        (run / "hub", settings.hub_uid, front, 0o750),
        (run / "proxy", settings.proxy_uid, front, 0o750),
        (run / "gate", settings.vault_uid, settings.meter_uid, 0o750),
        (run / "helper", 0, front, 0o750),
        (run / "zones", 0, front, 0o755),
        (run / "etc", 0, 0, 0o755),
    ]
    for folder, uid, gid, mode in owned:
        folder.mkdir(parents=True, exist_ok=True)
        os.chown(folder, uid, gid)
        folder.chmod(mode)
    file = state / "workspace.json"
    file.write_text(settings.model_dump_json(indent=1))
    file.chmod(0o644)
    return file


def write_hub_config(settings: Workspace, file: Path) -> Path:
    """JupyterHub's configuration file, which only calls config.py."""
    path = settings.state / "jupyterhub_config.py"
    path.write_text(
        "from pathlib import Path\n"
        "from millpond.hub.workspace.config import configure\n"
        "from millpond.hub.workspace.settings import read_workspace\n"
        f"configure(get_config(), read_workspace(Path({str(file)!r})))\n"
    )
    path.chmod(0o644)
    return path


def secret(file: Path) -> str:
    """The secret in a file that only root can read, made the first time."""
    if not file.exists():
        file.parent.mkdir(mode=0o700, exist_ok=True)
        file.touch(mode=0o600)
        file.write_text(secrets.token_urlsafe(32))
    return file.read_text()


def python(*arguments: str) -> list[str]:
    """A command line of this environment's Python."""
    return [sys.executable, "-sP", *arguments]


def python_environment(**more: str) -> dict[str, str]:
    """Of a part in a sandbox; all that it gets."""
    return {
        "PATH": f"{sys.prefix}/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": python_path(),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "LANG": "C.UTF-8",
        "HOME": "/tmp",
        "USER": "millpond",
        **more,
    }


def answers(path: Path, url: str, holds: str = "") -> Callable[[], Awaitable[bool]]:
    """Whether an HTTP server at a unix socket answers, and the answer holds a text."""

    async def ask() -> bool:
        try:
            async with (
                aiohttp.ClientSession(
                    connector=aiohttp.UnixConnector(str(path)), timeout=aiohttp.ClientTimeout(total=5)
                ) as session,
                session.get(f"http://localhost{url}", allow_redirects=False) as answer,
            ):
                return answer.status < 500 and holds in await answer.text()
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    return ask


def listens(where: str | Path) -> Callable[[], Awaitable[bool]]:
    """Whether something accepts connections at a unix socket or at HOST:PORT."""

    async def ask() -> bool:
        try:
            if isinstance(where, Path):
                _, writer = await asyncio.open_unix_connection(where)
            else:
                host, _, port = where.rpartition(":")
                _, writer = await asyncio.open_connection(host, int(port))
        except OSError:
            return False
        writer.close()
        return True

    return ask


def helper_part(settings: Workspace, file: Path) -> Part:
    """Root: starts and stops workspaces, and nothing else."""
    command = [*python("-m", "millpond.hub.workspace.helper"), str(file)]
    return Part("helper", command, listens(settings.helper_socket), python_environment(HOME="/root"))


def proxy_part(settings: Workspace, file: Path) -> Part:
    """What browsers connect to."""
    state, run = settings.state / "proxy", settings.run
    read = {file: file, run / "hub": run / "hub", run / "zones": run / "zones"}
    if settings.tls is not None:
        read |= {settings.tls.certificate: settings.tls.certificate, settings.tls.key: settings.tls.key}
    sandbox = Sandbox(
        settings.proxy_uid, settings.front_gid, home=state, network=True, etc=run / "etc" / "proxy",
        read=read, write={state: state, run / "proxy": run / "proxy"},
    )  # fmt: skip
    command = sandbox.command(python("-m", "millpond.hub.workspace.proxy_server", str(file)))
    return Part("proxy", command, answers(settings.proxy_socket, "/routes"), python_environment())


def hub_part(settings: Workspace, file: Path, config: Path, token: str, more: Mapping[str, str] | None = None) -> Part:
    """JupyterHub. It shares the network only where an institution's login or database needs it."""
    state, run = settings.state / "hub", settings.run
    outside = settings.authentication.kind == "oauth" or settings.database.startswith("postgresql")
    sandbox = Sandbox(
        settings.hub_uid, settings.front_gid, home=state, network=outside, etc=run / "etc" / "hub",
        read={file: file, config: config, run / "proxy": run / "proxy", run / "helper": run / "helper", run / "zones": run / "zones"},
        write={state: state, run / "hub": run / "hub"},
    )  # fmt: skip
    command = sandbox.command(python("-m", "jupyterhub", "--config", str(config)))
    environment = python_environment(MILLPOND_GATEWAY_TOKEN=token, **(more or {}))
    up, routed = answers(settings.hub_socket, "/hub/api/"), answers(settings.proxy_socket, "/routes", holds='"/": ')

    async def ready() -> bool:  # the proxy knows the routes of an earlier hub
        return await up() and await routed()

    return Part("hub", command, ready, environment, patience=90)


def meter_part(settings: Workspace, cap: int, rate: int) -> Part:
    """The only way to the gateway: counts what leaves, for ever."""
    state, gate = settings.state / "meter", settings.gateway_socket.parent
    sandbox = Sandbox(
        settings.meter_uid, home=state, network=True, etc=settings.run / "etc" / "meter",
        read={gate: gate}, write={state: state},
    )  # fmt: skip
    command = [sys.executable, "-I", meter_program.__file__, "--listen", settings.gateway]
    command += ["--to", f"unix:{settings.gateway_socket}", "--ledger", str(state / "ledger")]
    command += ["--cap", str(cap), "--rate", str(rate)]
    return Part("meter", sandbox.command(command), listens(settings.gateway), python_environment())


def with_hub(settings: Workspace, port: int, command: list[str]) -> list[str]:
    """`command` with a relay beside it, so that it finds the hub's API at 127.0.0.1:PORT of its own loopback."""
    relay = [sys.executable, "-I", relay_program.__file__, f"tcp:127.0.0.1:{port}=unix:{settings.hub_socket}"]
    return [*relay, "--", *command]
