"""Jobs run to their end whatever is killed when, their answers are there once, and can be made again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import sqlalchemy as sa
from tests.hub.gatehouse import HOOK, Gatehouse, probe, rows, write_run
from tests.queue_serving import serving

from millpond.hub.answers import Answers
from millpond.hub.body import ErrorCode, Failure, Handles, ReleasedResult, decode
from millpond.hub.executor import Executor, Progress, Workshop, verify_release
from millpond.hub.queue_api import create_queue_app, new_worker
from millpond.hub.settings import Weights
from millpond.hub.tables import ANSWERS, ENTRIES
from millpond.store.artifacts import artifact_names
from millpond.store.errors import InvalidInput, LeaseLost
from millpond.store.generation import write_completions, write_judged
from millpond.store.http_queue import HttpQueue

P = "/api/v1/p/one"


@pytest.fixture
def gate(tmp_path):
    with Gatehouse(tmp_path, lease_seconds=1.0) as found:
        yield found


def autoencoder(gate, tokens):
    return {
        "kind": "sae_train", "estimator": {"name": "BatchTopKSae", "params": {"d_sae": 64, "k": 4, "batch_size": 128}},
        "hooks": [HOOK], "rows": rows(gate.run, "train"), "tokens": tokens, "test": rows(gate.run, "test"),
    }  # fmt: skip


def executor(gate):
    command = [sys.executable, "-m", "millpond.cli", "executor", "--config", str(gate.config)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def releases(gate):
    with gate.engine.connect() as connection:
        details = connection.scalars(sa.select(ENTRIES.c.detail).where(ENTRIES.c.kind == "charge"))
        return sum('"ReleasedResult"' in detail for detail in details)


@pytest.mark.slow
def test_a_job_whose_executor_is_killed_is_taken_over_and_answered_once(gate):
    ada = gate.client("ada")
    handle = gate.submit(ada, autoencoder(gate, 400_000))
    first = executor(gate)
    try:
        end = time.monotonic() + 60
        while decode(ada.get(f"{P}/jobs/{handle}").content).state != "running":
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert decode(ada.get(f"{P}/jobs/{handle}").content).state == "running"
    time.sleep(1.1)  # the lease
    assert gate.work() == 1
    assert gate.wait(ada, handle) == "done"
    job = Workshop(gate.settings).queue.get(handle)
    assert job.attempts == 2
    assert isinstance(gate.answer(ada, handle), ReleasedResult)
    before = gate.spent()
    assert isinstance(gate.answer(ada, handle), ReleasedResult)
    assert gate.spent() - before == 16
    assert releases(gate) == 1
    made = decode(ada.get(f"{P}/jobs/{handle}/made").content)
    assert len(made.values) == 1
    assert artifact_names(gate.lake) == [f"job-{handle}"]


def test_a_kill_between_keeping_the_artifact_and_the_end_leaves_one_of_each(gate, monkeypatch):
    ada = gate.client("ada")
    handle = gate.submit(ada, probe(gate.run))
    killed = Executor(gate.settings, told=lambda _: None)

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    monkeypatch.setattr(killed, "_finish", die)
    with pytest.raises(Killed):
        killed.run(until_empty=True)
    assert artifact_names(gate.lake) == [f"job-{handle}"]
    assert Answers(gate.engine).of(handle) == ()
    assert decode(ada.get(f"{P}/jobs/{handle}/made").content) == Handles(())
    killed.workshop.engine.dispose()
    time.sleep(1.1)
    assert gate.work() == 1
    assert gate.wait(ada, handle) == "done"
    assert len(decode(ada.get(f"{P}/jobs/{handle}/made").content).values) == 1
    assert len(Answers(gate.engine).of(handle)) == 1


def test_an_executor_that_lost_its_lease_writes_nothing(gate):
    """The end of a job and its answers are one transaction: what an old claim brings does not count."""
    ada = gate.client("ada")
    handle = gate.submit(ada, probe(gate.run))
    slow = Executor(gate.settings, told=lambda _: None)
    claimed = slow.workshop.queue.claim("slow", {"probe"}, 0.01)
    import threading

    outcome, kept = slow._do(claimed, None, threading.Event(), Progress(lambda: None))
    time.sleep(0.05)
    assert gate.work() == 1
    with pytest.raises(LeaseLost):
        slow._finish(claimed, outcome, kept)
    slow.workshop.engine.dispose()
    assert len(Answers(gate.engine).of(handle)) == 1
    assert len(gate.projects.held("one", "artifact")) == 1


def test_a_cancelled_job_stops_and_leaves_nothing(gate):
    ada = gate.client("ada")
    handle = gate.submit(ada, autoencoder(gate, 1_000_000_000))  # hours
    worker = Executor(gate.settings, told=lambda _: None)
    import threading

    thread = threading.Thread(target=worker.run, kwargs={"until_empty": True})
    thread.start()
    end = time.monotonic() + 30
    while decode(ada.get(f"{P}/jobs/{handle}").content).state != "running":
        assert time.monotonic() < end
        time.sleep(0.05)
    ada.delete(f"{P}/jobs/{handle}")
    thread.join(20)
    assert not thread.is_alive()
    worker.workshop.engine.dispose()
    assert gate.wait(ada, handle) == "cancelled"
    assert artifact_names(gate.lake) == []
    assert Answers(gate.engine).of(handle) == ()


def test_a_release_is_made_again_to_the_byte_and_a_change_of_the_data_is_seen(gate, capsys):
    from millpond.cli import main

    ada = gate.client("ada")
    handle = gate.do(ada, probe(gate.run, name="LogisticProbe"))
    direction = gate.do(
        ada, {"kind": "release", "artifact": decode(ada.get(f"{P}/jobs/{handle}/made").content).values[0].hex()}
    )
    gate.answer(ada, handle)
    assert verify_release(gate.settings, handle) == [(0, "same")]
    assert verify_release(gate.settings, direction) == [(0, "kept")]
    gate.answer(ada, direction)
    assert main(["release", "verify", direction, "--config", str(gate.config)]) == 0
    assert "the released bytes, again" in capsys.readouterr().out
    with gate.engine.begin() as connection:  # somebody with the database changes what left: the ledger still has it
        other = connection.execute(sa.select(ANSWERS.c.result).where(ANSWERS.c.job == handle)).scalar_one()
        connection.execute(ANSWERS.update().where(ANSWERS.c.job == direction).values(result=other))
    assert verify_release(gate.settings, direction) == [(0, "same")]
    gate.lake.delete("shared")
    write_run(gate.lake, "shared", seed=9)
    assert verify_release(gate.settings, handle) == [(0, "differs")]
    assert main(["release", "verify", handle, "--config", str(gate.config)]) == 1
    queued = gate.submit(ada, probe(gate.run))
    with pytest.raises(InvalidInput, match="queued"):
        verify_release(gate.settings, queued)


@pytest.mark.slow
def test_on_a_dask_cluster_the_answers_are_the_same_to_the_byte(gate):
    ada = gate.client("ada")
    jobs = [probe(gate.run, name="LogisticProbe"), {"kind": "statistics", "hook": HOOK, "rows": rows(gate.run)}]
    handles = [gate.do(ada, job) for job in jobs]
    for handle in handles:
        gate.answer(ada, handle)
    on_dask = gate.settings.model_copy(update={"workers": 2})
    assert [verify_release(on_dask, handle) for handle in handles] == [[(0, "same")], [(0, "same")]]


def test_progress_only_rises_and_ends_below_sixteen():
    seen = []
    progress = Progress(lambda: seen.append(progress.step))
    for share in (0.1, 0.3, 0.2, 0.5, 0.51, 1.0):
        progress(share)
        progress.passes("x", 1, 2)
        progress.passes("x", 2, 2)
    assert seen == sorted(set(seen))
    assert seen[-1] <= 15


def test_a_capture_is_queued_for_the_workers_and_its_run_is_the_projects(gate):
    ada, eve = gate.client("ada"), gate.client("eve")
    sent = {"name": "set", "prompts": [{"id": f"q{n}", "text": f"text {n}", "topic": "x"} for n in range(3)]}
    (prompts,) = decode(ada.post(f"{P}/prompts", json=sent).content).values
    trained = gate.do(ada, probe(gate.run, test=False))
    (artifact,) = decode(ada.get(f"{P}/jobs/{trained}/made").content).values
    job = {
        "kind": "capture", "model": "m", "name": "fresh", "prompts": prompts.hex(), "hooks": [HOOK],
        "interventions": [{"op": "add", "hook": HOOK, "vector": artifact.hex(), "scale": 2.0}],
    }  # fmt: skip
    handle = gate.submit(ada, job)
    assert gate.work() == 0  # no executor takes it
    queue = Workshop(gate.settings).queue
    assert queue.claim("worker", {"capture"}, 60, {"elsewhere:auto"}) is None
    claimed = queue.claim("worker", {"capture"}, 60, {"nowhere:auto"})
    spec = claimed.spec
    assert spec["model"]["path"] == "nowhere"
    assert spec["prompts"]["metadata"] == ["topic"]
    with open(spec["prompts"]["path"]) as handle_:  # noqa: PTH123
        assert [line.count("text") for line in handle_] == [2, 2, 2]
    assert len(spec["intervene"][0]["vector"]) == 8
    assert "'one'" not in str(spec)  # a worker is not told whose it is
    assert spec["prompts"]["path"].startswith(f"{gate.lake.folder}/prompts/")  # where every worker can read it
    write_run(gate.lake, spec["destination"]["run"], seed=3)
    queue.finish(claimed, {"rows": 1200})
    assert gate.wait(ada, handle) == "done"
    (run,) = decode(ada.get(f"{P}/jobs/{handle}/made").content).values
    view = decode(ada.get(f"{P}/runs/{run.hex()}").content)
    assert (view.name, view.model, view.rows) == ("fresh", "m", 1200)
    assert decode(ada.get(f"{P}/jobs/{handle}/made").content).values == (run,)
    assert run in decode(ada.get(f"{P}/runs").content).values
    assert run not in decode(eve.get("/api/v1/p/two/runs").content).values
    # two that wait under one name would resolve to the same run: the second is refused, and another project's is not
    waiting = gate.submit(ada, job | {"name": "twice"})
    refused = ada.post(f"{P}/jobs", json={"job": job | {"name": "twice"}})
    assert decode(refused.content) == Failure(ErrorCode.BAD_REQUEST)
    mine = {"kind": "capture", "model": "m", "name": "twice", "prompts": [{"id": "a", "text": "b"}], "hooks": [HOOK]}
    files = set((gate.folder / "lake" / "prompts").iterdir())
    refused = ada.post(f"{P}/jobs", json={"job": mine})
    assert decode(refused.content) == Failure(ErrorCode.BAD_REQUEST)
    assert set((gate.folder / "lake" / "prompts").iterdir()) == files  # what it brought is not kept
    assert gate.submit(eve, mine, "two")
    ada.delete(f"{P}/jobs/{waiting}")
    assert gate.submit(ada, job | {"name": "twice"})  # the first one will never be
    for wrong in ({"name": "fresh"}, {"model": "other"}, {"model": "nobody"}, {"adapter": "x"}, {"prompts": "0" * 16}):
        reply = ada.post(f"{P}/jobs", json={"job": job | {"name": "more"} | wrong})
        assert reply.status_code in (400, 404), wrong


def test_each_step_of_a_generation_waits_for_a_worker_of_its_own_model(tmp_path):
    gate, kinds = Gatehouse(tmp_path), ["capture", "generate", "judge"]
    models = {"m": Weights(path="/models/writer"), "other": Weights(path="/models/judge/")}
    gate.settings = gate.settings.model_copy(update={"models": models})
    gate.projects.create("both", models=list(models), by="ada")
    token, credential = new_worker("gpu", kinds)
    workshop = Workshop(gate.settings)
    job = {
        "kind": "generate", "model": "m", "prompts": [{"id": f"p{n}", "text": f"text {n}"} for n in range(4)],
        "sampling": {"max_tokens": 5},
        "score": {"template": "{completion} Good?", "choices": [" yes", " no"], "model": "other"},
    }  # fmt: skip
    with gate, serving(create_queue_app(workshop.queue, [credential])) as address:
        ada, storage = gate.client("ada"), gate.lake.storage

        def claim(model):
            return HttpQueue(address, token).claim(model, kinds, 60, {f"/models/{model}:auto"})

        def state():
            return decode(ada.get(f"/api/v1/p/both/jobs/{handle}").content).state

        handle = gate.submit(ada, job, "both")
        assert (claim("judge"), claim("third"), state()) == (None, None, "queued")
        step = claim("writer")
        assert (step.kind, step.spec["model"]["path"]) == ("generate", "/models/writer")
        table = pd.DataFrame({"prompt": range(4), "sample": 0, "text": "words", "tokens": 1})
        write_completions(storage, handle, table.assign(prompt_tokens=[[1, n] for n in range(4)]))
        HttpQueue(address, token).finish(step, {"completions": 4})
        assert (claim("writer"), gate.work()) == (None, 0)
        step = claim("judge")
        assert (step.kind, step.spec["model"]["path"]) == ("judge", "/models/judge/")
        write_judged(storage, handle, table.assign(choice=[0, 1, 1, 1]))
        HttpQueue(address, token).finish(step, {"judged": 4})
        assert (claim("writer"), claim("judge"), gate.work()) == (None, None, 1)  # the last step is an executor's
        assert gate.wait(ada, handle, "both") == "done"
    workshop.engine.dispose()
