"""The headline of the probes: more rows than memory holds, beside one cold read of the same bytes.

`python benchmarks/probes_headline.py [--quick]` writes a run of bfloat16 rows with our own store, reads its bytes
once, cold, one after another, and fits a logistic and a mass-mean probe, each from cold, with one thread a core. Rows
are synthetic: a power-law spectrum turned against the axes, columns of very different scale, two massive dimensions,
labels drawn from a planted direction. Memory is the sum over all processes of the proportional set size without file
pages. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.store.dtypes import decode
from millpond.store.lake import open_lake
from millpond.store.run import Run
from millpond.store.seal import seal_run
from millpond.store.segment import CapturedRequest, RunWriter

HOOK = "blocks.20.hook_resid_post"
PROMPT_ROWS = 512
BLOCK_ROWS = 8192
FACTORS = 128


class Rows:
    """A source of made-up rows, and the direction that decides their labels."""

    def __init__(self, width: int, seed: int) -> None:
        import torch

        self.rng = np.random.default_rng(seed)
        self.width = width
        spectrum = np.arange(1, FACTORS + 1) ** -0.5
        self.factors = (self.rng.standard_normal((FACTORS, width)) * spectrum[:, None]).astype(np.float32)
        self.scale = np.exp(self.rng.normal(0, 0.5, width)).astype(np.float32)
        self.pool = self.rng.standard_normal((BLOCK_ROWS // 2, width)).astype(np.float32)
        self.offset = np.zeros(width, np.float32)
        self.offset[[7, width // 3]] = 60.0, -40.0
        direction = self.rng.standard_normal(width) / self.scale
        self.direction = (direction * 2 / np.sqrt(width * (1 + (spectrum**2).sum()))).astype(np.float32)
        self._factors = torch.from_numpy(self.factors)

    def block(self) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
        """bfloat16 bits (BLOCK_ROWS, width) and labels."""
        import torch

        hidden = torch.from_numpy(self.rng.standard_normal((BLOCK_ROWS, FACTORS), dtype=np.float32))
        rows = (hidden @ self._factors).numpy()
        half = len(self.pool)
        for start in (0, half):  # noise from a pool, with other signs, order and columns each time
            noise = self.pool[self.rng.permutation(half)] * self.rng.choice([-1, 1], half)[:, None].astype(np.float32)
            turn = int(self.rng.integers(self.width))
            rows[start : start + half, turn:] += noise[:, : self.width - turn]
            rows[start : start + half, :turn] += noise[:, self.width - turn :]
        rows *= self.scale
        logits = rows @ self.direction
        labels = self.rng.random(BLOCK_ROWS) < 1 / (1 + np.exp(-logits))
        rows += self.offset
        return torch.from_numpy(rows).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16), labels


def write_run(folder: Path, n_rows: int, width: int) -> tuple[Run, NDArray[np.float32]]:
    """A sealed run of `n_rows` rows, and the planted direction."""
    lake = open_lake(folder, create=True)
    spec = lake.create_run("wide", hooks=(HOOK,), d_model=width, dtype="bfloat16", provenance={"model": "synthetic"})
    writer = RunWriter(lake.run_folder("wide"), spec, segment_rows=n_rows)
    source = Rows(width, seed=0)
    labels, number = {}, 0
    for _ in range(n_rows // BLOCK_ROWS):
        bits, label = source.block()
        for start in range(0, BLOCK_ROWS, PROMPT_ROWS):
            some = slice(start, start + PROMPT_ROWS)
            positions = np.arange(PROMPT_ROWS, dtype=np.int32)
            writer.append(CapturedRequest(f"p{number}", positions, PROMPT_ROWS, positions, {HOOK: bits[some]}))
            labels[f"p{number}"] = label[some]
            number += 1
    writer.commit()
    run = seal_run(
        lake.run_folder("wide"),
        token_labels={"y": labels},
        token_label_dtypes={"y": "bool"},
        expected_rows=writer.committed_rows,
    )
    return run, source.direction


def shard_files(run: Run) -> list[Path]:
    """The files that hold the activations, in order."""
    (part,) = run.plan.parts
    folder = run.plan.folder / part.path / HOOK
    spec = run.plan.spec.activation_array
    return [(folder / spec.shard_path(shard)).path for shard in range(-(-part.rows // spec.shard_rows))]


def forget(run: Run) -> None:
    """Drop the run's activations from the page cache."""
    os.sync()
    for path in shard_files(run):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cold_read(run: Run) -> float:
    """Seconds to read every activation once, from cold, one file after another."""
    forget(run)
    buffer = bytearray(8 << 20)
    start = time.perf_counter()
    for path in shard_files(run):
        with path.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    return time.perf_counter() - start


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """Gives a function that returns the peak so far, GB, over this process and all below it, without file pages."""
    import psutil

    highest, stop = [0.0], threading.Event()

    def watch() -> None:
        me = psutil.Process()
        while not stop.is_set():
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                except OSError:  # it has just ended
                    continue
                fields = dict(line.split(":") for line in text.splitlines()[1:])
                total += sum(int(fields[name].split()[0]) for name in ("Pss_Anon", "Pss_Shmem"))
            highest[0] = max(highest[0], total * 1024 / 1e9)
            stop.wait(0.3)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: highest[0]
    finally:
        stop.set()
        thread.join()


class Timed:
    """Runs something and keeps its value and its wall and CPU seconds, of all threads."""

    def __init__(self, action: Callable[[], Any]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.value = action()
        self.wall, self.cpu = time.perf_counter() - wall, time.process_time() - cpu


class Steps:
    """Seconds from the start of each pass to the start of the next."""

    def __init__(self) -> None:
        self.names: dict[str, float] = {}

    def __call__(self, description: str, done: int, total: int) -> None:
        """As `running` calls it."""
        self.names.setdefault(description, time.perf_counter())

    def __str__(self) -> str:
        names, times = list(self.names), [*self.names.values(), time.perf_counter()]
        return ", ".join(f"{n} {b - a:.1f} s" for n, a, b in zip(names, times[:-1], times[1:], strict=True))


def objective_of(run: Run, probe: Any) -> tuple[float, float]:
    """Mean of the log-losses + |coef|^2 / (2 C n), and the norm of its gradient, by a pass of its own."""
    from millpond.analysis.aligned import AlignedRows
    from millpond.analysis.passes import Pass, run_pass

    rows = AlignedRows(run[HOOK], run.labels["y"], stored=True)
    coef, intercept = probe.coef_[0], float(probe.intercept_[0])
    loss, gradient, residual = run_pass(Pass(rows, loss_and_gradient, (coef, intercept)), progress=False)
    gradient += coef / probe.C
    return (loss + coef @ coef / (2 * probe.C)) / run.n_rows, float(
        np.hypot(np.linalg.norm(gradient), residual)
    ) / run.n_rows


def loss_and_gradient(
    state: tuple[NDArray[Any], float], x: Any, y: NDArray[np.bool_]
) -> tuple[float, NDArray[Any], float]:
    """Sums over a block, in float64 wherever rows are added."""
    from millpond.analysis.tiles import tiles

    coef, intercept = state
    loss, gradient, residual = 0.0, np.zeros(len(coef)), 0.0
    for rows, tile in tiles(x):
        z = tile @ coef.astype(np.float32) + intercept
        loss += float(np.logaddexp(0, np.where(y[rows], -z, z)).sum(dtype=np.float64))
        p = 1 / (1 + np.exp(-z)) - y[rows]
        gradient += p.astype(np.float32) @ tile
        residual += float(p.sum(dtype=np.float64))
    return loss, gradient, residual


def measure(n_rows: int, width: int, folder: Path) -> dict[str, Any]:
    """Write a run, read it, fit both probes."""
    from millpond import LogisticProbe, MassMeanProbe
    from millpond.analysis.passes import running

    start = time.perf_counter()
    run, planted = write_run(folder, n_rows, width)
    wrote = time.perf_counter() - start
    gigabytes = run.nbytes / 1e9
    reads = [cold_read(run)]
    steps = Steps()
    with peak_memory() as peak, running(on_progress=steps):
        forget(run)
        mass_mean = Timed(lambda: MassMeanProbe(progress=False).fit(run[HOOK], run.labels["y"]))
        forget(run)
        steps.names.clear()
        logistic = Timed(lambda: LogisticProbe(tol=1e-4, progress=False).fit(run[HOOK], run.labels["y"]))
        highest = peak()
    reads.append(cold_read(run))
    read = min(reads)
    probe = logistic.value
    objective, gradient_norm = objective_of(run, probe)
    test = run.plan.blocks()[-1]
    x = decode(run.plan.read_stored(HOOK, test), "bfloat16")
    centred = x - x.mean(axis=0)
    agreement = float(np.corrcoef(centred @ probe.coef_[0].astype(np.float32), centred @ planted)[0, 1])
    print(f"{gigabytes:.2f} GB, {run.n_rows:,} x {width:,}, written in {wrote:.0f} s")
    print(f"  cold read {reads[0]:.2f} and {reads[1]:.2f} s ({gigabytes / read:.2f} GB/s); ratios are to the faster")
    for name, timed in (("mass-mean", mass_mean), ("logistic", logistic)):
        print(
            f"  {name}: {timed.wall:.2f} s = {timed.wall / read:.2f} reads; {timed.cpu:.1f} s of CPU, which is "
            f"{timed.cpu / 2 / read:.2f} reads on two idle cores"
        )
    print(f"  steps of the logistic probe: {steps}")
    print(
        f"  {int(probe.n_iter_[0])} gradient passes, converged {probe.converged_}, loss {objective:.8f} and gradient norm "
        f"{gradient_norm:.1e} a row, agreement with the planted scores {agreement:.4f}; peak {highest:.2f} GB",
        flush=True,
    )
    shutil.rmtree(folder)
    return {
        "read": read, "mass_mean": mass_mean.wall, "logistic": logistic.wall, "logistic_cpu": logistic.cpu,
        "peak": highest, "gigabytes": gigabytes,
    }  # fmt: skip


def headline(*, quick: bool) -> dict[str, float]:
    """The headline's keys of the record that `benchmarks/probes.py` prints."""
    width = 4096 if quick else 10_240
    large = (16 if quick else 123) * BLOCK_ROWS
    small = (4 if quick else 12) * BLOCK_ROWS
    folder = Path(tempfile.mkdtemp(prefix="millpond-headline-"))
    try:
        first = measure(small, width, folder / "small")
        second = measure(large, width, folder / "large")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    growth = np.log(second["logistic"] / first["logistic"]) / np.log(second["gigabytes"] / first["gigabytes"])
    return {
        "headline_time_over_read": round(second["logistic"] / second["read"], 2),
        "headline_mass_mean_over_read": round(second["mass_mean"] / second["read"], 2),
        "headline_peak_gb": round(second["peak"], 2),
        "growth_exponent": round(float(growth), 3),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 GB in place of 20")
    print(json.dumps(headline(quick=parser.parse_args().quick)))


if __name__ == "__main__":
    main()
