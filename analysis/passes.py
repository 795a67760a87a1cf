"""Passes over rows: map blocks of rows to small statistics next to the data, and combine them in a fixed order.

Every analysis is a few of these passes. A pass may serve many hooks, labels and hyper-parameters; each
block is read once in it.
"""

from __future__ import annotations

import itertools
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from millpond.analysis.aligned import AlignedRows, InMemory
from millpond.analysis.lazy_chunks import LazyChunks, StoredBfloat16
from millpond.store.errors import Cancelled, MemoryTooSmall
from millpond.store.reprs import human_bytes

if TYPE_CHECKING:
    from millpond.analysis.aligned import RowArray as RowArray

__all__ = [
    "AlignedRows", "InMemory", "LazyChunks", "Pass", "StoredBfloat16",
    "add", "join", "one_blas_thread", "run_pass", "run_passes", "running",
]  # fmt: skip

MapFunction = Callable[..., Any]
"""`(state, *blocks) -> statistics`; picklable, pure, returns arrays, numbers, or dicts and tuples of them."""
Combine = Callable[[Any, Any], Any]
Mapped = tuple[MapFunction, Combine, bool]
"""Function, how its statistics combine, and whether it accumulates."""

SMALL_RESULT = 1 << 20
"""Statistics below this size (bytes) need no place in the plan."""
RESULTS_BYTES = 1 << 30
"""Statistics of all tasks together, where they are large: wide Gram matrices get fewer, longer tasks."""
MAX_TASKS = 2048


@dataclass(frozen=True)
class Pass:
    """One map and reduction: `function(state, *blocks)` over every block of `rows`, combined in block order."""

    rows: AlignedRows
    function: MapFunction
    state: Any = None
    combine: Combine | None = None
    """How two neighbouring statistics become one; `add` when not given. It must not change its arguments."""
    result_bytes: int = 0
    """Size of the statistics of one block; to be given if it may pass `SMALL_RESULT`."""
    accumulate: bool = False
    """`function(state)` makes an object that takes in one block after another, `update(*blocks)`, and gives the
    statistics of a task, `result()`: for what needs more rows at once than a block has, or is large."""
    scratch_bytes: int = 0
    """What `function` needs beside the block, a copy of it and the statistics."""

    @property
    def n_tasks(self) -> int:
        """Tasks of this pass, which depend on its rows and on `result_bytes` alone."""
        blocks = len(self.rows.blocks)
        tasks = min(blocks, max(64, min(MAX_TASKS, blocks // 8)))
        if self.result_bytes > SMALL_RESULT:
            tasks = min(tasks, max(4, RESULTS_BYTES // self.result_bytes))
        return tasks

    @property
    def mapping(self) -> Mapped:
        """What is done with the rows."""
        return self.function, self.combine or add, self.accumulate

    def ranges(self) -> list[tuple[int, int]]:
        """The first block of each task and the one after its last."""
        edges = [len(self.rows.blocks) * task // self.n_tasks for task in range(self.n_tasks + 1)]
        return list(itertools.pairwise(edges))

    def thread_bytes(self) -> int:
        """Most memory that a thread needs: two blocks (one read ahead), a copy, two statistics, scratch."""
        return 3 * self.rows.block_bytes + 2 * self.result_bytes + self.scratch_bytes

    def waiting_bytes(self) -> int:
        """Most memory of statistics that wait for their neighbours, a worker."""
        return (math.ceil(math.log2(self.n_tasks)) + 1) * self.result_bytes


@dataclass(frozen=True)
class Settings:
    """Where passes run and who watches; see `running`."""

    client: Any = None
    in_process: bool = False
    threads: int | None = None
    memory_limit: int | None = None
    cancel: threading.Event | None = None
    on_progress: Callable[[str, int, int], None] | None = None
    hosts: Mapping[str, str] | None = None
    on_figure: Callable[[float, float], None] | None = None


_SETTINGS: ContextVar[Settings | None] = ContextVar("millpond-passes", default=None)


@contextmanager
def running(
    client: Any = None,
    *,
    in_process: bool = False,
    threads: int | None = None,
    memory_limit: int | None = None,
    cancel: threading.Event | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    hosts: Mapping[str, str] | None = None,
    on_figure: Callable[[float, float], None] | None = None,
) -> Iterator[None]:
    """Within this context, run passes as said here.

    Args:
        client: a `dask.distributed.Client`; by default the active one, if there is one.
        in_process: run in threads of this process even if a client is active.
        threads: of this process; by default one a core.
        memory_limit: bytes that passes may use in this process; by default its physical memory.
        cancel: passes stop with `Cancelled` soon after this event is set.
        on_progress: called with the description of the pass, blocks done and blocks in all.
        hosts: which worker is next to the rows below a URL: a Dask worker's address or name, or its host. Tasks run
            there if it is there, else anywhere. By default those of the context around this one.
        on_figure: called by a training with the share that is done and its FVU there.
    """
    if hosts is None:
        hosts = (_SETTINGS.get() or Settings()).hosts
    token = _SETTINGS.set(Settings(client, in_process, threads, memory_limit, cancel, on_progress, hosts, on_figure))
    try:
        yield
    finally:
        _SETTINGS.reset(token)


def tell_figure(share: float, value: float) -> None:
    """Tell whoever watches, as `running` says, how far a training is and how well it does."""
    told = (_SETTINGS.get() or Settings()).on_figure
    if told is not None:
        told(share, value)


def run_pass(one: Pass, *, description: str = "pass", progress: bool = True) -> Any:
    """Run one pass; see `run_passes`."""
    return run_passes([one], description=description, progress=progress)[0]


def run_passes(passes: Sequence[Pass], *, description: str = "pass", progress: bool = True) -> list[Any]:
    """Run several passes at once and return the statistics of each.

    Runs on the active `dask.distributed` client if there is one and some rows are lazy, else on threads
    of this process; `running` says otherwise. A task is a range of neighbouring blocks, read and mapped
    one after another; the statistics of the tasks are combined in a binary tree. Ranges and tree depend
    on the rows alone and BLAS uses one thread, so the bits of the result depend neither on where nor on
    how often tasks run: one that is lost with its worker is simply run again.

    Raises:
        MemoryTooSmall: a worker cannot hold `threads * Pass.thread_bytes() + Pass.waiting_bytes()`;
            nothing was run.
        Cancelled: the event given to `running` was set.
    """
    from tqdm.auto import tqdm

    from millpond.analysis.execution import run_in_threads, run_on_cluster

    settings = _SETTINGS.get() or Settings()
    lazy = any(held is None for one in passes for held in one.rows.memory)
    client = None if settings.in_process or not lazy else settings.client or _active_client()
    n_blocks = sum(len(one.rows.blocks) for one in passes)
    bar = tqdm(
        total=n_blocks, desc=description, unit="block", delay=1.0, leave=False, disable=None if progress else True
    )
    with bar:
        report = _Report(bar, description, n_blocks, settings.on_progress)
        report(0)
        if client is not None:
            done = run_on_cluster(client, passes, description, settings, report)
        else:
            done = run_in_threads(passes, description, settings, report)
        report.finish()
    return done


def check_memory(passes: Sequence[Pass], threads: int, limit: int, where: str, description: str) -> None:
    """Raises MemoryTooSmall if `threads` threads with `limit` bytes together cannot hold what the passes need."""
    need = threads * max(one.thread_bytes() for one in passes) + sum(one.waiting_bytes() for one in passes)
    if need > limit:
        largest = max(passes, key=Pass.thread_bytes)
        raise MemoryTooSmall(
            f"{description} needs up to {human_bytes(need)} ({threads} threads with blocks of "
            f"{human_bytes(largest.rows.block_bytes)} and statistics of {human_bytes(largest.result_bytes)}), "
            f"but {where} has {human_bytes(limit)}; give it more memory or fewer threads"
        )


class _Report:
    """Counts finished blocks; called from any thread. A block that is mapped again is not counted twice in the bar."""

    def __init__(self, bar: Any, description: str, total: int, also: Callable[[str, int, int], None] | None) -> None:
        self.bar, self.description, self.total, self.also = bar, description, total, also
        self.done, self.lock = 0, threading.Lock()

    def __call__(self, blocks: int) -> None:
        with self.lock:
            blocks = min(blocks, self.total - self.done)
            self.done += blocks
            if blocks:
                self.bar.update(blocks)
            if self.also is not None:
                self.also(self.description, self.done, self.total)

    def finish(self) -> None:
        if self.done < self.total:
            self(self.total - self.done)


def map_range(one: Mapped, state: Any, blocks: Iterator[list[Any]], tick: Callable[[], None]) -> Any:
    """Statistics of one task: its blocks mapped and combined one after another."""
    function, combine, accumulate = one
    total: Any = None
    if accumulate:
        sums = function(state)
        for arrays in blocks:
            sums.update(*arrays)
            del arrays
            tick()
        return sums.result()
    for number, arrays in enumerate(blocks):
        found = function(state, *arrays)
        del arrays
        total = found if number == 0 else combine(total, found)
        tick()
    return total


def check_cancelled(cancel: threading.Event | None, description: str) -> None:
    """Raises Cancelled if the event is set."""
    if cancel is not None and cancel.is_set():
        raise Cancelled(f"{description} was cancelled; run it again to have its result")


def add(left: Any, right: Any) -> Any:
    """Sum two statistics of the same shape: numbers, arrays, or dicts and tuples of them."""
    if isinstance(left, dict):
        return {name: add(value, right[name]) for name, value in left.items()}
    if isinstance(left, tuple):
        return tuple(add(a, b) for a, b in zip(left, right, strict=True))
    return left + right


def join(left: list[Any], right: list[Any]) -> list[Any]:
    """Concatenate two lists of per-block values, in block order."""
    return left + right


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """One thread for BLAS, and for PyTorch if it is loaded, in this process.

    Blocks already use every core; threads inside BLAS would only wait for each other. The small factorisations
    between passes gain little from a second thread, and lose much on a busy machine.
    """
    import scipy.linalg  # noqa: F401  # threadpool_limits sees only the BLAS copies that are loaded; SciPy brings its own
    from threadpoolctl import threadpool_limits

    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    with threadpool_limits(1, user_api="blas"):
        if torch:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if torch:
                torch.set_num_threads(threads)


def _active_client() -> Any:
    from dask.base import get_scheduler

    owner = getattr(get_scheduler(), "__self__", None)
    return owner if hasattr(owner, "run_on_scheduler") else None
