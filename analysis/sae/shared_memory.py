"""Memory that the workers of one host share, so that matrices are added up without going through sockets."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def shared_tensors(shapes: Sequence[torch.Size]) -> list[list[Tensor]]:
    """Float32 tensors of these shapes, one of each worker's in the order of ranks, that all workers see.

    Every worker has to call it. The memory has no name, so nothing of it stays when workers are killed.

    Returns:
        For each shape the tensors; an empty list where the workers are not processes of one user on one host.
    """
    size = 4 * sum(prod(shape) for shape in shapes)
    host = _host()
    descriptor = -1 if host is None else os.memfd_create("millpond-sums")
    try:
        if descriptor >= 0:
            os.ftruncate(descriptor, size)
        places = _gathered((host, os.getpid(), descriptor))
        memory = []
        if host is not None and {other for other, _, _ in places} == {host}:
            try:
                memory = [_floats(f"/proc/{process}/fd/{number}", size) for _, process, number in places]
            except OSError:  # the system keeps processes apart; who sees none tells the others
                memory = []
        if not all(_gathered(bool(memory))):
            return []
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    parts = [torch.split(flat, [prod(shape) for shape in shapes]) for flat in memory]
    return [[part[number].view(shape) for part in parts] for number, shape in enumerate(shapes)]


def _host() -> str | None:
    """What processes have in common that can open each other's files by their numbers; None where that is not Linux."""
    if sys.platform != "linux":
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()} {os.getuid()}"


def _floats(path: str, size: int) -> Tensor:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.float32)
    finally:
        os.close(descriptor)


def _gathered(value: Any) -> list[Any]:
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every
