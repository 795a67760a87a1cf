"""Files of /proc that tell what the rest of the machine does; a workspace sees these in their place.

On one machine the load of the vault would be a channel that no budget counts. Covering these files closes the easy ways; what
remains (sysinfo(2), timing) is why the vault and the workspaces belong on different hosts.
"""

from __future__ import annotations

import os
from pathlib import Path

EMPTY = (
    "buddyinfo", "cgroups", "cmdline", "config.gz", "consoles", "diskstats", "interrupts", "iomem", "ioports", "kallsyms",
    "key-users", "keys", "kmsg", "kpagecgroup", "kpagecount", "kpageflags", "latency_stats", "locks", "modules", "mtrr",
    "pagetypeinfo", "partitions", "sched_debug", "schedstat", "slabinfo", "softirqs", "swaps", "sysrq-trigger",
    "timer_list", "vmallocinfo", "vmstat", "zoneinfo",
)  # fmt: skip
"""Under /proc; read as empty files."""
EMPTY_FOLDERS = ("acpi", "asound", "bus", "driver", "fs", "irq", "pressure", "scsi", "tty")


def _meminfo(memory: int) -> str:
    kib = memory // 1024
    lines = {
        "MemTotal": kib,
        "MemFree": kib,
        "MemAvailable": kib,
        "Buffers": 0,
        "Cached": 0,
        "SwapTotal": 0,
        "SwapFree": 0,
    }
    return "".join(f"{name + ':':<16}{value:>8} kB\n" for name, value in lines.items())


def _stat(cpus: int) -> str:
    idle = "0 0 0 0 0 0 0 0 0 0"
    return "".join(
        [f"cpu  {idle}\n", *(f"cpu{n} {idle}\n" for n in range(cpus)), "btime 0\nprocesses 1\nprocs_running 1\n"]
    )


def write_masks(folder: Path, memory: int) -> list[str]:
    """Write the stand-ins into `folder`; returns bubblewrap's arguments that put them over /proc. `memory` in bytes."""
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    content = {
        "loadavg": "0.00 0.00 0.00 1/1 1\n",
        "meminfo": _meminfo(memory),
        "stat": _stat(os.cpu_count() or 1),
        "uptime": "1.00 1.00\n",
        "cpuinfo": Path("/proc/cpuinfo").read_text(),  # its clock rates as they were when the workspace started
        **dict.fromkeys(EMPTY, ""),
    }
    arguments: list[str] = []
    for name, text in content.items():
        if Path("/proc", name).exists():
            (folder / name).write_text(text)
            (folder / name).chmod(0o444)
            arguments += ["--ro-bind", str(folder / name), f"/proc/{name}"]
    for name in EMPTY_FOLDERS:
        if Path("/proc", name).is_dir():
            arguments += [
                "--size",
                "4096",
                "--perms",
                "0555",
                "--tmpfs",
                f"/proc/{name}",
                "--remount-ro",
                f"/proc/{name}",
            ]
    return arguments
