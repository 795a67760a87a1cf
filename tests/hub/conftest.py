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


@pytest.fixture(scope="session")
def postgres():
    """The URL of a PostgreSQL server on a socket in a temporary folder, without a network address."""
    programs = postgres_programs()
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    options: dict[str, object] = {"check": True, "capture_output": True, "cwd": "/"}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        shutil.chown(folder, "postgres")
        options["user"] = pwd.getpwnam("postgres").pw_uid
    data = folder / "data"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]  # only names the socket
    try:
        subprocess.run([programs / "initdb", "-D", data, "-U", "millpond", "--auth=trust", "-E", "UTF8"], **options)
        settings = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -p {port}"
        subprocess.run(
            [programs / "pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", settings, "start"], **options
        )
        yield f"postgresql+psycopg://millpond@/{{}}?host={folder}&port={port}"
    finally:
        subprocess.run([programs / "pg_ctl", "-D", data, "-m", "immediate", "stop"], **options | {"check": False})
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'ledger.db'}"
        return
    import psycopg

    template = request.getfixturevalue("postgres")
    admin = template.format("postgres").replace("+psycopg", "")
    name = f"t{os.urandom(6).hex()}"
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield template.format(name)
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


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
