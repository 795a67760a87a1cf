"""The ledger's databases: SQLite files, and a PostgreSQL server of the tests' own."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from millpond.hub.policy import ModelPolicy, Policy


def postgres_programs() -> Path:
    """The folder of initdb and pg_ctl: Debian keeps it off the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    if on_path is None:
        raise RuntimeError("PostgreSQL is not installed; run: make test (or apt-get install postgresql)")
    return Path(on_path).resolve().parent


class PostgresServer:
    """A server on a socket in a temporary folder, without a network address."""

    def __init__(self) -> None:
        self.programs = postgres_programs()
        self.folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
        self.options: dict[str, object] = {"check": True, "capture_output": True, "cwd": "/"}
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            shutil.chown(self.folder, "postgres")
            self.options["user"] = pwd.getpwnam("postgres").pw_uid
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]  # only names the socket
        self._run("initdb", "-U", "millpond", "--auth=trust", "-E", "UTF8")

    @property
    def url(self) -> str:
        """With {} for the database's name."""
        return f"postgresql+psycopg://millpond@/{{}}?host={self.folder}&port={self.port}"

    def start(self) -> None:
        """Start it, also after a crash."""
        settings = f"-c listen_addresses='' -c unix_socket_directories='{self.folder}' -p {self.port}"
        self._run("pg_ctl", "-w", "-l", self.folder / "log", "-o", settings, "start")

    def crash(self) -> None:
        """End it at once, as a loss of power would: the next start recovers from the log."""
        self._run("pg_ctl", "-m", "immediate", "stop")

    def create(self) -> str:
        """The URL of a new, empty database."""
        name = f"t{os.urandom(6).hex()}"
        self._admin(f"CREATE DATABASE {name}")
        return self.url.format(name)

    def remove(self) -> None:
        """Stop it and delete its folder."""
        subprocess.run(
            [self.programs / "pg_ctl", "-D", self.folder / "data", "-m", "immediate", "stop"],
            **self.options | {"check": False},
        )
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: object) -> None:
        subprocess.run([self.programs / program, "-D", self.folder / "data", *map(str, arguments)], **self.options)

    def _admin(self, statement: str) -> None:
        import psycopg

        with psycopg.connect(self.url.format("postgres").replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(statement)


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server of the tests' own."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database(request, tmp_path_factory):
    """Makes empty databases; called, it gives the URL of one."""
    if request.param == "sqlite":
        yield lambda: f"sqlite:///{tmp_path_factory.mktemp('database') / 'ledger.db'}"
        return
    yield request.getfixturevalue("postgres").create  # dropped with the server: one by one takes seconds each


@pytest.fixture
def database(new_database):
    """The URL of an empty database."""
    return new_database()


@pytest.fixture
def policy():
    """Model `m` with 8e9 parameters, so 4e9 secret bytes; `tiny` with 1,000 bytes a week; `open` that anybody has."""
    return Policy(
        models={
            "m": ModelPolicy(parameters=8_000_000_000),
            "tiny": ModelPolicy(parameters=8_000_000),
            "open": ModelPolicy(parameters=1000, public=True),
        }
    )
