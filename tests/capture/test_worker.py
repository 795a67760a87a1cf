"""Jobs from the hub's queue, over HTTP: adapters in one batch, reuse, a killed worker, and the check against Hugging Face."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import millpond as mp
from millpond.capture.reference import check_reference
from millpond.capture.worker_jobs import base_names
from millpond.cli import main
from millpond.hub.limits import Limits
from millpond.hub.queue import SqlQueue
from millpond.hub.queue_api import create_queue_app, new_worker
from millpond.store.capture_spec import ModelSection
from millpond.store.errors import InvalidInput
from millpond.store.http_queue import HttpQueue
from millpond.store.queue import FolderQueue, QueuedJob
from millpond.store.run import Run
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter
from millpond.store.verify import verify_run
from tests.capture.conftest import HOOK, MODEL, N_LAYERS, Reference
from tests.capture.serving import make_adapter, merge_by_hand
from tests.queue_serving import serving

pytestmark = pytest.mark.slow
MIDDLE = "blocks.2.hook_resid_mid"


@dataclass(frozen=True)
class Queue:
    """A queue's server; the worker's token may claim, the operator's submit and look. Of `timed`, jobs may run for six seconds."""

    address: str
    worker_token: str
    operator: HttpQueue
    timed: SqlQueue


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Queue]:
    worker_token, worker = new_worker("gpu", ["capture"])
    operator_token, operator = new_worker("operator", ["capture"], submit=True)
    sql = SqlQueue(f"sqlite:///{tmp_path_factory.mktemp('queue') / 'hub.db'}")
    with serving(create_queue_app(sql, [worker, operator])) as address:
        timed = SqlQueue(sql.engine, limits=Limits(seconds=6))
        yield Queue(address, worker_token, HttpQueue(address, operator_token), timed)
    sql.engine.dispose()


class Worker:
    """`millpond worker` in a process group of its own."""

    def __init__(self, folder: Path, queue: Queue, *arguments: str) -> None:
        # fmt: off
        command = [
            sys.executable, "-m", "millpond.cli", "worker", "--queue", queue.address, "--model", str(MODEL),
            "--lake", str(folder / "lake"), "--dtype", "float32", "--hooks", "blocks.*.hook_resid_post", MIDDLE,
            "--engine", json.dumps({"kv_cache_memory_bytes": 1 << 28, "max_num_batched_tokens": 512}),
            "--max-adapters", "2", "--max-rank", "8", "--lease", "3", *arguments,
        ]
        # fmt: on
        self.log = folder / "worker.log"
        with self.log.open("ab") as log:
            environment = os.environ | {"MILLPOND_WORKER_TOKEN": queue.worker_token}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def prompts(python_prompts: list[list[int]]) -> dict[str, list[int]]:
    return {f"p{number}": ids for number, ids in enumerate(python_prompts) if 5 < len(ids) < 200}


@pytest.fixture(scope="module")
def jobs(
    tmp_path_factory: pytest.TempPathFactory, prompts: dict[str, list[int]], queue: Queue
) -> tuple[Path, dict[str, QueuedJob]]:
    """Every job's end, after the first worker was killed in the middle of the long one."""
    folder = tmp_path_factory.mktemp("worker")
    first = make_adapter(folder / "first", 4, 1)
    second = make_adapter(folder / "second", 8, 2)
    rng = np.random.default_rng(0)
    long = {f"n{n}": [0, *rng.integers(2, 4096, 100).tolist()] for n in range(600)}
    names = list(prompts)
    again = {f"same-{name}": prompts[name] for name in names[:3]}
    again |= {f"prefix-{name}": prompts[name][:-3] for name in names[3:6]}
    again |= {"new": [*prompts[names[0]], 7]}

    def submit(run: str, file: dict[str, list[int]], **sections: Any) -> str:
        path = folder / f"{run}.jsonl"
        path.write_text("".join(json.dumps({"id": name, "token_ids": ids}) + "\n" for name, ids in file.items()))
        job: dict[str, Any] = {
            "model": {"path": str(MODEL), "dtype": "float32"},
            "capture": {"hooks": ["blocks.*.hook_resid_post", MIDDLE]},
            "prompts": {"path": str(path)},
            "destination": {"lake": str(folder / "lake"), "run": run, "chunk_rows": 64, "shard_rows": 2048},
        }
        for section, values in sections.items():
            job[section] = {**job[section], **values} if section in job else values
        submits = queue.timed if run == "timed" else queue.operator
        return submits.submit("capture", job, model=ModelSection(**job["model"]).base)

    ids = {"long": submit("long", long)}
    worker = Worker(folder, queue)
    try:
        deadline = time.monotonic() + 200
        while not list((folder / "lake" / "runs").glob("long/commits/[!.]*.json")):
            assert worker.process.poll() is None, worker.log.read_text()[-3000:]
            assert time.monotonic() < deadline, worker.log.read_text()[-3000:]
            time.sleep(0.02)
    finally:
        worker.kill()
    held = mp.open(folder / "lake")["long"]
    assert (held.state, 0 < len(held.prompts) < len(long)) == ("open", True)
    ids["timed"] = submit("timed", {f"t{n}": [0, *rng.integers(2, 4096, 100).tolist()] for n in range(6000)})
    paired = [{"run": "first", "adapter": str(first)}, {"run": "second", "adapter": str(second)}]
    ids["paired"] = submit("base", prompts, paired=paired)
    ids["reuse"] = submit("again", again, destination={"reuse": ["base", "first"]}, capture={"positions": "all"})
    ids["no tap"] = submit("no-tap", prompts, capture={"hooks": ["blocks.1.hook_mlp_out"]})
    ids["other dtype"] = submit("other-dtype", prompts, model={"dtype": "bfloat16"})
    ids["engine"] = submit("engine", prompts, engine={"max_num_seqs": 3})
    last = Worker(folder, queue, "--until-empty")
    try:
        assert last.process.wait(300) == 0, last.log.read_text()[-3000:]
    finally:
        if last.process.poll() is None:
            last.kill()
    return folder, {name: queue.operator.get(job_id) for name, job_id in ids.items()}


def rows_of(run: Run, prompt_id: str) -> tuple[list[int], np.ndarray]:
    part = run.select((run.prompts["id"] == prompt_id).to_numpy())
    rows = np.stack([part[HOOK.format(layer)].values for layer in range(N_LAYERS)])
    return part.tokens["token_id"].values.tolist(), rows


def test_a_killed_worker_loses_and_repeats_nothing(jobs: tuple[Path, dict[str, QueuedJob]]) -> None:
    folder, ends = jobs
    assert (ends["long"].state, ends["long"].attempts) == ("finished", 2)
    run = mp.open(folder / "lake")["long"]
    assert run.state == "sealed"
    assert sorted(run.prompts["id"]) == sorted(f"n{n}" for n in range(600))
    assert verify_run(run).problems == []
    assert ends["long"].result is not None
    assert ends["long"].result["rows"] == 600 * 101


def test_the_engines_process_logs_for_the_job_too(jobs: tuple[Path, dict[str, QueuedJob]]) -> None:
    """Segments are committed in the engine's process, runs sealed in the worker's own."""
    folder, ends = jobs
    lines = [
        json.loads(line) for line in (folder / "worker.log").read_text().splitlines() if line.startswith('{"time"')
    ]
    found = {(line["event"], line["run"], line.get("job")) for line in lines if "run" in line}
    for run, name in {"long": "long", "again": "reuse"}.items():
        assert ("committed", run, ends[name].id) in found
        assert ("sealed", run, ends[name].id) in found


def test_a_job_that_runs_too_long_is_stopped_and_the_worker_goes_on(jobs: tuple[Path, dict[str, QueuedJob]]) -> None:
    folder, ends = jobs
    assert (ends["timed"].state, ends["timed"].attempts) == ("failed", 1)
    assert str(ends["timed"].error).startswith("TimeLimit: it ran for more than 6 s")
    run = mp.open(folder / "lake")["timed"]
    assert (run.state, 0 < len(run.prompts) < 6000) == ("open", True)
    assert set(run.prompts["n_rows"]) == {101}
    assert verify_run(run).problems == []
    assert ends["paired"].submitted > ends["timed"].submitted
    assert ends["paired"].state == "finished", ends["paired"].error  # by the same worker


def test_jobs_that_the_worker_cannot_do_fail_with_the_field(jobs: tuple[Path, dict[str, QueuedJob]]) -> None:
    folder, ends = jobs
    for name, word in {"no tap": "blocks.1.hook_mlp_out", "engine": "max_num_seqs"}.items():
        assert ends[name].state == "failed"
        assert word in str(ends[name].error)
    assert not {"no-tap", "other-dtype", "engine"} & set(mp.open(folder / "lake"))


def test_a_job_of_a_model_that_no_worker_runs_is_left_in_the_queue(jobs: tuple[Path, dict[str, QueuedJob]]) -> None:
    _, ends = jobs
    waits = ends["other dtype"]
    assert (waits.state, waits.attempts, waits.model) == ("queued", 0, f"{MODEL}:bfloat16")


def test_a_submitted_job_is_for_the_workers_of_its_folder_however_that_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "link").symlink_to("weights")
    folder = FolderQueue("queue")
    rest = '[capture]\nhooks = ["blocks.0.hook_resid_post"]\n[prompts]\npath = "p.txt"\n[destination]\nlake = "lake"\nrun = "r"\n'
    own = base_names(ModelSection(path=str(tmp_path / "link"), dtype="float32"))
    for path in ("./link/", str(tmp_path / "link"), str(tmp_path / "weights")):
        Path("job.toml").write_text(f'[model]\npath = "{path}"\ndtype = "float32"\n{rest}')
        assert main(["submit", "queue", "job.toml"]) == 0
        job_id = capsys.readouterr().out.strip()
        assert main(["jobs", "queue"]) == 0
        assert "waits for a worker of " in capsys.readouterr().out
        for other in ({"path": "weights2", "dtype": "float32"}, {"path": path}):
            assert folder.claim("other", {"capture"}, 60, base_names(ModelSection(**other))) is None
        claimed = folder.claim("own", {"capture"}, 60, own)
        assert claimed is not None
        assert claimed.id == job_id
        folder.finish(claimed, {})


def test_paired_runs_hold_the_same_prompts_through_each_adapter(
    jobs: tuple[Path, dict[str, QueuedJob]], prompts: dict[str, list[int]]
) -> None:
    folder, ends = jobs
    assert ends["paired"].state == "finished", ends["paired"].error
    lake = mp.open(folder / "lake")
    for name in ("base", "first", "second"):
        truth = Reference(torch.float32)
        if name != "base":
            merge_by_hand(truth.model, folder / name)
        run = lake[name]
        assert run.prompts["id"].tolist() == list(prompts)  # aligned
        assert run.provenance["paired"] == [other for other in ("base", "first", "second") if other != name]
        for prompt_id in list(prompts)[:4]:
            tokens, rows = rows_of(run, prompt_id)
            assert tokens == prompts[prompt_id]
            right = truth.residuals(tokens)
            assert (np.linalg.norm(rows - right, axis=(1, 2)) / np.linalg.norm(right, axis=(1, 2))).max() < 1e-4


def test_reused_rows_are_the_stored_ones(
    jobs: tuple[Path, dict[str, QueuedJob]], prompts: dict[str, list[int]], reference: Reference
) -> None:
    """Whole prompts and prefixes are taken from the base's run, bit for bit; only the new prompt is computed."""
    folder, ends = jobs
    assert ends["reuse"].result is not None, ends["reuse"].error
    new = [*prompts[next(iter(prompts))], 7]
    assert (ends["reuse"].result["reused"], ends["reuse"].result["tokens"]) == (6, len(new))
    lake = mp.open(folder / "lake")
    run, base = lake["again"], lake["base"]
    assert verify_run(run).problems == []
    for prompt_id in run.prompts["id"]:
        tokens, rows = rows_of(run, prompt_id)
        if prompt_id == "new":
            assert tokens == new
            np.testing.assert_allclose(rows, reference.residuals(new), rtol=1e-3, atol=1e-3)
            continue
        kind, _, source = prompt_id.partition("-")
        length = len(prompts[source]) - (3 if kind == "prefix" else 0)
        source_tokens, source_rows = rows_of(base, source)
        assert tokens == source_tokens[:length]
        np.testing.assert_array_equal(rows, source_rows[:, :length])


def test_verify_recomputes_a_sample(
    jobs: tuple[Path, dict[str, QueuedJob]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = jobs
    lake = mp.open(folder / "lake")
    assert main(["verify", str(folder / "lake"), "base", "second", "--reference", "--prompts", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("3 prompts against Hugging Face") == 2
    assert printed.count("hook_resid_post") == 2 * N_LAYERS
    assert printed.count(MIDDLE) == 2
    with pytest.raises(InvalidInput, match="is not the one"):
        check_reference(lake["second"], adapter=folder / "first")
    base = lake["base"]
    spec = lake.create_run(
        "wrong", hooks=base.hooks, d_model=base.d_model, dtype="float32", provenance=dict(base.provenance)
    )
    part = base.select(np.arange(len(base.prompts)) < 2)
    tokens = part.tokens.compute()
    writer, begin = RunWriter(lake.run_folder("wrong"), spec), 0
    for prompt_id, count in part.prompts[["id", "n_rows"]].itertuples(index=False, name=None):
        rows = slice(begin, begin := begin + count)
        activations = {hook: part[hook].values[rows] for hook in base.hooks}
        activations[MIDDLE] = activations[MIDDLE].copy()
        activations[MIDDLE][0, 0] += 0.5
        ids = tokens["token_id"].values[rows]
        writer.append(CapturedRequest(prompt_id, ids, count, np.arange(count, dtype=np.int32), activations))
    writer.commit()
    seal_run(lake.run_folder("wrong"), expected_rows=len(part))
    check = check_reference(lake["wrong"])
    assert [error.hook for error in check.errors if not error.ok] == [MIDDLE]
    assert max(error.max_abs for error in check.errors) == pytest.approx(0.5, abs=1e-2)
    assert main(["verify", str(folder / "lake"), "wrong", "--reference"]) == 1
