"""What `millpond up` needs of a machine, and what to do where it is missing."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from millpond.hub.workspace.cgroups import Limits, make_group
from millpond.hub.workspace.settings import Workspace
from millpond.store.errors import MillpondError

_PROGRAMS = {
    "bwrap": "bubblewrap",
    "setpriv": "util-linux",
    "mount": "mount",
    "mkfs.ext4": "e2fsprogs",
    "resize2fs": "e2fsprogs",
    "ip": "iproute2",
}
_MODULES = (
    "aiohttp",
    "bcrypt",
    "ipykernel",
    "jupyterhub",
    "jupyterlab",
    "nativeauthenticator",
    "sqlalchemy",
    "starlette",
)


def _root() -> Iterator[str]:
    if os.geteuid() != 0:
        yield "runs as an ordinary user; run as root: it makes namespaces and drops to users of their own"


def _programs() -> Iterator[str]:
    missing = sorted({package for program, package in _PROGRAMS.items() if shutil.which(program) is None})
    if missing:
        yield f"missing programs; apt-get install {' '.join(missing)}"


def _packages() -> Iterator[str]:
    missing = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    if missing:
        yield f"missing Python packages {', '.join(missing)}; pip install 'millpond[workspace]'"


def _filter() -> Iterator[str]:
    from millpond.hub.workspace.seccomp import program

    try:
        program()
    except MillpondError as error:
        yield str(error)


def _limits(settings: Workspace) -> Iterator[str]:
    try:
        make_group(settings.run.name, "doctor", Limits()).remove()
    except MillpondError as error:
        if settings.limits.required:
            yield str(error)


def _loop() -> Iterator[str]:
    if not Path("/dev/loop-control").exists():
        yield "no /dev/loop-control; homes need loop devices for their quota: modprobe loop"


def _ports(settings: Workspace) -> Iterator[str]:
    for name, address in (("listen", settings.listen), ("gateway", settings.gateway)):
        host, _, port = address.rpartition(":")
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host.strip("[]"), int(port)))
            except OSError as error:
                yield f"workspace.{name} is {address}: {error.strerror}; stop what listens there or choose another"


def _users(settings: Workspace) -> Iterator[str]:
    for number in (*range(settings.first_uid, settings.first_uid + 5), settings.first_uid + 100):
        try:
            account = pwd.getpwuid(number).pw_name
        except KeyError:
            continue
        yield f"number {number} belongs to the system's account {account!r}; set workspace.first_uid to a free range"


def _disk(settings: Workspace) -> Iterator[str]:
    place = settings.state
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < settings.limits.home:
        yield f"{place} has {free >> 20} MiB free, less than one user's home ({settings.limits.home >> 20} MiB)"


def diagnose(settings: Workspace, *, running: bool = False) -> dict[str, list[str]]:
    """What is wrong, by what was looked at. `running`: the ports are ours."""
    checks: dict[str, Callable[[], Iterator[str]]] = {
        "root": _root,
        "programs": _programs,
        "Python packages": _packages,
        "filter of system calls": _filter,
        "limits": lambda: _limits(settings),
        "loop devices": _loop,
        "ports": lambda: iter(()) if running else _ports(settings),
        "users": lambda: _users(settings),
        "disk": lambda: _disk(settings),
    }
    return {name: list(check()) for name, check in checks.items()}
