"""How well scores separate a binary label, with 95 % intervals that resample whole prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.store.errors import InvalidInput

Floats = NDArray[np.float64]

METRICS = ("auroc", "accuracy", "balanced_accuracy", "f1", "log_loss")
_BINS = 4096


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one set of scores."""

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    evidence: dict[str, int]


def evaluate_scores(
    scores: NDArray[Any],
    labels: NDArray[Any],
    groups: NDArray[Any] | None = None,
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """AUROC, accuracy, balanced accuracy, F1 (threshold 0) and log-loss of `scores`, which are log-odds.

    Intervals are the 2.5 and 97.5 percentiles over `n_bootstrap` resamples of the groups with
    replacement (Field and Welsh, 2007), which are prompts: tokens of one prompt are not independent.
    Without `groups`, rows are resampled. Resamples that hold one class only are left out of the
    intervals they have no value for (NaN if that leaves none). Intervals of the AUROC use 4,096
    quantile bins of the scores; its value is exact.

    Raises:
        InvalidInput: the lengths differ, a score is not finite, or the rows hold one class only.
    """
    scores, truth = np.asarray(scores), np.asarray(labels).astype(bool)
    if scores.shape != truth.shape or scores.ndim != 1:
        raise InvalidInput(f"scores have shape {scores.shape} and labels {truth.shape}; give one of each for every row")
    if not np.isfinite(scores).all():
        raise InvalidInput(
            f"{int((~np.isfinite(scores)).sum()):,} of {len(scores):,} scores are NaN or infinite; leave them out"
        )
    if not 0 < truth.sum() < len(truth):
        raise InvalidInput(
            f"all {len(truth):,} rows to evaluate have the label {bool(truth[:1].all())}; give rows of both classes"
        )
    code, n_groups = _codes(groups, len(truth))
    edges = np.unique(scores)
    if len(edges) > _BINS:
        edges = np.unique(np.quantile(scores, np.linspace(0, 1, _BINS + 1)[1:]))
    bins = np.searchsorted(edges, scores)
    table = _GroupCounts(code, n_groups, bins, len(edges), scores, truth)
    values = {name: float(value[0]) for name, value in table.metrics(np.ones((1, n_groups))).items()}
    values["auroc"] = auroc(scores, truth)
    intervals = {}
    if n_bootstrap:
        rng = np.random.default_rng(seed)
        drawn = [
            table.metrics(rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=count).astype(np.float64))
            for count in _split(n_bootstrap, max(1, (32 << 20) // (8 * (n_groups + 2 * _BINS))))
        ]
        for name in METRICS:
            sample = np.concatenate([part[name] for part in drawn])
            sample = sample[np.isfinite(sample)]
            low, high = np.percentile(sample, [2.5, 97.5]) if len(sample) else (np.nan, np.nan)
            intervals[name] = (float(low), float(high))
    evidence = {"rows": len(truth), "positives": int(truth.sum()), "negatives": int((~truth).sum())}
    if groups is not None:
        evidence["prompts"] = n_groups
    return Evaluation(values, intervals, evidence)


def auroc(scores: NDArray[Any], labels: NDArray[Any]) -> float:
    """Area under the ROC curve: the chance that a positive row scores above a negative one, ties counting half."""
    truth = np.asarray(labels).astype(bool)
    _, ranks, counts = np.unique(scores, return_inverse=True, return_counts=True)
    positive = np.bincount(ranks, weights=truth, minlength=len(counts))
    return float(_area(positive[:, None].astype(np.float64), (counts - positive)[:, None].astype(np.float64))[0])


def _area(positive: Floats, negative: Floats) -> Floats:
    """AUROC from counts by ascending score (bins, samples); NaN where a class is absent."""
    below = np.cumsum(negative, axis=0) - negative
    wins = (positive * (below + negative / 2)).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(wins / (positive.sum(axis=0) * negative.sum(axis=0)))


class _GroupCounts:
    """Everything the metrics need, as sums over the rows of each group."""

    def __init__(
        self,
        code: NDArray[Any],
        n_groups: int,
        bins: NDArray[Any],
        n_bins: int,
        scores: NDArray[Any],
        truth: NDArray[Any],
    ) -> None:
        import scipy.sparse

        def histogram(rows: NDArray[Any]) -> Any:
            ones = np.ones(int(rows.sum()))
            return scipy.sparse.csr_matrix((ones, (bins[rows], code[rows])), shape=(n_bins, n_groups))

        self.positive, self.negative = histogram(truth), histogram(~truth)
        wide = scores.astype(np.float64)
        loss = np.logaddexp(0, np.where(truth, -wide, wide))
        called = wide > 0
        columns = (truth & called, truth & ~called, ~truth & called, ~truth & ~called, loss)
        self.sums = np.stack([np.bincount(code, weights=column, minlength=n_groups) for column in columns], axis=1)

    def metrics(self, weights: Floats) -> dict[str, Floats]:
        """Each metric for each row of `weights` (samples, groups), how often each group was drawn."""
        tp, fn, fp, tn, loss = (weights @ self.sums).T
        total = tp + fn + fp + tn
        with np.errstate(invalid="ignore", divide="ignore"):
            return {
                "auroc": _area(self.positive @ weights.T, self.negative @ weights.T),
                "accuracy": (tp + tn) / total,
                "balanced_accuracy": (tp / (tp + fn) + tn / (tn + fp)) / 2,
                "f1": 2 * tp / (2 * tp + fp + fn),
                "log_loss": loss / total,
            }


def _codes(groups: NDArray[Any] | None, n_rows: int) -> tuple[NDArray[Any], int]:
    if groups is None:
        return np.arange(n_rows), n_rows
    groups = np.asarray(groups)
    if groups.shape != (n_rows,):
        raise InvalidInput(f"groups have shape {groups.shape}; give one prompt number for each of the {n_rows:,} rows")
    names, code = np.unique(groups, return_inverse=True)
    return code, len(names)


def _split(total: int, size: int) -> list[int]:
    return [size] * (total // size) + ([total % size] if total % size else [])
