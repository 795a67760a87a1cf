"""Filling shards exactly: near the end of a shard, requests wait until some of them fill it to the last row.

Whole shards keep their bytes when the run is sealed, and requests are never cut in two. Which of the waiting
requests fit is a subset sum; lengths vary enough for a dozen of them to have one, nearly always.
"""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class ShardPacker(Generic[T]):
    """Decides in which order requests are written, and where a segment ends."""

    def __init__(self, rows: int, wait_rows: int) -> None:
        self.rows = rows
        """Rows of a segment: whole shards."""
        self.wait_rows = wait_rows
        """Most rows that wait."""
        self.waiting: list[tuple[int, T]] = []
        self._reach: list[int] = [1]
        """Bit n of entry k: some of the first k waiting requests have n rows together."""

    def add(self, filled: int, rows: int, request: T) -> tuple[list[T], bool]:
        """What to write now, after `filled` rows of the segment, and whether the segment then ends."""
        left = self.rows - filled
        if not self.wait_rows:
            return [request], rows >= left
        if not self.waiting and rows <= left - self.wait_rows // 2:
            return [request], False
        self.waiting.append((rows, request))
        mask = (1 << left + 1) - 1
        self._reach.append((self._reach[-1] | self._reach[-1] << rows) & mask)
        if self._reach[-1] >> left & 1:
            return self._take(left), True
        if sum(rows for rows, _ in self.waiting) > self.wait_rows:
            return self.flush(), True  # no luck: the segment ends with a broken shard, and sealing packs it anew
        return [], False

    def flush(self) -> list[T]:
        """All that waits; to be called after a segment ended, and added again to the next."""
        requests = [request for _, request in self.waiting]
        self._keep([])
        return requests

    def _take(self, left: int) -> list[T]:
        chosen: list[int] = []
        for number in range(len(self.waiting), 0, -1):
            if not self._reach[number - 1] >> left & 1:
                chosen.append(number - 1)
                left -= self.waiting[number - 1][0]
        taken = [self.waiting[number][1] for number in reversed(chosen)]
        self._keep([entry for number, entry in enumerate(self.waiting) if number not in set(chosen)])
        return taken

    def _keep(self, waiting: list[tuple[int, T]]) -> None:
        self.waiting = waiting
        self._reach = [1]
