"""What the workspace costs: spawning, latency through proxy and relays, memory of idle notebooks, time to the log-in page.

    python benchmarks/workspace.py [--quick] [--write]

Needs root. Starts `millpond up --demo` in a temporary folder with as many users as are spawned. Latency is the difference, in one
run, between the same request through proxy and relay, and inside the workspace straight to the notebook server. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "hub" / "workspace"))

from browser import Browser

from millpond.hub.demo import find_example
from millpond.hub.workspace.up import Up, demo_config

INSIDE = """
import http.client, os, time
took = []
for i in range({count}):
    began = time.perf_counter()
    c = http.client.HTTPConnection('127.0.0.1', 8888)
    c.request('GET', '/user/' + os.environ['USER'] + '/api'); c.getresponse().read(); c.close()
    took.append(time.perf_counter() - began)
print(sorted(took)[len(took) // 2])
"""


async def measure(folder: Path, users: int, requests: int) -> dict[str, float]:
    """Start the demo, spawn, ask, weigh."""
    names = [f"user-{number}" for number in range(users)]
    config = demo_config(folder, find_example(None), "127.0.0.1:8765")
    authentication = config.workspace.authentication.model_copy(update={"groups": {"researchers": tuple(names)}})
    limits = config.workspace.limits.model_copy(update={"home": 64 << 20})
    changed = {
        "run": Path(f"/run/mpb{os.getpid()}"), "first_uid": 57_000, "gateway": "127.0.0.1:8766", "limits": limits,
        "authentication": authentication,
    }  # fmt: skip
    config = config.model_copy(update={"workspace": config.workspace.model_copy(update=changed), "projects": {}})
    began = time.perf_counter()
    up = Up(config, demo_tokens=1)
    browsers: list[Browser] = []
    try:
        await up.start()
        to_login = time.perf_counter() - began
        spawns, group = [], Path("/sys/fs/cgroup")
        for name in names:
            browser = Browser(up.settings.origin, name, up.passwords[name])
            browsers.append(browser)
            began = time.perf_counter()
            await browser.login()  # which starts the server
            running, message = await browser.spawn()
            assert running, message
            spawns.append(time.perf_counter() - began)
            await browser.open()
            await browser.run(await browser.kernel(), "x = 1")
        through = []
        for _ in range(requests):
            began = time.perf_counter()
            status, _ = await browsers[0].ask("GET", "api")
            assert status == 200
            through.append(time.perf_counter() - began)
        inside = float(await browsers[0].run(await browsers[0].kernel(), INSIDE.format(count=requests)))
        await asyncio.sleep(5)
        resident = sum(_resident(path) for path in group.glob(f"**/{up.settings.run.name}/user-*/cgroup.procs"))
    finally:
        for browser in browsers:
            await browser.close()
        await up.stop()
        shutil.rmtree(up.settings.run, ignore_errors=True)
    return {
        "spawn_p50_s": statistics.median(spawns),
        "added_latency_p50_ms": 1e3 * (statistics.median(through) - inside),
        "rss_20_idle_gb": resident / users * 20 / 1e9,
        "up_to_login_s": to_login,
    }


def _resident(procs: Path) -> int:
    """Bytes of a group's processes, each page shared by several counted in parts (PSS); version 1's pids group is enough."""
    if "memory" not in procs.parts and (procs.parent / "memory.max").exists() is False:
        return 0
    total = 0
    for number in procs.read_text().split():
        for line in Path(f"/proc/{number}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def main() -> int:
    """Print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three users and 100 requests in place of twenty and 500")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="millpond-"))
    folder.chmod(0o755)
    users, requests = (3, 100) if arguments.quick else (20, 500)
    try:
        found = asyncio.run(measure(folder, users, requests))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    limits = {"spawn_p50_s": 8.0, "added_latency_p50_ms": 5.0, "rss_20_idle_gb": 6.0, "up_to_login_s": 60.0}
    rows: list[Any] = [(name, f"{value:.2f}", f"below {limits[name]:g}") for name, value in found.items()]
    table = "\n".join(["| | measured | wanted |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)])
    print(f"{users} users, each with an idle kernel, {os.cpu_count()} cores\n\n{table}\n")
    if arguments.write:
        _write(f"{users} users, each with an idle kernel.\n\n{table}\n")
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))
    return 0


def _write(text: str) -> None:
    """Replace this benchmark's section of docs/benchmarks.md."""
    import platform
    from datetime import UTC, datetime

    path = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
    heading = "## Workspace"
    before, _, rest = path.read_text().partition(heading)
    after = rest.partition("\n## ")[2]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {datetime.now(UTC):%Y-%m-%d}"
    tail = f"\n## {after}" if after else ""
    path.write_text(f"{before.rstrip()}\n\n{heading}\n\n{machine}. {text}{tail}")


if __name__ == "__main__":
    sys.exit(main())
