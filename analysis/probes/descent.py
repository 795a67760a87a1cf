"""The descent of one logistic-regression problem: L-BFGS, driven from outside, with a metric that is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.gram import whole
from millpond.analysis.probes.targets import Problem

Vector = NDArray[np.float64]

PATIENCE = 15
"""Passes before a binary problem's metric becomes its Hessian; renewed after each third of that."""
_MEMORY = 12
"""Steps that L-BFGS remembers."""


class Metric:
    """Solves (q K + lambda I) w = g for many q and lambda from one factorisation of K = V diag(values) V'."""

    def __init__(self, values: Vector, vectors: Vector) -> None:
        self.values, self.vectors = np.maximum(values, 0.0), vectors

    @classmethod
    def of(cls, covariance: Vector) -> Metric:
        """The metric of a whole covariance matrix."""
        import scipy.linalg

        return cls(*scipy.linalg.eigh(covariance, driver="evd", check_finite=False))

    def solve(self, columns: Vector, curvature: Vector, penalty: Vector) -> Vector:
        """Apply the inverse to each column (weights, then intercept); each has its `curvature` q and `penalty`."""
        out = np.empty_like(columns)
        out[:-1] = self.vectors @ ((self.vectors.T @ columns[:-1]) / (self.values[:, None] * curvature + penalty))
        out[-1] = _intercepts(columns[-1], curvature)
        return out


class SingleMetric:
    """As `Metric`, for one problem of two classes: a Cholesky factor, which costs a thirtieth of the eigenvectors.

    It is that of the first q; later ones, which differ little, only scale it.
    """

    def __init__(self, covariance: Vector) -> None:
        self.covariance = covariance
        self.factor: Any = None

    def solve(self, columns: Vector, curvature: Vector, penalty: Vector) -> Vector:
        """Apply the inverse to the column (weights, then intercept), which has `curvature` q and `penalty`."""
        import scipy.linalg

        if self.factor is None:
            ridge = float(penalty[0] / curvature[0])
            spread = 1e-12 * float(np.trace(self.covariance)) / len(self.covariance)
            self.covariance[np.diag_indices_from(self.covariance)] += ridge + spread
            self.factor = scipy.linalg.cho_factor(self.covariance, overwrite_a=True, check_finite=False)
        out = np.empty_like(columns)
        out[:-1] = scipy.linalg.cho_solve(self.factor, columns[:-1], check_finite=False) / curvature
        out[-1] = _intercepts(columns[-1], curvature)
        return out


class CoarseMetric:
    """As `Metric`, for wide rows: the Cholesky factor in float32 of a sample's covariance from bfloat16 products.

    With g d rows in the sample, the preconditioned Hessian has eigenvalues between (1 + g^-1/2)^-2 and
    (1 - g^-1/2)^-2 (Marchenko and Pastur, 1967) times what p (1 - p) varies. One factor serves all: that of the
    first problem's q and lambda, beside which others differ little over many rows.
    """

    def __init__(self, tiles: tuple[NDArray[np.float32], ...], n: float, center: Vector, scale: Vector) -> None:
        d = len(center)
        covariance = whole(tiles, d)
        covariance /= np.float32(n)
        low = center.astype(np.float32)
        for start in range(0, d, 1024):  # a whole outer product would be another matrix
            covariance[start : start + 1024] -= np.outer(low[start : start + 1024], low)
        variance = np.maximum(np.diag(covariance).astype(np.float64), 0.0)
        self.turn = 1 / np.sqrt(np.maximum(variance, 1e-6 * float(variance.max()) or 1.0))
        low = self.turn.astype(np.float32)
        covariance *= low
        covariance *= low[:, None]
        self.scale = scale
        self.factor, self.factored = covariance, False
        """The correlation matrix, and then its factor in the upper triangle."""
        share = d / max(n, d + 1)
        # the inverse of a sample covariance is too long by this much in the middle of its spectrum
        self.shrink = (1 - share) ** 2 / (1 + share)

    def solve(self, columns: Vector, curvature: Vector, penalty: Vector) -> Vector:
        """Apply the inverse to each column (weights, then intercept); each has its `curvature` q and `penalty`."""
        import scipy.linalg

        turn = (self.turn * self.scale)[:, None]
        floor = 1e-9 * float(curvature.max())
        if not self.factored:
            first = int(np.argmax(curvature))
            self._factor(penalty[first] / curvature[first] * turn[:, 0] ** 2)
        out = np.empty_like(columns)
        solved = scipy.linalg.cho_solve(
            (self.factor.T, True), (columns[:-1] * turn).astype(np.float32), check_finite=False
        )
        steep = solved * turn * (self.shrink / np.maximum(curvature, floor))
        out[:-1] = np.where(curvature > floor, steep, columns[:-1] / penalty)
        out[-1] = _intercepts(columns[-1], curvature)
        return out

    def _factor(self, ridge: Vector) -> None:
        """Cholesky in place; what the rounding of bfloat16 products took from small eigenvalues is given back first."""
        from scipy.linalg.lapack import spotrf

        nudge, failed = 2e-3, 1
        diagonal = np.diag(self.factor).astype(np.float64)
        while failed:
            np.fill_diagonal(self.factor, diagonal + ridge + nudge)
            # the transposed view is in Fortran's order: its lower triangle is ours above the diagonal
            _, failed = spotrf(self.factor.T, lower=1, clean=0, overwrite_a=1)
            if failed:
                _restore(self.factor)
                nudge *= 4
        self.factored = True


def _restore(matrix: NDArray[np.float32]) -> None:
    """Copy the lower triangle over the upper one, without another matrix."""
    for start in range(0, len(matrix), 1024):
        stop = min(start + 1024, len(matrix))
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T
        corner = np.tril(matrix[start:stop, start:stop], -1)
        matrix[start:stop, start:stop] = corner + corner.T


def _intercepts(row: Vector, curvature: Vector) -> Vector:
    """The step of the intercepts; a softmax does not feel the sum of its own, whose curvature is 0."""
    floor = 1e-9 * float(curvature.max())
    return np.where(curvature > floor, row / np.maximum(curvature, floor), 0.0)


class Hessian:
    """The Hessian of one binary problem at one point, weights bordered by the intercept."""

    def __init__(self, outer: Vector, first: Vector, total: float) -> None:
        self.outer, self.first, self.total = outer, first, total
        self._factor: Any = None

    def solve(self, column: Vector, penalty: float) -> Vector:
        """Apply the inverse of the Hessian, with its penalty, to one column (weights, then intercept)."""
        import scipy.linalg

        if self._factor is None:
            schur = self.outer - np.outer(self.first, self.first) / self.total
            schur[np.diag_indices_from(schur)] += penalty
            self._factor = scipy.linalg.cho_factor(schur)
        weights = scipy.linalg.cho_solve(self._factor, column[:-1, 0] - self.first * (column[-1, 0] / self.total))
        return np.append(weights, (column[-1, 0] - self.first @ weights) / self.total)[:, None]


@dataclass(frozen=True)
class Start:
    """Where a problem starts: no weights, and the intercepts that the class frequencies give."""

    point: Vector
    """(d + 1, k): weights, then intercepts of centred rows; one column for two classes, else one a class."""
    value: float
    gradient: Vector
    curvature: Vector
    """Sum over rows of the loss's second derivative by the scores, (k, k)."""
    n: float
    """Sum of the rows' weights."""


class Descent:
    """L-BFGS for one problem, driven from outside: `trial` is evaluated in a pass and handed to `observe`.

    After `stall` steps that did not get shorter than half the shortest, rounding is taken to be the limit.
    """

    def __init__(self, problem: Problem, start: Start, tol: float, stall: int) -> None:
        self.problem, self.tol, self.stall = problem, tol, stall
        self.penalty = 1 / problem.strength
        self.n_iter, self.backtracks = 0, 0
        self.converged = self.finished = False
        self.pairs: list[tuple[Vector, Vector, float]] = []
        self.hessian: Hessian | None = None
        self.renew_at = PATIENCE
        self.shortest, self.stalled = np.inf, 0
        self.start = start
        self.point, self.value, self.gradient = start.point, start.value, start.gradient
        self.curvature = start.curvature
        self.direction, self.step = np.zeros_like(self.point), 1.0

    @property
    def k(self) -> int:
        """Score columns."""
        return int(self.point.shape[1])

    @property
    def trial(self) -> Vector:
        """The point to evaluate next."""
        return self.point + self.step * self.direction

    @property
    def stale(self) -> bool:
        """Whether the metric should become the Hessian at `point`."""
        return self.k == 1 and self.n_iter >= self.renew_at and self.step == 1.0

    def begin(self, direction: Vector) -> None:
        """Take the first direction, the least-squares step, lengthened to the discriminant's.

        That has the covariance within classes in place of the total one.
        """
        weights = max(self.k - 1, 1)
        explained = -float(np.vdot(direction[:-1], self.gradient[:-1])) / self.start.n / weights
        self.direction = direction / max(1 - explained, 0.1)

    def renew(self, hessian: Hessian) -> None:
        """Go on from `point` with `hessian` as the metric."""
        self.hessian, self.pairs = hessian, []
        self.renew_at = self.n_iter + max(1, PATIENCE // 3)
        self.two_loop_second(hessian.solve(self.two_loop_first(), self.penalty))

    def observe(self, loss: float, gradient: Vector, curvature: Vector) -> bool:
        """Take the trial point or shorten the step; True when a new direction is wanted."""
        self.n_iter += 1
        trial = self.trial
        value = loss + 0.5 * self.penalty * float(np.vdot(trial[:-1], trial[:-1]))
        gradient = gradient.copy()
        gradient[:-1] += self.penalty * trial[:-1]
        slope = float(np.vdot(self.gradient, self.direction))
        new_slope = float(np.vdot(gradient, self.direction))
        falls = value <= self.value + 1e-4 * self.step * slope
        # near the optimum the loss is rounded more coarsely than it falls; its slope is not
        flat = value <= self.value + 1e-6 * abs(self.value) and abs(new_slope) <= 0.9 * abs(slope)
        if not (falls or flat):
            self.backtracks += 1
            shorter = slope / (slope - new_slope) if new_slope > 0 else 0.5
            self.step *= min(max(shorter, 0.1), 0.5)
            if self.backtracks == 20:
                self.finished = True
            return False
        moved, turned = trial - self.point, gradient - self.gradient
        if (bend := float(np.vdot(moved, turned))) > 0:
            self.pairs = [*self.pairs, (moved, turned, 1 / bend)][-_MEMORY:]
        self.point, self.value, self.gradient, self.curvature = trial, value, gradient, curvature
        self.backtracks = 0
        return True

    def two_loop_first(self) -> Vector:
        """The columns to which the inverse metric is to be applied."""
        q = self.gradient.copy()
        self._alphas = []
        for moved, turned, rho in reversed(self.pairs):
            alpha = rho * float(np.vdot(moved, q))
            self._alphas.append(alpha)
            q -= alpha * turned
        return q

    def two_loop_second(self, r: Vector) -> None:
        """Take a new direction, or the last step, from what the inverse metric gave."""
        r = r.copy()
        for (moved, turned, rho), alpha in zip(self.pairs, reversed(self._alphas), strict=True):
            r += moved * (alpha - rho * float(np.vdot(turned, r)))
        self.direction, self.step = -r, 1.0
        size, weights = float(np.linalg.norm(r[:-1])), float(np.linalg.norm(self.point[:-1]))
        intercept = float(np.abs(r[-1]).max()) / max(1.0, float(np.abs(self.point[-1]).max()))
        length = max(size / max(weights, 1e-300), intercept)
        self.stalled = 0 if length < self.shortest / 2 else self.stalled + 1
        self.shortest = min(self.shortest, length)
        if length <= self.tol or (length <= 1e-4 and self.stalled >= self.stall):
            self.point = self.trial
            self.converged = self.finished = True
