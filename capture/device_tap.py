"""What a tap does where a graph is replayed without Python: tensor operations on buffers that never move.

A CUDA graph repeats kernels on the addresses that they were recorded with. So everything that depends on a step
is in buffers that are filled before the forward: which row of the staging ring each token goes to, and which
vectors of the bank it is edited with. Nothing here looks at a value on the host, allocates by a value, or branches
on one. The same operations run on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from millpond.capture.device_saes import DeviceSplice
from millpond.store.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class BankRow:
    """One edit of one position: x becomes keep * x, moved along `unit` into [low, high], plus `step`."""

    unit: Tensor
    """(d_model,), float32; zero moves nothing."""
    step: Tensor
    """(d_model,), float32."""
    low: float = -float("inf")
    high: float = float("inf")
    keep: bool = True
    """Whether x stays; without it, x is replaced by `step`."""


class VectorBank:
    """Rows that tokens are edited with, in device memory; row 0 changes nothing.

    Rows are loaded when a step first needs them, in the place of those that were not needed for longest.

    Args:
        rows: most rows that one step may need.
        d_model: width of a row.
        device: where they are kept.
    """

    def __init__(self, rows: int, d_model: int, device: torch.device) -> None:
        self.unit = torch.zeros(rows + 1, d_model, device=device)
        self.step = torch.zeros(rows + 1, d_model, device=device)
        self.low = torch.full((rows + 1,), -float("inf"), device=device)
        self.high = torch.full((rows + 1,), float("inf"), device=device)
        self.keep = torch.ones(rows + 1, dtype=torch.bool, device=device)
        self._held: dict[BankRow, int] = {}  # in the order of their last use
        self._free = list(range(rows, 0, -1))

    def places(self, wanted: Sequence[BankRow]) -> list[int]:
        """Where the rows are that the coming step needs, loaded if they were not.

        Raises:
            InvalidInput: there are more than fit; admission lets no request in that could cause this.
        """
        distinct = dict.fromkeys(wanted)
        if len(distinct) > len(self.keep) - 1:
            raise InvalidInput(f"a step needs {len(distinct)} vectors, the bank holds {len(self.keep) - 1}")
        for row in distinct:
            if row in self._held:
                self._held[row] = self._held.pop(row)  # now the last used
        missing = [row for row in distinct if row not in self._held]
        while len(self._free) < len(missing):
            oldest = next(iter(self._held))
            self._free.append(self._held.pop(oldest))
        for row in missing:
            place = self._held[row] = self._free.pop()
            self.unit[place].copy_(_sent(row.unit, self.unit.device), non_blocking=True)
            self.step[place].copy_(_sent(row.step, self.step.device), non_blocking=True)
            self.low[place].fill_(row.low)
            self.high[place].fill_(row.high)
            self.keep[place].fill_(row.keep)
        return [self._held[row] for row in wanted]


class DeviceTaps:
    """The buffers of a worker's taps.

    Args:
        n_hooks: hook points of this worker.
        ring_rows: rows of the staging ring.
        max_tokens: most tokens of one step, padding included.
        d_model: width of the activations.
        dtype: the model's.
        edits: most edits that one token gets at one hook point; 0 leaves editing out of the graph.
        bank_rows: rows of the bank.
        device: where the model runs.
        splices: SAEs that may be spliced in, with the number of their hook point.
    """

    def __init__(
        self,
        n_hooks: int,
        ring_rows: int,
        max_tokens: int,
        d_model: int,
        dtype: torch.dtype,
        edits: int,
        bank_rows: int,
        device: torch.device,
        splices: Sequence[tuple[int, DeviceSplice]] = (),
    ) -> None:
        self.splices = tuple(splices)
        """Applied before the edits of the bank."""
        self.ring = torch.zeros(n_hooks, ring_rows + 1, d_model, dtype=dtype, device=device)
        """The last row takes what nobody wants."""
        self.nowhere = ring_rows
        self.target = torch.full((max_tokens,), ring_rows, dtype=torch.int64, device=device)
        """Row of the ring that each token of the step goes to."""
        self.places = torch.zeros(max_tokens, n_hooks, edits, dtype=torch.int32, device=device)
        """Rows of the bank that each token is edited with at each hook point, in order."""
        self.bank = VectorBank(bank_rows if edits else 0, d_model, device)
        self._used = (0, 0)

    @property
    def nbytes(self) -> int:
        """Device memory of all buffers."""
        bank = self.bank
        buffers = (self.ring, self.target, self.places, bank.unit, bank.step)
        return sum(t.nbytes for t in buffers) + sum(splice.nbytes for _, splice in self.splices)

    def warm_up(self) -> None:
        """Run every operation once: a kernel that is first loaded while a graph is recorded can spoil the graph."""
        if not len(self.ring):
            return  # a pipeline stage that nothing is kept of
        hidden = torch.zeros(2, self.ring.shape[2], dtype=self.ring.dtype, device=self.ring.device)
        for residual in (None, torch.zeros_like(hidden)):
            for _, splice in self.splices:
                splice.apply(hidden, residual)
            if self.places.shape[2]:
                edit_rows(hidden, residual, self.places[:2, 0], self.bank)
            stage_rows(hidden, residual, self.target[:2], self.ring[0])

    def load(self, target: NDArray[np.int64] | None, places: NDArray[np.int32] | None) -> None:
        """Fill the buffers for the coming step, in the stream that it runs in.

        Args:
            target: ring row of each token (n_tokens,), or None if nothing is kept.
            places: bank rows (n_tokens, n_hooks, edits), or None if nothing is edited.
        """
        device = self.target.device
        if target is not None:
            self.target[: len(target)].copy_(_sent(torch.from_numpy(target), device), non_blocking=True)
        if places is not None:
            self.places[: len(places)].copy_(_sent(torch.from_numpy(places), device), non_blocking=True)
        self._used = (0 if target is None else len(target), 0 if places is None else len(places))

    def clear(self) -> None:
        """Let the forwards that follow keep and edit nothing: vLLM also runs some of its own."""
        targets, places = self._used
        if targets:
            self.target[:targets].fill_(self.nowhere)
        if places:
            self.places[:places].zero_()
        self._used = (0, 0)
        for _, splice in self.splices:
            splice.clear()

    def apply(self, hidden: Tensor, residual: Tensor | None, hook: int) -> None:
        """Edit and stage the tokens of one hook point; what the operator `millpond::tap` does, and may be recorded.

        Args:
            hidden: (n_tokens, d_model), or with dimensions before the last that multiply to n_tokens.
            residual: of the same shape; the value is the sum of both.
            hook: number of the hook point in this worker.
        """
        hidden = hidden.view(-1, hidden.shape[-1])
        if residual is not None:
            residual = residual.view(-1, residual.shape[-1])
        n_tokens = hidden.shape[0]
        # what is left out while a graph is recorded would be left out of its every replay
        recorded = hidden.is_cuda and torch.cuda.is_current_stream_capturing()
        for number, splice in self.splices:
            if number == hook and (recorded or splice.is_used):
                splice.apply(hidden, residual)
        if self.places.shape[2] and (recorded or self._used[1]):
            edit_rows(hidden, residual, self.places[:n_tokens, hook], self.bank)
        if recorded or self._used[0]:
            stage_rows(hidden, residual, self.target[:n_tokens], self.ring[hook])


def stage_rows(hidden: Tensor, residual: Tensor | None, target: Tensor, ring: Tensor) -> None:
    """Copy every token's sum, (n_tokens, d_model), to its row of `ring`."""
    value = hidden if residual is None else hidden + residual
    ring.index_copy_(0, target, value.to(ring.dtype))


def edit_rows(hidden: Tensor, residual: Tensor | None, places: Tensor, bank: VectorBank) -> None:
    """Edit in float32 on the true sum, rounded once an edit; rows whose places are all 0 keep their bits.

    Args:
        hidden: (n_tokens, d_model); edited rows get the edited sum.
        residual: (n_tokens, d_model); edited rows become zero.
        places: rows of the bank, (n_tokens, edits), int32.
        bank: what they mean.
    """
    x = hidden.float() if residual is None else hidden.float() + residual.float()
    for place in places.unbind(1):
        unit = bank.unit.index_select(0, place)
        along = (x * unit).sum(1)
        moved = along.clamp(bank.low.index_select(0, place), bank.high.index_select(0, place)) - along
        kept = torch.where(bank.keep.index_select(0, place)[:, None], x + moved[:, None] * unit, 0.0)
        changed = (kept + bank.step.index_select(0, place)).to(hidden.dtype)
        x = torch.where((place != 0)[:, None], changed.float(), x)
    edited = (places != 0).any(1, keepdim=True)
    hidden.copy_(torch.where(edited, x.to(hidden.dtype), hidden))
    if residual is not None:
        residual.masked_fill_(edited, 0.0)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """`values` in page-locked memory where the device reads them later; the allocator keeps them until it has."""
    return values.pin_memory() if device.type == "cuda" else values
