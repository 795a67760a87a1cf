"""Binary logistic regression on rows so wide that reading them is most of the work.

The same optimum as `probes.solver`, for thousands of columns and more rows than memory holds. One pass sums the
rows by label and a Gram matrix over a sample of `SAMPLE_PER_COLUMN` rows a column, of bfloat16 products of centred
rows; its Cholesky factor preconditions L-BFGS (Nocedal and Wright, 2006, algorithm 7.4), each step of which costs
one pass at about the speed of reading. Rows are decoded, shifted and used for both products of the gradient tile by
tile in the cache.

With n = g d rows in the sample, the preconditioned Hessian has eigenvalues between (1 + g^-1/2)^-2 and
(1 - g^-1/2)^-2 (Marchenko and Pastur, 1967) times what p (1 - p) varies: g = 16 gives a condition number of 2.8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.gram import UpperGram, first_mean, gram_bytes, whole
from millpond.analysis.passes import AlignedRows, Pass, one_blas_thread, run_pass
from millpond.analysis.tiles import Rows, tile_rows, tiles
from millpond.store.errors import InvalidInput

Vector = NDArray[np.float64]

SAMPLE_PER_COLUMN = 16
_MEMORY = 12
_SHIFT_RATIO = 4.0


@dataclass(frozen=True)
class WideProblem:
    """One probe: a column of the labels and an inverse regularisation strength."""

    label: int
    C: float = 1.0


@dataclass(frozen=True)
class WideSolution:
    """A fitted weight vector in the rows' own units: a row scores `x @ coef + intercept`."""

    coef: Vector
    intercept: float
    objective: float
    """Sum of log-losses + |coef|^2 / (2 C)."""
    gradient_norm: float
    """Of the objective at the last point whose gradient is known, a row."""
    n_iter: int
    """Gradient passes."""
    converged: bool


def solve_wide(
    rows: AlignedRows, problems: Sequence[WideProblem], *, tol: float = 1e-4, max_iter: int = 50, progress: bool = True
) -> list[WideSolution]:
    """Fit each problem to `rows`: activations (n, d), best `stored`, and labels (n, L) of 0 and 1.

    A problem has converged when its next step would be shorter than `tol` times its weights. Memory: the upper
    triangle of a d * d float32 matrix for each thread, and the whole of it in this process.

    Raises:
        InvalidInput: a value is NaN or infinite, or a label has one class only.
    """
    import torch  # noqa: F401  # before the threads are limited, so that its own are too

    with one_blas_thread():
        return _solve(rows, problems, tol, max_iter, progress)


def _solve(
    rows: AlignedRows, problems: Sequence[WideProblem], tol: float, max_iter: int, progress: bool
) -> list[WideSolution]:
    mean, deviation = run_pass(Pass(rows.head(4096), _look), progress=False)
    # only means that would cancel are worth an operation for each value of each pass
    shift = np.where(np.abs(mean) > _SHIFT_RATIO * deviation, mean, 0.0)
    d = len(shift)
    stride = max(1, rows.n_rows // (SAMPLE_PER_COLUMN * d))
    one = Pass(
        rows,
        SampledMoments,
        (shift, stride),
        accumulate=True,
        result_bytes=gram_bytes(d, 4),
        scratch_bytes=6 * d * 2048,
    )
    sums = run_pass(one, description="probe statistics", progress=progress)
    if not (np.isfinite(sums["sum"]).all() and np.isfinite(sums["label_sum"]).all()):
        raise InvalidInput(f"some of the {rows.n_rows:,} rows hold NaN or infinity; leave those rows out")
    n = int(sums["n"])
    for problem in problems:
        positive = int(sums["positive"][problem.label])
        if not 0 < positive < n:
            raise InvalidInput(
                f"label {problem.label} is {int(positive > 0)} in all {n:,} rows; give rows of both classes"
            )
    metric = CholeskyMetric(sums, d)
    descents = [_Descent(problem, sums, metric, tol) for problem in problems]
    for number in range(max_iter):
        active = [descent for descent in descents if not descent.converged]
        if not active:
            break
        points = np.stack([descent.trial for descent in active], axis=1)
        labels = [descent.problem.label for descent in active]
        todo = Pass(rows, gradients, (shift, points, labels), result_bytes=16 * points.nbytes)
        found = run_pass(todo, description=f"probe pass {number + 1}", progress=progress)
        for column, descent in enumerate(active):
            descent.observe(*(part[..., column] for part in found))
    return [descent.solution(shift) for descent in descents]


def _look(state: None, x: Rows, y: NDArray[np.uint8]) -> tuple[Vector, Vector]:
    mean = first_mean(None, x)
    squares = np.zeros(len(mean))
    for _, tile in tiles(x, mean):
        squares += np.square(tile).sum(axis=0, dtype=np.float64)
    return mean, np.sqrt(squares / len(x))


class SampledMoments:
    """Accumulates sums by label over all rows, and a coarse Gram matrix of every `stride`-th row less the shift."""

    def __init__(self, state: tuple[Vector, int]) -> None:
        self.shift, self.stride = state
        d = len(self.shift)
        self.gram = UpperGram(d, coarse=True)
        self.n = self.sampled = 0
        self.total, self.sampled_total = np.zeros(d), np.zeros(d)
        self.label_total: Any = 0.0
        self.positive: Any = 0

    def update(self, x: Rows, y: NDArray[np.uint8]) -> None:
        """Take in a block."""
        self.n += len(x)
        self.positive = self.positive + y.sum(axis=0, dtype=np.int64)
        by_label, total = label_sums(self.shift, x, y)
        self.label_total = self.label_total + by_label
        self.total += total
        for _, tile in tiles(x[:: self.stride], self.shift, rows=256):
            self.gram.update(tile)
            self.sampled_total += tile.sum(axis=0, dtype=np.float64)
            self.sampled += len(tile)

    def result(self) -> dict[str, Any]:
        """Everything, by name."""
        return {
            "n": self.n, "sum": self.total, "label_sum": self.label_total, "positive": self.positive,
            "gram": self.gram.result(), "gram_n": self.sampled, "gram_sum": self.sampled_total,
        }  # fmt: skip


def label_sums(shift: Vector, x: Rows, y: NDArray[np.uint8]) -> tuple[Vector, Vector]:
    """Sums of `x - shift` over the rows of each label (d, L), and over all rows (d,)."""
    marks = np.concatenate([y.T, np.ones((1, len(x)), np.uint8)]).astype(np.float32)
    total = np.zeros((len(marks), x.shape[1]))
    for rows, tile in tiles(x, shift, rows=tile_rows(x.shape[1], len(marks))):
        total += marks[:, rows].astype(tile.dtype) @ tile
    return total[:-1].T, total[-1]


def label_sums_pass(rows: AlignedRows) -> Pass:
    """The one pass of a mass-mean probe: sums by label (d, L) and of all rows (d,), and rows, about the zero vector."""
    return Pass(rows, _label_sums_and_count, None)


def _label_sums_and_count(state: None, x: Rows, y: NDArray[np.uint8]) -> tuple[Vector, Vector, int]:
    return (*label_sums(np.zeros(x.shape[1]), x, y), len(x))


def gradients(state: tuple[Vector, Vector, list[int]], x: Rows, y: NDArray[np.uint8]) -> tuple[Vector, ...]:
    """Loss, sum of p (1 - p), and gradient (d + 1) at each column of points (weights, then intercept)."""
    shift, points, labels = state
    loss, curvature, gradient = np.zeros(len(labels)), np.zeros(len(labels)), np.zeros(points.shape)
    weights: Any = None
    for rows, tile in tiles(x, shift, rows=tile_rows(x.shape[1], len(labels))):
        if weights is None:
            weights, intercepts = points[:-1].astype(tile.dtype), points[-1].astype(tile.dtype)
        z = tile @ weights
        z += intercepts
        target = y[rows, labels] if len(labels) == 1 else y[rows][:, labels]
        target = target.reshape(z.shape)
        small = np.exp(-np.abs(z))
        p = np.where(z >= 0, 1, small) / (1 + small)
        loss += (np.maximum(z, 0) + np.log1p(small) - z * target).sum(axis=0, dtype=np.float64)
        curvature += (p * (1 - p)).sum(axis=0, dtype=np.float64)
        p -= target
        gradient[:-1] += (p.T @ tile).T
        gradient[-1] += p.sum(axis=0, dtype=np.float64)
    return loss, curvature, gradient


class CholeskyMetric:
    """Applies (q K + I / C)^-1 for the covariance K of the rows times their number, estimated from a sample."""

    def __init__(self, sums: dict[str, Any], d: int) -> None:
        self.n, self.mean = int(sums["n"]), sums["sum"] / sums["n"]
        covariance = whole(sums.pop("gram"), d, symmetric=False)
        center = (sums["gram_sum"] / sums["gram_n"]).astype(np.float32)
        covariance /= np.float32(sums["gram_n"])
        for start in range(0, d, 1024):  # a whole outer product would be another matrix
            covariance[start : start + 1024] -= np.outer(center[start : start + 1024], center)
        variance = np.maximum(np.diag(covariance).astype(np.float64), 0.0)
        floor = 1e-6 * float(variance.max()) or 1.0
        self.scale = 1 / np.sqrt(np.maximum(variance, floor))
        low = self.scale.astype(np.float32)
        covariance *= low
        covariance *= low[:, None]
        self.correlation: NDArray[np.float32] | None = covariance
        self.factor: Any = None
        share = d / max(int(sums["gram_n"]), d + 1)
        # the inverse of a sample covariance is too long by this much in the middle of its spectrum
        self.shrink = (1 - share) ** 2 / (1 + share)

    def solve(self, column: Vector, curvature: float, penalty: float) -> Vector:
        """Apply the inverse to one column (weights, then intercept); `curvature` is the sum of p (1 - p).

        The factor of the first penalty serves all: beside a sum over many rows it is small.
        """
        import scipy.linalg

        if self.factor is None:
            assert self.correlation is not None
            ridge = np.float32(penalty / curvature) * (self.scale**2).astype(np.float32)
            # bfloat16 rounding of the products, which must not make a direction negative
            self.correlation[np.diag_indices_from(self.correlation)] += ridge + np.float32(2e-3)
            self.factor = scipy.linalg.cholesky(self.correlation.T, lower=True, overwrite_a=True, check_finite=False)
            self.correlation = None
        out = np.empty_like(column)
        solved = scipy.linalg.cho_solve(
            (self.factor, True), (column[:-1] * self.scale).astype(np.float32), check_finite=False
        )
        out[:-1] = solved * self.scale * (self.shrink / curvature)
        out[-1] = column[-1] / curvature
        return out


class _Descent:
    """L-BFGS for one problem in coordinates where rows have mean 0; `trial` is that of shifted rows."""

    def __init__(self, problem: WideProblem, sums: dict[str, Any], metric: CholeskyMetric, tol: float) -> None:
        self.problem, self.metric, self.tol = problem, metric, tol
        self.n, self.mean, self.penalty = metric.n, metric.mean, 1 / problem.C
        rate = float(sums["positive"][problem.label]) / self.n
        pull = sums["label_sum"][:, problem.label] - self.mean * rate * self.n
        self.point = np.append(np.zeros(len(pull)), np.log(rate / (1 - rate)))
        self.value = -self.n * (rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
        self.gradient = np.append(-pull, 0.0)
        self.curvature = self.n * rate * (1 - rate)
        self.pairs: list[tuple[Vector, Vector, float]] = []
        self.n_iter, self.backtracks, self.step = 0, 0, 1.0
        self.converged = False
        self.direction = metric.solve(-self.gradient, self.curvature, self.penalty)
        # the least-squares step, lengthened to the discriminant's: within-class instead of total covariance
        explained = float(self.direction[:-1] @ pull) / self.n
        self.direction /= max(1 - explained, 0.1)

    @property
    def trial(self) -> Vector:
        return self._shifted(self.point + self.step * self.direction)

    def _shifted(self, point: Vector) -> Vector:
        return np.append(point[:-1], point[-1] - self.mean @ point[:-1])

    def observe(self, loss: float, curvature: float, gradient: Vector) -> None:
        self.n_iter += 1
        trial = self.point + self.step * self.direction
        value = float(loss) + 0.5 * self.penalty * float(trial[:-1] @ trial[:-1])
        gradient = gradient - np.append(gradient[-1] * self.mean, 0.0) + self.penalty * np.append(trial[:-1], 0.0)
        slope, new_slope = float(self.gradient @ self.direction), float(gradient @ self.direction)
        falls = value <= self.value + 1e-4 * self.step * slope
        flat = value <= self.value + 1e-6 * abs(self.value) and abs(new_slope) <= 0.9 * abs(slope)
        if not (falls or flat) and self.backtracks < 20:
            self.backtracks += 1
            shorter = slope / (slope - new_slope) if new_slope > 0 else 0.5
            self.step *= min(max(shorter, 0.1), 0.5)
            return
        moved, turned = trial - self.point, gradient - self.gradient
        if (bend := float(moved @ turned)) > 0:
            self.pairs = [*self.pairs, (moved, turned, 1 / bend)][-_MEMORY:]
        self.point, self.value, self.gradient, self.curvature = trial, value, gradient, float(curvature)
        self.backtracks, self.step = 0, 1.0
        self.direction = -self._inverse_hessian(gradient)
        size, weights = np.linalg.norm(self.direction[:-1]), np.linalg.norm(self.point[:-1])
        if size <= self.tol * weights:
            self.point = self.point + self.direction
            self.converged = True

    def _inverse_hessian(self, gradient: Vector) -> Vector:
        q, alphas = gradient.copy(), []
        for moved, turned, rho in reversed(self.pairs):
            alphas.append(rho * float(moved @ q))
            q -= alphas[-1] * turned
        r = self.metric.solve(q, self.curvature, self.penalty)
        for (moved, turned, rho), alpha in zip(self.pairs, reversed(alphas), strict=True):
            r += moved * (alpha - rho * float(turned @ r))
        return r

    def solution(self, shift: Vector) -> WideSolution:
        shifted = self._shifted(self.point)
        coef, intercept = shifted[:-1], float(shifted[-1] - shift @ shifted[:-1])
        norm = float(np.linalg.norm(self.gradient)) / self.n
        return WideSolution(coef, intercept, self.value, norm, self.n_iter, self.converged)
