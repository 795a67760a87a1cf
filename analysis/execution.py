"""Where passes run: threads of this process, or the workers of a Dask cluster."""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from millpond.analysis.aligned import Box, hold, read_ahead
from millpond.analysis.passes import (
    Pass,
    Settings,
    check_cancelled,
    check_memory,
    map_range,
    one_blas_thread,
)
from millpond.store.errors import Cancelled, ClusterUnavailable
from millpond.store.logs import job_id, log_once, of_job

logger = logging.getLogger(__name__)

_TOPIC = "millpond-pass"
_WORKERS_TIMEOUT = 60
_CHECK_SECONDS = 10
_TICK_SECONDS = 0.25


def run_in_threads(
    passes: Sequence[Pass], description: str, settings: Settings, report: Callable[[int], None]
) -> list[Any]:
    """Run on threads of this process, one BLAS thread each."""
    from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

    tasks = [(number, task, span) for number, one in enumerate(passes) for task, span in enumerate(one.ranges())]
    threads = min(settings.threads or len(os.sched_getaffinity(0)), len(tasks))
    limit = settings.memory_limit or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    check_memory(passes, threads, limit, "this process", description)
    stopped = threading.Event()

    def stop() -> None:
        check_cancelled(settings.cancel, description)
        if stopped.is_set():
            raise Cancelled(f"{description} was stopped")

    def run(number: int, span: tuple[int, int]) -> Any:
        one = passes[number]
        blocks = read_ahead(one.rows.sources, one.rows.blocks[slice(*span)], one.rows.local_memory(), stop)
        return map_range(one.mapping, one.state, blocks, lambda: report(1))

    trees = [_Tree(one) for one in passes]
    waiting = iter(tasks)
    with one_blas_thread(), ThreadPoolExecutor(threads, thread_name_prefix="millpond-pass") as pool:
        if threads == 1 and len(tasks) == 1:  # no thread hop for the many small passes over arrays in memory
            trees[0].put(0, run(0, tasks[0][2]))
            return [trees[0].total]
        running: dict[Future[Any], tuple[int, int]] = {}
        try:
            while True:
                for number, task, span in itertools.islice(waiting, threads - len(running)):
                    running[pool.submit(run, number, span)] = (number, task)
                if not running:
                    break
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    number, task = running.pop(done)
                    trees[number].put(task, done.result())
        except BaseException:
            stopped.set()
            raise
    return [tree.total for tree in trees]


class _Tree:
    """Combines the statistics of tasks in the binary tree over their order, as they come."""

    def __init__(self, one: Pass) -> None:
        self.combine = one.mapping[1]
        self.widths = _widths(one.n_tasks)
        self.waiting: dict[tuple[int, int], Any] = {}
        self.total: Any = None

    def put(self, task: int, value: Any) -> None:
        level, place = 0, task
        while level < len(self.widths) - 1:
            neighbour = place ^ 1
            if neighbour < self.widths[level]:
                if (level, neighbour) not in self.waiting:
                    self.waiting[level, place] = value
                    return
                other = self.waiting.pop((level, neighbour))
                value = self.combine(other, value) if neighbour < place else self.combine(value, other)
            level, place = level + 1, place // 2
        self.total = value


def _widths(tasks: int) -> list[int]:
    """How many statistics each level of the tree has, down to one."""
    widths = [tasks]
    while widths[-1] > 1:
        widths.append(-(-widths[-1] // 2))
    return widths


def run_on_cluster(
    client: Any,
    passes: Sequence[Pass],
    description: str,
    settings: Settings,
    report: Callable[[int], None],
) -> list[Any]:
    """Run on the workers of `client`'s cluster, those of `settings.hosts` first where they are next to the rows.

    Raises:
        ClusterUnavailable: the cluster has no workers.
        MemoryTooSmall: a worker cannot hold what the passes need.
        Cancelled: `settings.cancel` was set; workers stop after the block they are at.
    """
    for threads, limit in _workers(client):
        if limit:
            check_memory(passes, threads, limit, "a worker", description)
    token = f"{job_id()}/{uuid.uuid4().hex}"
    client.subscribe_topic(_TOPIC, lambda event: report(event[1][1]) if event[1][0] == token else None)
    finished, left = threading.Event(), itertools.count(1)

    def done(_: Any) -> None:
        if next(left) == len(passes):
            finished.set()

    graphs = [_graph(client, one, token, settings.hosts or {}) for one in passes]
    roots = client.compute(graphs, optimize_graph=False)
    try:
        for root in roots:
            root.add_done_callback(done)
        checked = time.monotonic()
        while not finished.wait(0.1):
            check_cancelled(settings.cancel, description)
            if any(root.status == "error" for root in roots):
                break
            if time.monotonic() - checked > _CHECK_SECONDS:  # workers that die at once are no longer replaced
                _workers(client)
                checked = time.monotonic()
        return [box.value for box in client.gather(roots)]
    except BaseException:
        client.cancel(roots)
        client.run(_stop, token)
        raise


def _workers(client: Any) -> list[tuple[int, int]]:
    """Threads and memory limit of every worker."""
    deadline = time.monotonic() + _WORKERS_TIMEOUT
    while not (found := client.run_on_scheduler(_threads_and_memory)):
        if time.monotonic() > deadline:
            raise ClusterUnavailable(f"the Dask cluster has had no workers for {_WORKERS_TIMEOUT} s; start some")
        time.sleep(0.2)
    return [(int(threads), int(limit)) for threads, limit in found]


def _threads_and_memory(dask_scheduler: Any) -> list[tuple[int, int]]:
    return [(worker.nthreads, worker.memory_limit or 0) for worker in dask_scheduler.workers.values()]


def _graph(client: Any, one: Pass, token: str, hosts: Mapping[str, str]) -> Any:
    from cloudpickle import dumps
    from dask import annotate, delayed

    spans = one.ranges()
    # as bytes: what a worker cannot import then fails in the task, and not in the worker's connection
    what = hold(client, [(dumps(one.mapping), one.state)])[0]
    rows = one.rows.on(client)
    blocks = one.rows.blocks
    bounds = [(blocks[first].start, blocks[last - 1].stop) for first, last in spans]
    held = [None if array is None else array.on(client, bounds) for array in one.rows.memory]
    mapped, combined = delayed(_map_task, pure=False), delayed(_combine_task, pure=False)
    parts = []
    for task, span in enumerate(spans):
        memory = [None if array is None else array[task] for array in held]
        host = one.rows.host(span, hosts) if hosts else None
        near = annotate(workers=[host], allow_other_workers=True) if host else nullcontext()
        with near:
            parts.append(mapped(what, rows, span, bounds[task][0], token, *memory))
    while len(parts) > 1:
        pairs = [combined(what, *parts[i : i + 2]) for i in range(0, len(parts) - 1, 2)]
        parts = pairs + parts[len(pairs) * 2 :]
    return parts[0]


def _map_task(what: Box, rows: Box, span: tuple[int, int], first_row: int, token: str, *held: Box | None) -> Box:
    """`token` is the job's id and the pass's mark; Dask logs it too where a task fails."""
    worker, started = _worker(), time.monotonic()
    _limit_threads(worker)
    with of_job(token.partition("/")[0]):
        if job_id():
            log_once()
        total = _map_span(worker, what, rows, span, first_row, token, *held)
        logger.info(
            "mapped",
            extra={"worker": worker.name, "blocks": span[1] - span[0], "seconds": round(time.monotonic() - started, 3)},
        )
    return Box(total)


def _map_span(
    worker: Any, what: Box, rows: Box, span: tuple[int, int], first_row: int, token: str, *held: Box | None
) -> Any:
    sources, all_blocks = rows.value
    memory = [None if box is None else (first_row, box.value) for box in held]
    key = worker.get_current_task()

    def stop() -> None:
        task = worker.state.tasks.get(key)  # released, also where whoever asked was killed and told nobody
        if token in getattr(worker, "millpond_stopped", ()) or task is None or task.state == "cancelled":
            raise Cancelled("the pass was cancelled")

    tick = _Tick(worker, token)
    packed, state = what.value
    mapping = pickle.loads(packed)  # noqa: S301  # from our own client
    total = map_range(mapping, state, read_ahead(sources, all_blocks[slice(*span)], memory, stop), tick)
    tick.send()
    return total


def _combine_task(what: Box, left: Box, right: Box) -> Box:
    _limit_threads(_worker())
    _, combine, _ = pickle.loads(what.value[0])  # noqa: S301
    return Box(combine(left.value, right.value))


class _Tick:
    """Tells the client about finished blocks, a few times a second at most."""

    def __init__(self, worker: Any, token: str) -> None:
        self.worker, self.token = worker, token
        self.blocks, self.last = 0, time.monotonic()

    def __call__(self) -> None:
        self.blocks += 1
        if time.monotonic() - self.last > _TICK_SECONDS:
            self.send()

    def send(self) -> None:
        self.worker.log_event(_TOPIC, [self.token, self.blocks])
        self.blocks, self.last = 0, time.monotonic()


def _worker() -> Any:
    from distributed import get_worker

    return get_worker()


def _limit_threads(worker: Any) -> None:
    """One thread for BLAS and OpenMP in this worker process, for good: its tasks already use every core."""
    import sys

    from threadpoolctl import threadpool_limits

    loaded = len(sys.modules)
    if getattr(worker, "millpond_limited", 0) != loaded:  # modules loaded since then may have brought a BLAS
        worker.millpond_limits = threadpool_limits(1)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)
        worker.millpond_limited = len(sys.modules)


def _stop(token: str, dask_worker: Any) -> None:
    dask_worker.millpond_stopped = {*getattr(dask_worker, "millpond_stopped", ()), token}
