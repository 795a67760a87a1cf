"""The writing thread: the cores that it uses, and what it says is committed."""

import json
import os
import subprocess
import sys
import time

import numpy as np

import millpond
from millpond.capture.sink import LakeSink
from millpond.store.errors import StorageFailed
from millpond.store.segment import CapturedRequest, RunWriter

HOOK = "blocks.0.hook_resid_post"

BOUND = """
import json, os
import numpy as np
from millpond.capture.sink import LakeSink
from millpond.store.errors import CaptureFailed
from millpond.store.segment import CapturedRequest

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # as OpenMP binds a worker's process
seen = []

def open_run(name):
    seen.append(sorted(os.sched_getaffinity(0)))
    raise CaptureFailed("no run here")

sink = LakeSink(open_run)
steps = np.arange(2, dtype=np.int32)
sink.put("r", "c", CapturedRequest("p", steps, 2, steps, {"h": np.zeros((2, 4), np.float32)}))
sink.commit()
print(json.dumps([seen, sorted(os.sched_getaffinity(0))]))
"""


def test_the_writing_thread_runs_where_the_parent_process_may():
    mine = sorted(os.sched_getaffinity(0))
    done = subprocess.run([sys.executable, "-c", BOUND], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [[mine], mine[:1]]


def request(name, n):
    positions = np.arange(n, dtype=np.int32)
    return CapturedRequest(name, positions, n, positions, {HOOK: np.ones((n, 4), np.float32)})


def test_only_what_a_commit_holds_is_told_where_a_segment_ends_with_later_requests(tmp_path):
    lake = millpond.open(tmp_path / "lake", create=True)
    spec = lake.create_run("a", hooks=(HOOK,), d_model=4, dtype="float32", chunk_rows=4, shard_rows=16)
    sink = LakeSink(lambda _: RunWriter(lake.run_storage("a"), spec))
    for name, rows in {"first": 13, "waits": 2, "fills": 3}.items():  # 13 + 3 are a shard
        sink.put("a", f"capture-{name}", request(name, rows))
    told, deadline = {}, time.monotonic() + 30
    while not told and time.monotonic() < deadline:
        told, _ = sink.poll()
        time.sleep(0.01)
    assert told == {"capture-first": 13, "capture-fills": 3}
    assert lake["a"].prompts["id"].tolist() == ["first", "fills"]
    assert sink.commit() == (18, 3, None)
    assert sink.poll() == ({"capture-waits": 2}, {})


def test_what_was_committed_before_a_failure_in_the_same_call_is_told_so(tmp_path):
    """The request that fills a segment commits it; then one that waited begins the next, which fails."""
    lake = millpond.open(tmp_path / "lake", create=True)
    spec = lake.create_run("a", hooks=(HOOK,), d_model=4, dtype="float32", chunk_rows=4, shard_rows=16)

    class FullAfterOneSegment(RunWriter):
        def _open_segment(self):
            if self.committed_prompts:
                raise StorageFailed(28, "No space left on device", "segment")
            return super()._open_segment()

    sink = LakeSink(lambda _: FullAfterOneSegment(lake.run_storage("a"), spec))
    for name, rows in {"first": 13, "waits": 2, "fills": 3}.items():
        sink.put("a", f"capture-{name}", request(name, rows))
    assert sink.commit() == (16, 2, "writing to the lake failed: No space left on device")
    committed, failed = sink.poll()
    assert committed == {"capture-first": 13, "capture-fills": 3}
    assert set(failed) == {"capture-waits"}
    assert lake["a"].prompts["id"].tolist() == ["first", "fills"]
