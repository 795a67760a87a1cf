"""Which rows a view holds, and how it reads them in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.store.dtypes import decode
from millpond.store.errors import InvalidInput
from millpond.store.manifest import RunSpec
from millpond.store.objects import Storage
from millpond.store.shards import ArraySpec, read_rows
from millpond.store.snapshot import Parts


@dataclass(frozen=True)
class Block:
    """Consecutive stored rows of one part."""

    part: int
    start: int
    """First row, counted in the part."""
    stop: int
    first: int
    """Number of row `start` in the whole run."""


@dataclass(frozen=True)
class BlockTable:
    """Many blocks as columns, in storage order, (n_blocks,) each; a run may have millions."""

    part: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    first: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, number: int) -> Block:
        return Block(*(int(column[number]) for column in (self.part, self.start, self.stop, self.first)))

    def __iter__(self) -> Iterator[Block]:
        return (self[number] for number in range(len(self)))


@dataclass(frozen=True)
class Piece:
    """The chosen rows of one block, with all that reading them needs: small, and picklable by itself."""

    folder: Storage
    """Of the part."""
    start: int
    stop: int
    first: int
    """Number of row `start` in the whole run."""
    keep: NDArray[np.uint8] | None
    """Which of the rows are chosen, as packed bits; None for all."""
    count: int
    first_prompt: int
    bounds: NDArray[np.int64]
    """First row, in the whole run, of the prompts from `first_prompt` on."""

    def chosen(self, rows: NDArray[Any]) -> NDArray[Any]:
        """The chosen ones of `rows`, one for each row of the block."""
        if self.keep is None:
            return rows
        kept: NDArray[Any] = rows[np.unpackbits(self.keep, count=self.stop - self.start).view(bool)]
        return kept

    def read(self, name: str, array: ArraySpec, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """The chosen rows of the array `name`, as they are stored; into contiguous `out` if given."""
        if name != "prompt" and self.keep is None:
            return read_rows(self.folder / name, array, self.start, self.stop, out)
        rows = (
            self.prompts()
            if name == "prompt"
            else self.chosen(read_rows(self.folder / name, array, self.start, self.stop))
        )
        if out is None:
            return rows
        out[...] = rows
        return out

    def divide(self, rows: int) -> list[Piece]:
        """The same chosen rows in pieces of at most `rows` stored ones; those without a chosen one are left out."""
        size = self.stop - self.start
        if size <= rows:
            return [self]
        mask = None if self.keep is None else np.unpackbits(self.keep, count=size).view(bool)
        pieces = []
        for begin in range(0, size, rows):
            end = min(begin + rows, size)
            kept = None if mask is None else mask[begin:end]
            count = end - begin if kept is None else int(np.count_nonzero(kept))
            if count:
                first = self.first + begin
                low = int(np.searchsorted(self.bounds, first, "right")) - 1
                high = int(np.searchsorted(self.bounds, first + end - begin, "left"))
                keep = None if kept is None or count == end - begin else np.packbits(kept)
                bounds = self.bounds[low : max(high, low + 1)]
                place = self.start + begin, self.start + end, first
                pieces.append(Piece(self.folder, *place, keep, count, self.first_prompt + low, bounds))
        return pieces

    def prompts(self) -> NDArray[np.int32]:
        """Number of the prompt of each chosen row."""
        rows = self.chosen(np.arange(self.first, self.first + self.stop - self.start))
        return (self.first_prompt + np.searchsorted(self.bounds, rows, "right") - 1).astype(np.int32)


@dataclass(frozen=True)
class RowPlan:
    """The rows of a view: some prompts of a run's parts, or some of their rows, in storage order.

    A prompt's rows are contiguous and follow the order of the prompt table, so the plan of a
    selection by prompt needs the table alone, not the rows.
    """

    folder: Storage
    spec: RunSpec
    parts: Parts
    offsets: NDArray[np.int64]
    """First row of each prompt of the run, and the number of rows at the end."""
    chosen: NDArray[np.bool_]
    """Whether the view holds the prompt, (n_prompts,)."""
    marks: NDArray[np.bool_] | None = None
    """Whether the view holds the row, (rows of the run,), one byte each; None for all rows of the chosen prompts."""

    def select_prompts(self, chosen: NDArray[np.bool_]) -> RowPlan:
        """The part of the view in the prompts that `chosen` marks, (n_prompts,)."""
        chosen = chosen & self.chosen
        marks = None if self.marks is None else self.marks & np.repeat(chosen, np.diff(self.offsets))
        return replace(self, chosen=chosen, marks=marks)

    def select_rows(self, marks: NDArray[np.bool_]) -> RowPlan:
        """The rows that `marks` marks, one value for each row of the view; prompts without any leave it."""
        if marks.shape != (self.n_rows,):
            raise InvalidInput(
                f"row marks have shape {marks.shape}; give {self.n_rows} booleans, one a row of the view"
            )
        if marks.all():
            return self
        whole = np.zeros(int(self.offsets[-1]), bool)
        held = self.marks if self.marks is not None else np.repeat(self.chosen, np.diff(self.offsets))
        whole[held] = marks
        nonempty = np.diff(self.offsets) > 0
        kept = np.zeros(len(self.chosen), bool)
        kept[nonempty] = np.logical_or.reduceat(whole, self.offsets[:-1][nonempty]) if nonempty.any() else False
        return replace(self, chosen=kept, marks=whole)

    @cached_property
    def part_rows(self) -> NDArray[np.int64]:
        """Number, in the whole run, of each part's first row, and the number of rows at the end."""
        return np.concatenate([[0], np.cumsum(self.parts.rows)]).astype(np.int64)

    def table(self, rows: int) -> BlockTable:
        """The run cut into blocks of at most `rows` rows."""
        sizes = self.parts.rows
        counts = -(-sizes // rows)
        part = np.repeat(np.arange(len(sizes)), counts)
        number = np.arange(len(part)) - np.repeat(np.cumsum(counts) - counts, counts)
        start = number * rows
        stop = np.minimum(start + rows, sizes[part])
        return BlockTable(part, start, stop, self.part_rows[:-1][part] + start)

    def blocks(self, rows: int | None = None) -> list[Block]:
        """The run cut into blocks of at most `rows` rows, by default a shard."""
        return list(self.table(rows or self.spec.shard_rows))

    @cached_property
    def spans(self) -> list[tuple[Piece, ...]]:
        """The chosen rows in lazy arrays' blocks: a shard each, or the rows of small parts up to a shard."""
        table = self.table(self.spec.shard_rows)
        counts = self.counts(table)
        spans: list[list[Piece]] = []
        rows = self.spec.shard_rows
        for number in np.flatnonzero(counts):
            if rows + counts[number] > self.spec.shard_rows:
                spans.append([])
                rows = 0
            spans[-1].append(self.piece(table[number]))
            rows += counts[number]
        return [tuple(span) for span in spans]

    @cached_property
    def row_counts(self) -> NDArray[np.int64]:
        """Rows of the chosen prompts before each prompt, and their number at the end; `marks` aside."""
        counts = np.where(self.chosen, np.diff(self.offsets), 0)
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @cached_property
    def n_rows(self) -> int:
        """Rows of the view."""
        return int(self.row_counts[-1]) if self.marks is None else int(np.count_nonzero(self.marks))

    def counts(self, table: BlockTable) -> NDArray[np.int64]:
        """Chosen rows of each of the blocks of `RowPlan.table`."""
        if not len(table):
            return np.zeros(0, np.int64)
        if self.marks is not None:
            return np.add.reduceat(self.marks, table.first, dtype=np.int64)
        return self._chosen_before(table.first + table.stop - table.start) - self._chosen_before(table.first)

    def count(self, block: Block) -> int:
        """Chosen rows of `block`."""
        last = block.first + block.stop - block.start
        if self.marks is not None:
            return int(np.count_nonzero(self.marks[block.first : last]))
        low, high = self._chosen_before(np.array([block.first, last]))
        return int(high - low)

    def _chosen_before(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of chosen prompts before each of `rows`."""
        if not len(self.chosen):
            return np.zeros(len(rows), np.int64)
        prompts = np.minimum(np.searchsorted(self.offsets, rows, "right") - 1, len(self.chosen) - 1)
        inside = np.where(self.chosen[prompts], rows - self.offsets[prompts], 0)
        counts: NDArray[np.int64] = self.row_counts[prompts] + inside
        return counts

    def prompt_numbers(self, block: Block) -> NDArray[np.int32]:
        """Number of the prompt of each stored row of `block`."""
        rows = np.arange(block.first, block.first + block.stop - block.start)
        return (np.searchsorted(self.offsets, rows, "right") - 1).astype(np.int32)

    def mask(self, block: Block) -> NDArray[np.bool_] | slice:
        """Selects the chosen rows among the stored rows of `block`."""
        if self.count(block) == block.stop - block.start:
            return slice(None)
        if self.marks is not None:
            return self.marks[block.first : block.first + block.stop - block.start]
        return self.chosen[self.prompt_numbers(block)]

    def piece(self, block: Block) -> Piece:
        """What reads the chosen rows of `block`; the rows before the first and after the last chosen one are cut off."""
        mask = self.mask(block)
        start, stop, first, keep = block.start, block.stop, block.first, None
        count = stop - start
        if not isinstance(mask, slice):
            held = np.flatnonzero(mask)
            count = len(held)
            low, high = (int(held[0]), int(held[-1]) + 1) if count else (0, 0)
            start, stop, first = start + low, start + high, first + low
            keep = None if count == high - low else np.packbits(mask[low:high])
        low = int(np.searchsorted(self.offsets, first, "right")) - 1
        high = int(np.searchsorted(self.offsets, first + stop - start, "left"))
        folder = self.folder / self.parts[block.part].path
        return Piece(folder, start, stop, first, keep, count, low, self.offsets[low : max(high, low + 1)])

    def read_stored(self, name: str, block: Block) -> NDArray[Any]:
        """The chosen rows of `block` in the array `name`, as they are stored."""
        return self.piece(block).read(name, self.spec.arrays()[name])

    def read(self, name: str, block: Block) -> NDArray[Any]:
        """The chosen rows of `block` in the array `name`; activations as float32."""
        stored = self.read_stored(name, block)
        return decode(stored, self.spec.dtype) if name in self.spec.hooks else stored
