"""Training on several Dask workers: each sees rows of its own, gradients are averaged with torch.distributed.

One task a worker joins a process group (gloo on CPUs, nccl on GPUs) and runs the ordinary loop. A worker
holds the parameters, Adam's moments and the gradients of each autoencoder (16 bytes a parameter), the
wide product of one batch (batch_size * d_sae * 2 or 4 bytes) and its shuffling buffer.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from millpond.store.errors import InvalidInput, MillpondError

if TYPE_CHECKING:
    from millpond.analysis.sae.fit import Learner, Trained
    from millpond.analysis.sae.scaling import Scale
    from millpond.analysis.sae.together import SourceSpec

T = TypeVar("T")

_TIMEOUT = timedelta(minutes=5)
_GRACE_SECONDS = 30


class Group:
    """The workers that train together; use as a context."""

    def __init__(self, address: str, rank: int, world: int, device: str) -> None:
        self.address, self.rank, self.world = address, rank, world
        self.backend = "nccl" if device == "cuda" else "gloo"

    def __enter__(self) -> Group:
        dist.init_process_group(
            self.backend, init_method=self.address, rank=self.rank, world_size=self.world, timeout=_TIMEOUT
        )
        return self

    def __exit__(self, *error: object) -> None:
        dist.destroy_process_group()

    def start_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to replace a tensor by its sum over the workers; what is returned waits for that."""
        work = dist.all_reduce(tensor, async_op=True)

        def wait() -> None:
            work.wait()

        return wait

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
