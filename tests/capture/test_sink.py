"""The writing thread keeps off the cores that the model is bound to."""

import json
import os
import subprocess
import sys

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
