"""Shuffled batches for trainers, read in whole chunks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from millpond.store.errors import InvalidInput
from millpond.store.rows import Block, RowPlan


class ActivationStream(Iterator[NDArray[np.float32]]):
    """Batches (batch_size, d_model) in an order that the seed decides; one group of chunks is read ahead.

    In each epoch the chunks are permuted and dealt into groups of about `buffer_rows` rows; the rows
    of a group are permuted, and batches are cut from the groups laid end to end. So any step can be
    reached by counting rows, without reading what came before.
    """

    def __init__(
        self,
        plan: RowPlan,
        hook: str,
        batch_size: int,
        *,
        seed: int,
        epochs: int | None,
        buffer_rows: int,
        step: int,
    ) -> None:
        if batch_size < 1 or plan.n_rows < batch_size:
            raise InvalidInput(
                f"batch_size is {batch_size}; give 1 to {plan.n_rows}, the rows of this view of {plan.spec.name!r}"
            )
        for name, value, least in (
            ("seed", seed, 0),
            ("epochs", epochs, 0),
            ("start_step", step, 0),
            ("buffer_rows", buffer_rows, 1),
        ):
            if value is not None and value < least:
                raise InvalidInput(f"{name} is {value}; give {least} or more")
        self.plan = plan
        self.hook = hook
        self.batch_size = batch_size
        self.seed = seed
        self.epochs = epochs
        self.buffer_rows = max(buffer_rows, batch_size)
        self.step = step
        """Batches given out so far; pass it as `start_step` to go on from here."""
        counted = [(block, plan.count(block)) for block in plan.blocks(plan.spec.chunk_rows)]
        self._blocks = [block for block, count in counted if count]
        self._counts = np.array([count for _, count in counted if count])
        self._batches = self._make_batches(step)

    def __iter__(self) -> ActivationStream:
        return self

    def __next__(self) -> NDArray[np.float32]:
        batch = next(self._batches)
        self.step += 1
        return batch

    def _groups(self, epoch: int) -> list[list[int]]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._blocks))
        groups: list[list[int]] = []
        rows = self.buffer_rows
        for number in order:
            if rows + self._counts[number] > self.buffer_rows:
                groups.append([])
                rows = 0
            groups[-1].append(int(number))
            rows += int(self._counts[number])
        return groups

    def _load(self, epoch: int, group: int, numbers: list[int]) -> NDArray[np.float32]:
        blocks: list[Block] = [self._blocks[number] for number in numbers]
        rows = np.empty((int(self._counts[numbers].sum()), self.plan.spec.d_model), np.float32)
        place = np.random.default_rng([self.seed, epoch, group]).permutation(len(rows))
        filled = 0
        for block in blocks:
            part = self.plan.read(self.hook, block)
            rows[place[filled : filled + len(part)]] = part
            filled += len(part)
        return rows

    def _schedule(self, skip: int) -> Iterator[tuple[int, int, list[int], int]]:
        """Epoch, number and chunks of each group, with the rows to skip in it, from row `skip` on."""
        epoch = skip // self.plan.n_rows
        skip -= epoch * self.plan.n_rows
        while self.epochs is None or epoch < self.epochs:
            for group, numbers in enumerate(self._groups(epoch)):
                rows = int(self._counts[numbers].sum())
                if skip >= rows:
                    skip -= rows
                    continue
                yield epoch, group, numbers, skip
                skip = 0
            epoch += 1

    def _make_batches(self, step: int) -> Iterator[NDArray[np.float32]]:
        schedule = self._schedule(step * self.batch_size)
        left = np.empty((0, self.plan.spec.d_model), np.float32)
        with ThreadPoolExecutor(1, thread_name_prefix="millpond-stream") as reader:
            entry = next(schedule, None)
            ahead = entry and reader.submit(self._load, *entry[:3])
            while entry and ahead:
                rows = ahead.result()[entry[3] :]
                entry = next(schedule, None)
                ahead = entry and reader.submit(self._load, *entry[:3])
                if len(left):  # only this batch lies in two groups: joining it alone copies no whole buffer
                    missing = self.batch_size - len(left)
                    left = np.concatenate([left, rows[:missing]])
                    rows = rows[missing:]
                    if len(left) < self.batch_size:
                        continue
                    yield left
                whole = len(rows) // self.batch_size * self.batch_size
                for begin in range(0, whole, self.batch_size):
                    yield rows[begin : begin + self.batch_size]
                left = rows[whole:].copy()
