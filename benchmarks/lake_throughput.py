"""How fast the lake writes and reads, beside a plain file and beside zarr-python, in one run on one disk.

`python benchmarks/lake_throughput.py [--quick]` prints a table and a last line of JSON. The raw file and
the lake are synced to disk after writing, zarr-python does not do that. Reads are warm, that is from the page cache:
what is compared is the work around the bytes. Lower CPU seconds a GB are better.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from millpond.store.shards import ArraySpec, ArrayWriter, read_rows

D_MODEL, CHUNK_ROWS, SHARD_ROWS, REQUEST_ROWS = 2048, 512, 32_768, 700


def raw_write(path: Path, requests: list[NDArray[Any]]) -> None:
    """Requests one after the other into a file, synced."""
    with path.open("wb", buffering=0) as handle:
        for rows in requests:
            handle.write(rows.data)
        os.fsync(handle.fileno())


def raw_read(path: Path, n_rows: int) -> NDArray[Any]:
    """The file, shard by shard, into one buffer."""
    buffer = np.empty((SHARD_ROWS, D_MODEL), np.uint16)
    with path.open("rb", buffering=0) as handle:
        for start in range(0, n_rows, SHARD_ROWS):
            view = memoryview(buffer[: min(SHARD_ROWS, n_rows - start)]).cast("B")
            while view:
                view = view[handle.readinto(view) :]
    return buffer


def lake_write(path: Path, requests: list[NDArray[Any]]) -> None:
    """Requests through the streaming shard writer, checksummed and synced."""
    writer = ArrayWriter(path, ArraySpec("uint16", D_MODEL, CHUNK_ROWS, SHARD_ROWS))
    for rows in requests:
        writer.append(rows)
    writer.finish()


def lake_read(path: Path, n_rows: int) -> None:
    """Shard by shard through the reader."""
    spec = ArraySpec("uint16", D_MODEL, CHUNK_ROWS, SHARD_ROWS)
    for start in range(0, n_rows, SHARD_ROWS):
        read_rows(path, spec, start, min(start + SHARD_ROWS, n_rows))


def zarr_write(path: Path, requests: list[NDArray[Any]]) -> None:
    """zarr-python's best case: whole shards at once, which needs a shard of memory an array."""
    rows = np.concatenate(requests)
    array = zarr.create_array(
        str(path),
        shape=rows.shape,
        dtype="uint16",
        chunks=(CHUNK_ROWS, D_MODEL),
        shards=(SHARD_ROWS, D_MODEL),
        compressors=None,
    )
    for start in range(0, len(rows), SHARD_ROWS):
        array[start : start + SHARD_ROWS] = rows[start : start + SHARD_ROWS]


def zarr_read(path: Path, n_rows: int) -> None:
    """Shard by shard through zarr-python."""
    array = zarr.open_array(str(path), mode="r")
    for start in range(0, n_rows, SHARD_ROWS):
        _ = array[start : start + SHARD_ROWS]


def measure(action: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="0.5 GB and two rounds in place of 2 GB and three")
    quick = parser.parse_args().quick
    gigabytes, rounds = (0.5, 2) if quick else (2.0, 3)
    n_rows = int(gigabytes * 1e9 / (2 * D_MODEL))
    rng = np.random.default_rng(0)
    block = rng.integers(0, 2**16, (REQUEST_ROWS, D_MODEL), dtype=np.uint16)
    requests = [block] * (n_rows // REQUEST_ROWS)
    n_rows = REQUEST_ROWS * len(requests)
    size = n_rows * D_MODEL * 2 / 1e9
    systems = {
        "raw file": (raw_write, raw_read),
        "lake": (lake_write, lake_read),
        "zarr-python": (zarr_write, zarr_read),
    }
    best: dict[tuple[str, str], tuple[float, float]] = {}
    folder = Path(tempfile.mkdtemp(prefix="millpond-benchmark-"))
    try:
        for _ in range(rounds):
            for name, (write, read) in systems.items():
                path = folder / name.replace(" ", "-")
                for step, took in (
                    ("write", measure(lambda write=write, path=path: write(path, requests))),
                    ("read", measure(lambda read=read, path=path: read(path, n_rows))),
                ):
                    old = best.get((name, step), took)
                    best[name, step] = (min(old[0], took[0]), min(old[1], took[1]))
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        shutil.rmtree(folder)
    record = {}
    print(f"{size:.2f} GB of d_model {D_MODEL} in requests of {REQUEST_ROWS} rows; best of {rounds}")
    print(f"{'':14}{'step':7}{'MB/s':>8}{'CPU s/GB':>10}{'of raw':>8}")
    for (name, step), (wall, cpu) in best.items():
        ratio = best["raw file", step][0] / wall
        print(f"{name:14}{step:7}{size * 1e3 / wall:8.0f}{cpu / size:10.2f}{ratio:8.2f}")
        record[f"{name} {step}"] = {
            "mb_per_s": round(size * 1e3 / wall),
            "cpu_s_per_gb": round(cpu / size, 3),
            "of_raw": round(ratio, 3),
        }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
