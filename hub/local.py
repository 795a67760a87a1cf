"""A gateway, an executor and an egress meter as processes of one user on one machine, without a JupyterHub.

For trying things out and for tests. The processes share a user and a network, so nothing keeps the user out of the lake:
a deployment that protects something runs them apart (docs/gate.md).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa

from millpond.hub.auth import new_token
from millpond.hub.database import open_database
from millpond.hub.ledger import Ledger
from millpond.hub.policy import read_policy
from millpond.hub.projects import Projects
from millpond.store.errors import GatewayUnavailable

_PATIENCE = 60.0
_METER = Path(__file__).with_name("meter.py")


class LocalVault:
    """The processes, and the files that they share in one folder. Nothing runs before `start`."""

    def __init__(
        self, folder: Path, lake: str | os.PathLike[str], models: Mapping[str, Mapping[str, Any]], **settings: Any
    ) -> None:
        """Write the settings.

        Args:
            folder: for settings, tokens, database, ledger, sockets and logs; its path must be short (a socket's limit).
            lake: folder or URL of the lake.
            models: the policy file's models, by name.
            settings: further ones of `millpond.hub.settings.Settings`, such as `workers`.
        """
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.socket = self.folder / "gateway.sock"
        self.database = f"sqlite:///{self.folder / 'hub.db'}"
        self.settings = self.folder / "gateway.toml"
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._engine: sa.Engine | None = None
        self.meter_port = 0
        values = {
            "lake": os.fspath(lake), "database": self.database, "policy": "policy.toml", "tokens": "tokens.toml",
            "listen": f"unix:{self.socket}",
        } | settings  # fmt: skip
        self.settings.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
        (self.folder / "policy.toml").write_text(
            "".join(
                f"[models.{json.dumps(name)}]\n"
                + "".join(f"{key} = {json.dumps(value)}\n" for key, value in model.items())
                for name, model in models.items()
            )
        )
        (self.folder / "tokens.toml").touch(mode=0o600)

    def add_token(self, user: str, *scopes: str, expires: datetime | None = None, login: bool = False) -> str:
        """A new token of `user`; it works at once."""
        return new_token(self.folder / "tokens.toml", user, scopes, expires=expires, login=login)

    @property
    def projects(self) -> Projects:
        """The projects, in this process."""
        if self._engine is None:
            self._engine = open_database(self.database)
        return Projects(self._engine)

    def ledger(self) -> Ledger:
        """The ledger, in this process; close it after use."""
        return Ledger(self.database, read_policy(self.folder / "policy.toml"))

    @property
    def url(self) -> str:
        """Where clients find the gateway: behind the meter, if it runs."""
        return f"http://127.0.0.1:{self.meter_port}" if "meter" in self._running else f"unix:{self.socket}"

    @property
    def metered(self) -> int:
        """Bytes that the meter has counted, rounded up to what it has reserved."""
        lines = (self.folder / "meter-ledger").read_text().split()
        return int(lines[-1]) if lines else 0

    def start(self, *, executor: bool = True, meter_cap: int | None = None) -> None:
        """Start what does not run, and wait until it answers.

        Raises:
            GatewayUnavailable: something does not start; the message ends with its log.
        """
        if "gateway" not in self._running:
            self.socket.unlink(missing_ok=True)
        for name in ["gateway", *["executor"] * executor]:
            if name not in self._running:
                command = [sys.executable, "-m", "millpond.cli", name, "--config", str(self.settings)]
                self._run(name, command)
        if meter_cap is not None and "meter" not in self._running:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                self.meter_port = probe.getsockname()[1]
            listen, ledger = f"127.0.0.1:{self.meter_port}", self.folder / "meter-ledger"
            arguments = [
                "--listen",
                listen,
                "--to",
                f"unix:{self.socket}",
                "--ledger",
                str(ledger),
                "--cap",
                str(meter_cap),
            ]
            self._run("meter", [sys.executable, "-I", str(_METER), *arguments])
        self._wait()

    def process(self, name: str) -> int:
        """The process number of `gateway`, `executor` or `meter`."""
        return self._running[name].pid

    def kill(self, name: str) -> None:
        """End `gateway`, `executor` or `meter` without a chance to tidy up."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def stop(self) -> None:
        """End everything that was started."""
        for process in self._running.values():
            process.send_signal(signal.SIGTERM)
        for process in self._running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    def __enter__(self) -> LocalVault:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def log(self, name: str) -> str:
        """The end of what a process has said."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""

    def _run(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def _wait(self) -> None:
        end = time.monotonic() + _PATIENCE
        transport = None if "meter" in self._running else httpx.HTTPTransport(uds=str(self.socket))
        address = self.url if "meter" in self._running else "http://millpond"
        with httpx.Client(transport=transport, base_url=address, trust_env=False) as client:
            while True:
                for name, process in self._running.items():
                    if process.poll() is not None:
                        raise GatewayUnavailable(f"the {name} ended with status {process.returncode}: {self.log(name)}")
                try:
                    if self._listens() and client.get("/api/v1/version").status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                if time.monotonic() > end:
                    raise GatewayUnavailable(
                        f"the gateway does not answer within {_PATIENCE:.0f} s: {self.log('gateway')}"
                    )
                time.sleep(0.05)

    def _listens(self) -> bool:
        """Whether the gateway's socket takes connections: httpx leaks one for each that is refused."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.socket))
            except OSError:
                return False
        return True
