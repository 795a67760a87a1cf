"""Lakes in S3, S3 gone and back, and a lake's disk that fills under a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from millpond.capture.lock import only_capture
from millpond.capture.plan import plan_capture
from millpond.hub.queue import SqlQueue
from millpond.store.artifacts import save_probe
from millpond.store.capture_spec import ModelSection, read_job
from millpond.store.errors import InvalidInput, RunBusy
from millpond.store.lake import Lake, open_lake
from millpond.store.verify import verify_run
from tests.capture.conftest import D_MODEL, HOOK, MODEL, Reference
from tests.capture.serving import TWO_CORES, Server
from tests.store.conftest import S3, s3_server

pytestmark = pytest.mark.slow
COEF, INTERCEPT = np.random.default_rng(5).normal(0, 1, (1, D_MODEL)), np.array([0.5])
OUTAGE_SECONDS = 6.5  # more than the patience after which a worker says that it waits


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    server = S3("seaweedfs", tmp_path_factory.mktemp("s3") / "server")
    with pytest.MonkeyPatch.context() as patch:  # lakes are opened as jobs and servers do it
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
    s3_server.stop(server.folder)


def outage(s3: S3) -> None:
    """S3 stops, in the middle of whatever it does, and comes back."""
    s3_server.kill(s3.folder, "weed", 9)
    time.sleep(OUTAGE_SECONDS)
    s3_server.restart_seaweedfs(s3.folder)


def check_whole(lake: Lake, name: str, tokens: dict[str, list[int]], reference: Reference) -> None:
    """Every prompt once, with rows and scores as Hugging Face has them in a few of them."""
    run = lake[name]
    assert verify_run(run).problems == []
    assert sorted(run.prompts["id"]) == sorted(tokens)
    assert run.prompts.set_index("id")["n_rows"].to_dict() == {key: len(ids) for key, ids in tokens.items()}
    some = run.select(list(tokens)[:3])
    right = np.concatenate([reference.residuals(tokens[key])[3] for key in some.prompts["id"]])
    rows = some[HOOK.format(3)].values
    assert np.linalg.norm(rows - right) < 1e-4 * np.linalg.norm(right)
    scores = rows.astype(np.float64) @ COEF.T + INTERCEPT
    np.testing.assert_allclose(some.reads["p"]["scores"].values, scores, atol=1e-5 * np.abs(scores).max(), rtol=0)


def test_a_job_waits_for_s3_and_loses_nothing(s3: S3, tmp_path: Path, reference: Reference) -> None:
    lake = open_lake(s3.url("jobs"), create=True)
    save_probe(lake, "p", COEF, INTERCEPT)
    rng = np.random.default_rng(0)
    sent = {f"p{n}": [0, *rng.integers(2, 4096, 99).tolist()] for n in range(400)}
    prompts, path = tmp_path / "prompts.jsonl", tmp_path / "job.toml"
    prompts.write_text("".join(json.dumps({"id": key, "token_ids": ids}) + "\n" for key, ids in sent.items()))
    path.write_text(f"""
        model = {{path = "{MODEL}", dtype = "float32"}}
        prompts = {{path = "{prompts}"}}
        destination = {{lake = "{lake.url}", run = "far", chunk_rows = 64, shard_rows = 4096}}
        engine = {{kv_cache_memory_bytes = {1 << 28}}}
        [capture]
        hooks = ["{HOOK.format(3)}"]
        reads = [{{read = "probe", artifact = "p", hook = "{HOOK.format(3)}"}}]
    """)
    command = [sys.executable, "-m", "millpond.cli", "capture", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        commits = lake.run_storage("far")
        while not list(commits.list("commits")):
            assert process.poll() is None, process.stderr and process.stderr.read()[-3000:]
            time.sleep(0.02)
        outage(s3)
        held = lake["far"].prompts  # what is visible is whole
        assert (held["n_rows"] == 100).all()
        _, printed = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert process.returncode == 0, printed[-3000:]
    assert lake["far"].state == "sealed"
    check_whole(lake, "far", sent, reference)
    assert "'far': the lake has not answered for 5 s" in printed
    assert "'far': the lake answers again" in printed
    assert not lake.run_storage("far").exists("capture.json")


def test_one_capture_a_run_in_s3_too(s3: S3) -> None:
    lake = open_lake(s3.url("locks"), create=True)
    lake.create_run("run", hooks=(HOOK.format(0),), d_model=4, dtype="float32")
    run = lake.run_storage("run")
    with only_capture(run) as check:
        check()
        with pytest.raises(RunBusy, match="captured by another process"), only_capture(run):
            pass
    with only_capture(run):
        pass


WORKER = """
import sys
from millpond.capture import lock, worker_jobs
from millpond.hub.queue import SqlQueue
from millpond.store.capture_spec import ModelSection
from millpond.store.lake import open_lake

lock.LEASE_SECONDS = worker_jobs.LEASE_SECONDS = 6.0
database, lake, model, hook = sys.argv[1:]

def told(line):
    if "is ready" in line:  # the worker that held the run was killed just now
        open_lake(lake).run_storage("held").put("capture.json", b"{}")
    print(line)

engine = {"kv_cache_memory_bytes": 1 << 28}
config = worker_jobs.WorkerConfig(ModelSection(path=model, dtype="float32"), lake, (hook,), engine, lease_seconds=1.0)
assert worker_jobs.work(SqlQueue(database), config, until_empty=True, told=told) == 1
"""


def test_a_worker_waits_until_the_hold_of_a_killed_one_has_run_out(s3: S3, tmp_path: Path) -> None:
    """The hold lasts longer here than two of the worker's own leases; the process is its own, for it changes constants."""
    lake, hook = open_lake(s3.url("held"), create=True), HOOK.format(0)
    prompts = [{"id": "a", "token_ids": [0, 5, 6]}, {"id": "b", "token_ids": [0, 5, 6, 7]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    model = ModelSection(path=str(MODEL), dtype="float32")
    spec = {
        "model": model.model_dump(),
        "capture": {"hooks": [hook]},
        "prompts": {"path": str(tmp_path / "prompts.jsonl")},
        "destination": {"lake": lake.url, "run": "held"},
        "intervene": [{"op": "add", "hook": hook, "vector": [1.0] * D_MODEL, "positions": [3]}],
    }
    database = f"sqlite:///{tmp_path}/hub.db"
    queue = SqlQueue(database)
    job = queue.submit("capture", spec, model=model.base)
    command = [sys.executable, "-c", WORKER, database, lake.url, str(MODEL), hook]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    result = queue.get(job).result
    queue.engine.dispose()
    assert result is not None
    assert len(lake["held"].prompts) == result["prompts"] == 2
    assert lake["held"].provenance["interventions_missed"] == result["missed"] == [1]


def test_a_store_that_is_not_there_is_refused_before_anything_is_loaded(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("millpond.capture.plan._PATIENCE_SECONDS", 0.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "token_ids": [0, 5, 6]}\n')
    path = tmp_path / "job.toml"
    path.write_text(f"""
        model = {{path = "{MODEL}"}}
        prompts = {{path = "{tmp_path}/prompts.jsonl"}}
        destination = {{lake = "{s3.url("nowhere")}", run = "run"}}
        capture = {{hooks = ["{HOOK.format(0)}"]}}
    """)
    with pytest.raises(InvalidInput, match=r"destination\.lake 's3://lakes/nowhere' cannot be used"):
        plan_capture(read_job(path))


def told(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()["kv_transfer_params"]["millpond"]
    return found


def test_a_server_waits_for_s3_and_loses_nothing(s3: S3, tmp_path: Path, reference: Reference) -> None:
    """Requests that are under way while S3 is gone are answered when it is back; two engines and two API servers."""
    lake = open_lake(s3.url("served"), create=True)
    save_probe(lake, "p", COEF, INTERCEPT)
    ranks = ["--data-parallel-size", "2", "--api-server-count", "2"]
    server = Server(tmp_path, *ranks, lake=lake.url, environment=TWO_CORES)
    sent: dict[str, list[int]] = {}
    responses: list[httpx.Response] = []
    wish = {
        "run": "far",
        "hooks": [HOOK.format(3)],
        "reads": [{"read": "probe", "artifact": "p", "hook": HOOK.format(3)}],
    }
    try:

        def client(number: int) -> None:
            rng = np.random.default_rng(number)
            until = time.monotonic() + OUTAGE_SECONDS + 3
            while time.monotonic() < until:
                key, ids = f"c{number}-{len(sent)}", [0, *rng.integers(2, 4096, 50).tolist()]
                sent[key] = ids
                body = {"prompt": ids, "max_tokens": 1}
                responses.append(server.post(body, millpond={**wish, "id": key}))

        client_threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        told(server.post({"prompt": [0, 5, 6], "max_tokens": 1}, millpond={**wish, "id": "first"}))
        sent["first"] = [0, 5, 6]
        for thread in client_threads:
            thread.start()
        time.sleep(1)
        outage(s3)
        for thread in client_threads:
            thread.join()
        wrong = server.post(
            {"prompt": [0, 5]}, millpond={"run": "new", "reads": [{**wish["reads"][0], "artifact": "no"}]}
        )
        assert (wrong.status_code, "capture.reads.0.artifact" in wrong.text) == (400, True)
        other = server.post({"prompt": [0, 5]}, millpond={**wish, "reads": [{**wish["reads"][0], "name": "q"}]})
        assert (other.status_code, "other reads than run 'far' has (p)" in other.text) == (400, True)
    finally:
        server.stop()
    assert {told(response)["status"] for response in responses} == {"committed"}
    assert {told(response)["engine"] for response in responses} == {0, 1}
    assert len(responses) == len(sent) - 1
    assert "new" not in lake
    check_whole(lake, "far", sent, reference)
    assert "the lake answers again" in server.log.read_text()


def test_a_full_disk_fails_the_requests_concerned_and_shows_none_of_their_rows(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    namespace = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    mount = ["sh", "-c", f'mount -t tmpfs -o size=64m none {disk} && exec "$@"', "sh"]
    server = Server(tmp_path, lake=str(disk / "lake"), prefix=(*namespace, *mount))
    inside = Path(f"/proc/{server.process.pid}/root{disk}")  # the disk is mounted for the server alone
    long = {"prompt": [0, 7] * 200, "max_tokens": 1}
    try:
        assert told(server.post(long, millpond={"id": "before"}))["rows"] == 400
        with (inside / "filler").open("wb", buffering=0) as filler, suppress(OSError):
            while filler.write(bytes(1 << 16)):
                pass
        failed = server.post(long, millpond={"id": "whole"})
        streamed = server.post({**long, "stream": True}, millpond={"id": "streamed"})
        new_run = server.post(long, millpond={"id": "other", "run": "other"})
        plain = server.post(long)
        (inside / "filler").unlink()
        assert told(server.post(long, millpond={"id": "after"}))["status"] == "committed"
        for response, status in ((failed, 500), (streamed, 200), (new_run, 500)):
            assert response.status_code == status
            assert "No space left on device" in response.text
            assert '"committed"' not in response.text
        assert plain.status_code == 200
        run = open_lake(inside / "lake")["live"]
        assert sorted(run.prompts["id"]) == ["after", "before"]
        assert verify_run(run).problems == []
    finally:
        server.stop()
