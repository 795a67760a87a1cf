"""What one user may take of the vault: time, memory, places in the queue, threads of the gateway, room on its disk."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvicorn
from tests.hub.gatehouse import HOOK, Gatehouse, probe, rows

from millpond.hub.answers import Answers
from millpond.hub.body import ErrorCode, Failure, Handles, ReleasedResult, decode
from millpond.hub.database import open_database
from millpond.hub.foreman import Foreman
from millpond.hub.gateway import create_app, server_options
from millpond.hub.limits import Limits
from millpond.hub.queue import SqlQueue
from millpond.hub.room import THREADS_OF_ONE
from millpond.hub.serving import Endpoint, Fixed
from millpond.hub.uploads import Uploads
from millpond.store.artifacts import artifact_names
from millpond.store.errors import LeaseLost, QuotaExceeded, TooMany

P = "/api/v1/p/one"
SECONDS = 10


def test_a_claim_that_lasts_too_long_ends_whoever_works_on_it(database):
    engine, clock = open_database(database), [1000.0]
    queue = SqlQueue(engine, limits=Limits(seconds=100), now=lambda: clock[0])
    queue.submit("capture", {}, project="p", user="ada")
    first = queue.claim("dies", {"capture"}, 60)
    clock[0] += 61
    job = queue.claim("works", {"capture"}, 60)
    for _ in range(2):
        clock[0] += 50
        queue.heartbeat(job, 60, {})  # 111 and 161 s after the first claim, 50 and 100 after this one
    assert not queue.holds(first)
    assert queue.holds(job)
    clock[0] += 1
    with pytest.raises(LeaseLost, match="it is failed"):
        queue.heartbeat(job, 60, {})
    with pytest.raises(LeaseLost):
        queue.finish(job, {"rows": 1})
    found = queue.get(job.id)
    assert (found.state, found.result) == ("failed", None)
    assert found.error.startswith("TimeLimit: it ran for more than 100 s")
    assert [event.event for event in queue.history(job.id)][-1] == "time out"
    engine.dispose()


def test_a_projects_members_together_have_so_many_places(database):
    engine = open_database(database)
    queue = SqlQueue(engine, limits=Limits(queued=3, running=2, project_queued=4, project_running=3))
    for user in ("ada", "ada", "bob", "bob"):
        queue.submit("probe", {}, project="p", user=user)
    with pytest.raises(TooMany, match="project 'p' has 4 jobs waiting and 4 are allowed"):
        queue.submit("probe", {}, project="p", user="eve")
    queue.submit("probe", {}, project="q", user="eve")
    claims = [queue.claim("w", {"probe"}, 60) for _ in range(6)]
    assert sorted(job.project for job in claims if job) == ["p", "p", "p", "q"]
    queue.finish(next(job for job in claims if job.project == "p"), {})
    assert queue.claim("w", {"probe"}, 60).project == "p"
    engine.dispose()


def test_uploads_at_once_stay_within_a_users_and_a_projects_room(database):
    engine = open_database(database)
    uploads = Uploads(engine, per_user=1000, per_project=1500)
    refused = []

    def send(user):
        for _ in range(6):
            try:
                with uploads.taking("p", user, 100):
                    pass
            except QuotaExceeded as error:
                refused.append(str(error))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(send, ["ada", "ada", "bob", "bob"]))  # 24 of 100 bytes; 10 fit each user, 15 the project
    assert len(refused) == 9
    with pytest.raises(QuotaExceeded, match="project 'p' may bring 1,500 bytes"), uploads.taking("p", "eve", 100):
        pytest.fail("it was let in")
    with pytest.raises(ZeroDivisionError), uploads.taking("q", "eve", 1000):
        raise ZeroDivisionError
    with uploads.taking("q", "eve", 1000):  # given back, so there is room
        pass
    with pytest.raises(QuotaExceeded, match="user 'eve' may bring 1,000 bytes"), uploads.taking("r", "eve", 1):
        pytest.fail("it was let in")
    engine.dispose()


def autoencoder(gate, **more):
    settings = {"d_sae": 64, "k": 4, "batch_size": 128} | more
    return {
        "kind": "sae_train", "estimator": {"name": "BatchTopKSae", "params": settings}, "hooks": [HOOK],
        "rows": rows(gate.run), "tokens": 1_000_000_000,
    }  # fmt: skip


@pytest.mark.slow
def test_jobs_that_take_too_long_or_too_much_end_alone(tmp_path):
    """A training that is told to stop, one whose process hears nothing, one that wants more memory than there is."""
    policy = f"[jobs]\nseconds = {SECONDS}\n"
    with Gatehouse(tmp_path, policy=policy, memory_bytes=2 << 30, lease_seconds=60) as gate:
        ada, said = gate.client("ada"), []
        foreman = Foreman(gate.settings, grace_seconds=2, told=said.append)
        thread = threading.Thread(target=foreman.run)
        thread.start()
        try:
            long = gate.submit(ada, autoencoder(gate))
            wide = gate.submit(ada, autoencoder(gate, d_sae=1 << 19, batch_size=1200))  # 2.5 GB a batch
            short = gate.submit(ada, {"kind": "statistics", "hook": HOOK, "rows": rows(gate.run)})
            assert gate.wait(ada, long, past=("queued",)) == "running"
            assert gate.wait(ada, long) == "failed"  # not in hours
            before = gate.spent()
            assert gate.answer(ada, long) == Failure(ErrorCode.TIME_LIMIT)
            assert gate.spent() - before == 16 + 2  # charged as any refusal
            first = foreman._process.pid
            assert gate.wait(ada, wide) == "failed"
            assert gate.answer(ada, wide) in (Failure(ErrorCode.JOB_FAILED), Failure(ErrorCode.TIME_LIMIT))
            assert "allocate" in str(foreman._queue.get(wide).error) or "Memory" in str(foreman._queue.get(wide).error)
            assert gate.wait(ada, short) == "done"
            assert foreman._process.pid == first  # nothing had to be ended for that

            deaf = gate.submit(ada, autoencoder(gate, seed=1))
            assert gate.wait(ada, deaf, past=("queued",)) == "running"
            os.kill(first, signal.SIGSTOP)
            later = gate.submit(ada, {"kind": "statistics", "hook": HOOK, "rows": rows(gate.run, where="position > 3")})
            assert gate.wait(ada, deaf) == "failed"
            assert gate.wait(ada, later) == "done"  # by another process
            assert foreman._process.pid != first
            with pytest.raises(ProcessLookupError):
                os.kill(first, 0)
            assert isinstance(gate.answer(ada, later), ReleasedResult)
            assert [line for line in said if "ended" in line] == [
                f"job {deaf}: it is over and its process goes on; ended"
            ]
        finally:
            foreman.stop()
            thread.join(30)
        assert not thread.is_alive()
        assert artifact_names(gate.lake) == []
        assert Answers(gate.engine).of(long) == ()


def test_what_is_sent_is_counted_and_refused_by_name_when_there_is_no_room(tmp_path):
    with Gatehouse(tmp_path, max_user_bytes=6000, max_project_bytes=9000) as gate:
        ada, ben, eve = gate.client("ada"), gate.client("ben"), gate.client("eve")

        def send(client, name, size, project="one"):
            prompts = {"name": name, "prompts": [{"id": "a", "text": "x" * size}]}
            return decode(client.post(f"/api/v1/p/{project}/prompts", json=prompts).content)

        assert isinstance(send(ada, "first", 4000), Handles)
        assert decode(
            ada.post(f"{P}/prompts", json={"name": "first", "prompts": [{"id": "a", "text": "y" * 1500}]}).content
        ) == (
            Failure(ErrorCode.BAD_REQUEST)  # the name is taken: nothing is counted
        )
        files = list((tmp_path / "lake" / "prompts").iterdir())
        assert len(files) == 1  # and nothing is left of it
        before = gate.spent()
        assert send(ada, "second", 3000) == Failure(ErrorCode.DISK_QUOTA)
        assert gate.spent() - before == 16 + 2
        assert list((tmp_path / "lake" / "prompts").iterdir()) == files
        labels = {f"p{number}": "a long value " * 5 for number in range(60)}
        reply = ada.post(f"{P}/runs/{gate.run}/labels", json={"name": "x", "by": "prompt", "values": labels})
        assert decode(reply.content) == Failure(ErrorCode.DISK_QUOTA)
        assert not any("x" in name for name in gate.lake["shared"].labels if name != "true")
        assert isinstance(send(ada, "third", 1000), Handles)
        assert isinstance(send(ben, "fourth", 3000), Handles)
        assert send(ben, "fifth", 1500) == Failure(ErrorCode.DISK_QUOTA)  # the project's, not Ben's own
        assert isinstance(send(eve, "fifth", 1500, "two"), Handles)
        job = probe(gate.run) | {
            "train": rows(gate.run, where="position > 0 and " + " and ".join(["position > 1"] * 90))
        }
        assert decode(ben.post(f"{P}/jobs", json={"job": job}).content) == Failure(ErrorCode.DISK_QUOTA)


def test_one_users_requests_leave_threads_for_others(tmp_path):
    held, started = threading.Event(), []

    def slow(call):
        started.append(call.who.user)
        assert held.wait(20)
        return Fixed(b"{}")

    def quick(call):
        return Fixed(call.who.user.encode())

    gate = Gatehouse(tmp_path)
    app = create_app(gate.settings, [Endpoint("GET", "/slow", "read", slow), Endpoint("GET", "/quick", "read", quick)])
    server = uvicorn.Server(uvicorn.Config(app, **server_options(gate.settings)))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        with ThreadPoolExecutor(20) as pool:
            waiting = [pool.submit(gate.client("ada").get, "/slow") for _ in range(16)]
            while len(started) < THREADS_OF_ONE:
                time.sleep(0.01)
            assert gate.client("eve").get("/quick").content == b"eve"
            time.sleep(0.2)
            assert len(started) == THREADS_OF_ONE
            held.set()
            assert [one.result().status_code for one in waiting] == [200] * 16
        assert started == ["ada"] * 16
    finally:
        held.set()
        server.should_exit = True
        thread.join()
        for client in gate._clients:
            client.close()
        gate.ledger.close()
        gate.engine.dispose()
