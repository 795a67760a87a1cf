"""Limits of memory, CPU and processes by control groups, version 1 or 2, whichever the machine has.

A group is made below every hierarchy that counts something we limit. Without a writable hierarchy the limits cannot be kept,
which is an error: nothing runs without them unless the operator says so.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from millpond.store.errors import IsolationFailed

ROOT = Path("/sys/fs/cgroup")
_PERIOD = 100_000  # microseconds


@dataclass(frozen=True)
class Limits:
    """What one workspace may use."""

    memory: int = 2 << 30
    """Bytes, page cache included; there is no swap on top."""
    cpus: float = 1.0
    """Processors' worth of time."""
    processes: int = 256
    """Processes and threads."""


@dataclass(frozen=True)
class Group:
    """One workspace's groups: one folder in version 2, one a controller in version 1."""

    folders: tuple[Path, ...]

    def enter(self) -> None:
        """Move the calling process into the group; called between fork and exec."""
        for folder in self.folders:
            with (folder / "cgroup.procs").open("w") as handle:
                handle.write("0")

    def processes(self) -> list[int]:
        """Of the group, as the host numbers them."""
        found: set[int] = set()
        for folder in self.folders:
            with contextlib.suppress(OSError):
                found.update(int(line) for line in (folder / "cgroup.procs").read_text().split())
        return sorted(found)

    def kill(self, number: int) -> None:
        """Send a signal to every process of the group."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def remove(self, patience: float = 10.0) -> None:
        """Remove the empty groups; a process that was killed may take a moment to leave."""
        end = time.monotonic() + patience
        for folder in self.folders:
            while folder.exists():
                try:
                    folder.rmdir()
                except OSError:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.02)


def _version_1(root: Path, limits: Limits) -> dict[str, dict[str, int]]:
    """The files of every controller and what is written to them, in order."""
    memory = {"memory.limit_in_bytes": limits.memory, "memory.memsw.limit_in_bytes": limits.memory}
    if not (root / "memory" / "memory.memsw.limit_in_bytes").exists():
        del memory["memory.memsw.limit_in_bytes"]  # a kernel that does not count swap
    return {
        "memory": memory,
        "pids": {"pids.max": limits.processes},
        "cpu": {"cpu.cfs_period_us": _PERIOD, "cpu.cfs_quota_us": int(limits.cpus * _PERIOD)},
    }


def _version_2(root: Path, limits: Limits) -> dict[str, int | str]:
    values: dict[str, int | str] = {
        "memory.max": limits.memory,
        "pids.max": limits.processes,
        "cpu.max": f"{int(limits.cpus * _PERIOD)} {_PERIOD}",
    }
    if (root / "memory.swap.max").exists():
        values["memory.swap.max"] = 0
    return values


def make_group(parent: str, name: str, limits: Limits, root: Path = ROOT) -> Group:
    """The groups `PARENT/NAME` with their limits set and read back; raises IsolationFailed."""
    try:
        if (root / "memory" / "cgroup.procs").exists():
            folders = []
            for controller, values in _version_1(root, limits).items():
                folder = root / controller / parent / name
                folder.mkdir(parents=True, exist_ok=True)
                for file, value in values.items():
                    (folder / file).write_text(str(value))
                    if int((folder / file).read_text()) not in (value, value // 4096 * 4096):
                        raise IsolationFailed(f"{folder / file} does not hold {value} after it was written")
                folders.append(folder)
            return Group(tuple(folders))
        if (root / "cgroup.controllers").exists():
            (root / parent).mkdir(exist_ok=True)
            for place in (root, root / parent):
                (place / "cgroup.subtree_control").write_text("+memory +pids +cpu")
            folder = root / parent / name
            folder.mkdir(exist_ok=True)
            for file, setting in _version_2(folder, limits).items():
                (folder / file).write_text(str(setting))
                held = (folder / file).read_text().strip()
                if held != str(setting) and file != "memory.max":
                    raise IsolationFailed(f"{folder / file} holds {held!r} after {setting!r} was written")
            return Group((folder,))
    except OSError as error:
        raise IsolationFailed(
            f"cannot limit memory, CPU and processes: {error}; mount cgroups writable for root, or set "
            "limits_required = false and accept that one notebook can take the whole machine"
        ) from error
    raise IsolationFailed(
        f"{root} holds neither cgroup v1's memory controller nor cgroup v2; mount one, or set workspace.limits.required = false"
    )


def remove_parent(parent: str, root: Path = ROOT) -> None:
    """Remove the groups above those of workspaces, if none is left below."""
    for place in (root / parent, *(root / controller / parent for controller in ("memory", "pids", "cpu"))):
        with contextlib.suppress(OSError):
            place.rmdir()


def leftovers(parent: str, root: Path = ROOT) -> list[Group]:
    """Groups that an earlier helper left behind."""
    names: dict[str, list[Path]] = {}
    for place in (root / parent, *(root / controller / parent for controller in ("memory", "pids", "cpu"))):
        if place.is_dir():
            for folder in place.iterdir():
                if folder.is_dir():
                    names.setdefault(folder.name, []).append(folder)
    return [Group(tuple(folders)) for folders in names.values()]
