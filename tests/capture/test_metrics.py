"""The metrics of capture, from a sink to which known things happened, to the registry that vLLM serves."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from millpond.capture.metrics import FOLDER, HELP, MetricsFile, capture_metrics, offer_to_prometheus
from millpond.capture.sink import LakeSink
from millpond.store.lake import open_lake
from millpond.store.segment import CapturedRequest, RunWriter

HOOK = "blocks.0.hook_resid_post"


def captured(name: str, rows: int) -> CapturedRequest:
    positions = np.arange(rows, dtype=np.int32)
    return CapturedRequest(name, positions, rows, positions, {HOOK: np.ones((rows, 4), np.float32)})


def samples(text: str) -> dict[str, float]:
    worker = f'pid="{os.getpid()}",rank="0"'
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {
        name.replace(worker + ",", "").replace(f"{{{worker}}}", "").removeprefix("millpond_capture_"): float(value)
        for name, _, value in lines
    }


def test_what_a_sink_did_and_has_before_it_is_told(tmp_path: Path) -> None:
    """Two requests are written, one is lost, and one waits behind a lake that stands still; so does the engine."""
    lake = open_lake(tmp_path / "lake", create=True)
    lake.create_run("kept", hooks=(HOOK,), d_model=4, dtype="float32")
    goes_on = threading.Event()

    def open_run(name: str) -> RunWriter:
        if name == "slow":
            goes_on.wait(60)
        if name != "kept":
            raise OSError(28, "No space left on device")
        return RunWriter(lake.run_storage(name), lake[name].plan.spec)

    sink = LakeSink(open_run, max_bytes=1)
    sink.put("kept", "a", captured("a", 3))
    sink.put("kept", "b", captured("b", 5))
    sink.put("lost", "c", captured("c", 7))
    sink.commit()
    sink.put("slow", "d", captured("d", 2))
    full = threading.Thread(target=lambda: sink.put("kept", "e", captured("e", 2)))
    full.start()
    time.sleep(0.3)
    statistics = {"steps": 9, "rows": 17, "wait_seconds": sink.waited}
    found = samples(capture_metrics(0, statistics, ["kept", "kept", "slow"], {"kept": 1}, sink.counts()))
    goes_on.set()
    full.join()
    assert found["engine_wait_seconds_total"] >= 0.29  # while it waits
    assert found["queue_bytes"] == 2 * 4 * 4 == captured("d", 2).nbytes
    del found["engine_wait_seconds_total"], found["queue_bytes"]
    assert found == {
        "steps_total": 9,
        "staged_rows_total": 17,
        "queue_requests": 0,  # d is with the writing thread
        'open_requests{run="kept"}': 2,
        'open_requests{run="slow"}': 1,
        'committed_rows_total{run="kept"}': 8,
        'committed_requests_total{run="kept"}': 2,
        'failed_requests_total{run="kept",why="capture"}': 1,
        'failed_requests_total{run="lost",why="lake"}': 1,
    }


@pytest.mark.parametrize("servers", ["one", "several"])
def test_vllms_endpoint_shows_the_files_of_living_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, servers: str
) -> None:
    from fastapi import FastAPI
    from prometheus_client import REGISTRY
    from prometheus_client.multiprocess import MultiProcessCollector
    from starlette.testclient import TestClient
    from vllm.entrypoints.serve.instrumentator.metrics import attach_router

    if servers == "several":
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    old = tmp_path / f"millpond_capture_{dead.pid}.prom"
    old.write_text("# TYPE millpond_capture_steps_total counter\nmillpond_capture_steps_total 7\n")
    steps = 0

    def text() -> str:
        return capture_metrics(0, {"steps": steps}, ["live"], {}, None)

    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setattr(MultiProcessCollector, "__init__", MultiProcessCollector.__init__)  # put back at the end
    before = set(REGISTRY._collector_to_names)
    offer_to_prometheus()
    offer_to_prometheus()  # once is enough
    app = FastAPI()
    try:
        attach_router(app)
        client = TestClient(app)
        assert "millpond_capture_steps_total 7" not in client.get("/metrics").text
        file = MetricsFile(tmp_path, text, seconds=0.05)
        assert not old.exists()
        steps = 5
        file.close()
        (tmp_path / f"millpond_capture_{os.getppid()}.prom").write_text(  # another process of the engine
            file.path.read_text().replace('rank="0"', 'rank="1"')
        )
        shown = client.get("/metrics").text
        for rank in (0, 1):
            assert f'millpond_capture_steps_total{{pid="{os.getpid()}",rank="{rank}"}} 5.0' in shown
            assert f'millpond_capture_open_requests{{pid="{os.getpid()}",rank="{rank}",run="live"}} 1.0' in shown
        assert shown.count("# TYPE millpond_capture_steps_total counter") == 1
        assert shown.count(HELP["millpond_capture_open_requests"]) == 1
    finally:
        for one in set(REGISTRY._collector_to_names) - before:
            REGISTRY.unregister(one)
