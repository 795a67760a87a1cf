"""What goes wrong outside: the store fails, is slow, forgets to reply, goes away, refuses, or damages bytes."""

import importlib.util
import json
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

from millpond.store.compaction import compact
from millpond.store.errors import LakeCorrupt, StorageFailed
from millpond.store.lake import open_lake
from millpond.store.objects import open_storage
from millpond.store.run import open_run
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter
from millpond.store.verify import verify_run

HOOK = "blocks.0.hook_resid_post"
SOAK = Path(__file__).parents[2] / "tools" / "soak.py"

_SPEC = importlib.util.spec_from_file_location("fault_proxy", Path(__file__).with_name("fault_proxy.py"))
fault_proxy = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fault_proxy)


def request(number, n=4):
    positions = np.arange(n, dtype=np.int32)
    return CapturedRequest(f"r{number}", positions, n, positions, {HOOK: np.full((n, 4), number, np.float32)})


def new_run(server):
    lake = open_lake(server.url(uuid.uuid4().hex), create=True, **server.options())
    lake.create_run("a", hooks=(HOOK,), d_model=4, dtype="float32", chunk_rows=4, shard_rows=8)
    return lake.run_storage("a")


def check(run, acknowledged):
    opened = open_run(run)
    numbers = opened.prompts["id"].str[1:].astype(int).tolist()
    assert len(set(numbers)) == len(numbers)
    assert set(acknowledged) <= set(numbers)
    assert np.array_equal(opened[HOOK].values[:, 0], np.repeat(numbers, 4))
    assert verify_run(opened).problems == []
    return numbers


def run_soak(*arguments):
    done = subprocess.run([sys.executable, SOAK, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    for found in (report[state] for state in ("open", "followed", "sealed", "collected") if state in report):
        assert found["requests"] + found["used"] >= report["acknowledged"] > 0
        assert (found["lost"], found["doubled"], found["wrong_or_partial"], found["problems"]) == (0, 0, 0, 0), report
    return report


@pytest.mark.parametrize("store", ["local", "ceph"])
def test_kills_lose_nothing(store):
    assert run_soak("--store", store, "--kills", "10", "--seed", "7")["kills"] == 10


def test_kills_lose_nothing_while_used_rows_are_dropped():
    assert run_soak("--store", "local", "--kills", "12", "--seed", "3", "--consume")["followed"]["dropped"] > 0


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize(("store", "kills"), [("local", 120), ("ceph", 120), ("seaweedfs", 100)])
def test_many_kills_lose_nothing(store, kills, consume):
    more = ["--consume"] if consume else []
    print(run_soak("--store", store, "--kills", str(kills), "--seed", str(int(time.time())), *more))


def test_a_store_that_fails_is_slow_and_forgets_to_reply_loses_nothing(ceph):
    run = new_run(ceph)
    faults = {"error": 0.04, "reset": 0.04, "lost": 0.04, "slow": 0.02}
    proxy = fault_proxy.FaultProxy(ceph.environment["AWS_ENDPOINT_URL"], faults)
    try:
        through = open_storage(run.url, **ceph.options(proxy.endpoint))
        acknowledged = []
        for number in range(8):
            writer = RunWriter(through, open_run(through).plan.spec, compact_every=0)
            writer.append(request(number))
            if number:
                writer.append(request(number // 2))
            writer.commit()
            acknowledged += [number, number // 2]
            if number % 4 == 1:
                with (through / "large").stream_writer(str(number), memory=10 << 20) as large:
                    large.write(np.full(12 << 20, number, np.uint8).data)
                (through / "large").copy(str(number), f"{number}-again")
                assert set((through / "large").get(f"{number}-again")) == {number}
                (through / "large").delete([str(number), f"{number}-again"])
            if number % 5 == 4:
                compact(through)
        check(through, acknowledged)
    finally:
        proxy.close()
    assert all(count > 0 for count in proxy.done.values()), proxy.done
    check(run, acknowledged)
    seal_run(run)
    check(run, acknowledged)


def test_a_server_that_stops_and_comes_back_is_waited_for(ceph):
    """The gateway is killed in the middle of writing and started again five seconds later."""
    run = new_run(ceph)
    writer = RunWriter(run, open_run(run).plan.spec, compact_every=2)
    killer = threading.Timer(0.5, lambda: (ceph.kill_gateway(), time.sleep(5), ceph.start_gateway()))
    killer.start()
    number, started = 0, time.monotonic()
    while killer.is_alive() or time.monotonic() - started < 7:
        writer.append(request(number))
        writer.commit()
        number += 1
    killer.join()
    check(run, range(number))


def test_refused_credentials_are_named_and_lose_nothing(ceph):
    """Expired keys: the commit fails, and the same rows go in with new ones."""
    run = new_run(ceph)
    writer = RunWriter(run, open_run(run).plan.spec)
    writer.append(request(1))
    writer.commit()
    expired = open_storage(run.url, **ceph.options() | {"secret": "expired"})
    writer = RunWriter(run, open_run(run).plan.spec)
    writer.append(request(2))
    writer._segment.run = expired
    writer._segment.folder = expired / f"segments/{writer._segment.id}"
    with pytest.raises(StorageFailed, match=r"refuses these credentials .*; renew them"):
        writer.commit()
    assert check(run, [1]) == [1]
    writer = RunWriter(run, open_run(run).plan.spec)
    writer.append(request(2))
    writer.commit()
    assert check(run, [1, 2]) == [1, 2]


def test_a_store_that_is_gone_is_named_after_its_time_is_up():
    storage = open_storage("s3://bucket/x", key="k", secret="s", endpoint_url="http://127.0.0.1:9", retry_timeout_s=1)
    started = time.monotonic()
    with pytest.raises(StorageFailed, match="the store failed"):
        storage.get("y")
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_damaged_shard_is_named_and_the_others_are_read(ceph, damage, codec):
    lake = open_lake(ceph.url(uuid.uuid4().hex), create=True, **ceph.options())
    lake.create_run("a", hooks=(HOOK,), d_model=4, dtype="float32", chunk_rows=4, shard_rows=8, codec=codec)
    run = lake.run_storage("a")
    for number in range(3):
        writer = RunWriter(run, open_run(run).plan.spec)
        writer.append(request(number))
        writer.commit()
    path = sorted(entry.path for entry in run.list("segments") if f"{HOOK}/c/0/0" in entry.path)[1]
    content = bytearray(run.get(path))
    run.put(path, bytes(content[:20]) if damage == "truncated" else bytes([content[0], content[1] ^ 16, *content[2:]]))
    problems = verify_run(open_run(run)).problems
    assert any(path in problem for problem in problems)
    assert all(HOOK in problem for problem in problems)
    opened = open_run(run)
    for number in (0, 2):
        view = opened.select((opened.prompts["id"] == f"r{number}").to_numpy())
        assert np.array_equal(view[HOOK].values, np.full((4, 4), number))
    if damage == "truncated":
        view = opened.select((opened.prompts["id"] == "r1").to_numpy())
        with pytest.raises(LakeCorrupt, match="run millpond verify"):
            _ = view[HOOK].values
