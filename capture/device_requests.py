"""Following requests where taps are part of the model's graph: a step is planned into buffers, its rows arrive later."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from millpond.capture.device_saes import LatentEdits
from millpond.capture.device_tap import DeviceTaps
from millpond.capture.kept_rows import as_stored
from millpond.capture.requests import BankedEdit, Following, RequestFollower
from millpond.capture.ring import StagingRing
from millpond.store.segment import CapturedRequest


@dataclass(frozen=True)
class _Part:
    """What one request gets of a step."""

    following: Following
    start: int
    """Its first position in the step."""
    count: int
    offset: int
    """Place of that position among the step's tokens."""
    positions: NDArray[np.int32]
    """Of the rows that it keeps."""
    begin: int = 0
    """Where those begin among the step's kept rows."""


class DeviceFollower(RequestFollower):
    """Plans steps into the buffers of `taps`.

    The tokens of a step need not be known when it is planned: generated ones may exist on the device only. They
    come with the rows. A request is confirmed once the last step that computed any of its positions has arrived.
    """

    def __init__(self, hooks: tuple[str, ...], d_model: int, dtype: torch.dtype, taps: DeviceTaps) -> None:
        super().__init__(hooks, d_model, dtype)
        self.taps = taps
        self.ring = StagingRing(taps.ring)
        self._planned: list[_Part] = []

    def load_step(self, batch: Iterable[tuple[str, int, int]]) -> None:
        """Fill the taps' buffers for the coming step; waits while the ring is full.

        Args:
            batch: in row order, each request's id, first position and number of tokens of this step.
        """
        parts: list[_Part] = []
        edits: list[tuple[BankedEdit, NDArray[np.int32], int]] = []
        splices: dict[int, list[tuple[NDArray[np.int64], LatentEdits]]] = {}
        n_tokens = kept = 0
        counted = []
        for request_id, start, count in batch:
            counted.append((request_id, start, np.full(count, -1, np.int32)))
            n_tokens += count
        for following, start, stop, first in self._followed(counted):
            for planned in following.banked:
                at = planned.where.select(following.n_prompt, start, stop, following.tokens)
                if len(at):
                    edits.append((planned, at, first))
            for splice in following.splices:
                at = splice.where.select(following.n_prompt, start, stop, following.tokens)
                if len(at):
                    splices.setdefault(splice.splice, []).append((at.astype(np.int64) + first, splice.edits))
            if following.wish is not None:
                at = following.wish.select(following.n_prompt, start, stop, following.tokens)
                parts.append(_Part(following, start, stop - start, first + start, at, kept))
                kept += len(at)
        self._begin = self.ring.reserve(kept) if kept else 0
        target = None
        if kept:
            target = np.full(n_tokens, self.taps.nowhere, np.int64)
            for part in parts:
                at = part.positions - part.start + part.offset
                target[at] = self._begin + part.begin + np.arange(len(at))
        self.taps.load(target, self._places(edits, n_tokens) if edits else None)
        for number, wanted in splices.items():
            self.taps.splices[number][1].load(wanted, n_tokens)
        self._planned = parts
        self._kept = kept
        self._n_tokens = n_tokens

    def _places(self, edits: list[tuple[BankedEdit, NDArray[np.int32], int]], n_tokens: int) -> NDArray[np.int32]:
        rows = [planned.rows.at(position) for planned, at, _ in edits for position in at.tolist()]
        held = iter(self.taps.bank.places(rows))
        places = np.zeros((n_tokens, *self.taps.places.shape[1:]), np.int32)
        for planned, at, first in edits:
            for position in at.tolist():
                places[position + first, planned.hook, planned.nth] = next(held)
        return places

    def send_rows(self, input_ids: Tensor) -> tuple[int, int]:
        """Start the way of the rows that the step keeps; returns how many, and their bytes in all hooks.

        Args:
            input_ids: the step's tokens on the device, in row order.
        """
        self.taps.clear()
        parts, self._planned = self._planned, []
        size = 0
        if parts:
            ends: dict[int, list[int]] = {}
            for part in parts:
                low = self._begin + part.begin
                following = part.following
                wanted = {*following.hooks, *(read.hook for read in following.reads)}
                for hook in sorted(wanted) if len(part.positions) else ():
                    ends.setdefault(hook, []).extend((low, low + len(part.positions)))
            spans = [(hook, low, high) for hook in ends for low, high in _joined(ends[hook])]
            size = sum(high - low for _, low, high in spans) * self._d_model * self.taps.ring.element_size()
            begin = self._begin

            def taken(tokens: NDArray[np.int32], rows: Any) -> None:
                for part in parts:
                    part.following.see(part.start, tokens[part.offset : part.offset + part.count])
                    if len(part.positions):
                        low = begin + part.begin
                        kept = self._rows_of(part.following)
                        room = kept.room(len(part.positions))
                        for number, hook in enumerate(part.following.hooks):
                            room[number] = rows(hook, low, low + len(part.positions))
                        kept.take(len(part.positions))
                        part.following.positions.append(part.positions)
                        part.following.values.append(self._read(part, rows, low))

            step = self.ring.send(begin, begin + self._kept, spans, input_ids[: self._n_tokens], taken)
            for part in parts:
                part.following.steps.append((step, part.start))
        self.ring.drain()
        return (self._kept if parts else 0), size

    def _read(self, part: _Part, rows: Any, low: int) -> dict[str, NDArray[Any]]:
        """The arrays of the request's reads, computed on the host from the rows that arrived."""
        found = {}
        for read in part.following.reads:
            x = torch.from_numpy(rows(read.hook, low, low + len(part.positions)))
            values = read.reader(x.view(self._dtype))
            for (name, array), value in zip(self._arrays_of(read).items(), values, strict=True):
                found[name] = as_stored(value).astype(array.dtype, copy=False)
        return found

    def confirm(self, capture_id: str, n_tokens: int) -> CapturedRequest:
        """As `RequestFollower.confirm`, after waiting for the request's last rows."""
        following = self._by_id.get(capture_id)
        if following is not None:
            computed = self.computed(following, n_tokens)
            self.ring.drain(max((step for step, start in following.steps if start < computed), default=0))
        return super().confirm(capture_id, n_tokens)


def _joined(ends: list[int]) -> list[tuple[int, int]]:
    """Ranges given as begin, end, begin, end, ... in ascending order, those that touch made one."""
    joined: list[tuple[int, int]] = []
    for low, high in zip(ends[::2], ends[1::2], strict=True):
        if joined and joined[-1][1] == low:
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return joined
