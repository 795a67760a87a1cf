"""Passes on a real Dask cluster: the same bits as in this process, whatever happens to the workers."""

import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from distributed import Client, LocalCluster
from tests.analysis.conftest import HOOKS

from millpond.analysis.passes import AlignedRows, Pass, join, run_pass, run_passes, running
from millpond.store.errors import Cancelled, InvalidInput, MemoryTooSmall
from millpond.store.logs import job_id, of_job

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def importable():
    """Workers import this module by name to run its functions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2]))
        yield


@pytest.fixture(scope="module")
def cluster(importable):
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", memory_limit="1GB"
    ) as made:
        yield made


@pytest.fixture(scope="module")
def client(cluster):
    with Client(cluster) as made:
        yield made


def moments(state, x, y):
    z = x @ state
    return {"n": len(x), "gram": x.T @ x, "sum": (z * y).sum(dtype=np.float64), "score": x.T @ np.tanh(z)}


def slow_moments(state, x, y):
    folder, direction = state
    (folder / f"{os.getpid()}-{time.monotonic_ns()}").touch()
    time.sleep(0.02)
    return moments(direction, x, y)


def block_of(state, x, numbers):
    return [(int(numbers[0]), len(x), os.getpid())]


@pytest.fixture(scope="module")
def rows(run):
    y = run.labels["inside"].values.astype(np.float32)
    return AlignedRows(run[HOOKS[1]].chunk({"row": 23}), y, block_bytes=23 * 64)


@pytest.fixture(scope="module")
def direction():
    return np.random.default_rng(3).standard_normal(16).astype(np.float32)


def bits(found):
    return {name: np.asarray(value).tobytes() for name, value in found.items()}


def test_the_same_bits_in_process_on_one_worker_and_on_two(rows, direction, client):
    one = Pass(rows, moments, direction)
    assert one.n_tasks > 40
    with running(in_process=True):
        expected = run_pass(one)
    with running(in_process=True, threads=1):
        assert bits(run_pass(one)) == bits(expected)
    assert bits(run_pass(one)) == bits(expected)
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as single, Client(single) as other:
        assert bits(run_pass(one)) == bits(expected)
        with running(client):
            assert bits(run_pass(one)) == bits(expected)
        with running(other):
            assert bits(run_pass(one)) == bits(expected)


def test_a_killed_worker_changes_nothing(rows, direction, tmp_path):
    quiet = tmp_path / "quiet"
    loud = tmp_path / "loud"
    quiet.mkdir()
    loud.mkdir()
    with running(in_process=True):
        expected = run_pass(Pass(rows, slow_moments, (quiet, direction)))
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", memory_limit="1GB") as made,
        Client(made),
    ):
        killed = []

        def workers():
            return {int(path.name.split("-")[0]) for path in loud.iterdir()}

        def kill():
            while len(workers()) < 2 or len(list(loud.iterdir())) < 15:
                time.sleep(0.01)
            for victim in workers():  # every worker: no copy of anything is left
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)

        killer = threading.Thread(target=kill)
        killer.start()
        found = run_pass(Pass(rows, slow_moments, (loud, direction)))
        killer.join()
    assert bits(found) == bits(expected)
    assert len(killed) == 2
    assert workers() - set(killed)
    assert len(list(loud.iterdir())) > len(rows.blocks)  # some blocks were mapped twice


def test_each_block_is_mapped_once_in_order_and_next_to_the_data(run, client):
    rows = AlignedRows(run[HOOKS[0]], range(len(run)), block_bytes=64 * 64)
    parts = run_pass(Pass(rows, block_of, None, join))
    assert [(first, count) for first, count, _ in parts] == [(b.start, b.stop - b.start) for b in rows.blocks]
    assert os.getpid() not in {pid for _, _, pid in parts}
    # what goes to the cluster is a plan, not rows
    assert len(pickle.dumps(rows.sources)) < 10_000 < rows.n_rows * 64 / 10


def job_of(state, x, numbers):
    return [job_id()]


def test_workers_log_for_the_job(run, client):
    rows = AlignedRows(run[HOOKS[0]], range(len(run)), block_bytes=64 * 64)
    with of_job("4f00"):
        assert set(run_pass(Pass(rows, job_of, None, join))) == {"4f00"}
    assert set(run_pass(Pass(rows, job_of, None, join))) == {""}
    handlers = client.run(lambda: [type(one.formatter).__name__ for one in logging.getLogger("millpond").handlers])
    assert set(map(tuple, handlers.values())) <= {(), ("JsonLines",)}  # once, where a task of a job has run
    assert ["JsonLines"] in handlers.values()


def test_progress_counts_every_block(rows, direction, client):
    seen = []
    with running(on_progress=lambda what, done, total: seen.append((what, done, total))):
        run_passes([Pass(rows, moments, direction)] * 2, description="two")
    total = 2 * len(rows.blocks)
    assert seen[0] == ("two", 0, total)
    assert seen[-1] == ("two", total, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


@pytest.mark.parametrize("in_process", [True, False])
def test_a_cancelled_pass_stops_soon(rows, direction, client, tmp_path, in_process):
    cancel = threading.Event()

    def stop_at_five():
        while len(list(tmp_path.iterdir())) < 5:
            time.sleep(0.01)
        cancel.set()

    watcher = threading.Thread(target=stop_at_five)
    watcher.start()
    with (
        running(cancel=cancel, in_process=in_process, threads=1),
        pytest.raises(Cancelled, match="my pass was cancelled"),
    ):
        run_pass(Pass(rows, slow_moments, (tmp_path, direction)), description="my pass")
    watcher.join()
    time.sleep(0.3)
    mapped = len(list(tmp_path.iterdir()))
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) == mapped < len(rows.blocks) / 2


def ask(address, wanted):
    with Client(address):
        run_pass(wanted)


def test_the_tasks_of_a_process_that_was_killed_stop_soon(rows, direction, cluster, client, tmp_path):
    """As an executor that could not be told to stop: nobody is left to tell the workers of a cluster that goes on."""
    wanted = Pass(rows, slow_moments, (tmp_path, direction), result_bytes=1 << 27)  # tasks of several blocks
    process = multiprocessing.get_context("spawn").Process(target=ask, args=(cluster.scheduler_address, wanted))
    process.start()
    while len(list(tmp_path.iterdir())) < 3:
        time.sleep(0.01)
    process.kill()
    process.join()
    time.sleep(0.3)
    mapped = len(list(tmp_path.iterdir()))
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) == mapped < len(rows.blocks) / 2


def test_what_a_worker_cannot_hold_is_refused_before_it_runs(rows, direction, client, tmp_path):
    wide = Pass(rows, slow_moments, (tmp_path, direction), result_bytes=300_000_000)
    with pytest.raises(MemoryTooSmall, match=r"correlations needs up to 1\.5 GB .* but a worker has 1\.0 GB"):
        run_pass(wide, description="correlations")
    with running(in_process=True, threads=2, memory_limit=10**9), pytest.raises(MemoryTooSmall, match="this process"):
        run_pass(wide)
    assert not list(tmp_path.iterdir())


def test_an_error_in_a_task_reaches_the_caller(rows, client):
    with pytest.raises(ValueError, match="matmul"):
        run_pass(Pass(rows, moments, np.ones(5)))


def test_a_cluster_without_workers_is_named(rows, direction, monkeypatch):
    monkeypatch.setattr("millpond.analysis.execution._WORKERS_TIMEOUT", 1)
    with (
        LocalCluster(n_workers=0, dashboard_address=":0") as empty,
        Client(empty),
        pytest.raises(InvalidInput, match="no workers"),
    ):
        run_pass(Pass(rows, moments, direction))


def test_large_statistics_make_fewer_tasks(rows):
    assert Pass(rows, moments).n_tasks == min(64, len(rows.blocks))
    assert Pass(rows, moments, result_bytes=1 << 28).n_tasks == 4
    assert Pass(rows, moments, result_bytes=1 << 25).n_tasks == 32
    spans = Pass(rows, moments, result_bytes=1 << 28).ranges()
    assert spans[0][0] == 0
    assert spans[-1][1] == len(rows.blocks)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
