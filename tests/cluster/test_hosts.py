"""The documented NetworkPolicies, as firewalls of real hosts: exactly the listed connections are possible."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import textwrap

import pytest

from tests.cluster.hosts import Hosts, read_policies

APPS = {
    "s3": "s3",
    "scheduler": "dask-scheduler",
    "worker-a": "dask-worker",
    "worker-b": "dask-worker",
    "capture": "capture",
    "gateway": "gateway",
    "meter": "meter",
    "notebook": "notebook",
}
PORTS = (22, 8333, 8443, 8786, 8910, 8911, 9000, 9015, 9016)


@pytest.fixture(scope="module")
def hosts():
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("nft") is None:
        pytest.skip("network namespaces and their firewalls need root, iproute2 and nftables")
    made = Hosts(APPS)
    yield made
    made.close()


def test_every_policy_is_two_sided():
    """A connection needs its sender's and its receiver's rule; one alone is a mistake in the file."""
    policies = read_policies()
    out = {(app, other, ports) for app, rules in policies.items() for other, ports in rules["out"]}
    into = {(other, app, ports) for app, rules in policies.items() for other, ports in rules["in"]}
    assert out == into
    assert set(policies) == set(APPS.values())


def test_the_vault_reaches_nothing_outside():
    policies = read_policies()
    vault = set(policies) - {"notebook"}
    for app in vault:
        assert {other for other, _ in policies[app]["out"]} <= vault
    assert [app for app in vault if any(other == "notebook" for other, _ in policies[app]["in"])] == ["meter"]


LISTEN = textwrap.dedent(
    """
    import socket, sys, time
    kept = []
    for port in map(int, sys.argv[1].split(",")):
        kept.append(socket.create_server(("0.0.0.0", port)))
    print("ready", flush=True)
    time.sleep(600)
    """
)
CONNECT = textwrap.dedent(
    """
    import select, socket, sys, time
    waiting = {}
    for target in sys.argv[1].split(","):
        host, port = target.split(":")
        one = socket.socket()
        one.setblocking(False)
        one.connect_ex((host, int(port)))
        waiting[one] = target
    end = time.monotonic() + 2
    reached = []
    while waiting and time.monotonic() < end:
        for one in select.select([], list(waiting), [], 0.1)[1]:
            target = waiting.pop(one)
            if one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                reached.append(target)
    print(",".join(reached))
    """
)


def test_exactly_the_listed_connections_are_possible(hosts, tmp_path):
    for name in APPS:
        hosts.start(name, sys.executable, "-c", LISTEN, ",".join(map(str, PORTS)), log=tmp_path / f"{name}.log")
    for name in APPS:
        while "ready" not in (tmp_path / f"{name}.log").read_text():
            assert all(process.poll() is None for process in hosts.processes)
    policies = read_policies()
    seen = 0
    for name, app in APPS.items():
        targets = {
            f"{hosts.addresses[other]}:{port}": (other, port) for other in APPS for port in PORTS if other != name
        }
        done = hosts.run(name, sys.executable, "-c", CONNECT, ",".join(targets))
        reached = {targets[target] for target in done.stdout.strip().split(",") if target}
        allowed = {
            (other, port)
            for other, port in itertools.product(APPS, PORTS)
            if other != name
            and any(APPS[other] == to and first <= port <= last for to, (first, last) in policies[app]["out"])
        }
        assert reached == allowed, name
        seen += len(reached)
    assert seen > 10
