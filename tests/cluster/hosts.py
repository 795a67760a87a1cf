"""Hosts on one machine: network namespaces on one switch, each behind the firewall that its NetworkPolicy asks for."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

POLICIES = Path(__file__).parents[2] / "examples" / "deploy" / "networkpolicies.yaml"
NETWORK = "10.213.0"

Ports = tuple[int, int]
"""First and last."""


def read_policies(path: Path = POLICIES) -> dict[str, dict[str, list[tuple[str, Ports]]]]:
    """By application: `in` and `out`, each a list of (other application, ports)."""
    found = {}
    for document in yaml.safe_load_all(path.read_text()):
        spec = document["spec"]
        assert document["kind"] == "NetworkPolicy"
        assert spec["policyTypes"] == ["Ingress", "Egress"]  # or what is not listed would be allowed
        rules = {"in": _rules(spec.get("ingress", []), "from"), "out": _rules(spec.get("egress", []), "to")}
        found[_app(spec["podSelector"])] = rules
    return found


def _rules(given: Iterable[Mapping[str, Any]], side: str) -> list[tuple[str, Ports]]:
    return [
        (_app(peer["podSelector"]), (port["port"], port.get("endPort", port["port"])))
        for rule in given
        for peer in rule[side]
        for port in rule["ports"]
    ]


def _app(selector: Mapping[str, Any]) -> str:
    return str(selector["matchLabels"]["app"])


class Hosts:
    """Namespaces, by name; everything that was started in them is ended by `close`."""

    def __init__(self, apps: Mapping[str, str]) -> None:
        """Make a host for each name of `apps`, whose value is its application.

        Raises:
            subprocess.CalledProcessError: the kernel or the rights do not allow it.
        """
        self.apps = dict(apps)
        self.addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(apps, start=1)}
        self.processes: list[subprocess.Popen[bytes]] = []
        self._mark = f"mh{os.getpid()}"
        self._switch = f"{self._mark}-switch"
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "switch", "up")
        for number, (name, address) in enumerate(self.addresses.items()):
            space, cable = self.space(name), f"p{number}"
            _ip("netns", "add", space)
            _ip("link", "add", "eth0", "netns", space, "type", "veth", "peer", "name", cable, "netns", self._switch)
            _ip("-n", self._switch, "link", "set", cable, "master", "switch", "up")
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", space, "link", "set", device, "up")
        policies = read_policies()
        for name in self.apps:
            self._protect(name, policies[self.apps[name]])

    def _protect(self, name: str, rules: Mapping[str, list[tuple[str, Ports]]]) -> None:
        lines = ["table inet host {"]
        for chain, side, address in (("input", "in", "saddr"), ("output", "out", "daddr")):
            lines += [f"chain {chain} {{ type filter hook {chain} priority 0; policy drop;"]
            lines += [f"{'iif' if side == 'in' else 'oif'} lo accept", "ct state established,related accept"]
            for app, (first, last) in rules[side]:
                others = ", ".join(self.addresses[host] for host, of in self.apps.items() if of == app)
                if others:
                    lines.append(f"ip {address} {{ {others} }} tcp dport {first}-{last} accept")
            lines.append("}")
        lines.append("}")
        command = ["ip", "netns", "exec", self.space(name), "nft", "-f", "-"]
        subprocess.run(command, input="\n".join(lines), text=True, check=True, capture_output=True)

    def space(self, name: str) -> str:
        """The namespace of host `name`."""
        return f"{self._mark}-{name}"

    def run(self, name: str, *command: str, timeout: float = 60, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `command` on host `name` to its end."""
        full = ["ip", "netns", "exec", self.space(name), *command]
        return subprocess.run(full, text=True, capture_output=True, timeout=timeout, check=False, **options)

    def start(
        self, name: str, *command: str, log: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start `command` on host `name`, in a process group of its own."""
        full = ["ip", "netns", "exec", self.space(name), *command]
        with log.open("ab") as output:
            process = subprocess.Popen(
                full, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=env, start_new_session=True
            )
        self.processes.append(process)
        return process

    def cut(self, name: str) -> None:
        """Pull the cable of host `name`."""
        _ip("-n", self.space(name), "link", "set", "eth0", "down")

    def join(self, name: str) -> None:
        """Put the cable back."""
        _ip("-n", self.space(name), "link", "set", "eth0", "up")

    def close(self) -> None:
        """End what was started, and remove the hosts."""
        for process in self.processes:
            end(process)
        for name in (self._switch, *map(self.space, self.addresses)):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def end(process: subprocess.Popen[bytes], how: signal.Signals = signal.SIGKILL) -> None:
    """End a process that `Hosts.start` started, with its children."""
    if process.poll() is None:
        os.killpg(process.pid, how)
    process.wait(30)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
