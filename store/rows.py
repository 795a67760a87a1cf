"""Which rows a view holds, and how it reads them in blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.store.dtypes import decode
from millpond.store.manifest import RunSpec
from millpond.store.objects import Storage
from millpond.store.shards import read_rows
from millpond.store.snapshot import Parts

BLOCK_BYTES = 64 << 20
"""Most bytes of float32 activations in one block of a lazy array."""


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
class RowPlan:
    """The rows of a view: some prompts of a run's parts, in storage order.

    A prompt's rows are contiguous and follow the order of the prompt table, so the plan of a
    selection needs the table alone, not the rows.
    """

    folder: Storage
    spec: RunSpec
    parts: Parts
    offsets: NDArray[np.int64]
    """First row of each prompt of the run, and the number of rows at the end."""
    chosen: NDArray[np.bool_]
    """Whether the view holds the prompt, (n_prompts,)."""

    def blocks(self, rows: int | None = None) -> list[Block]:
        """The run cut into blocks of at most `rows` rows, by default as many as a lazy array's block holds."""
        chunk = self.spec.chunk_rows
        limit = rows or max(chunk, min(self.spec.shard_rows, BLOCK_BYTES // (4 * self.spec.d_model) // chunk * chunk))
        blocks, first = [], 0
        for number, part in enumerate(self.parts):
            for start in range(0, part.rows, limit):
                stop = min(start + limit, part.rows)
                blocks.append(Block(number, start, stop, first + start))
            first += part.rows
        return blocks

    @cached_property
    def row_counts(self) -> NDArray[np.int64]:
        """Chosen rows before each prompt, and the number of chosen rows at the end."""
        counts = np.where(self.chosen, np.diff(self.offsets), 0)
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @property
    def n_rows(self) -> int:
        """Rows of the view."""
        return int(self.row_counts[-1])

    def count(self, block: Block) -> int:
        """Chosen rows of `block`."""
        return self._chosen_before(block.first + block.stop - block.start) - self._chosen_before(block.first)

    def _chosen_before(self, row: int) -> int:
        prompt = int(np.searchsorted(self.offsets, row, "right")) - 1
        if prompt >= len(self.chosen):
            return self.n_rows
        inside = row - int(self.offsets[prompt])
        return int(self.row_counts[prompt]) + (inside if self.chosen[prompt] else 0)

    def prompt_numbers(self, block: Block) -> NDArray[np.int32]:
        """Number of the prompt of each stored row of `block`."""
        rows = np.arange(block.first, block.first + block.stop - block.start)
        return (np.searchsorted(self.offsets, rows, "right") - 1).astype(np.int32)

    def mask(self, block: Block) -> NDArray[np.bool_] | slice:
        """Selects the chosen rows among the stored rows of `block`."""
        if self.count(block) == block.stop - block.start:
            return slice(None)
        return self.chosen[self.prompt_numbers(block)]

    def read(self, name: str, block: Block) -> NDArray[Any]:
        """The chosen rows of `block` in the array `name`; activations as float32."""
        stored = self.read_stored(name, block)
        return decode(stored, self.spec.dtype) if name in self.spec.hooks else stored

    def read_stored(self, name: str, block: Block) -> NDArray[Any]:
        """The chosen rows of `block` in the array `name`; activations in their stored data type."""
        if name == "prompt":  # stored numbers count from the start of a part
            return self.prompt_numbers(block)[self.mask(block)]
        array = self.spec.arrays()[name]
        folder = self.folder / self.parts[block.part].path / name
        return read_rows(folder, array, block.start, block.stop)[self.mask(block)]
