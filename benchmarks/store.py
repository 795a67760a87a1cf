"""How fast a lake is written, read, committed to and opened, beside raw files and raw S3 in the same run.

`python benchmarks/store.py [--quick]` prints tables and a last line of JSON. Ratios are of throughput, ours to raw,
medians of rounds in which both take turns. Cold reads drop the files from the page cache first. S3 is Ceph's gateway
with a store in memory, on loopback, so that both sides are bound by CPU and not by a network.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import stream
from numpy.typing import NDArray
from peers import SYSTEMS

from millpond.store.compaction import compact
from millpond.store.lake import open_lake
from millpond.store.manifest import ArrayChecksums, Part, RunSpec, encode_record, read_record
from millpond.store.objects import Storage, open_storage
from millpond.store.run import open_run
from millpond.store.segment import CapturedRequest, RunWriter
from millpond.store.shards import ArraySpec, ArrayWriter, read_rows
from millpond.store.versions import VersionRecord

D_MODEL, CHUNK_ROWS, SHARD_ROWS, REQUEST_ROWS = 2048, 512, 32_768, 700
HOOK = "blocks.0.hook_resid_post"
SPEC = ArraySpec("uint16", D_MODEL, CHUNK_ROWS, SHARD_ROWS)
PARALLEL = 4
PATIENCE_SECONDS = 60
"""A system that takes longer for a round is not asked for another."""


def requests_of(gigabytes: float) -> list[NDArray[Any]]:
    """So many bytes of bfloat16 bits, in requests; 16 different ones."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((16, REQUEST_ROWS, D_MODEL)).astype(np.float32)
    blocks = (values.view(np.uint32) >> 16).astype(np.uint16)
    count = int(gigabytes * 1e9 / (2 * D_MODEL)) // REQUEST_ROWS
    return [blocks[number % 16] for number in range(count)]


def drop_cache(path: Path) -> None:
    """Make the next read of the files below `path` come from the disk."""
    os.sync()
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(action: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def race(title: str, size: float, rounds: int, sides: dict[str, Callable[[], tuple[float, float]]]) -> float:
    """Let two sides take turns, in the order ABBA; prints medians, returns the median of the second's speed over the first's."""
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            took[name].append(sides[name]())
    times = {name: np.array(found) for name, found in took.items()}
    base = next(iter(times.values()))
    for name, found in times.items():
        wall, cpu = np.median(found, axis=0)
        low, ratio, high = np.quantile(base[:, 0] / found[:, 0], [0.25, 0.5, 0.75])
        print(
            f"{title:12}{name:14}{size / wall / 1e6:8.0f} MB/s{cpu / size * 1e9:8.2f} CPU s/GB{ratio:8.2f} of raw "
            f"[{low:.2f}, {high:.2f}]"
        )
    return round(float(ratio), 3)


def local(quick: bool) -> dict[str, float]:
    """`write` and `read_cold`: one array in a folder, beside a file of the same bytes."""
    requests = requests_of(0.5 if quick else 2.0)
    rows = REQUEST_ROWS * len(requests)
    size = rows * D_MODEL * 2
    folder = Path(tempfile.mkdtemp(prefix="millpond-benchmark-"))
    raw, ours = folder / "raw", folder / "ours"

    def write_raw() -> None:
        with raw.open("wb") as handle:
            for block in requests:
                block.tofile(handle)
            handle.flush()
            os.fsync(handle.fileno())

    def write_ours() -> None:
        writer = ArrayWriter(open_storage(ours), SPEC)
        for block in requests:
            writer.append(block)
        writer.finish()

    def read_raw() -> None:
        buffer = np.empty((SHARD_ROWS, D_MODEL), np.uint16)
        with raw.open("rb", buffering=0) as handle:
            for start in range(0, rows, SHARD_ROWS):
                view = memoryview(buffer[: min(SHARD_ROWS, rows - start)]).cast("B")
                while view:
                    view = view[handle.readinto(view) :]

    def read_ours() -> None:
        storage, buffer = open_storage(ours), np.empty((SHARD_ROWS, D_MODEL), np.uint16)
        for start in range(0, rows, SHARD_ROWS):
            stop = min(start + SHARD_ROWS, rows)
            read_rows(storage, SPEC, start, stop, buffer[: stop - start])

    def fresh(path: Path, action: Callable[[], None]) -> tuple[float, float]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        os.sync()
        return measure(action)

    def cold(path: Path, action: Callable[[], None]) -> tuple[float, float]:
        drop_cache(path)
        return measure(action)

    rounds = 10
    try:
        write = {"raw": lambda: fresh(raw, write_raw), "lake": lambda: fresh(ours, write_ours)}
        read = {"raw": lambda: cold(raw, read_raw), "lake": lambda: cold(ours, read_ours)}
        return {"write": race("write", size, rounds, write), "read_cold": race("read cold", size, rounds, read)}
    finally:
        shutil.rmtree(folder)


@contextmanager
def s3() -> Iterator[tuple[Callable[[str], Storage], dict[str, Any], Callable[[str], Any]]]:
    """A server: opens storages of it by prefix, their options, and obstore's own store for a prefix."""
    from obstore.store import S3Store

    path = Path(__file__).parents[1] / "tools" / "s3_server.py"
    spec = importlib.util.spec_from_file_location("s3_server", path)
    assert spec is not None
    assert spec.loader is not None
    server = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(server)
    folder = Path(tempfile.mkdtemp(prefix="millpond-s3-"))
    environment = server.start("ceph", folder / "server")
    try:
        server.make_bucket(environment, "bench")
        options = {
            "endpoint_url": environment["AWS_ENDPOINT_URL"],
            "key": environment["AWS_ACCESS_KEY_ID"],
            "secret": environment["AWS_SECRET_ACCESS_KEY"],
        }

        def plain(prefix: str) -> Any:
            return S3Store(
                "bench",
                prefix=prefix,
                config={
                    "endpoint": options["endpoint_url"],
                    "access_key_id": options["key"],
                    "secret_access_key": options["secret"],
                },
                client_options={"allow_http": True, "timeout": "60s"},
            )

        yield lambda prefix: open_storage(f"s3://bench/{prefix}", **options), options, plain
    finally:
        server.stop(folder / "server")
        shutil.rmtree(folder, ignore_errors=True)


def s3_throughput(quick: bool, opened: Callable[[str], Storage], plain: Callable[[str], Any]) -> dict[str, float]:
    """`s3_write` and `s3_read`: arrays of one shard each, `PARALLEL` at once, beside plain PUTs and GETs of objects."""
    shards = 4 if quick else 8
    rows = SHARD_ROWS // 2
    values = np.concatenate(requests_of(rows * D_MODEL * 2.2 / 1e9))[:rows]
    flat = values.reshape(-1).view(np.uint8)
    size = shards * flat.nbytes

    def every(action: Callable[[int], object]) -> tuple[float, float]:
        with ThreadPoolExecutor(PARALLEL) as pool:
            return measure(lambda: list(pool.map(action, range(shards))))

    def write_ours(number: int) -> None:
        writer = ArrayWriter(opened(f"ours/{number}"), SPEC)
        for start in range(0, rows, REQUEST_ROWS):
            writer.append(values[start : start + REQUEST_ROWS])
        writer.finish()

    store = plain("raw")
    write = {
        "obstore": lambda: every(lambda n: store.put(f"{n}", flat.data, chunk_size=8 << 20, max_concurrency=7)),
        "lake": lambda: every(write_ours),
    }
    steps = range(0, flat.nbytes, 8 << 20)
    ends = [min(start + (8 << 20), flat.nbytes) for start in steps]
    read = {
        "obstore": lambda: every(lambda n: store.get_ranges(f"{n}", starts=list(steps), ends=ends, coalesce=0)),
        "lake": lambda: every(lambda n: read_rows(opened(f"ours/{n}"), SPEC, 0, rows)),
    }
    rounds = 4 if quick else 6
    return {"s3_write": race("S3 write", size, rounds, write), "s3_read": race("S3 read", size, rounds, read)}


def _commit_often(url: str, options: dict[str, Any], worker: int, commits: int, times: Any) -> None:
    storage = open_storage(url, **options)
    writer = RunWriter(storage, read_record(storage, "run.json", RunSpec))
    positions = np.arange(64, dtype=np.int32)
    rows = np.full((64, 256), 0x3F80, np.uint16)
    took = []
    for number in range(commits):
        writer.append(CapturedRequest(f"{worker}-{number}", positions, 64, positions, {HOOK: rows}))
        started = time.perf_counter()
        writer.commit()
        took.append(time.perf_counter() - started)
        time.sleep(0.2)
    times.put(took)


def commit_latency(quick: bool, options: dict[str, Any]) -> dict[str, float]:
    """`commit_p99_s`: eight processes that write into one run in S3 and commit a segment five times a second at most."""
    url = f"s3://bench/{uuid.uuid4().hex}"
    lake = open_lake(url, create=True, **options)
    lake.create_run("a", hooks=(HOOK,), d_model=256, dtype="bfloat16")
    context = multiprocessing.get_context("spawn")
    times = context.Queue()
    commits = 25 if quick else 100
    arguments = (lake.run_storage("a").url, options)
    workers = [context.Process(target=_commit_often, args=(*arguments, n, commits, times)) for n in range(8)]
    for worker in workers:
        worker.start()
    took = np.concatenate([times.get(timeout=600) for _ in workers])
    for worker in workers:
        worker.join()
    assert lake["a"].n_rows == 8 * commits * 64
    p50, p99 = np.quantile(took, [0.5, 0.99])
    print(f"commit      8 writers on S3, {len(took)} commits: median {p50 * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms")
    return {"commit_p99_s": round(float(p99), 4)}


def _publish(run: Storage, spec: RunSpec, first: int, count: int) -> None:
    """Commit `count` small segments of one prompt with the least that readers of the manifest look at."""
    import google_crc32c
    import pandas as pd

    from millpond.store.commits import commit_path
    from millpond.store.prompts import encode_prompt_table

    for number in range(first, first + count):
        segment = f"{number:032x}"
        row = {"id": f"p{number}", "sha256": "0" * 64, "n_prompt_tokens": 3, "n_tokens": 3, "n_rows": 3}
        table = encode_prompt_table(pd.DataFrame([row]))
        sums = ArrayChecksums(rows=3, shards=((1028, number),))
        part = Part(
            path=f"segments/{segment}",
            rows=3,
            prompts=1,
            arrays=dict.fromkeys(spec.arrays(), sums),
            prompt_table=(len(table), int(google_crc32c.value(table))),
        )
        run.put(f"segments/{segment}/prompts.parquet", table, durable=False)
        run.put(commit_path(segment), encode_record(part), durable=False)


def many_commits(quick: bool) -> dict[str, float]:
    """`open_50k_segments_s`, and the curve of compaction and opening over 10,000 commits."""
    folder = Path(tempfile.mkdtemp(prefix="millpond-benchmark-"))
    try:
        lake = open_lake(folder / "lake", create=True)
        spec = lake.create_run("a", hooks=(HOOK,), d_model=D_MODEL, dtype="bfloat16")
        run = lake.run_storage("a")
        total, step = (2_000 if quick else 10_000), 50
        compactions, opens = [], {}
        for first in range(0, total, step):
            _publish(run, spec, first, step)
            compactions.append(measure(lambda: compact(run))[0])
            if (first + step) in {total // 20 * n for n in (1, 2, 5, 10, 20)}:
                opens[first + step] = min(measure(lambda: open_run(run))[0] for _ in range(3))
        groups = np.array_split(np.array(compactions), 5)
        print(f"compaction  of {step} commits, by fifth of a run of {total}: median", end=" ")
        print(", ".join(f"{np.median(g) * 1e3:.0f}" for g in groups), "ms; mean", end=" ")
        print(", ".join(f"{g.mean() * 1e3:.0f}" for g in groups), "ms")
        print("opening     after", ", ".join(f"{n} commits {took * 1e3:.1f} ms" for n, took in opens.items()))
        lake.create_run("b", hooks=(HOOK,), d_model=D_MODEL, dtype="bfloat16")
        took = _open_many(lake.run_storage("b"), 50_000)
        print(f"opening     50,000 segments of 500,000 prompts: {took * 1e3:.1f} ms")
        return {"open_50k_segments_s": round(took, 4)}
    finally:
        shutil.rmtree(folder)


def _open_many(run: Storage, count: int) -> float:
    """Time to open a run of `count` segments of ten prompts, as compaction would have laid it out."""
    import pandas as pd

    from millpond.store.versions import Segments, version_path, write_page

    spec = read_record(run, "run.json", RunSpec)
    pages = []
    for first, size, level in [(0, count // 2, 4), (count // 2, count // 4, 3), (count // 4 * 3, count // 4, 3)]:
        sums = ArrayChecksums(rows=300, shards=((4_194_308, 7),))
        arrays = dict.fromkeys(spec.arrays(), sums)
        parts = [
            Part(path=f"segments/{n:032x}", rows=300, prompts=10, arrays=arrays, prompt_table=(9, 9))
            for n in range(first, first + size)
        ]
        ids = [f"p{n}" for n in range(first * 10, (first + size) * 10)]
        prompts = pd.DataFrame({"id": ids, "sha256": "0" * 64, "n_prompt_tokens": 30, "n_tokens": 30, "n_rows": 30})
        path = f"index/{1:016x}-{uuid.uuid4().hex}"
        pages.append(
            write_page(
                run, path, level, Segments.of(parts, list(arrays)), prompts.assign(visible=True, dropped=False), {}
            )
        )
    run.create(version_path(1), encode_record(VersionRecord(run=spec.id, number=1, pages=tuple(pages))))
    took = []
    for _ in range(5):
        started = time.perf_counter()
        opened = open_run(run)
        took.append(time.perf_counter() - started)
        assert (len(opened.plan.parts), opened.n_rows) == (count, 300 * count)
    return min(took)


def peers(quick: bool) -> dict[str, Any]:
    """`peers`: how many times as fast as each other system a run is, and in writing an array alone; null: does not run."""
    n_rows, rounds = (131_072, 2) if quick else (524_288, 3)
    script = Path(__file__).parent / "peers.py"
    folder = Path(tempfile.mkdtemp(prefix="millpond-benchmark-"))
    best: dict[str, dict[str, float] | None] = {}
    try:
        python = stream.peers_python(folder)
        for name in [name for _ in range(rounds) for name in SYSTEMS]:
            found = best.get(name, {})
            if found is None or sum(found.values()) > PATIENCE_SECONDS:
                continue
            place = folder / name
            place.mkdir()
            command = [
                sys.executable if name in ("raw", "millpond", "array") else python,
                script,
                name,
                place,
                str(n_rows),
            ]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            shutil.rmtree(place)
            if done.returncode:
                print(f"peers       {name} does not run: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
                best[name] = None
                continue
            took = json.loads(done.stdout.splitlines()[-1])
            held = best.get(name) or took
            best[name] = {key: min(value, held[key]) for key, value in took.items()}
    finally:
        shutil.rmtree(folder)
    size = n_rows * D_MODEL * 2
    for name, times in best.items():
        if times:
            cpu = times.pop("write_cpu") / size * 1e9
            speeds = "".join(f"{key} {size / t / 1e6:6.0f} MB/s  " for key, t in times.items())
            print(f"peers       {name:14}{speeds}writing {cpu:5.2f} CPU s/GB")
    ours, array = best.pop("millpond"), best.pop("array")
    assert ours is not None
    assert array is not None
    times_as_fast = {
        name: times
        and {key: round(times[key] / ours[key], 2) for key in ours}
        | {"write_array": round(times["write"] / array["write"], 2)}
        for name, times in best.items()
    }
    return {"peers": times_as_fast}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less data and fewer rounds")
    quick = parser.parse_args().quick
    record: dict[str, Any] = local(quick)
    with s3() as (opened, options, plain):
        record |= s3_throughput(quick, opened, plain)
        record |= commit_latency(quick, options)
    record |= many_commits(quick)
    record |= stream.measured(quick)
    record |= peers(quick)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
