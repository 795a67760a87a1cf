"""Pipeline stages: each keeps the rows of its own layers, and the first writes them all into one run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from millpond.store.errors import CaptureFailed
from millpond.store.segment import CapturedRequest

Confirmed = CapturedRequest | CaptureFailed
_ALIGNED = 16


def gather_stages(group: Any, mine: Mapping[str, Confirmed]) -> dict[str, Confirmed]:
    """What the stages of a pipeline have of confirmed requests, made whole; only the first stage gets any.

    Every stage must call this at the same place in its order of work. Arrays cross as they are, one message a request:
    pickled and gathered as objects they would cost the first stage about six times the processor time.

    Args:
        group: vLLM's pipeline group, with `world_size`, `rank_in_group`, `ranks` and `cpu_group`.
        mine: this stage's part, by capture id.
    """
    if group.world_size == 1:
        return dict(mine)
    import torch.distributed

    first = group.rank_in_group == 0
    described = {} if first else {capture_id: _described(part) for capture_id, part in mine.items()}
    told: list[Any] | None = [None] * group.world_size if first else None
    torch.distributed.gather_object(described, told, dst=group.ranks[0], group=group.cpu_group)
    if told is None:
        for part in mine.values():
            if isinstance(part, CapturedRequest):
                torch.distributed.send(_packed(part), dst=group.ranks[0], group=group.cpu_group)
        return {}
    parts = [dict(mine)]
    for rank, others in zip(group.ranks[1:], told[1:], strict=True):
        parts.append({})
        for capture_id, (request, arrays) in others.items():
            if isinstance(request, CapturedRequest):
                buffer = torch.empty(sum(array.room for array in arrays), dtype=torch.uint8)
                torch.distributed.recv(buffer, src=rank, group=group.cpu_group)
                request = _unpacked(request, arrays, buffer.numpy())
            parts[-1][capture_id] = request
    return join_stages(parts)


@dataclass(frozen=True)
class _Array:
    """An array of a request, without its values."""

    name: str
    is_read: bool
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def room(self) -> int:
        """Bytes in a message, so that the next array is aligned."""
        return -(-self.nbytes // _ALIGNED) * _ALIGNED


def _arrays(part: CapturedRequest) -> Iterator[tuple[str, bool, NDArray[Any]]]:
    for is_read, arrays in ((False, part.activations), (True, part.reads)):
        for name, array in arrays.items():
            yield name, is_read, array


def _described(part: Confirmed) -> tuple[Confirmed, list[_Array]]:
    if isinstance(part, CaptureFailed):
        return part, []
    arrays = [_Array(name, is_read, array.dtype.str, array.shape) for name, is_read, array in _arrays(part)]
    return replace(part, activations={}, reads={}), arrays


def _packed(part: CapturedRequest) -> Tensor:
    """The bytes of all its arrays."""
    _, described = _described(part)
    buffer = np.empty(sum(one.room for one in described), np.uint8)
    begin = 0
    for one, (_, _, array) in zip(described, _arrays(part), strict=True):
        buffer[begin : begin + one.nbytes].view(array.dtype)[:] = array.reshape(-1)
        begin += one.room
    return torch.from_numpy(buffer)


def _unpacked(request: CapturedRequest, arrays: Sequence[_Array], buffer: NDArray[np.uint8]) -> CapturedRequest:
    activations: dict[str, NDArray[Any]] = {}
    reads: dict[str, NDArray[Any]] = {}
    begin = 0
    for one in arrays:
        values = buffer[begin : begin + one.nbytes].view(one.dtype).reshape(one.shape)
        (reads if one.is_read else activations)[one.name] = values
        begin += one.room
    return replace(request, activations=activations, reads=reads)


def join_stages(parts: Sequence[Mapping[str, Confirmed]]) -> dict[str, Confirmed]:
    """One request for each capture id, with the hooks and reads of all stages; failed where it failed in any."""
    joined: dict[str, Confirmed] = {}
    for capture_id in parts[0]:
        known = [part[capture_id] for part in parts if capture_id in part]
        failed = next((part for part in known if isinstance(part, CaptureFailed)), None)
        whole = [part for part in known if isinstance(part, CapturedRequest)]
        if failed is not None:
            joined[capture_id] = failed
        elif len(known) < len(parts):
            joined[capture_id] = CaptureFailed(f"request {capture_id!r} never reached every pipeline stage")
        elif any(
            not np.array_equal(part.positions, whole[0].positions)
            or not np.array_equal(part.token_ids, whole[0].token_ids)
            for part in whole
        ):
            joined[capture_id] = CaptureFailed(f"request {capture_id!r}: pipeline stages kept different positions")
        else:
            activations = {hook: rows for part in whole for hook, rows in part.activations.items()}
            reads = {name: values for part in whole for name, values in part.reads.items()}
            joined[capture_id] = replace(whole[0], activations=activations, reads=reads)
    return joined
