"""What capture does in one vLLM worker, in Prometheus' text format: a file that a thread renews, and vLLM's own `/metrics`.

Nothing is counted here. The thread reads the counters that the taps and the sink keep anyway, so a step costs what it
did before. Where the folder is, `MILLPOND_METRICS` says; every process of an engine inherits it. Numbers of rows depend
on what people do with a model: the folder and the endpoint are for the vault's own monitoring.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millpond.store.metrics import Sample, exposition

if TYPE_CHECKING:
    from millpond.capture.sink import SinkCounts

logger = logging.getLogger(__name__)

FOLDER = "MILLPOND_METRICS"
"""Environment variable: the folder of the files, made if it is missing."""
SECONDS = 2.0
"""A file is at most so old while its process lives."""
_FILE = re.compile(r"millpond_capture_(\d+)\.prom")

HELP = {
    "millpond_capture_steps_total": "Steps of the engine.",
    "millpond_capture_staged_rows_total": "Rows that the taps took, counted once for all hooks.",
    "millpond_capture_staged_bytes_total": "Bytes that the taps took, of all hooks and reads.",
    "millpond_capture_plan_seconds_total": "Seconds in which steps waited for their row maps.",
    "millpond_capture_take_seconds_total": "Seconds in which steps waited for their rows to be handed over.",
    "millpond_capture_ring_wait_seconds_total": "Seconds in which steps waited for room in the staging ring.",
    "millpond_capture_engine_wait_seconds_total": "Seconds in which the engine waited for the lake, the wait under way included.",
    "millpond_capture_queue_requests": "Captured requests that wait to be written.",
    "millpond_capture_queue_bytes": "Bytes of the activations that wait to be written.",
    "millpond_capture_written_bytes_total": "Bytes of activations given to the lake.",
    "millpond_capture_writer_seconds_total": "Seconds in which the writing thread worked.",
    "millpond_capture_open_requests": "Requests of a run that are captured now.",
    "millpond_capture_committed_rows_total": "Rows of a run that are durable and visible.",
    "millpond_capture_committed_requests_total": "Requests of a run that are durable and visible.",
    "millpond_capture_failed_requests_total": "Requests of a run that failed: rows were missing (capture) or not written (lake).",
    "millpond_capture_cpu_seconds_total": "CPU seconds of the engine's process.",
}
_PLAIN = {
    "steps": "steps_total",
    "rows": "staged_rows_total",
    "bytes": "staged_bytes_total",
    "plan_seconds": "plan_seconds_total",
    "take_seconds": "take_seconds_total",
    "ring_wait_seconds": "ring_wait_seconds_total",
    "wait_seconds": "engine_wait_seconds_total",
    "written": "written_bytes_total",
    "writer_seconds": "writer_seconds_total",
    "cpu_seconds": "cpu_seconds_total",
}
"""Names of `Tapping.statistics`."""


def capture_metrics(
    rank: int,
    statistics: Mapping[str, float],
    open_runs: Iterable[str],
    failed: Mapping[str, int],
    sink: SinkCounts | None,
) -> str:
    """One worker's metrics.

    Args:
        rank: the worker's, among all of its engine.
        statistics: of `Tapping.statistics`.
        open_runs: the run of each request that is captured now.
        failed: requests whose rows were missing, by run.
        sink: what the sink has done; None where another worker writes.
    """
    worker = f'pid="{os.getpid()}",rank="{rank}"'  # run names need no escaping
    samples: list[Sample] = []

    def add(name: str, value: float, run: str | None = None, more: str = "") -> None:
        labels = worker if run is None else f'{worker},run="{run}"{more}'
        samples.append((f"millpond_capture_{name}", f"{{{labels}}}", value))

    for name, metric in _PLAIN.items():
        if name in statistics:
            add(metric, statistics[name])
    for run, count in sorted(Counter(open_runs).items()):
        add("open_requests", count, run)
    for run, count in sorted(failed.items()):
        add("failed_requests_total", count, run, ',why="capture"')
    if sink is not None:
        add("queue_requests", sink.queued_requests)
        add("queue_bytes", sink.queued_bytes)
        for run, (rows, requests) in sorted(sink.committed.items()):
            add("committed_rows_total", rows, run)
            add("committed_requests_total", requests, run)
        for run, count in sorted(sink.lost.items()):
            add("failed_requests_total", count, run, ',why="lake"')
    return exposition(HELP, samples)


class MetricsFile:
    """`millpond_capture_PID.prom` in a folder, renewed by a thread for as long as the process lives.

    The file of a process that has ended stays, with its last numbers, until the next one begins in the folder.

    Args:
        folder: made if it is missing; that of node_exporter's textfile collector, for example.
        text: gives the metrics.
        seconds: time between two.
    """

    def __init__(self, folder: Path, text: Callable[[], str], seconds: float = SECONDS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for path, pid in _files(folder):
            if not _lives(pid):
                path.unlink(missing_ok=True)
        self.path = folder / f"millpond_capture_{os.getpid()}.prom"
        self._text = text
        self._lock = threading.Lock()
        self._told = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(seconds,), name="millpond-metrics", daemon=True)
        self._thread.start()

    def write(self) -> None:
        """Renew the file now; what prevents it is logged, once: a capture must not end because nobody can watch it."""
        with self._lock:
            try:
                new = self.path.with_suffix(".new")
                new.write_text(self._text())
                new.replace(self.path)
                self._told = False
            except OSError as error:
                if not self._told:
                    logger.warning("the metrics cannot be written to %s: %s", self.path, error.strerror)
                self._told = True

    def close(self) -> None:
        """Write a last time, and end the thread."""
        self._ended.set()
        self._thread.join()
        self.write()

    def _run(self, seconds: float) -> None:
        while True:
            self.write()
            if self._ended.wait(seconds):
                return


def offer_to_prometheus() -> None:
    """Let what this process's vLLM serves at `/metrics` show the files of its engines' processes.

    With one API server that is prometheus_client's own registry. With several, a new registry is made of all servers'
    counters for every request, in vLLM and in its instrumentator: each gets the files too.
    """
    folder = os.environ.get(FOLDER)
    if not folder:
        return
    from prometheus_client import REGISTRY
    from prometheus_client.multiprocess import MultiProcessCollector

    files = _Files(Path(folder))
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        with suppress(ValueError):  # registered already
            REGISTRY.register(files)
        return
    original: Any = MultiProcessCollector.__init__
    if getattr(original, "_millpond", False):
        return

    def begin(self: Any, registry: Any, *args: Any, **kwargs: Any) -> None:
        original(self, registry, *args, **kwargs)
        registry.register(files)

    begin._millpond = True  # type: ignore[attr-defined]
    setattr(MultiProcessCollector, "__init__", begin)  # noqa: B010


class _Files:
    """A collector of prometheus_client's that reads the files when it is asked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def describe(self) -> list[Any]:
        """Its names, which prometheus_client wants to be unique."""
        from prometheus_client.metrics_core import Metric

        kinds = {name: "counter" if name.endswith("_total") else "gauge" for name in HELP}
        return [Metric(name.removesuffix("_total"), text, kinds[name]) for name, text in HELP.items()]

    def collect(self) -> Iterator[Any]:
        """The metrics of the processes that live."""
        from prometheus_client.parser import text_string_to_metric_families

        families: dict[str, Any] = {}
        for path, pid in _files(self._folder):
            if _lives(pid):
                for family in text_string_to_metric_families(path.read_text()):
                    families.setdefault(family.name, family)
                    if families[family.name] is not family:
                        families[family.name].samples += family.samples
        yield from families.values()


def _files(folder: Path) -> list[tuple[Path, int]]:
    found = [(path, _FILE.fullmatch(path.name)) for path in sorted(folder.iterdir())] if folder.is_dir() else []
    return [(path, int(match[1])) for path, match in found if match]


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
