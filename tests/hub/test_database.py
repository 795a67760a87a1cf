"""The database's own promises: migrated once, and nothing lost that was acknowledged."""

import json
import subprocess
import sys
import time

import pytest
import sqlalchemy as sa
from alembic import command
from tests.hub.conftest import PostgresServer

from millpond.hub.database import _alembic, open_database
from millpond.hub.ledger import Ledger, Payer
from millpond.hub.queue import SqlQueue

OPEN = """
import sys
from millpond.hub.ledger import Ledger, Payer
from millpond.hub.policy import ModelPolicy, Policy
policy = Policy(models={"m": ModelPolicy(parameters=8_000_000_000)})
print("ready", flush=True)
sys.stdin.read()
ledger = Ledger(sys.argv[1], policy)
for _ in range(5):
    ledger.charge(Payer("ada", "p", ("m",)), 10, what="x")
"""

CHARGE = """
import os, sys
from millpond.hub.ledger import Ledger, Payer
from millpond.hub.policy import ModelPolicy, Policy
ledger = Ledger(sys.argv[1], Policy(models={"m": ModelPolicy(parameters=8_000_000_000)}))
handle = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
while True:
    sent = ledger.charge(Payer("ada", "p", ("m",)), 3, what="x")
    os.write(handle, b"%d\\n" % sent.seq)
"""


def test_processes_that_open_a_new_database_at_once_migrate_it_once(database, policy):
    command = [sys.executable, "-c", OPEN, database]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.close()
    for process in processes:
        process.stdout.close()
        assert process.wait(60) == 0
    ledger = Ledger(database, policy)
    found = ledger.verify()
    ledger.close()
    engine = open_database(database, create=False)
    with engine.connect() as connection:
        kinds = dict(connection.execute(sa.text("SELECT kind, count(*) FROM ledger_entries GROUP BY kind")).all())
        versions = connection.execute(sa.text("SELECT version_num FROM alembic_version")).all()
    engine.dispose()
    assert kinds == {"cap": 6, "charge": 20}  # three caps of m, adopted once, and three of tiny when it was opened here
    assert found.charged == 200
    assert len(versions) == 1


@pytest.mark.slow
def test_a_server_that_crashes_loses_nothing_it_acknowledged(policy, tmp_path):
    server = PostgresServer()
    try:
        server.start()
        url = server.create()
        ledger = Ledger(url, policy)
        files = [tmp_path / "a", tmp_path / "b"]
        command = [sys.executable, "-c", CHARGE, url]
        processes = [subprocess.Popen([*command, file], stderr=subprocess.PIPE) for file in files]
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not all(file.exists() and file.stat().st_size > 200 for file in files):
            time.sleep(0.02)
        server.crash()
        for process in processes:
            assert b"OperationalError" in process.communicate(timeout=60)[1]  # said, not passed over
        server.start()
        sent = [int(line) for file in files for line in file.read_text().splitlines()]
        ledger.charge(Payer("ada", "p", ("m",)), 3, what="x")  # the connections of before are replaced
        found = ledger.verify()
        ledger.close()
        engine = open_database(url, create=False)
        with engine.connect() as connection:
            rows = connection.execute(sa.text("SELECT seq, detail FROM ledger_entries WHERE kind = 'charge'")).all()
        engine.dispose()
    finally:
        server.remove()
    recorded = {seq: json.loads(detail)["bytes"] for seq, detail in rows}
    assert len(sent) == len(set(sent)) > 50
    assert set(sent) <= set(recorded)
    assert len(recorded) <= len(sent) + 1 + len(files)  # one a process may have been recorded and not yet told
    assert found.charged == 3 * len(recorded)


def test_jobs_that_wait_are_given_their_models_when_the_database_is_brought_up_to_date(database):
    engine = sa.create_engine(database)
    config = _alembic()
    job = {
        "project": "",
        "user": "",
        "priority": 0,
        "submitted": 1.0,
        "attempts": 0,
        "lease_until": 0,
        "progress": "{}",
    }
    capture, work = {"model": {"path": "/m/a/", "dtype": "float32"}}, {"judge": {"model": {"path": "/m/b"}}}
    jobs = (
        ("capture", "queued", capture),
        ("judge", "claimed", {"job": {"model": "name"}, "work": work}),
        ("probe", "queued", {"job": {"model": "name"}}),
        ("capture", "finished", capture),
    )
    table = sa.table("jobs", *(sa.column(name) for name in (*job, "id", "kind", "state", "spec")))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0004")
        for number, (kind, state, spec) in enumerate(jobs):
            row = job | {"id": str(number), "kind": kind, "state": state, "spec": json.dumps(spec)}
            connection.execute(table.insert().values(row))
    engine.dispose()
    queue = SqlQueue(database)
    assert [one.model for one in queue.jobs()] == ["/m/a:float32", "/m/b:auto", "", ""]
    queue.engine.dispose()
