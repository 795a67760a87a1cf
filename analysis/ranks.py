"""How scores rank two classes: a table of counts that merges in any order and keeps a bounded size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RankTable:
    """Rows of both classes by (group, score), the scores as ordered integers with their `level` lowest bits cut.

    Scores are float32, exact while the table has at most `limit` lines; beyond, as many low bits are cut
    as it takes. Cutting bits only merges lines, so the level that a merged table ends at, and with it the
    table, depends on the rows alone and not on how they were cut into blocks.
    """

    group: NDArray[np.int32]
    key: NDArray[np.uint32]
    positive: NDArray[np.int64]
    negative: NDArray[np.int64]
    level: int
    limit: int

    @classmethod
    def of(cls, scores: NDArray[Any], truth: NDArray[np.bool_], group: NDArray[Any], limit: int) -> RankTable:
        """The table of one block; `group` may be all zeros."""
        ones = truth.astype(np.int64)
        return _compact(group.astype(np.int32), _ordered(scores), ones, 1 - ones, 0, limit)

    def merge(self, other: RankTable) -> RankTable:
        """The table of both blocks."""
        level = max(self.level, other.level)
        keys = [table.key >> np.uint32(level - table.level) for table in (self, other)]
        return _compact(
            np.concatenate([self.group, other.group]), np.concatenate(keys),
            np.concatenate([self.positive, other.positive]), np.concatenate([self.negative, other.negative]),
            level, self.limit,
        )  # fmt: skip

    def by_score(self) -> tuple[Floats, Floats]:
        """Positive and negative rows by ascending score, (bins, 1) each."""
        _, bins = np.unique(self.key, return_inverse=True)
        count = int(bins.max()) + 1 if len(bins) else 0
        positive, negative = (
            np.bincount(bins, weights=rows, minlength=count)[:, None].astype(np.float64)
            for rows in (self.positive, self.negative)
        )
        return positive, negative

    def by_group(self, n_groups: int, most_bins: int) -> tuple[Any, Any]:
        """Positive and negative rows as sparse matrices (bins, groups), in at most `most_bins` bins of equal rows."""
        import scipy.sparse

        keys, bins = np.unique(self.key, return_inverse=True)
        if len(keys) > most_bins:
            total = np.cumsum(np.bincount(bins, weights=self.positive + self.negative))
            coarse = np.minimum((total - 1) * most_bins // total[-1], most_bins - 1).astype(np.int64)
            bins = coarse[bins]
        shape = (int(bins.max()) + 1, n_groups)
        made = [
            scipy.sparse.csr_matrix((rows.astype(np.float64), (bins, self.group)), shape=shape)
            for rows in (self.positive, self.negative)
        ]
        return made[0], made[1]


def area(positive: Floats, negative: Floats) -> Floats:
    """AUROC from counts by ascending score (bins, samples), ties counting half; NaN where a class is absent."""
    below = np.cumsum(negative, axis=0) - negative
    wins = (positive * (below + negative / 2)).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(wins / (positive.sum(axis=0) * negative.sum(axis=0)))


def recall_at(positive: Floats, negative: Floats, fpr: float) -> Floats:
    """Largest recall of a threshold that calls at most the fraction `fpr` of the negatives, from counts as in `area`."""
    called, hit = (np.cumsum(rows[::-1], axis=0) for rows in (negative, positive))
    allowed = called <= fpr * negative.sum(axis=0) * (1 + 1e-12)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.where(allowed, hit, 0.0).max(axis=0) / positive.sum(axis=0)
    return np.where(negative.sum(axis=0) > 0, found, np.nan)


def _ordered(scores: NDArray[Any]) -> NDArray[np.uint32]:
    """Unsigned integers in the order of the scores as float32."""
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)  # + 0 makes -0 equal 0
    return np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000)).astype(np.uint32)


def _compact(
    group: NDArray[np.int32],
    key: NDArray[np.uint32],
    positive: NDArray[np.int64],
    negative: NDArray[np.int64],
    level: int,
    limit: int,
) -> RankTable:
    while True:
        lines, where = np.unique((group.astype(np.int64) << 32) | key, return_inverse=True)
        if len(lines) <= limit or level == 31:
            break
        key, level = key >> np.uint32(1), level + 1
    positive, negative = (
        np.bincount(where, weights=rows, minlength=len(lines)).astype(np.int64) for rows in (positive, negative)
    )
    return RankTable(
        (lines >> 32).astype(np.int32), (lines & 0xFFFFFFFF).astype(np.uint32), positive, negative, level, limit
    )
