"""Kills writers, compactors and garbage collectors of one run at random moments, then proves that nothing was lost.

`python tools/soak.py --store local|ceph|seaweedfs --kills 200` prints one line of JSON. Every request's rows follow
from its id, and every writer may write every request, so many are committed twice on purpose. Writers append to a
file what was acknowledged to them. The collector's grace period is a second, far below what anybody would choose,
so that it also fences segments that are being written. With `--consume` a follower reads the run too, checks what it
is given, and what it used is dropped behind it. In the end, before sealing and after, the run must hold every
acknowledged request that was not used and dropped, none twice and none partly, with the right rows, and `verify_run`
must find nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from millpond.store.collect import collect_run
from millpond.store.compaction import compact
from millpond.store.errors import CaptureFailed, LakeCorrupt, StorageFailed
from millpond.store.follow import Follower
from millpond.store.lake import open_lake
from millpond.store.manifest import RunSpec, read_record
from millpond.store.objects import Storage, open_storage
from millpond.store.retention import drop_consumed
from millpond.store.run import Run, open_run
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter
from millpond.store.verify import verify_run

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
D_MODEL, REQUESTS, GRACE_S = 8, 20_000, 1.0
CONSUMER = "trainer"


def expected_rows(number: int) -> NDArray[np.float32]:
    """The rows of request `number`, the same in every process."""
    rng = np.random.default_rng(number)
    return rng.standard_normal((int(rng.integers(1, 40)), D_MODEL)).astype(np.float32)


def request(number: int) -> CapturedRequest:
    """Request `number`; its second hook is the negative of the first."""
    rows = expected_rows(number)
    positions = np.arange(len(rows), dtype=np.int32)
    return CapturedRequest(f"r{number}", positions + number, len(rows), positions, {HOOKS[0]: rows, HOOKS[1]: -rows})


def write_for_ever(url: str, options: dict[str, Any], acknowledged: str, seed: int) -> None:
    """Write random requests, noting what was acknowledged."""
    rng = random.Random(seed)
    storage = open_storage(url, **options)
    spec = read_record(storage, "run.json", RunSpec)
    notes = os.open(acknowledged, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while True:
        writer = RunWriter(storage, spec, segment_rows=10**9, compact_every=4)
        with suppress(CaptureFailed, StorageFailed):
            while True:
                numbers = rng.sample(range(REQUESTS), rng.randint(1, 5))
                for number in numbers:
                    writer.append(request(number))
                    if rng.random() < 0.02:
                        time.sleep(GRACE_S * 2)  # so slow that the collector takes it for dead
                writer.commit()
                os.write(notes, "".join(f"{number}\n" for number in numbers).encode())


def compact_for_ever(url: str, options: dict[str, Any], acknowledged: str, seed: int) -> None:
    """Compact again and again."""
    storage = open_storage(url, **options)
    while True:
        with suppress(StorageFailed):
            compact(storage, lease_s=0.3)  # so short that compactors race, with each other and with the writers


def collect_for_ever(url: str, options: dict[str, Any], acknowledged: str, seed: int) -> None:
    """Collect garbage again and again."""
    storage = open_storage(url, **options)
    while True:
        with suppress(StorageFailed, LakeCorrupt, FileNotFoundError):  # its own short grace period hits readers too
            collect_run(storage, grace_s=GRACE_S)


def follow_for_ever(url: str, options: dict[str, Any], acknowledged: str, seed: int) -> None:
    """Follow the run, and end if a row is not what it should be; what was used is dropped."""
    rng = random.Random(seed)
    storage = open_storage(url, **options)
    while True:
        with suppress(StorageFailed, LakeCorrupt, FileNotFoundError):  # as above
            follower = Follower(open_run(storage), CONSUMER, poll_s=0.05, view_rows=400)
            for number, view in follower.views():
                if wrong_requests(view):
                    raise ValueError(f"view {number} holds wrong rows")
                time.sleep(rng.uniform(0, 0.05))
                follower.use(number)


def follow_a_while(run: Run) -> None:
    """Use a few views more, undisturbed, and drop them."""
    follower = Follower(run, CONSUMER, poll_s=0.01, timeout_s=0, view_rows=400)
    for number, view in islice(follower.views(), 3):
        if wrong_requests(view):
            raise ValueError(f"view {number} holds wrong rows")
        follower.use(number)
    drop_consumed(run.plan.folder)


ROLES: dict[str, Callable[[str, dict[str, Any], str, int], None]] = {
    "writer": write_for_ever,
    "compactor": compact_for_ever,
    "collector": collect_for_ever,
    "follower": follow_for_ever,
}
CAST = ("writer", "writer", "writer", "compactor", "collector")


def wrong_requests(run: Run) -> int:
    """How many requests do not have their rows."""
    ids = [int(name[1:]) for name in run.prompts["id"]]
    prompts = run.tokens["prompt"].values
    values = {hook: run[hook].values for hook in HOOKS}
    tokens = run.tokens["token_id"].values
    number_of = dict(zip(run.prompts.index, ids, strict=True))
    edges = np.flatnonzero(np.diff(prompts)) + 1
    wrong = 0
    for rows in np.split(np.arange(len(prompts)), edges):
        number = number_of[int(prompts[rows[0]])]
        expected = expected_rows(number)
        good = np.array_equal(values[HOOKS[0]][rows], expected) and np.array_equal(values[HOOKS[1]][rows], -expected)
        wrong += not (good and np.array_equal(tokens[rows], np.arange(len(expected)) + number))
    return wrong


def check(run: Run, acknowledged: set[int], used: Counter[int]) -> dict[str, int]:
    """Count what is lost, doubled or wrong in a run, some of whose requests were used and may have been dropped."""
    counts = Counter(int(name[1:]) for name in run.prompts["id"])
    gone = {int(name[1:]) for name in run.dropped["id"]}
    return {
        "requests": len(counts),
        "used": len(used),
        "dropped": len(gone),
        "lost": len(acknowledged - set(counts) - set(used)) + len(gone - set(used)),
        "doubled": sum(count > 1 for count in [*counts.values(), *used.values()]) + len(gone & set(counts)),
        "wrong_or_partial": wrong_requests(run),
        "problems": len(verify_run(run).problems),
    }


def read_used(storage: Storage) -> Counter[int]:
    """How often each request was used, by the records of every view."""
    used: Counter[int] = Counter()
    for entry in storage.list(f"consumers/{CONSUMER}"):
        if entry.path.rpartition("/")[2][0].isdigit():
            table = pq.read_table(io.BytesIO(storage.get(entry.path)))
            used.update(int(name[1:]) for name in table["id"].to_pylist())
    return used


def read_notes(path: Path) -> set[int]:
    """What was acknowledged; a line that a kill cut off does not count."""
    text = path.read_text() if path.exists() else ""
    return {int(line) for line in text[: text.rfind("\n") + 1].split()}


def soak(url: str, options: dict[str, Any], kills: int, seed: int, consume: bool) -> dict[str, Any]:
    """Run the cast on a new run, killing `kills` of them, and check what is left."""
    lake = open_lake(url, create=True, **options)
    name = f"soak-{seed}"
    lake.create_run(name, hooks=HOOKS, d_model=D_MODEL, dtype="float32", chunk_rows=16, shard_rows=64)
    storage = lake.run_storage(name)
    roles = CAST
    if consume:
        lake.retain(name, [CONSUMER], grace_s=GRACE_S)
        roles = (*CAST, "follower")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["millpond.store.verify", "millpond.store.seal", "obstore.store", "pandas"])
    rng = random.Random(seed)
    killed: Counter[str] = Counter()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "acknowledged"
        births = iter(range(10**9))

        def start(role: str) -> Any:
            arguments = (storage.url, options, str(notes), seed * 10**6 + next(births))
            process = context.Process(target=ROLES[role], args=arguments, daemon=True)
            process.start()
            return process

        cast = [(role, start(role)) for role in roles]
        while sum(killed.values()) < kills:
            time.sleep(rng.uniform(0.1, 0.6))
            place = rng.randrange(len(cast))
            role, process = cast[place]
            if process.exitcode is not None:
                raise RuntimeError(f"a {role} ended by itself with {process.exitcode}")
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed[role] += 1
            cast[place] = (role, start(role))
        for _, process in cast:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        acknowledged = read_notes(notes)
    run, used = open_run(storage), read_used(storage)
    report: dict[str, Any] = {"kills": sum(killed.values()), **{f"kills_{role}": n for role, n in killed.items()}}
    report |= {"acknowledged": len(acknowledged), "version": run.version, "open": check(run, acknowledged, used)}
    if consume:
        follow_a_while(run)
        run, used = open_run(storage), read_used(storage)
        report["followed"] = check(run, acknowledged, used)
    compact(storage)
    report["fenced"] = sum(entry.size == 0 for entry in storage.list("commits"))
    report["sealed"] = check(seal_run(storage), acknowledged, used)
    collect_run(storage, grace_s=0)
    report["collected"] = check(open_run(storage), acknowledged, used)
    report["seconds"] = round(time.monotonic() - started)
    return report


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", choices=["local", "ceph", "seaweedfs"], default="local")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--consume", action="store_true", help="follow the run, and drop what was used")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="millpond-soak-") as folder:
        if given.store == "local":
            print(json.dumps(soak(f"{folder}/lake", {}, given.kills, given.seed, given.consume)))
            return
        spec = importlib.util.spec_from_file_location("s3_server", Path(__file__).with_name("s3_server.py"))
        assert spec is not None
        assert spec.loader is not None
        server = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(server)
        environment = server.start(given.store, Path(folder) / "server")
        try:
            server.make_bucket(environment, "soak")
            options = {
                "endpoint_url": environment["AWS_ENDPOINT_URL"],
                "key": environment["AWS_ACCESS_KEY_ID"],
                "secret": environment["AWS_SECRET_ACCESS_KEY"],
            }
            print(json.dumps(soak("s3://soak/lake", options, given.kills, given.seed, given.consume)))
        finally:
            server.stop(Path(folder) / "server")


if __name__ == "__main__":
    sys.exit(main())
