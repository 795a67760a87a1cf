"""How good scores are: metrics that merge over blocks of rows, with 95 % intervals that resample whole prompts.

A `Tally` holds sums by prompt and a table of ranks; it merges in block order and has a bounded size, so scores of
any number of rows stream through it. Counts and ranks do not depend on how rows are cut into blocks at all, sums of
losses only in their last digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.ranks import Floats, RankTable, area, recall_at
from millpond.store.errors import InvalidInput, OneClass

Kind = Literal["binary", "multiclass", "regression"]

METRICS: dict[Kind, tuple[str, ...]] = {
    "binary": ("auroc", "accuracy", "balanced_accuracy", "f1", "log_loss", "ece", "recall_at_fpr"),
    "multiclass": ("auroc", "accuracy", "balanced_accuracy", "f1", "log_loss", "ece"),
    "regression": ("r2", "mse"),
}
"""Metrics of each kind of label; for several classes AUROC (one against the rest), recalls and F1 are means over classes."""

RELIABILITY_BINS = 10
_TABLE_LINES = 1 << 24
_LEAST_LINES = 1 << 14
_BOOTSTRAP_BINS = 1024
_SAMPLE_BYTES = 32 << 20


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one set of scores."""

    values: dict[str, Any]
    intervals: dict[str, tuple[float, float]]
    evidence: dict[str, int]


@dataclass(frozen=True)
class Task:
    """What scores are to be compared with."""

    kind: Kind
    n_classes: int = 2
    probabilistic: bool = True
    """Whether scores are log-odds, or logits of a softmax; if not, there is no log-loss and no calibration."""
    n_groups: int = 1
    center: float = 0.0
    """About the mean of a regression target, so that large means do not cancel."""
    share: int = 1
    """Tasks that are tallied together and share the memory for ranks."""

    @property
    def names(self) -> tuple[str, ...]:
        """Its metrics."""
        return tuple(name for name in METRICS[self.kind] if self.probabilistic or name not in ("log_loss", "ece"))

    @property
    def nbytes(self) -> int:
        """Memory of a tally, at most about."""
        tables = self.n_classes if self.kind == "multiclass" else 1
        return self.n_groups * 8 * (self.n_classes**2 + 3 * RELIABILITY_BINS + 2) + 24 * tables * sum(self.limits)

    @property
    def limits(self) -> tuple[int, int]:
        """Lines of the table of all ranks, and of the one by group."""
        lines = max(_LEAST_LINES, _TABLE_LINES // (16 * self.share))
        return lines, max(lines, 64 * self.n_groups)


@dataclass(frozen=True)
class Tally:
    """Sufficient statistics of scores for all metrics of a task."""

    task: Task
    groups: NDArray[np.int64]
    """Groups seen, ascending."""
    sums: Floats
    """(groups seen, ...): see `_sums`."""
    ranks: tuple[tuple[RankTable, RankTable], ...]
    """For each class against the rest (one for two classes): the table of all rows, and by group."""

    @classmethod
    def of(cls, task: Task, scores: NDArray[Any], target: NDArray[Any], group: NDArray[Any]) -> Tally:
        """Of one block: scores (rows, columns), class codes or numbers (rows,), and group codes (rows,)."""
        groups, code = np.unique(group, return_inverse=True)
        columns = _sums(task, scores.astype(np.float64), target)
        sums = np.stack([np.bincount(code, weights=column, minlength=len(groups)) for column in columns], axis=1)
        tables = []
        if task.kind != "regression":
            for i in range(1 if task.kind == "binary" else task.n_classes):
                truth = target == (1 if task.kind == "binary" else i)
                every = RankTable.of(scores[:, i], truth, np.zeros(len(code)), task.limits[0])
                tables.append((every, RankTable.of(scores[:, i], truth, group, task.limits[1])))
        return cls(task, groups.astype(np.int64), sums.astype(np.float64), tuple(tables))

    def merge(self, other: Tally) -> Tally:
        """The tally of both blocks."""
        groups, code = np.unique(np.concatenate([self.groups, other.groups]), return_inverse=True)
        sums = np.zeros((len(groups), self.sums.shape[1]))
        sums[code[: len(self.groups)]] += self.sums
        sums[code[len(self.groups) :]] += other.sums
        pairs = zip(self.ranks, other.ranks, strict=True)
        ranks = tuple((a[0].merge(b[0]), a[1].merge(b[1])) for a, b in pairs)
        return Tally(self.task, groups, sums, ranks)

    def finish(self, *, n_bootstrap: int = 1000, seed: int = 0, fpr: float = 0.01) -> Evaluation:
        """Values, and intervals over `n_bootstrap` resamples of the groups.

        Raises:
            OneClass: a class has no row.
        """
        task = self.task
        whole = self.sums.sum(axis=0, keepdims=True)
        evidence = _evidence(task, whole[0], len(self.groups))
        values: dict[str, Any] = {name: float(value[0]) for name, value in _from_sums(task, whole).items()}
        if task.kind != "regression":
            counts = [every.by_score() for every, _ in self.ranks]
            values["auroc"] = float(np.mean([area(*pair)[0] for pair in counts]))
            if task.kind == "binary":
                values["recall_at_fpr"] = float(recall_at(*counts[0], fpr)[0])
        values = {name: values[name] for name in task.names}
        if task.probabilistic and task.kind != "regression":
            values["reliability"] = _reliability(task, whole[0])
        intervals = self._intervals(n_bootstrap, seed, fpr) if n_bootstrap and len(self.groups) > 1 else {}
        return Evaluation(values, intervals, evidence)

    def _intervals(self, n_bootstrap: int, seed: int, fpr: float) -> dict[str, tuple[float, float]]:
        task, n = self.task, len(self.groups)
        place = np.zeros(int(self.groups[-1]) + 1, np.int64)
        place[self.groups] = np.arange(n)
        pairs = []
        for _, table in self.ranks:
            named = RankTable(place[table.group].astype(np.int32), *_rest(table))
            pairs.append(named.by_group(n, _BOOTSTRAP_BINS))
        rng = np.random.default_rng(seed)
        drawn: dict[str, list[Floats]] = {name: [] for name in task.names}
        size = max(1, _SAMPLE_BYTES // (8 * (n + 2 * _BOOTSTRAP_BINS)))
        for start in range(0, n_bootstrap, size):
            count = min(size, n_bootstrap - start)
            weights = rng.multinomial(n, np.full(n, 1 / n), size=count).astype(np.float64)
            found = _from_sums(task, weights @ self.sums)
            if pairs:
                hits = [(positive @ weights.T, negative @ weights.T) for positive, negative in pairs]
                found["auroc"] = np.mean([area(*hit) for hit in hits], axis=0)
                if task.kind == "binary":
                    found["recall_at_fpr"] = recall_at(*hits[0], fpr)
            for name in task.names:
                drawn[name].append(found[name])
        intervals = {}
        for name, parts in drawn.items():
            sample = np.concatenate(parts)
            sample = sample[np.isfinite(sample)]
            low, high = np.percentile(sample, [2.5, 97.5]) if len(sample) else (np.nan, np.nan)
            intervals[name] = (float(low), float(high))
        return intervals


def merge_all(left: list[Tally], right: list[Tally]) -> list[Tally]:
    """Combine of a pass that tallies several tasks."""
    return [a.merge(b) for a, b in zip(left, right, strict=True)]


def evaluate_scores(
    scores: NDArray[Any],
    labels: NDArray[Any],
    groups: NDArray[Any] | None = None,
    *,
    kind: Kind = "binary",
    probabilistic: bool = True,
    n_bootstrap: int = 1000,
    seed: int = 0,
    fpr: float = 0.01,
) -> Evaluation:
    """Metrics of `scores` in memory: log-odds of two classes (rows,), logits (rows, K), or predicted numbers (rows,).

    Binary: AUROC, accuracy, balanced accuracy, F1 (threshold 0), log-loss, ECE and the reliability curve
    (`RELIABILITY_BINS` equal bins of the probability: mean probability, fraction of positives, rows), and
    the recall at a false-positive rate of at most `fpr`. Several classes: the same as means over classes,
    and the ECE of the most probable class (Guo et al., 2017). Regression: R2 and mean squared error.

    Intervals are the 2.5 and 97.5 percentiles over `n_bootstrap` resamples of the groups with
    replacement (Field and Welsh, 2007), which are prompts: tokens of one prompt are not independent.
    Without `groups`, rows are resampled. Resamples that hold one class only are left out of the
    intervals they have no value for (NaN if that leaves none). Scores are compared as float32; intervals of
    rank metrics use 1,024 bins of equal rows, their values none while at most a million scores differ.

    Raises:
        InvalidInput: the lengths differ, or a score is not finite.
        OneClass: the rows hold one class only.
    """
    scores = np.asarray(scores)
    target = np.asarray(labels)
    rows = scores[:, None] if scores.ndim == 1 else scores
    wanted = 2 if kind == "multiclass" else 1
    if target.shape != scores.shape[:1] or scores.ndim != wanted or not len(target):
        raise InvalidInput(
            f"scores have shape {scores.shape} and labels {target.shape}; give one of each for every row"
        )
    check_scores(rows)
    code, n_groups = group_codes(groups, len(target))
    if kind == "binary":
        target = target.astype(bool)
    n_classes = rows.shape[1] if kind == "multiclass" else 2
    center = float(target.mean()) if kind == "regression" else 0.0
    task = Task(kind, n_classes, probabilistic, n_groups, center)
    found = Tally.of(task, rows, target, code).finish(n_bootstrap=n_bootstrap, seed=seed, fpr=fpr)
    if groups is None:
        del found.evidence["prompts"]
    return found


def auroc(scores: NDArray[Any], labels: NDArray[Any]) -> float:
    """Area under the ROC curve: the chance that a positive row scores above a negative one, ties counting half."""
    truth = np.asarray(labels).astype(bool)
    table = RankTable.of(np.asarray(scores), truth, np.zeros(len(truth)), len(truth))
    return float(area(*table.by_score())[0])


def check_scores(scores: NDArray[Any]) -> None:
    """Raises InvalidInput if a score is NaN or infinite."""
    finite = np.isfinite(scores).all(axis=1)
    if not finite.all():
        raise InvalidInput(f"{int((~finite).sum()):,} of {len(scores):,} scores are NaN or infinite; leave them out")


def group_codes(groups: NDArray[Any] | None, n_rows: int) -> tuple[NDArray[Any], int]:
    """A number from 0 for each row's group, and how many groups there are; rows are groups if none are given.

    Raises:
        InvalidInput: there is not one group a row.
    """
    if groups is None:
        return np.arange(n_rows), n_rows
    groups = np.asarray(groups)
    if groups.shape != (n_rows,):
        raise InvalidInput(f"groups have shape {groups.shape}; give one prompt number for each of the {n_rows:,} rows")
    names, code = np.unique(groups, return_inverse=True)
    return code, len(names)


def _rest(table: RankTable) -> tuple[Any, ...]:
    return table.key, table.positive, table.negative, table.level, table.limit


def _sums(task: Task, scores: Floats, target: NDArray[Any]) -> list[NDArray[Any]]:
    """What is summed by group, one value a row each.

    Regression: one, y, y squared (centred), squared error. Else: the confusion matrix (true x called),
    the log-loss, and for each bin of probability the rows, the sum of probabilities and the hits.
    """
    if task.kind == "regression":
        y = target - task.center
        return [np.ones(len(y)), y, y * y, np.square(scores[:, 0] - target)]
    if task.kind == "binary":
        z = scores[:, 0]
        called, truth = (z > 0).astype(np.int64), np.asarray(target).astype(np.int64)
        loss = np.logaddexp(0, np.where(truth == 1, -z, z))
        probability, hit = np.exp(-np.logaddexp(0, -z)), truth == 1
    else:
        truth, called = np.asarray(target).astype(np.int64), scores.argmax(axis=1)
        top = scores.max(axis=1)
        norm = top + np.log(np.exp(scores - top[:, None]).sum(axis=1))
        loss = norm - scores[np.arange(len(truth)), truth]
        probability, hit = np.exp(top - norm), called == truth
    pair = truth * task.n_classes + called
    columns: list[NDArray[Any]] = [pair == number for number in range(task.n_classes**2)]
    if not task.probabilistic:
        return columns
    columns.append(loss)
    place = np.minimum((probability * RELIABILITY_BINS).astype(np.int64), RELIABILITY_BINS - 1)
    for number in range(RELIABILITY_BINS):
        inside = place == number
        columns += [inside, np.where(inside, probability, 0.0), inside & hit]
    return columns


def _from_sums(task: Task, sums: Floats) -> dict[str, Floats]:
    """The metrics that sums decide, for each of `sums` (samples, ...)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        if task.kind == "regression":
            n, y, square, error = sums.T
            return {"r2": 1 - error / (square - y * y / n), "mse": error / n}
        k = task.n_classes
        confusion = sums[:, : k * k].reshape(-1, k, k)
        total = confusion.sum(axis=(1, 2))
        right = np.einsum("sii->si", confusion)
        true, called = confusion.sum(axis=2), confusion.sum(axis=1)
        f1 = 2 * right / (true + called)
        found = {
            "accuracy": right.sum(axis=1) / total,
            "balanced_accuracy": (right / true).mean(axis=1),
            "f1": f1[:, 1] if task.kind == "binary" else np.nan_to_num(f1).mean(axis=1),
        }
        if task.probabilistic:
            found["log_loss"] = sums[:, k * k] / total
            bins = sums[:, k * k + 1 :].reshape(-1, RELIABILITY_BINS, 3)
            found["ece"] = np.abs(bins[:, :, 1] - bins[:, :, 2]).sum(axis=1) / total
        return found


def _reliability(task: Task, sums: Floats) -> Floats:
    """Mean probability, fraction of hits and rows of each bin, (bins, 3); NaN means where a bin is empty."""
    bins = sums[task.n_classes**2 + 1 :].reshape(RELIABILITY_BINS, 3)
    with np.errstate(invalid="ignore"):
        return np.stack([bins[:, 1] / bins[:, 0], bins[:, 2] / bins[:, 0], bins[:, 0]], axis=1)


def _evidence(task: Task, sums: Floats, n_groups: int) -> dict[str, int]:
    if task.kind == "regression":
        return {"rows": int(sums[0]), "prompts": n_groups}
    rows = sums[: task.n_classes**2].reshape(task.n_classes, -1).sum(axis=1).astype(int)
    if (absent := np.flatnonzero(rows == 0)).size:
        only = f"all have the label {bool(rows[1])}" if task.kind == "binary" else f"none is of class {absent[0]}"
        raise OneClass(f"of {rows.sum():,} rows to evaluate {only}; give rows of every class")
    found = {"rows": int(rows.sum()), "prompts": n_groups}
    if task.kind == "binary":
        return found | {"positives": int(rows[1]), "negatives": int(rows[0])}
    return found | {f"class_{number}": int(count) for number, count in enumerate(rows)}
