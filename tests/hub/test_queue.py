"""The queue in a database: the contract, turns, limits, cancellation, and workers killed at random."""

from __future__ import annotations

import collections
import io
import json
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from tests.queue_contract import Clock, QueueContract

from millpond.hub.database import open_database
from millpond.hub.limits import Limits
from millpond.hub.queue import SqlQueue
from millpond.hub.transitions import FINAL, TRANSITIONS, diagram
from millpond.store.errors import InvalidInput, LeaseLost, TooMany
from millpond.store.logs import log_to

KINDS = {"probe"}


@pytest.fixture
def engine(database):
    engine = open_database(database)
    yield engine
    engine.dispose()


@pytest.fixture
def clock():
    return [1000.0]


@pytest.fixture
def queue(engine, clock):
    return SqlQueue(engine, now=lambda: clock[0])


class TestSqlQueue(QueueContract):
    @pytest.fixture
    def queue(self, engine: sa.Engine, clock: Clock) -> SqlQueue:
        return SqlQueue(engine, now=lambda: clock[0])


def claimed(queue, **arguments):
    job = queue.claim("w", KINDS, 60, **arguments)
    assert job is not None
    return job


def test_priority_comes_first_and_then_users_take_turns(queue, clock):
    submitted = [("ada", 0)] * 4 + [("bob", 0)] * 2 + [("eve", 5)]
    for number, (user, priority) in enumerate(submitted):
        queue.submit("probe", {"n": number}, project="p", user=user, priority=priority)
    order = []
    while (job := queue.claim("w", KINDS, 60)) is not None:
        order.append((job.user, job.spec["n"]))
        clock[0] += 1
        queue.finish(job, {})
    assert order == [("eve", 6), ("ada", 0), ("bob", 4), ("ada", 1), ("bob", 5), ("ada", 2), ("ada", 3)]


def test_who_has_more_under_way_waits(queue, clock):
    for user in ("ada", "ada", "ada", "bob", "bob"):
        queue.submit("probe", {}, user=user)
    users = []
    for _ in range(5):
        clock[0] += 1
        users.append(claimed(queue).user)
    assert users == ["ada", "bob", "ada", "bob", "ada"]


def test_limits_of_a_user(engine, clock):
    queue = SqlQueue(engine, limits=Limits(queued=3, running=2), now=lambda: clock[0])
    for _ in range(3):
        queue.submit("probe", {}, user="ada")
        queue.submit("probe", {})
    with pytest.raises(TooMany, match="'ada' has 3 jobs waiting and 3 are allowed"):
        queue.submit("probe", {}, user="ada")
    queue.submit("probe", {}, user="bob")
    queue.submit("probe", {})  # the vault's own are not limited
    jobs = [queue.claim("w", KINDS, 60) for _ in range(8)]
    assert collections.Counter(job.user for job in jobs if job) == {"ada": 2, "bob": 1, "": 4}
    queue.submit("probe", {}, user="ada")  # one waits, so that two more may
    clock[0] += 61  # every lease has run out: nothing is under way
    again = [queue.claim("w", KINDS, 60) for _ in range(9)]
    assert collections.Counter(job.user for job in again if job) == {"ada": 2, "bob": 1, "": 4}


def test_submissions_at_once_stay_within_the_limit(engine):
    queue = SqlQueue(engine, limits=Limits(queued=5))
    refused = []

    def submit():
        for _ in range(4):
            try:
                queue.submit("probe", {}, user="ada")
            except TooMany as error:
                refused.append(error)

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(queue.jobs(user="ada")), len(refused)) == (5, 11)


def test_cancelled_jobs_are_not_claimed_and_their_workers_are_told(queue, clock):
    waiting, under_way = queue.submit("probe", {}), queue.submit("probe", {})
    done = queue.submit("probe", {})
    assert queue.cancel(waiting).state == "cancelled"
    job = claimed(queue)
    assert job.id == under_way
    queue.cancel(under_way)
    for call in (lambda: queue.heartbeat(job, 60, {}), lambda: queue.finish(job, {"n": 1})):
        with pytest.raises(LeaseLost, match="cancelled"):
            call()
    clock[0] += 100  # the lease of the cancelled job has run out
    last = claimed(queue)
    assert last.id == done
    queue.finish(last, {"n": 2})
    assert (queue.cancel(done).state, queue.get(done).result) == ("finished", {"n": 2})
    assert queue.claim("w", KINDS, 60) is None


def test_history_tells_what_a_job_was_at_any_time(queue, clock):
    job_id = queue.submit("probe", {})
    clock[0] = 1001.0
    job = claimed(queue)
    for at, progress in ((1002.0, 3), (1003.0, 3), (1004.0, 9)):
        clock[0] = at
        queue.heartbeat(job, 60, {"sixteenths": progress})
    clock[0] = 1005.0
    queue.fail(job, "it broke \0\udc80")
    found = [(event.at, event.event, event.state, event.progress.get("sixteenths")) for event in queue.history(job_id)]
    assert found == [
        (1000.0, "submit", "queued", None),
        (1001.0, "claim", "claimed", None),
        (1002.0, "heartbeat", "claimed", 3),
        (1004.0, "heartbeat", "claimed", 9),
        (1005.0, "fail", "failed", 9),
    ]


def test_what_belongs_to_an_end_is_kept_with_it_or_not_at_all(queue, engine, clock):
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE effects (job TEXT)"))
    queue.submit("probe", {})

    def also(connection):
        connection.execute(sa.text("INSERT INTO effects VALUES ('x')"))

    old = claimed(queue)
    clock[0] += 61
    new = claimed(queue)
    with pytest.raises(LeaseLost):
        queue.finish(old, {}, also=also)
    with pytest.raises(ZeroDivisionError):
        queue.finish(new, {}, also=lambda connection: (also(connection), 1 / 0))
    assert queue.get(new.id).state == "claimed"
    queue.finish(new, {}, also=also)
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM effects")) == 1
    with pytest.raises(InvalidInput, match="JSON"):
        queue.submit("probe", {"n": float("nan")})


def test_the_drawing_in_the_docs_is_the_table():
    text = (Path(__file__).parents[2] / "docs" / "jobs.md").read_text()
    assert f"```mermaid\n{diagram()}```" in text
    assert {"finished", "failed", "cancelled"} == FINAL
    assert all(step.source not in FINAL for step in TRANSITIONS)


KILLS = """
import os, random, signal, sys, time
import sqlalchemy as sa
from millpond.hub.database import open_database
from millpond.hub.limits import Limits
from millpond.hub.queue import SqlQueue
from millpond.store.errors import LeaseLost

url, seed = sys.argv[1], int(sys.argv[2])

def work(number):
    rng = random.Random(number)
    queue = SqlQueue(open_database(url, create=False), limits=Limits(running=2), max_attempts=10_000)
    while True:
        job = queue.claim(str(number), {"n"}, 0.4)
        if job is None:
            time.sleep(0.02)
            continue
        effect = sa.text("INSERT INTO effects VALUES (:job)")
        try:
            time.sleep(rng.random() * 0.05)
            queue.heartbeat(job, 0.4, {"worker": number})
            if rng.random() < 0.1:
                time.sleep(0.5)  # another one claims it meanwhile
            queue.finish(job, {"by": number}, also=lambda c: c.execute(effect, {"job": job.id}))
        except LeaseLost:
            pass

def start(number):
    pid = os.fork()
    if pid == 0:
        try:
            work(number)
        finally:
            os._exit(9)
    return pid

rng, started, kills = random.Random(seed), 0, 0
workers = []
for _ in range(4):
    workers.append(start(started)); started += 1
end = time.monotonic() + 60
while True:
    time.sleep(rng.random() * 0.15)
    victim = workers.pop(rng.randrange(len(workers)))
    os.kill(victim, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(victim, 0)[1])
    kills += 1
    pid = os.fork()  # another process looks: this one never holds a connection that its children would share
    if pid == 0:
        jobs = SqlQueue(open_database(url, create=False)).jobs()
        os._exit(0 if all(job.state == "finished" for job in jobs) else 1)
    if os.waitpid(pid, 0)[1] == 0:
        break
    assert time.monotonic() < end, "jobs are left"
    workers.append(start(started)); started += 1
for worker in workers:
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
print(kills)
"""


def test_workers_killed_at_random_end_every_job_exactly_once(queue, engine, database):
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE effects (job TEXT)"))
    ids = [queue.submit("n", {"n": number}, user="abc"[number % 3]) for number in range(60)]
    done = subprocess.run(
        [sys.executable, "-c", KILLS, database, "7"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 5  # kills, at random times: fewer on a busy machine
    with engine.connect() as connection:
        effects = list(connection.scalars(sa.text("SELECT job FROM effects")))
    assert sorted(effects) == sorted(ids)
    assert all([event.event for event in queue.history(job_id)].count("finish") == 1 for job_id in ids)
    assert sum(queue.get(job_id).attempts > 1 for job_id in ids) >= 3  # kills did hit jobs under way


def test_every_change_is_logged_with_its_job(queue, clock):
    stream = io.StringIO()
    handler = log_to(stream)
    try:
        ids = [queue.submit("probe", {"n": n}, user="ada") for n in range(3)]
        queue.finish(claimed(queue), {})
        queue.fail(claimed(queue), "why")
        queue.cancel(ids[2])
        queue.cancel(ids[2])  # it has ended: nothing changes
    finally:
        logging.getLogger("millpond").removeHandler(handler)
        logging.getLogger("millpond").propagate = True
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["event"], ids.index(line["job"])) for line in lines] == [
        ("submitted", 0), ("submitted", 1), ("submitted", 2),
        ("claimed", 0), ("finished", 0), ("claimed", 1), ("failed", 1), ("cancelled", 2),
    ]  # fmt: skip
    assert lines[3]["worker"] == "w"
