"""`millpond queue`: the queue's server inside the vault, and its workers' tokens."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from millpond.store.errors import InvalidInput


@dataclass(frozen=True)
class QueueServe:
    """Serve the gateway's queue to capture workers; never where users can reach it."""

    database: str
    """URL of the gateway's database: sqlite:///FILE or postgresql+psycopg://..."""
    workers: Path
    """File of the workers' tokens' hashes, from `millpond queue token`."""
    listen: str = "127.0.0.1:8911"
    """HOST:PORT of the vault, or unix:/PATH."""
    certificate: Path | None = None
    """PEM file of the certificate with which to serve HTTPS."""
    key: Path | None = None
    """PEM file of the certificate's key."""

    def run(self) -> int:
        """Serve until interrupted."""
        import uvicorn

        from millpond.hub.queue import SqlQueue
        from millpond.hub.queue_api import create_queue_app, read_workers
        from millpond.store.logs import log_to

        log_to()
        app = create_queue_app(SqlQueue(self.database), read_workers(self.workers))
        options = listen_at(self.listen) | serve_tls(self.certificate, self.key)
        uvicorn.run(app, **options, log_level="warning", access_log=False, server_header=False)
        return 0


@dataclass(frozen=True)
class QueueToken:
    """Make a worker's token: it is printed once, and its hash is added to the file."""

    name: Annotated[str, tyro.conf.Positional]
    """The worker's."""
    workers: Path
    """File of the workers' tokens' hashes; made if it is missing."""
    kinds: tuple[str, ...] = ("capture", "generate", "judge", "sae_cross_entropy")
    """Kinds of jobs that it may take."""
    submit: bool = False
    """Also let it submit and look at jobs of these kinds."""

    def run(self) -> int:
        """Print the token."""
        import json

        from millpond.hub.queue_api import new_worker, read_workers

        if self.workers.exists() and any(worker.name == self.name for worker in read_workers(self.workers)):
            raise InvalidInput(f"{self.workers} has a worker {self.name!r} already; remove it first or choose another")
        token, worker = new_worker(self.name, self.kinds, submit=self.submit)
        descriptor = os.open(self.workers, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "a") as handle:
            # JSON's strings and lists of them are TOML's
            handle.write(f"[[workers]]\nname = {json.dumps(worker.name)}\nsha256 = {json.dumps(worker.sha256)}\n")
            handle.write(f"kinds = {json.dumps(sorted(worker.kinds))}\nsubmit = {json.dumps(worker.submit)}\n\n")
        print(token)
        return 0


def serve_tls(certificate: Path | None, key: Path | None) -> dict[str, Any]:
    """Uvicorn's arguments for HTTPS, of version 1.2 of TLS at least; none without files.

    Raises:
        InvalidInput: one of the files is missing.
    """
    if certificate is None and key is None:
        return {}
    for name, path in (("certificate", certificate), ("key", key)):
        if path is None or not path.is_file():
            raise InvalidInput(f"{name} is {path}, which is no file; give both certificate and key")
    return {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}


def listen_at(address: str) -> dict[str, Any]:
    """Uvicorn's arguments for `HOST:PORT` or `unix:/PATH`.

    Raises:
        InvalidInput: it is neither.
    """
    if address.startswith("unix:/"):
        return {"uds": address.removeprefix("unix:")}
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidInput(f"listen is {address!r}; give HOST:PORT or unix:/PATH")
    return {"host": host.strip("[]"), "port": int(port)}
