import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from millpond.store.collect import collect_run
from millpond.store.errors import CaptureFailed, InvalidInput
from millpond.store.lake import open_lake
from millpond.store.objects import open_storage
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter
from millpond.store.verify import verify_run

HOOK = "blocks.0.hook_resid_post"


def request(name, n, value=1.0, **changes):
    fields = {
        "id": name,
        "token_ids": np.arange(n, dtype=np.int32),
        "n_prompt_tokens": n,
        "positions": np.arange(n, dtype=np.int32),
        "activations": {HOOK: np.full((n, 4), value, np.float32)},
    }
    return CapturedRequest(**fields | changes)


@pytest.fixture
def lake(tmp_path):
    lake = open_lake(tmp_path / "lake", create=True)
    lake.create_run("a", hooks=(HOOK,), d_model=4, dtype="float32", chunk_rows=4, shard_rows=8)
    return lake


def writer_of(lake, segment_rows=None):
    return RunWriter(lake.run_folder("a"), lake["a"].plan.spec, segment_rows)


def test_rows_are_visible_from_the_commit_on(lake):
    writer = writer_of(lake, segment_rows=100)
    writer.append(request("p", 5))
    assert lake["a"].n_rows == 0
    writer.commit()
    assert lake["a"].prompts["id"].tolist() == ["p"]
    writer.append(request("q", 5))
    writer.discard()
    writer.commit()
    assert (lake["a"].n_rows, writer.committed_rows, writer.committed_prompts) == (5, 5, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": np.array([0, 3], np.int32)}, "must ascend from 0 to below 3"),
        ({"positions": np.array([-1, 1], np.int32)}, "must ascend"),
        ({"positions": np.array([1, 1], np.int32)}, "must ascend"),
        ({"activations": {}}, f"lacks or adds {HOOK}"),
        ({"activations": {HOOK: np.zeros((3, 4), np.float16)}}, "has float16 rows"),
        ({"activations": {HOOK: np.zeros((2, 4), np.float32)}}, r"of shape \(2, 4\)"),
    ],
)
def test_a_request_that_does_not_fit_changes_nothing(lake, changes, message):
    writer = writer_of(lake)
    writer.append(request("p", 2))
    with pytest.raises(InvalidInput, match=message):
        writer.append(request("q", 3, **changes))
    writer.append(request("r", 2))
    writer.commit()
    assert lake["a"].prompts["id"].tolist() == ["p", "r"]
    assert verify_run(lake["a"]).ok


def test_two_writers_at_once_are_both_visible(lake):
    def fill(name):
        writer = writer_of(lake, segment_rows=6)
        for number in range(12):
            writer.append(request(f"{name}{number}", 3, value=number))
        writer.commit()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fill, "xy"))
    run = lake["a"]
    assert sorted(run.prompts["id"]) == sorted(f"{name}{number}" for name in "xy" for number in range(12))
    numbers = run.prompts["id"].str[1:].astype(float)
    assert np.array_equal(run[HOOK].values[:, 0], numbers[run.tokens["prompt"].values])
    assert len(list((lake.run_folder("a") / "commits").iterdir())) == 12
    assert verify_run(run).ok


def test_a_sealed_run_refuses_writers(lake):
    early = writer_of(lake)
    early.append(request("p", 3))
    seal_run(lake.run_folder("a"))
    with pytest.raises(CaptureFailed, match="was sealed before 3 rows were committed"):
        early.commit()
    with pytest.raises(InvalidInput, match="run 'a' is sealed and cannot grow; capture into a new run"):
        writer_of(lake).append(request("q", 3))
    assert (lake["a"].n_rows, lake["a"].state) == (0, "sealed")


KILLED = """
import sys
import numpy as np
import millpond
from millpond.store.segment import CapturedRequest, RunWriter
folder, name = sys.argv[1:]
lake = millpond.open(folder)
writer = RunWriter(lake.run_folder("a"), lake["a"].plan.spec, segment_rows=12)
for number in range(100_000):
    n = 1 + number % 5
    rows = np.full((n, 4), number, np.float32)
    positions = np.arange(n, dtype=np.int32)
    writer.append(CapturedRequest(f"{name}-{number}", positions, n, positions, {"blocks.0.hook_resid_post": rows}))
    print(writer.committed_prompts, flush=True)
"""


def test_a_killed_writer_leaves_whole_requests_only(lake):
    rng = np.random.default_rng(0)
    acknowledged = 0
    for kill in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(lake.folder), str(kill)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        time.sleep(rng.uniform(0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        lines += process.stdout.readlines()
        process.wait()
        process.stdout.close()
        acknowledged += int([line for line in lines if line.endswith("\n")][-1])
        run = lake["a"]
        assert len(run.prompts) >= acknowledged
        numbers = run.prompts["id"].str.split("-").str[1].astype(int).to_numpy()
        assert np.array_equal(run.prompts["n_rows"], 1 + numbers % 5)
        assert np.array_equal(run[HOOK].values[:, 0], np.repeat(numbers, 1 + numbers % 5))
        assert verify_run(run).problems == []
    sealed = seal_run(lake.run_folder("a"))
    assert len(sealed.prompts) >= acknowledged > 0
    assert verify_run(sealed).ok
    collect_run(open_storage(lake.run_folder("a")), grace_s=0)
    assert not (lake.run_folder("a") / "segments").exists()
    assert verify_run(lake["a"]).ok


FULL = """
import resource, signal, sys
import numpy as np
import millpond
from millpond.store.errors import CaptureFailed
from millpond.store.segment import CapturedRequest, RunWriter
limit = int(sys.argv[2])
lake = millpond.open(sys.argv[1])
writer = RunWriter(lake.run_folder("a"), lake["a"].plan.spec, segment_rows=10**6)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
positions = np.arange(6, dtype=np.int32)
def fill():
    for number in range(3):
        rows = np.ones((6, 4), np.float32)
        writer.append(CapturedRequest(f"q{number}", positions, 6, positions, {"blocks.0.hook_resid_post": rows}))
    writer.commit()
try:
    fill()
except OSError as error:
    print(error.strerror)
else:
    sys.exit("the disk was not full")
try:
    writer.commit()
except CaptureFailed as error:
    print(error)
writer.discard()
"""


@pytest.mark.parametrize("limit", [0, 50, 100, 200, 1500])
def test_a_full_disk_leaves_nothing_visible(lake, limit):
    writer = writer_of(lake)
    writer.append(request("p", 5))
    writer.commit()
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(lake.folder), str(limit)], capture_output=True, text=True, check=True
    )
    assert "File too large" in done.stdout
    assert "a write into this segment failed before" in done.stdout
    run = lake["a"]
    assert run.prompts["id"].tolist() == ["p"]
    assert len(list((lake.run_folder("a") / "segments").iterdir())) == 1
    assert verify_run(run).ok


def test_what_a_killed_writer_had_in_its_first_shard_is_collected_and_what_a_slow_one_writes_is_not(lake):
    """Neither has finished an object that a listing shows."""
    folder = lake.run_folder("a")
    dead, slow = writer_of(lake, segment_rows=100), writer_of(lake, segment_rows=100)
    dead.append(request("x", 2))
    slow.append(request("y", 2))
    path = f"segments/{dead._segment.id}"
    hidden = [file for file in (folder / path).rglob(".*") if file.is_file()]
    assert len(hidden) == 4
    for file in hidden:
        os.utime(file, (0, 0))
    assert collect_run(lake.run_storage("a"), grace_s=60).paths == [path]
    assert not (folder / path).exists()
    with pytest.raises(CaptureFailed, match="collected as abandoned"):
        dead.commit()
    slow.commit()
    assert lake["a"].prompts["id"].tolist() == ["y"]
