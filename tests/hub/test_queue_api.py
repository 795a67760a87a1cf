"""The queue over HTTP: the contract, what a worker's token allows, and a server that goes away."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from tests.queue_contract import Clock, QueueContract
from tests.queue_serving import serving

from millpond.cli import main
from millpond.hub.queue import SqlQueue
from millpond.hub.queue_api import create_queue_app, new_worker, read_workers
from millpond.store.errors import InvalidInput, JobNotFound, LeaseLost, NotPermitted, StorageFailed
from millpond.store.http_queue import HttpQueue, open_queue


@pytest.fixture
def clock():
    return [1000.0]


@pytest.fixture
def sql(tmp_path, clock):
    queue = SqlQueue(f"sqlite:///{tmp_path / 'hub.db'}", now=lambda: clock[0])
    yield queue
    queue.engine.dispose()


class TestHttpQueue(QueueContract):
    @pytest.fixture
    def queue(self, sql: SqlQueue, clock: Clock) -> Iterator[HttpQueue]:
        token, operator = new_worker("op", ["capture", "other"], submit=True)
        with serving(create_queue_app(sql, [operator])) as address:
            yield HttpQueue(address, token)


def test_a_workers_token_allows_its_own_kinds_and_nothing_else(sql):
    token, worker = new_worker("gpu-1", ["capture"])
    other_token, other = new_worker("gpu-2", ["generate"])
    made = []

    def finished(job, result, connection):
        made.append((job.project, job.user, result, connection.in_transaction()))

    with serving(create_queue_app(sql, [worker, other], finished=finished)) as address:
        mine = sql.submit("capture", {"n": 1}, project="p", user="ada")
        sql.submit("probe", {}, project="p", user="ada")
        queue, others = HttpQueue(address, token), HttpQueue(address, other_token)
        job = queue.claim("gpu-1", {"capture"}, 60)
        assert job is not None
        assert job.id == mine
        assert "ada" not in job.model_dump_json()
        for call in (
            lambda: queue.submit("capture", {}),
            lambda: queue.get(mine),
            lambda: queue.claim("gpu-1", {"capture", "probe"}, 60),
            lambda: HttpQueue(address, "x" * 43).claim("gpu-1", {"capture"}, 60),
        ):
            with pytest.raises(NotPermitted):
                call()
        for late in (
            lambda: others.finish(job, {}),
            lambda: others.fail(job, "x"),
            lambda: others.heartbeat(job, 1, {}),
        ):
            with pytest.raises(JobNotFound):
                late()
        with pytest.raises(InvalidInput, match="lease_seconds"):
            queue.claim("gpu-1", {"capture"}, 1e6)
        queue.finish(job, {"rows": 3})
        with pytest.raises(LeaseLost):
            queue.finish(job, {"rows": 4})
        assert made == [("p", "ada", {"rows": 3}, True)]
        assert sql.get(mine).result == {"rows": 3}


def test_a_server_that_comes_back_is_waited_for_and_one_that_does_not_is_named(sql, tmp_path):
    token, worker = new_worker("gpu", ["capture"])
    sql.submit("capture", {})
    app = create_queue_app(sql, [worker])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with pytest.raises(StorageFailed, match=f"{port} cannot be reached"):
        HttpQueue(address, token, patience_seconds=0.3).claim("w", {"capture"}, 60)
    claims = []
    thread = threading.Thread(target=lambda: claims.append(HttpQueue(address, token).claim("w", {"capture"}, 60)))
    thread.start()
    time.sleep(0.5)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", lifespan="off"))
    second = threading.Thread(target=server.run)
    second.start()
    thread.join(30)
    with httpx.Client(base_url=address) as client:  # not the client's own checks: what the server says to anybody
        assert client.post("/claim", json={}).status_code == 403
        known = {"Authorization": f"Bearer {token}"}
        assert client.post("/claim", content=b"{" * 10_000, headers=known).status_code == 400
        assert client.post("/claim", content=b"0" * ((8 << 20) + 1), headers=known).status_code == 400
    server.should_exit = True
    second.join()
    assert [claim.attempts for claim in claims] == [1]


def test_tokens_are_made_and_the_server_starts_from_the_command_line(tmp_path, capsys, monkeypatch):
    workers, database, where = (
        tmp_path / "workers.toml",
        f"sqlite:///{tmp_path / 'hub.db'}",
        tempfile.mkdtemp(dir="/tmp"),
    )
    assert main(["queue", "token", "gpu", "--workers", str(workers), "--kinds", "capture", "--submit"]) == 0
    token = capsys.readouterr().out.strip()
    assert main(["queue", "token", "gpu", "--workers", str(workers)]) == 2  # the name is taken
    assert token not in workers.read_text()
    assert workers.stat().st_mode & 0o077 == 0
    assert [(worker.name, worker.kinds) for worker in read_workers(workers)] == [("gpu", {"capture"})]
    address = f"unix:{where}/queue"
    command = ["queue", "serve", "--database", database, "--workers", str(workers), "--listen", address]
    with subprocess.Popen([sys.executable, "-m", "millpond.cli", *command]) as process:
        try:
            monkeypatch.delenv("MILLPOND_WORKER_TOKEN", raising=False)
            with pytest.raises(InvalidInput, match="MILLPOND_WORKER_TOKEN"):
                open_queue(address)
            monkeypatch.setitem(os.environ, "MILLPOND_WORKER_TOKEN", token)
            queue = open_queue(address)
            assert queue.get(queue.submit("capture", {"n": 1})).spec == {"n": 1}
        finally:
            process.terminate()
    shutil.rmtree(where)
