"""What the kernel must enforce around a workspace, asked from the inside: standard library only.

Every check tries the thing, or reads what the kernel says of this very process; none trusts a setting. They run in the
notebook server before any code of the user has: a kernel is the server's child and can only have less.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

_SYS_UNSHARE = {"x86_64": 272, "aarch64": 97}
_SYS_PTRACE = {"x86_64": 101, "aarch64": 117}
_SYS_KEYCTL = {"x86_64": 250, "aarch64": 219}
_PTRACE_ATTACH, _CLONE_NEWUSER = 16, 0x10000000
_WRITABLE = ("/tmp", "/dev/shm", "/dev", "/dev/pts", "/run")
_FOLDERS = {
    "bin",
    "dev",
    "etc",
    "home",
    "lib",
    "lib32",
    "lib64",
    "libx32",
    "proc",
    "run",
    "sbin",
    "tmp",
    "usr",
    "var",
    "zone",
}


def _status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _refused(number: int, *arguments: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.syscall(number, *arguments) == -1 and ctypes.get_errno() == errno.EPERM


def _identity() -> Iterator[str]:
    status = _status()
    if 0 in (*os.getresuid(), *os.getresgid()) or os.getgroups():
        yield f"runs as {os.getresuid()} in groups {os.getgroups()}"
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        if int(status[name], 16):
            yield f"holds capabilities: {name} {status[name]}"


def _no_new_privileges() -> Iterator[str]:
    if _status()["NoNewPrivs"] != "1":
        yield "set-user-id programs would be heeded"


def _system_calls() -> Iterator[str]:
    machine = os.uname().machine
    if _status()["Seccomp"] != "2":
        yield "no filter of system calls"
    if not _refused(_SYS_UNSHARE[machine], _CLONE_NEWUSER):
        yield "unshare is not refused"
    if not _refused(_SYS_PTRACE[machine], _PTRACE_ATTACH, 1, 0, 0):
        yield "ptrace is not refused"
    if not _refused(_SYS_KEYCTL[machine], 0, 0, 0, 0, 0):
        yield "keyctl is not refused"
    for name, *arguments in (
        ("packet", socket.AF_PACKET, socket.SOCK_RAW, 0),
        ("raw", socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
        ("audit", socket.AF_NETLINK, socket.SOCK_RAW, 9),
        ("virtual machine", 40, socket.SOCK_STREAM, 0),
    ):
        try:
            socket.socket(*arguments).close()
        except OSError:
            continue
        yield f"a {name} socket can be made"


def _network() -> Iterator[str]:
    devices = [line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
    if set(devices) - {"lo"}:
        yield f"network interfaces {sorted(devices)}"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return
    yield "there is a route out of this machine"


def _processes() -> Iterator[str]:
    numbers = sorted(int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
    if numbers[0] != 1 or numbers[-1] > 1000 or len(numbers) > 20:
        yield f"sees {len(numbers)} processes, up to number {numbers[-1]}"


def _files() -> Iterator[str]:
    home = os.environ["HOME"]
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, options = line.split()[:4]
        if "rw" not in options.split(",") or kind == "proc" or place.startswith("/dev/"):
            continue
        if place not in (*_WRITABLE, home):
            yield f"{place} is writable"
    known = _FOLDERS | {Path(folder).parts[1] for folder in os.environ["MILLPOND_VIEWS"].split(":")}
    if strange := {path.name for path in Path("/").iterdir()} - known:
        yield f"sees {', '.join(sorted(strange))} under /"
    for place in ("/", "/usr", "/etc", "/zone", str(Path(__file__).parent)):
        if os.access(place, os.W_OK):
            yield f"may write into {place}"
    if Path("/sys/class").exists():
        yield "/sys is visible"


def _home() -> Iterator[str]:
    quota = int(os.environ["MILLPOND_HOME_BYTES"])
    found = os.statvfs(os.environ["HOME"])
    if found.f_blocks * found.f_frsize > quota:
        yield f"the home holds {found.f_blocks * found.f_frsize} bytes, its quota is {quota}"
    if not found.f_flag & os.ST_NOSUID or not found.f_flag & os.ST_NODEV:
        yield "the home is mounted without nosuid and nodev"


def _masks() -> Iterator[str]:
    if Path("/proc/loadavg").read_text() != "0.00 0.00 0.00 1/1 1\n":
        yield "/proc/loadavg tells the machine's load"
    total = int(Path("/proc/meminfo").read_text().split()[1])
    if total * 1024 > int(os.environ["MILLPOND_MEMORY_BYTES"]):
        yield "/proc/meminfo tells the machine's memory"


def _limits() -> Iterator[str]:
    if resource.getrlimit(resource.RLIMIT_CORE)[1]:
        yield "core files are not off"
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 1 << 16:
        yield "open files are not limited"


def _environment() -> Iterator[str]:
    words = ("SECRET", "PASSWORD", "AWS_", "CREDENTIAL", "DATABASE", "PROXY_TOKEN", "COOKIE_SECRET", "PRIVATE")
    for name in os.environ:
        if any(word in name.upper() for word in words):
            yield f"the environment holds {name}"


CHECKS: dict[str, Callable[[], Iterator[str]]] = {
    "identity": _identity,
    "no new privileges": _no_new_privileges,
    "system calls": _system_calls,
    "network": _network,
    "processes": _processes,
    "files": _files,
    "home": _home,
    "masked files": _masks,
    "limits": _limits,
    "environment": _environment,
}
SERVER_CHECKS = ("configuration", "authorizer", "handlers", "plugins", "contents")
"""Made by lockdown.py beside these."""


def check_zone() -> tuple[list[str], list[str]]:
    """The names of the checks that were made, and what each found wrong."""
    problems = []
    for name, check in CHECKS.items():
        try:
            problems += [f"{name}: {text}" for text in check()]
        except Exception as error:  # a check that cannot be made has failed
            problems.append(f"{name}: {type(error).__name__}: {error}")
    return list(CHECKS), problems
