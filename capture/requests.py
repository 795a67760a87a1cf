"""Following requests through the engine's steps: which tokens are whose, what is edited, what is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from millpond.capture.device_saes import LatentEdits
from millpond.capture.edits import BankRows, Edit
from millpond.capture.kept_rows import KeptRows, as_computed, as_stored
from millpond.capture.reads import Reader
from millpond.capture.row_memory import RowMemory
from millpond.capture.tap import HookWork, Rows
from millpond.store.capture_spec import CaptureWish
from millpond.store.errors import CaptureFailed
from millpond.store.positions import PositionFilter
from millpond.store.reads import ReadSpec
from millpond.store.segment import CapturedRequest
from millpond.store.shards import ArraySpec


@dataclass(frozen=True)
class PlannedEdit:
    """One intervention at one hook point of one request."""

    hook: int
    where: PositionFilter
    edit: Edit


@dataclass(frozen=True)
class BankedEdit:
    """The same where taps are part of a device's graph."""

    hook: int
    where: PositionFilter
    rows: BankRows
    nth: int
    """How many others of the request come before it at this hook point."""


@dataclass(frozen=True)
class BankedSplice:
    """An SAE that is spliced in where taps are part of a device's graph."""

    splice: int
    """Which of the worker's."""
    where: PositionFilter
    edits: LatentEdits


@dataclass(frozen=True, eq=False)
class PlannedRead:
    """One read at one hook point; requests that share the object share a product."""

    hook: int
    spec: ReadSpec
    reader: Reader


@dataclass(eq=False)
class Following:
    """One request that captures, is intervened in, or both."""

    n_prompt: int
    wish: CaptureWish | None = None
    hooks: tuple[int, ...] = ()
    """Numbers of the hook points that are kept."""
    reads: tuple[PlannedRead, ...] = ()
    edits: tuple[PlannedEdit, ...] = ()
    """In the order in which they are applied at a hook point."""
    banked: tuple[BankedEdit, ...] = ()
    splices: tuple[BankedSplice, ...] = ()
    """Applied before `banked`."""
    tokens: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """Token ids seen, from position 0; room for more at the end."""
    seen: int = 0
    """Positions computed so far, from 0."""
    positions: list[NDArray[np.int32]] = field(default_factory=list)
    expected: int = 0
    """Rows that there will probably be."""
    rows: KeptRows | None = None
    """Of all steps; none before the first one that keeps any."""
    steps: list[tuple[int, int]] = field(default_factory=list)
    """Numbers of the steps that computed it, and the first position of each; only where rows arrive later."""
    values: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    """Of each step, the arrays of the reads by name, (n_rows, ...)."""

    def see(self, start: int, tokens: NDArray[np.int32]) -> None:
        """The tokens at the positions from `start` are these; negative where not known yet."""
        stop = start + len(tokens)
        if stop > len(self.tokens):
            grown = np.empty(max(stop, 2 * len(self.tokens)), np.int32)
            grown[: len(self.tokens)] = self.tokens
            self.tokens = grown
        self.tokens[start:stop] = tokens


_DIRECT_ROWS = 16
"""A request that keeps so many rows in a step has them written to their place; those of others are copied there together."""


@dataclass(frozen=True)
class _Share:
    """What one request gets of the rows that a step keeps."""

    following: Following
    positions: NDArray[np.int32]
    begin: int
    """Place of its first row among those that the step keeps."""
    staged: int | None
    """And among those that are staged together; None where the rows are in their place."""


@dataclass
class _Stage:
    """What a step keeps of the requests that keep the same."""

    rows: NDArray[Any]
    """Those that are staged together, (n_hooks, n_rows, d_model)."""
    shares: list[_Share]
    values: dict[str, NDArray[Any]] = field(default_factory=dict)
    """The arrays of the reads by name, (n_rows, ...) of all rows, once the model has run."""


_Kept = tuple[tuple[int, ...], tuple[PlannedRead, ...]]


class RequestFollower:
    """Turns the engine's steps into whole captured requests.

    A position that is computed again, after a preemption or because a drafted token was rejected,
    replaces what was kept of it: the last computation is the one that the model went on from.

    Args:
        hooks: names of the worker's hook points.
        d_model: width of the rows.
        dtype: the model's; rows are kept in it, bfloat16 as its bits in uint16.
    """

    def __init__(self, hooks: tuple[str, ...], d_model: int, dtype: torch.dtype) -> None:
        self._hooks = hooks
        self._d_model = d_model
        self._dtype = dtype
        self._by_request: dict[str, Following] = {}
        self._by_id: dict[str, Following] = {}
        self._failed: dict[str, str] = {}
        self._stages: list[_Stage] = []
        self._memory = RowMemory()

    def admit(self, request_id: str, following: Following) -> None:
        """Follow a new request of the engine."""
        if request_id in self._by_request:
            return  # resumed after a preemption
        if following.wish is not None and following.wish.id is not None:
            if following.wish.id in self._by_id:
                self._failed[following.wish.id] = (
                    f"request {following.wish.id!r} was sent twice at once; give each prompt its own id"
                )
                return
            self._by_id[following.wish.id] = following
        self._by_request[request_id] = following

    def _followed(
        self, batch: Iterable[tuple[str, int, NDArray[np.int32]]]
    ) -> Iterator[tuple[Following, int, int, int]]:
        """The batch's followed requests: positions from one to before another, and the row that position 0 would have."""
        offset = 0
        for request_id, start, tokens in batch:
            following = self._by_request.get(request_id)
            if following is not None:
                if start > following.seen and following.wish is not None and following.wish.id is not None:
                    self._failed[following.wish.id] = (
                        f"request {following.wish.id!r}: positions {following.seen} to {start - 1} were never computed"
                    )
                self._see(following, start, tokens)
                following.seen = start + len(tokens)
                yield following, start, following.seen, offset - start
            offset += len(tokens)

    def _see(self, following: Following, start: int, tokens: NDArray[np.int32]) -> None:
        following.see(start, tokens)

    def plan_step(self, batch: Iterable[tuple[str, int, NDArray[np.int32]]]) -> dict[int, HookWork]:
        """What each hook point does in the coming step.

        Args:
            batch: in row order, each request's id, first position and token ids of this step.
        """
        work: dict[int, HookWork] = {}
        edits: dict[tuple[int, int, Edit], list[tuple[NDArray[np.int64], NDArray[np.int32]]]] = {}
        kept: dict[_Kept, list[tuple[Following, NDArray[np.int32], int]]] = {}
        for following, start, stop, first in self._followed(batch):
            for order, planned in enumerate(following.edits):
                at = planned.where.select(following.n_prompt, start, stop, following.tokens)
                if len(at):
                    edits.setdefault((planned.hook, order, planned.edit), []).append((at.astype(np.int64) + first, at))
            if following.wish is not None:
                at = following.wish.select(following.n_prompt, start, stop, following.tokens)
                if len(at):
                    kept.setdefault((following.hooks, following.reads), []).append((following, at, first))
        for (hook, _, edit), parts in sorted(edits.items(), key=lambda item: item[0][1]):
            rows = as_rows(np.concatenate([rows for rows, _ in parts]))
            positions = np.concatenate([positions for _, positions in parts])
            work.setdefault(hook, HookWork()).edits.append((rows, _bind(edit, positions)))
        self._stages = [self._stage(*what, parts, work) for what, parts in kept.items()]
        return work

    def _stage(
        self,
        hooks: tuple[int, ...],
        reads: tuple[PlannedRead, ...],
        parts: list[tuple[Following, NDArray[np.int32], int]],
        work: dict[int, HookWork],
    ) -> _Stage:
        """Room for the rows of the requests that keep the same `hooks` and `reads`, and what fills it."""
        at_once: list[NDArray[np.int64]] = []
        shares: list[_Share] = []
        count = staged = 0
        for following, at, first in parts:
            index = at.astype(np.int64) + first
            direct = len(at) >= _DIRECT_ROWS
            shares.append(_Share(following, at, count, None if direct else staged))
            count += len(at)
            if direct:
                room = as_computed(self._rows_of(following).room(len(at)), self._dtype)
                self._copy(hooks, as_rows(index), room, work)
            else:
                staged += len(at)
                at_once.append(index)
        stage = torch.empty(len(hooks), staged, self._d_model, dtype=self._dtype)
        if at_once:
            self._copy(hooks, as_rows(np.concatenate(at_once)), stage, work)
        made = _Stage(as_stored(stage), shares)
        if reads:
            rows = as_rows(np.concatenate([at.astype(np.int64) + first for _, at, first in parts]))
            for read in reads:
                work.setdefault(read.hook, HookWork()).reads.append((rows, self._keeper(read, made)))
        return made

    @staticmethod
    def _copy(hooks: tuple[int, ...], rows: Rows, target: Tensor, work: dict[int, HookWork]) -> None:
        """Have `rows` of a step copied to `target`, (n_hooks, n_rows, d_model)."""
        for number, hook in enumerate(hooks):
            work.setdefault(hook, HookWork()).copies.append((rows, target[number]))

    def _rows_of(self, following: Following) -> KeptRows:
        if following.rows is None:
            following.rows = KeptRows(
                len(following.hooks), following.expected, self._d_model, self._dtype, self._memory
            )
        return following.rows

    def _keeper(self, read: PlannedRead, stage: _Stage) -> Callable[[Tensor], None]:
        """Computes a read and keeps its values in `stage`."""
        arrays = self._arrays_of(read)

        def keep(rows: Tensor) -> None:
            for (name, array), values in zip(arrays.items(), read.reader(rows), strict=True):
                stage.values[name] = as_stored(values).astype(array.dtype, copy=False)

        return keep

    def _arrays_of(self, read: PlannedRead) -> dict[str, ArraySpec]:
        return read.spec.arrays(str(self._dtype).removeprefix("torch."), 1, 1)

    def take_rows(self) -> tuple[int, int]:
        """Hand the rows that the step kept to their requests; returns how many, and their bytes in all hooks and reads."""
        count = size = 0
        row_bytes = self._d_model * self._dtype.itemsize
        for stage in self._stages:
            for share in stage.shares:
                following, new = share.following, len(share.positions)
                rows = self._rows_of(following)
                if share.staged is not None:
                    rows.room(new)[...] = stage.rows[:, share.staged : share.staged + new]
                rows.take(new)
                following.values.append(
                    {name: values[share.begin : share.begin + new].copy() for name, values in stage.values.items()}
                )
                following.positions.append(share.positions)
                count += new
                size += new * len(following.hooks) * row_bytes
            size += sum(values.nbytes for values in stage.values.values())
        self._stages = []
        return count, size

    def forget(self, request_ids: Iterable[str]) -> None:
        """The engine ended these requests; what they kept stays until confirmed or dropped by capture id."""
        for request_id in request_ids:
            self._by_request.pop(request_id, None)

    def fail(self, capture_id: str, reason: str) -> None:
        """Nothing of this request is to be stored; its confirmation says why."""
        self._failed[capture_id] = reason

    def drop(self, capture_id: str) -> None:
        """Let go of a request that nobody will confirm."""
        self._by_id.pop(capture_id, None)
        self._failed.pop(capture_id, None)

    def confirm(self, capture_id: str, n_tokens: int) -> CapturedRequest:
        """The whole request `capture_id`, of which the client received `n_tokens` prompt and generated tokens.

        Rows that the engine computed past the end are left out. The activations of the last generated
        token are never computed.

        Raises:
            CaptureFailed: rows are missing.
        """
        following = self._by_id.pop(capture_id, None)
        if capture_id in self._failed:
            raise CaptureFailed(self._failed.pop(capture_id))
        if following is None or following.wish is None:
            raise CaptureFailed(f"request {capture_id!r} never reached the worker")
        computed = self.computed(following, n_tokens)
        if following.seen < computed:
            raise CaptureFailed(f"request {capture_id!r}: {following.seen} of {computed} positions were computed")
        tokens = following.tokens[:computed].copy()
        positions = np.concatenate([np.empty(0, np.int32), *following.positions])
        rows = _last_of_each(positions, computed)
        expected = following.wish.select(following.n_prompt, 0, computed, tokens)
        # a token-id filter sees the tokens that a position had at last, not a draft's
        rows = rows[np.isin(positions[rows], expected)]
        if not np.array_equal(positions[rows], expected):
            raise CaptureFailed(
                f"request {capture_id!r}: {len(rows)} rows were captured, but {len(expected)} were asked for"
            )
        return CapturedRequest(
            id=following.wish.prompt or capture_id,
            token_ids=tokens,
            n_prompt_tokens=following.n_prompt,
            positions=positions[rows],
            activations=self._gather(following, rows),
            reads=self._gather_reads(following, rows),
        )

    @staticmethod
    def computed(following: Following, n_tokens: int) -> int:
        """Positions that a request of `n_tokens` tokens computes: not that of the last generated token."""
        return n_tokens if n_tokens == following.n_prompt else n_tokens - 1

    def _gather(self, following: Following, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        kept = self._rows_of(following)
        everything = np.array_equal(rows, np.arange(len(kept)))
        taken = {}
        for number, hook in enumerate(following.hooks):
            whole = kept.of(number)
            taken[self._hooks[hook]] = whole if everything else whole[rows]
        return taken

    def _gather_reads(self, following: Following, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        taken = {}
        for read in following.reads:
            for name, array in self._arrays_of(read).items():
                empty = np.empty((0,) if array.columns is None else (0, array.columns), array.dtype)
                taken[name] = np.concatenate([empty, *(part[name] for part in following.values)])[rows]
        return taken


def as_rows(indexes: NDArray[np.int64]) -> Rows:
    """The same tokens as a slice where they are consecutive."""
    if len(indexes) and indexes[-1] - indexes[0] == len(indexes) - 1 and (np.diff(indexes) == 1).all():
        return slice(int(indexes[0]), int(indexes[-1]) + 1)
    return torch.from_numpy(indexes)


def _last_of_each(positions: NDArray[np.int32], below: int) -> NDArray[np.int64]:
    """Indexes of the last occurrence of every position under `below`, by position."""
    reverse = positions[::-1]
    unique, first = np.unique(reverse, return_index=True)
    last = len(positions) - 1 - first
    return last[unique < below].astype(np.int64)


def _bind(edit: Edit, positions: NDArray[np.int32]) -> Callable[[Tensor], Tensor]:
    return lambda x: edit(x, positions)
