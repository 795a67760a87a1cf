"""How fast a lake gives shuffled batches, beside a cold read of raw files and beside SAELens' cached store, in one run.

`python benchmarks/stream.py [--quick]` prints a table and a last line of JSON. The same bfloat16 rows are read by all:
from a file in shards, from a run, and (as float32, which it needs) from the Arrow cache that SAELens reads. Before each cold
round the files are dropped from the page cache. SAELens is installed by the script into a folder of its own, which
uses this environment's torch; `rows/s/core` counts CPU seconds of the whole process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from millpond.store.lake import Lake, open_lake
from millpond.store.run import Run
from millpond.store.sealed import write_sealed

D_MODEL, CONTEXT, BATCH, BUFFER, HOOK = 2048, 128, 4096, 32_768, "blocks.0.hook_resid_post"

PEERS = (
    ["sae-lens"],
    ["zarr", "tensorstore", "safetensors", "datasets", "pylance"],
    # its own requirements take the clients of every cloud; these are what reading local files imports
    ["--no-deps", "mosaicml-streaming"],
    ["brotli", "python-snappy", "zstd", "xxhash<4", "catalogue", "cramjam"],
)
PEER = """
import json, sys, time, torch
from sae_lens import ActivationsStore
torch.set_num_threads(1)
folder, d, context, rows, batch = sys.argv[1], *map(int, sys.argv[2:])
store = ActivationsStore(model=None, dataset=None, streaming=False, hook_name="blocks.0.hook_resid_post",
    hook_head_index=None, context_size=context, d_in=d, n_batches_in_buffer=64, total_training_tokens=rows,
    store_batch_size_prompts=32, train_batch_size_tokens=batch, prepend_bos=False, normalize_activations="none",
    device=torch.device("cpu"), dtype="float32", cached_activations_path=folder)
wall, cpu, n = time.perf_counter(), time.process_time(), 0
try:
    while n < rows // 2:
        n += len(next(store))
except StopIteration:
    pass
print(json.dumps({"rows": n, "wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}))
"""
CACHE = """
import sys, numpy as np
from datasets import Array2D, Dataset, Features
folder, source, d, context = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
rows = np.load(source, mmap_mode="r").reshape(-1, context, d)
hook = "blocks.0.hook_resid_post"
features = Features({hook: Array2D(shape=(context, d), dtype="float32")})
def make():
    for one in rows:
        yield {hook: one}
Dataset.from_generator(make, features=features, cache_dir=folder + "-tmp").save_to_disk(folder)
"""


def drop(paths: Iterable[Path]) -> None:
    """Remove files from the page cache."""
    for path in paths:
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def raw_read(paths: list[Path]) -> int:
    """Read files one after the other into one buffer; the number of rows."""
    buffer = np.empty(max(path.stat().st_size for path in paths), np.uint8)
    size = 0
    for path in paths:
        with path.open("rb", buffering=0) as handle:
            view = memoryview(buffer)[: path.stat().st_size]
            size += len(view)
            while view:
                view = view[handle.readinto(view) :]
    return size // (2 * D_MODEL)


def streamed(run: Run, dtype: str) -> int:
    """One epoch; the number of rows."""
    return sum(len(batch) for batch in run.stream(HOOK, BATCH, seed=0, epochs=1, buffer_rows=BUFFER, dtype=dtype))


def measure(action: Callable[[], int]) -> tuple[int, float, float]:
    """Rows, wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    rows = action()
    return rows, time.perf_counter() - wall, time.process_time() - cpu


def make_run(lake: Lake, n_rows: int) -> Run:
    """Rows of bfloat16 noise with a few large dimensions."""
    rng = np.random.default_rng(0)
    block = rng.standard_normal((8192, D_MODEL)).astype(np.float32)
    block[:, :4] *= 50
    bits = (block.view(np.uint32) >> 16).astype(np.uint16)
    n_prompts = n_rows // CONTEXT
    table = pd.DataFrame({"id": [str(i) for i in range(n_prompts)], "sha256": ""})
    table = table.assign(n_prompt_tokens=CONTEXT, n_tokens=CONTEXT, n_rows=CONTEXT)

    def blocks(name: str) -> Iterable[np.ndarray]:
        if name == HOOK:
            for start in range(0, n_rows, len(bits)):
                yield bits[: n_rows - start]
        else:
            yield np.resize(np.arange(CONTEXT, dtype=np.int32), n_rows)

    like = {"hooks": (HOOK,), "d_model": D_MODEL, "dtype": "bfloat16"}
    return write_sealed(lake, "bench", like=like, table=table, blocks=blocks)


def peers_python(folder: Path) -> Path:
    """An environment with the systems that are compared, in MILLPOND_PEERS or `folder`; this one's packages are seen."""
    place = Path(os.environ.get("MILLPOND_PEERS", str(folder / "peers")))
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
        (site,) = place.glob("lib/python*/site-packages")
        (site / "zz_torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
        for packages in PEERS:
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=False)
    return python


def saelens(folder: Path, run: Run, n_rows: int) -> dict[str, float]:
    """What SAELens' store gives of the first rows, in a process and environment of its own."""
    python = peers_python(folder)
    np.save(folder / "rows.npy", run.select(run.prompts.index.to_numpy() < n_rows // CONTEXT).to_numpy(HOOK))
    arguments = [str(folder / "cache"), str(folder / "rows.npy"), str(D_MODEL), str(CONTEXT)]
    quiet = {"capture_output": True, "text": True, "check": True, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    subprocess.run([python, "-c", CACHE, *arguments], **quiet)
    (folder / "rows.npy").unlink()
    sizes = [str(D_MODEL), str(CONTEXT), str(n_rows), str(BATCH)]
    done = subprocess.run([python, "-c", PEER, str(folder / "cache"), *sizes], **quiet)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(quick: bool) -> dict[str, float | None]:
    """Measure and print a table; the keys of the last line."""
    n_rows, rounds = (262_144, 3) if quick else (1_048_576, 4)
    folder = Path(tempfile.mkdtemp(prefix="millpond-benchmark-"))
    try:
        run = make_run(open_lake(folder / "lake", create=True), n_rows)
        shards = sorted(p for p in (folder / "lake").rglob("c/*/0") if HOOK in str(p))
        actions: dict[str, Callable[[], int]] = {
            "raw read": lambda: raw_read(shards),
            "stream bfloat16": lambda: streamed(run, "bfloat16"),
            "stream float32": lambda: streamed(run, "float32"),
        }
        best: dict[str, tuple[int, float, float]] = {}
        for cold in (True, False):
            for _ in range(rounds):
                for name, action in actions.items():
                    if cold:
                        drop(shards)
                    took = measure(action)
                    key = f"{name} {'cold' if cold else 'warm'}"
                    old = best.get(key, took)
                    best[key] = (took[0], min(old[1], took[1]), min(old[2], took[2]))
        try:
            peer = saelens(folder, run, 32_768)
            best["SAELens float32 warm"] = (int(peer["rows"]), peer["wall"], peer["cpu"])
        except subprocess.CalledProcessError as error:
            print(f"SAELens does not run: {(str(error.stderr).strip().splitlines() or ['no output'])[-1]}")
    finally:
        shutil.rmtree(folder)
    size = n_rows * D_MODEL * 2 / 1e9
    print(
        f"{size:.2f} GB of d_model {D_MODEL} in bfloat16, batches of {BATCH}, buffers of {BUFFER} rows; best of {rounds}"
    )
    print(f"{'':24}{'rows/s':>12}{'rows/s/core':>13}{'of raw':>8}")
    rates = {name: (rows / wall, rows / cpu) for name, (rows, wall, cpu) in best.items()}
    for name, (rate, core) in rates.items():
        raw = rates["raw read cold" if "cold" in name else "raw read warm"][0]
        print(f"{name:24}{rate:12,.0f}{core:13,.0f}{rate / raw:8.2f}")
    peer_core = rates["SAELens float32 warm"][1] if "SAELens float32 warm" in rates else None
    return {
        "stream_cold": round(rates["stream bfloat16 cold"][0] / rates["raw read cold"][0], 3),
        "stream_cold_float32": round(rates["stream float32 cold"][0] / rates["raw read cold"][0], 3),
        "stream_vs_saelens": peer_core and round(rates["stream bfloat16 warm"][1] / peer_core, 1),
        "stream_vs_saelens_float32": peer_core and round(rates["stream float32 warm"][1] / peer_core, 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 GB and three rounds in place of 4 GB and four")
    print(json.dumps(measured(parser.parse_args().quick)))


if __name__ == "__main__":
    sys.exit(main())
