"""How opening, selecting, planning, ordering, scheduling and charging grow, with made-up manifests of up to 1 PB.

No activations are made: a run is its documents and its prompt table, as sealing writes them (8 hooks of 8,192 bfloat16
values, 131 kB a row; 1,000 rows a prompt). Beside it, 10,000 runs, a queue before 100 capture workers, an open run that
100 of them fill, and a ledger of 1,000 users. Each size is measured in a process of its own: CPU seconds of a step, and
the largest resident memory up to its end, above that of the idle process. An exponent is the slope between the last
two sizes in the logarithms. `--quick` leaves the largest sizes out and takes about two minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from millpond.store.commits import new_segment_id
from millpond.store.files import encode_document
from millpond.store.lake import open_lake
from millpond.store.manifest import ArrayChecksums, Manifest, Part, RunSpec, encode_record, read_record
from millpond.store.prompts import encode_prompt_table
from millpond.store.queue import FolderQueue
from millpond.store.run import open_run

ROOT = Path(__file__).parents[1]
HOOKS = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(0, 80, 10))
D_MODEL, PROMPT_ROWS = 8192, 1000
ROW_BYTES = 2 * D_MODEL * len(HOOKS)
WORKERS, USERS = 100, 1000
SIZES: dict[str, tuple[list[float], list[float]]] = {
    "sealed run, TB": ([1, 10, 100], [1, 10, 100, 1000]),
    "open run of 100 workers, segments": ([1_000, 10_000], [1_000, 10_000, 100_000]),
    "lake, runs": ([100, 1_000, 10_000], [100, 1_000, 10_000]),
    "queue, jobs": ([100, 1_000, 5_000], [100, 1_000, 10_000]),
    "ledger of 1,000 users, charges": ([1_000, 10_000], [1_000, 10_000, 100_000]),
}
PLAN_TB = 100
"""Passes and labels are planned in Python objects: at 1 PB that needs more memory than the 4 GB allowed here."""


class Steps:
    """CPU seconds of each step, and the peak of resident memory in it, in MB above the start."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float]] = {}
        self.base = resident()

    def __call__(self, name: str, action: Callable[[], Any], times: int = 1) -> Any:
        """Run and note one step; `times` repetitions count as one each."""
        started, result = time.process_time(), None
        for _ in range(times):
            result = action()
        self.found[name] = ((time.process_time() - started) / times, resident() - self.base)
        return result


def resident() -> float:
    """Peak resident memory of this process, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def spec_of(name: str) -> RunSpec:
    """The run that all of these are."""
    return RunSpec(
        id=uuid.uuid4().hex, name=name, created="2026-01-01", hooks=HOOKS, d_model=D_MODEL, dtype="bfloat16",
        provenance={"model": "made-up-70b"},
    )  # fmt: skip


def write_sealed(folder: Path, name: str, rows: int) -> None:
    """The documents of a sealed run of `rows` rows, synced by nobody: this is no test of the disk."""
    spec = spec_of(name)
    prompts = max(1, rows // PROMPT_ROWS)
    counts = np.full(prompts, rows // prompts)
    counts[-1] += rows - counts.sum()
    ids = np.char.add("prompt-", np.arange(prompts).astype(str))
    table = {"id": ids, "sha256": ids, "n_prompt_tokens": counts - 1, "n_tokens": counts, "n_rows": counts}
    data = encode_prompt_table(pd.DataFrame(table))
    shards = -(-rows // spec.shard_rows)
    arrays = {
        array: ArrayChecksums(
            rows=rows, shards=((array_spec.shard_rows * array_spec.row_bytes, 4_000_000_000),) * shards
        )
        for array, array_spec in spec.arrays().items()
    }
    part = Part(path="data", rows=rows, prompts=prompts, arrays=arrays, prompt_table=(len(data), 1))
    run = folder / "lake" / "runs" / name
    (run / "data").mkdir(parents=True)
    (run / "run.json").write_bytes(encode_record(spec))
    (run / "manifest.json").write_bytes(encode_record(Manifest(run=spec, sealed="2026-01-01", data=part)))
    (run / "data" / "prompts.parquet").write_bytes(data)


def prepare_sealed(folder: Path, terabytes: int) -> None:
    """One run of so many terabytes."""
    open_lake(folder / "lake", create=True)
    write_sealed(folder, "big", terabytes * 10**12 // ROW_BYTES)


def measure_sealed(folder: Path, terabytes: int, steps: Steps) -> None:
    """Open, split, select, order an epoch, plan a pass."""
    from millpond.analysis.passes import AlignedRows, Pass

    lake = open_lake(folder / "lake")
    run = steps("open", lambda: lake["big"])
    assert run.n_rows == terabytes * 10**12 // ROW_BYTES
    train, _ = steps("split", lambda: run.split(test=0.2, seed=0))
    steps("select", lambda: run.select(where="n_tokens > 10").n_rows)
    stream = steps("stream", lambda: train.stream(HOOKS[0], 4096, rank=3, world=8))
    steps("order of an epoch", lambda: len(stream._order(1)))
    steps("resume", lambda: stream.restore(stream.state() | {"step": 1_000}))
    if terabytes <= PLAN_TB:
        one = steps("plan of a pass", lambda: Pass(AlignedRows(run[HOOKS[0]]), np.sum))
        assert sum(stop - start for start, stop in one.ranges()) == len(one.rows.blocks)


def prepare_open(folder: Path, count: int) -> None:
    """An open run whose pages hold `count` segments of ten prompts, and 1,024 commits after them."""
    from millpond.store.versions import Segments, VersionRecord, version_path, write_page

    lake = open_lake(folder / "lake", create=True)
    lake.create_run("a", hooks=HOOKS[:1], d_model=D_MODEL, dtype="bfloat16")
    run = lake.run_storage("a")
    spec = read_record(run, "run.json", RunSpec)
    arrays = dict.fromkeys(spec.arrays(), ArrayChecksums(rows=300, shards=((4_194_308, 7),)))
    pages, first = [], 0
    while first < count:
        size = min(count - first, 1 << 15)
        parts = [
            Part(path=f"segments/{n:032x}", rows=300, prompts=10, arrays=arrays, prompt_table=(9, 9))
            for n in range(first, first + size)
        ]
        ids = [f"p{n}" for n in range(first * 10, (first + size) * 10)]
        prompts = pd.DataFrame({"id": ids, "sha256": "0" * 64, "n_prompt_tokens": 30, "n_tokens": 30, "n_rows": 30})
        path = f"index/{1:016x}-{uuid.uuid4().hex}"
        pages.append(write_page(run, path, 4, Segments.of(parts, list(arrays)), prompts.assign(visible=True), {}))
        first += size
    run.create(version_path(1), encode_record(VersionRecord(run=spec.id, number=1, pages=tuple(pages))))
    for worker in range(WORKERS):
        table = pd.DataFrame(
            {
                "id": [f"w{worker}-{n}" for n in range(10)],
                "sha256": "0",
                "n_prompt_tokens": 30,
                "n_tokens": 30,
                "n_rows": 30,
            }
        )
        segment, data = new_segment_id(), encode_prompt_table(table)
        part = Part(path=f"segments/{segment}", rows=300, prompts=10, arrays=arrays, prompt_table=(len(data), 1))
        run.put(f"segments/{segment}/prompts.parquet", data, durable=False)
        run.put(f"commits/{segment}.json", encode_record(part), durable=False)


def measure_open(folder: Path, count: int, steps: Steps) -> None:
    """Open it with a commit of each worker, fold those, open it again."""
    from millpond.store.compaction import compact

    run = open_lake(folder / "lake").run_storage("a")
    opened = steps("open", lambda: open_run(run))
    assert opened.n_rows == 300 * (count + WORKERS)
    assert steps("fold 100 commits", lambda: compact(run)) == WORKERS


def prepare_lake(folder: Path, runs: int) -> None:
    """Runs of which the first has 100 GB and the others a prompt; listing reads no more of them than their names."""
    open_lake(folder / "lake", create=True)
    for number in range(runs):
        write_sealed(folder, f"run-{number:05}", 10**11 // ROW_BYTES if number == 0 else 1000)


def measure_lake(folder: Path, runs: int, steps: Steps) -> None:
    """List, look one up, open one."""
    lake = open_lake(folder / "lake")
    assert len(steps("list", lake.runs)) == runs
    assert steps("is it there", lambda: "run-00007" in lake, times=20)
    steps("open one", lambda: lake["run-00000"])


def prepare_queue(folder: Path, jobs: int) -> None:
    """A hundred jobs that workers hold, and so many that wait."""
    queue = FolderQueue(folder / "queue")
    for number in range(jobs):
        document = {
            "id": f"{number:016}-{number:012x}",
            "kind": "capture",
            "spec": {"prompts": "x" * 200},
            "submitted": 0.0,
        }
        (queue.folder / "queued" / f"{document['id']}.json").write_bytes(encode_document(document))


def measure_queue(folder: Path, jobs: int, steps: Steps) -> None:
    """A claim and a heartbeat with all workers busy."""
    queue = FolderQueue(folder / "queue")
    held = [queue.claim(f"worker {number}", ["capture"], 1e6) for number in range(min(WORKERS, jobs - 20))]
    assert all(held)
    steps("claim", lambda: queue.claim("one more", ["capture"], 1e6), times=20)
    steps("heartbeat", lambda: queue.heartbeat(held[0], 1e6, {}), times=20)  # type: ignore[arg-type]


def _ledger(folder: Path) -> Any:
    from millpond.hub.ledger import Ledger
    from millpond.hub.policy import ModelPolicy, Policy

    return Ledger(f"sqlite:///{folder / 'ledger.db'}", Policy(models={"m": ModelPolicy(parameters=70_000_000_000)}))


def _payer(number: int) -> Any:
    from millpond.hub.ledger import Payer

    return Payer(f"user{number % USERS}", f"project{number % USERS // 10}", ("m",))


def prepare_ledger(folder: Path, charges: int) -> None:
    """So many charges, a thousand to a transaction, of users in turn; every tenth shows something of one run."""
    book = _ledger(folder)
    for first in range(0, charges, 1000):
        with book.writing() as writer:
            for number in range(first, first + 1000):
                shown = ("run", b"[null,[]]") if number % 10 == 0 else None
                writer.charge(_payer(number), 100, what="Result", body=b"x", key=f"k{number}", shown=shown)
    book.close()


def measure_ledger(folder: Path, charges: int, steps: Steps) -> None:
    """Open, charge, look up, what was shown before, verify."""
    book = steps("open", lambda: _ledger(folder))
    rng = random.Random(0)
    steps("charge", lambda: book.charge(_payer(rng.randrange(USERS)), 100, what="Result", body=b"x"), times=100)
    steps("same question", lambda: book.known(f"k{rng.randrange(charges)}"), times=100)
    with book.writing() as writer:
        assert len(steps("shown of a run", lambda: writer.earlier("run"), times=3)) == charges // 10
    assert steps("verify", book.verify).charged == 100 * (charges + 100)


SUBJECTS: dict[str, tuple[Callable[[Path, int], None], Callable[[Path, int, Steps], None]]] = {
    "sealed run, TB": (prepare_sealed, measure_sealed),
    "open run of 100 workers, segments": (prepare_open, measure_open),
    "lake, runs": (prepare_lake, measure_lake),
    "queue, jobs": (prepare_queue, measure_queue),
    "ledger of 1,000 users, charges": (prepare_ledger, measure_ledger),
}
LIMITS = {
    "sealed run, TB": "linear at first, and a little more beyond what the processor's caches hold. A pass keeps an object a block, "
    "so its plan at 1 PB would take more than the 4 GB that this script may use (not measured there); a stream keeps 40 bytes a "
    "chunk; opening parses the checksum of every shard. Keep runs at 100 TB and make a petabyte of ten, each with its own passes.",
    "open run of 100 workers, segments": "opening reads every page: linear from some 10,000 segments on. Folding commits hardly "
    "depends on what was folded before. Seal, and begin another run, or commit less often.",
    "lake, runs": "listing asks once for each run, many at a time: on S3 that is 10,000 requests. Beyond, one lake a project; "
    "looking up and opening a run do not depend on how many there are.",
    "queue, jobs": "a claim lists the folder and reads what is held, so emptying a queue is quadratic: 19 ms a claim at 10,000 jobs "
    "is 53 claims a second for all workers. For more, or for workers on several machines, use a queue in PostgreSQL.",
    "ledger of 1,000 users, charges": "a charge does not depend on what was charged before; verifying and what was shown of "
    "one run are linear. One writer at a time: beyond some hundred charges a second, one ledger a model.",
}


def run_one(subject: str, size: int, what: str, folder: Path) -> dict[str, Any]:
    """One step of one size, in a process of its own."""
    command = [sys.executable, __file__, "--one", subject, str(size), what, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout or "{}")
    return found


def slope(sizes: list[float], values: list[float]) -> float:
    """The exponent between the last two sizes; what is too small to be measured counts as 1 ms or 1 MB."""
    low, high = (max(value, 1e-3) for value in values[-2:])
    return math.log(high / low) / math.log(sizes[-1] / sizes[-2])


def report(subject: str, sizes: list[float]) -> tuple[list[str], dict[str, float]]:
    """The table of one subject and its exponents."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="millpond-scale-") as name:
            run_one(subject, int(size), "prepare", Path(name))
            for step, (seconds, megabytes) in run_one(subject, int(size), "measure", Path(name)).items():
                found.setdefault(step, []).append((size, seconds, megabytes))
    lines = [f"| {subject} | {' | '.join(f'{size:,.0f}' for size in sizes)} | time grows as | memory as |"]
    lines.append("|-" * (len(sizes) + 3) + "|")
    figures = {}
    for step, points in found.items():
        cells = [f"{1000 * seconds:,.1f} ms, {megabytes:,.0f} MB" for _, seconds, megabytes in points]
        cells += ["-"] * (len(sizes) - len(cells))
        held = [size for size, _, _ in points]
        times, memory = slope(held, [p[1] for p in points]), slope(held, [max(p[2], 1) for p in points])
        figures[f"{subject.split(',')[0].split(' of ')[0]}: {step}"] = round(times, 2)
        lines.append(f"| {step} | {' | '.join(cells)} | n^{times:.2f} | n^{memory:.2f} |")
    return [*lines, "", f"Where it stops: {LIMITS[subject]}", ""], figures


def write_section(lines: list[str]) -> None:
    """Put the tables into docs/benchmarks.md, in place of those of an earlier run."""
    path, heading = ROOT / "docs" / "benchmarks.md", "## Scale"
    before, _, rest = path.read_text().partition(f"\n{heading}\n")
    after = rest.partition("\n## ")[2]
    path.write_text(
        before.rstrip("\n")
        + f"\n\n{heading}\n\n"
        + "\n".join(lines).rstrip("\n")
        + "\n"
        + (f"\n## {after}" if after else "")
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="without the largest sizes")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        subject, size, what, folder = arguments.one
        prepare, measure = SUBJECTS[subject]
        if what == "prepare":
            prepare(Path(folder), int(size))
        else:
            steps = Steps()
            measure(Path(folder), int(size), steps)
            print(json.dumps(steps.found))
        return
    option = " --quick" if arguments.quick else ""
    lines = [
        f"`python benchmarks/scale.py{option}`, {date.today()}, {len(os.sched_getaffinity(0))} cores shared with other work: CPU "
        "milliseconds of a step, and peak memory of the process up to its end, above an idle one's. Manifests are made up; "
        "there are no activations. Exponents are those between the last two sizes.",
        "",
    ]
    figures: dict[str, float] = {}
    for subject, sizes in SIZES.items():
        table, exponents = report(subject, sizes[0 if arguments.quick else 1])
        print("\n".join(table), flush=True)
        lines += table
        figures |= exponents
    if arguments.write:
        write_section(lines)
    print(json.dumps({"time_exponents": figures}))


if __name__ == "__main__":
    main()
