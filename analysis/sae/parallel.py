"""Training on several Dask workers: each sees rows of its own, gradients are averaged with torch.distributed.

One task a worker joins a process group (gloo on CPUs, nccl on GPUs) and runs the ordinary loop. Where all
are on one host, matrices of gradients are added up in memory that they share, and the rest through sockets.
A worker holds the parameters, Adam's moments and the gradients of each autoencoder (16 bytes a parameter, and
8 of shared memory), the wide product of one batch (batch_size * d_sae * 2 or 4 bytes) and its shuffling buffer.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from millpond.analysis.sae.shared_memory import shared_tensors
from millpond.store.errors import InvalidInput, MillpondError

if TYPE_CHECKING:
    from millpond.analysis.sae.fit import Learner, Trained
    from millpond.analysis.sae.scaling import Scale
    from millpond.analysis.sae.together import SourceSpec

T = TypeVar("T")

_TIMEOUT = timedelta(minutes=5)
_GRACE_SECONDS = 30


@dataclass
class _Place:
    """Where a matrix is added up."""

    every: list[Tensor]
    """Each worker's."""
    read: int = -1
    """How many exchanges this worker had begun when it last read them."""


class Group:
    """The workers that train together; use as a context."""

    def __init__(self, address: str, rank: int, world: int, device: str) -> None:
        self.address, self.rank, self.world = address, rank, world
        self.backend = "nccl" if device == "cuda" else "gloo"
        self._shared: dict[torch.Size, deque[_Place]] = {}
        """Places for matrices of each shape, the one that was used last at the end."""
        self._begun = self._passed = 0
        """Exchanges begun, and how many of them every worker is known to have begun."""

    def __enter__(self) -> Group:
        dist.init_process_group(
            self.backend, init_method=self.address, rank=self.rank, world_size=self.world, timeout=_TIMEOUT
        )
        return self

    def __exit__(self, *error: object) -> None:
        dist.destroy_process_group()

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Where all workers are on one host, add up through memory that they share what has the shape of these matrices.

        Each has two places, so that nobody waits for the others to have read what was written a step before.
        """
        if self.backend != "gloo" or self.world == 1:
            return
        shapes = [tensor.shape for tensor in tensors if tensor.ndim == 2]
        for every in shared_tensors([*shapes, *shapes]):
            self._shared.setdefault(every[0].shape, deque()).append(_Place(every))

    def empty_like(self, tensor: Tensor) -> Tensor:
        """An uninitialised tensor for what `start_sum` is to be called with next; where it is shared, that copies nothing."""
        place = self._place(tensor)
        return torch.empty_like(tensor) if place is None else place.every[self.rank]

    def start_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to add a tensor up over the workers, which overwrites it; what is returned waits for the sum.

        All workers have to begin, and to wait, in the same order.
        """
        place = self._place(tensor)
        if place is not None:
            return self._start_shared(tensor, place)
        work = dist.all_reduce(tensor, async_op=True)
        self._begun += 1
        begun = self._begun

        def wait() -> Tensor:
            work.wait()
            self._passed = max(self._passed, begun)
            return tensor

        return wait

    def _place(self, tensor: Tensor) -> _Place | None:
        """Where the next matrix of this shape is added up, if that is in shared memory."""
        places = self._shared.get(tensor.shape)
        if places is None or tensor.dtype != torch.float32:
            return None
        self._let_all_come_to(places[0].read)
        return places[0]

    def _start_shared(self, tensor: Tensor, place: _Place) -> Callable[[], Tensor]:
        every = place.every
        self._shared[tensor.shape].rotate(-1)
        if tensor.data_ptr() != every[self.rank].data_ptr():
            every[self.rank].copy_(tensor)
        written = self._begun

        def wait() -> Tensor:
            self._let_all_come_to(written)
            total = every[0] + every[1]  # in the same order on all workers
            for other in every[2:]:
                total += other
            place.read = self._begun
            return total

        return wait

    def _let_all_come_to(self, begun: int) -> None:
        """Return when every worker has done what this one did while it had begun so many exchanges, and no more."""
        if self._passed <= begun:
            self.start_sum(torch.zeros(1))()

    def from_first(self, tensor: Tensor) -> Tensor:
        """The first worker's tensor, on all."""
        tensor = tensor.contiguous()
        dist.broadcast(tensor, src=0)
        return tensor

    def objects_of_first(self, values: list[T]) -> list[T]:
        """The first worker's values, on all."""
        shared = list(values)
        dist.broadcast_object_list(shared, src=0)
        return shared


def train_on_workers(
    client: Any,
    spec: SourceSpec,
    learners: Sequence[Learner],
    tokens: int,
    out: Path | None,
    *,
    resume: bool,
    scales: Mapping[int, Scale],
) -> list[Trained]:
    """Train on all workers of `client`, one thread each; `out` must be a folder that all of them see.

    Where some workers declare the resource `GPU`, only those train.

    Raises:
        InvalidInput: the cluster has no workers; or as `fit.train`.
    """
    from distributed import get_worker, wait

    workers = client.scheduler_info(n_workers=-1)["workers"]
    with_gpu = [address for address, worker in workers.items() if worker["resources"].get("GPU")]
    addresses = sorted(with_gpu or workers)
    if not addresses:
        raise InvalidInput("the cluster has no workers; start some, or leave client out to train here")
    spec.open()  # say here what cannot work, before any worker waits for another

    def free_port() -> tuple[str, int]:
        host = get_worker().address.split("://")[-1].rsplit(":", 1)[0].strip("[]")
        with socket.socket() as probe:
            probe.bind((host, 0))
            return host, int(probe.getsockname()[1])

    host, port = client.submit(free_port, workers=[addresses[0]], pure=False).result()
    folder = None if out is None else out.resolve()
    futures = [
        client.submit(
            _run_rank,
            f"tcp://{host}:{port}",
            rank,
            len(addresses),
            spec,
            list(learners),
            tokens,
            folder,
            resume,
            dict(scales),
            workers=[address],
            allow_other_workers=False,
            pure=False,
            retries=0,
        )
        for rank, address in enumerate(addresses)
    ]
    try:
        with client.as_current():  # `wait` asks for it
            wait(futures, return_when="FIRST_COMPLETED")
            if any(future.status == "error" for future in futures):
                with suppress(TimeoutError):  # one that fails breaks the others' connections: theirs is not the reason
                    wait(futures, timeout=_GRACE_SECONDS)
        failed = [future for future in futures if future.status == "error"]
        reasons = [future for future in failed if isinstance(future.exception(), MillpondError)]
        every: list[Trained] = [*reasons, *failed, futures[0]][0].result()
    finally:
        client.cancel(futures, force=True)
    return every


def _run_rank(
    address: str,
    rank: int,
    world: int,
    spec: SourceSpec,
    learners: list[Learner],
    tokens: int,
    out: Path | None,
    resume: bool,
    scales: dict[int, Scale],
) -> list[Trained] | None:
    import dask

    from millpond.analysis.sae.fit import train
    from millpond.analysis.sae.trainer import device

    config = learners[0].config
    # a task must not hand its reads to the cluster it runs on
    with dask.config.set(scheduler="synchronous"), Group(address, rank, world, device(config).type) as group:
        trained = train(
            spec.open(rank, world), learners, tokens, out, resume=resume, progress=False, scales=scales, group=group
        )
    return trained if rank == 0 else None
