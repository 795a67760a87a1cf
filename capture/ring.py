"""The way from device memory to a request: a ring of staged rows, copied out by a stream of their own."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from millpond.store.errors import InvalidInput

Taken = Callable[[NDArray[np.int32], Callable[[int, int, int], NDArray[Any]]], None]
"""Gets the step's token ids and `rows(hook, begin, end)`, which reads rows of the ring as they are stored."""


@dataclass
class _Step:
    """One step whose rows are on their way."""

    number: int
    begin: int
    end: int
    tokens: Tensor
    event: Any
    taken: Taken


class StagingRing:
    """Keeps the place of every staged row until it has reached its request.

    A step's rows are consecutive. `reserve` waits while the ring is full: back-pressure happens on the host,
    before the step, and never in a graph.

    Args:
        ring: (n_hooks, rows + 1, d_model) on the device; what the taps write. The last row is nobody's.
    """

    def __init__(self, ring: Tensor) -> None:
        self.waited = 0.0
        """Seconds that `reserve` has waited for room."""
        self.last_step = 0
        self._ring = ring
        self._rows = ring.shape[1] - 1
        self._cuda = ring.device.type == "cuda"
        # a mirror in page-locked memory; on a CPU the ring itself can be read
        self._host = torch.empty(ring[:, :-1].shape, dtype=ring.dtype, pin_memory=True) if self._cuda else ring
        self._stream = torch.cuda.Stream(ring.device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._steps: deque[_Step] = deque()
        self._next = 0

    def reserve(self, rows: int) -> int:
        """The first of `rows` consecutive free rows of the ring.

        Raises:
            InvalidInput: the ring is smaller than that.
        """
        if rows > self._rows:
            raise InvalidInput(
                f"a step keeps {rows} rows, the staging ring has {self._rows}; raise staging_rows in additional_config"
            )
        started = time.perf_counter()
        while (begin := self._place(rows)) is None:
            self._finish(self._steps.popleft())
        self.waited += time.perf_counter() - started
        return begin

    def _place(self, rows: int) -> int | None:
        first = next((step.begin for step in self._steps if step.end > step.begin), None)
        if first is None:
            return 0
        if self._next > first:  # the rows in use are consecutive
            if self._next + rows <= self._rows:
                return self._next
            return 0 if rows < first else None
        return self._next if self._next + rows < first else None

    def send(
        self, begin: int, end: int, copies: Sequence[tuple[int, int, int]], input_ids: Tensor, taken: Taken
    ) -> int:
        """Copy rows to the host once the forward has written them; returns the step's number.

        Args:
            begin: what `reserve` gave.
            end: one after the step's last row.
            copies: (hook, first row, one after the last) of what is wanted.
            input_ids: the step's tokens, on the device, (n_tokens,); another step may soon overwrite them.
            taken: called once the rows are there.
        """
        self.last_step += 1
        ids = input_ids.to(torch.int32, copy=True)
        event = None
        if self._stream is not None:
            host_ids = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
            self._stream.wait_stream(torch.cuda.current_stream(self._ring.device))
            with torch.cuda.stream(self._stream):
                host_ids.copy_(ids, non_blocking=True)
                ids.record_stream(self._stream)
                for hook, low, high in copies:
                    self._host[hook, low:high].copy_(self._ring[hook, low:high], non_blocking=True)
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(self._stream)
            ids = host_ids
        if end > begin:
            self._next = end
        else:
            begin = end = self._next
        self._steps.append(_Step(self.last_step, begin, end, ids, event, taken))
        return self.last_step

    def drain(self, through: int | None = None) -> None:
        """Hand over what has arrived, and wait for steps up to number `through`."""
        while self._steps and (
            (through is not None and self._steps[0].number <= through)
            or self._steps[0].event is None
            or self._steps[0].event.query()
        ):
            self._finish(self._steps.popleft())

    def _finish(self, step: _Step) -> None:
        if step.event is not None:
            step.event.synchronize()
        step.taken(step.tokens.numpy(), self._read)

    def _read(self, hook: int, begin: int, end: int) -> NDArray[Any]:
        rows = self._host[hook, begin:end]
        stored: NDArray[Any] = (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()
        return stored
