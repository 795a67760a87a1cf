"""What probes are fitted to: label columns with their classes, sample weights and folds, held in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.passes import AlignedRows, InMemory

if TYPE_CHECKING:
    from millpond.analysis.passes import RowArray

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """One probe to fit: a label column, a regularisation strength, and the fold to leave out."""

    label: int
    strength: float
    """C, alpha or shrinkage, as the estimator calls it."""
    fold: int = -1
    """Rows of this fold are not fitted to; -1 for none."""


@dataclass(frozen=True)
class Targets:
    """Label columns of all rows: class codes, or numbers to regress on, one byte a row and column if few classes."""

    columns: InMemory
    """(rows, labels): class codes as uint8 or uint16, or float64 values."""
    n_classes: tuple[int, ...]
    """Classes of each column; 1 for numbers."""
    class_weights: tuple[tuple[float, ...] | None, ...]
    """Weight of each class of each column."""
    weights: InMemory | None = None
    """Sample weights (rows,), float64."""
    folds: InMemory | None = None
    """Fold of each row (rows,), uint8."""
    n_folds: int = 1

    @classmethod
    def of(
        cls,
        columns: Sequence[NDArray[Any]],
        n_classes: Sequence[int],
        class_weights: Sequence[tuple[float, ...] | None],
        weights: Vector | None = None,
        folds: NDArray[np.uint8] | None = None,
    ) -> Targets:
        """Stack label columns, each (rows,)."""
        return cls(
            InMemory(np.stack(columns, axis=1)),
            tuple(n_classes),
            tuple(class_weights),
            None if weights is None else InMemory(weights),
            None if folds is None else InMemory(folds),
            1 if folds is None else int(folds.max()) + 1,
        )

    def align(self, X: RowArray) -> AlignedRows:
        """`X` with the columns, weights and folds of its rows, for passes; stored rows are decoded there."""
        more = (held for held in (self.weights, self.folds) if held is not None)
        return AlignedRows(X, self.columns, *more, stored=True)

    @property
    def layout(self) -> Layout:
        """How blocks of these targets are read."""
        return Layout(self.n_classes, self.class_weights, self.weights is not None, self.n_folds)


@dataclass(frozen=True)
class Design:
    """One hook's rows with the targets of its problems."""

    name: str
    X: Any
    targets: Targets

    @cached_property
    def rows(self) -> AlignedRows:
        """The rows with their targets, planned once for all passes."""
        return self.targets.align(self.X)


@dataclass(frozen=True)
class Layout:
    """What a pass needs to know of `Targets` to read a block of them: (columns, weights?, folds?)."""

    n_classes: tuple[int, ...]
    class_weights: tuple[tuple[float, ...] | None, ...]
    weighted: bool
    n_folds: int

    @property
    def starts(self) -> NDArray[np.int64]:
        """Where each label's indicator columns start in `indicators`, and where the last ends."""
        return np.concatenate([[1], 1 + np.cumsum([max(k - 1, 1) for k in self.n_classes])]).astype(np.int64)

    def unpack(self, blocks: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], Vector | None, NDArray[np.uint8] | None]:
        """Columns, sample weights and folds of a block."""
        extra = list(blocks[1:])
        weights = extra.pop(0) if self.weighted else None
        return blocks[0], weights, extra.pop(0) if self.n_folds > 1 else None

    def indicators(self, columns: NDArray[Any], dtype: Any) -> NDArray[Any]:
        """Ones, then for each label its numbers, or 0/1 for each of its classes but the first: (rows, 1 + M)."""
        starts = self.starts
        out = np.empty((len(columns), int(starts[-1])), dtype)
        out[:, 0] = 1
        if max(self.n_classes) <= 2:
            out[:, 1:] = columns
            return out
        for label, (start, k) in enumerate(zip(starts[:-1], self.n_classes, strict=True)):
            if k <= 2:
                out[:, start] = columns[:, label]
            else:
                out[:, start : start + k - 1] = columns[:, label, None] == np.arange(1, k)
        return out

    def by_class(self, sums: NDArray[Any], label: int) -> NDArray[Any]:
        """Sums of each class of `label`, (..., K), from sums by `indicators`, (..., 1 + M)."""
        start, k = int(self.starts[label]), self.n_classes[label]
        later = sums[..., start : start + max(k - 1, 1)]
        if k == 1:
            return later
        return np.concatenate([(sums[..., 0] - later.sum(axis=-1))[..., None], later], axis=-1)

    def weight_of(self, label: int) -> Vector:
        """Weight of each class of `label`, (K,)."""
        given = self.class_weights[label]
        return np.ones(self.n_classes[label]) if given is None else np.asarray(given, np.float64)


def training_sums(by_fold: NDArray[Any], fold: int) -> NDArray[Any]:
    """The sum over folds, (F, ...), without `fold`."""
    total = by_fold.sum(axis=0)
    return np.asarray(total if fold < 0 else total - by_fold[fold])
