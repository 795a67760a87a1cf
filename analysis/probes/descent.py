"""The descent of one logistic-regression problem: L-BFGS, driven from outside, with a metric that is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

FULL_RANK = 2048
"""Above this width the metric keeps only the largest `FULL_RANK // 2` principal directions exactly."""
PATIENCE = 15
"""Passes before a problem's metric becomes its Hessian; renewed after each third of that."""
_MEMORY = 12
"""Steps that L-BFGS remembers."""


@dataclass(frozen=True)
class Problem:
    """One probe to fit: a column of the labels and an inverse regularisation strength."""

    label: int
    C: float


class Metric:
    """Solves (q K + lambda I) w = g for many q and lambda from one factorisation of K = V diag(values) V' + tail."""

    def __init__(self, gram: Vector, n: int) -> None:
        import scipy.linalg

        d = len(gram)
        self.n = n
        if d <= FULL_RANK:
            values, self.vectors = scipy.linalg.eigh(gram, driver="evd")
            self.tail = 0.0
        else:
            values, self.vectors = _leading(gram, FULL_RANK // 2)
            self.tail = max(float(np.trace(gram) - values.sum()), 0.0) / (d - len(values))
        self.values = np.maximum(values, 0.0)

    def solve(self, columns: Vector, curvature: Sequence[float], penalty: Sequence[float]) -> Vector:
        """Apply the inverse to each column (weights, then intercept); `curvature` is the sum of p (1 - p)."""
        q, ridge = np.asarray(curvature) / self.n, np.asarray(penalty)
        flat = 1 / (q * self.tail + ridge)
        steep = 1 / (self.values[:, None] * q + ridge) - flat
        weights = columns[:-1]
        out = np.empty_like(columns)
        out[:-1] = weights * flat + self.vectors @ (steep * (self.vectors.T @ weights))
        out[-1] = columns[-1] / np.maximum(np.asarray(curvature), 1e-12 * self.n)
        return out


class Hessian:
    """The Hessian of one problem at one point, weights bordered by the intercept."""

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
        weights = scipy.linalg.cho_solve(self._factor, column[:-1] - self.first * (column[-1] / self.total))
        return np.append(weights, (column[-1] - self.first @ weights) / self.total)


def _leading(gram: Vector, rank: int) -> tuple[Vector, Vector]:
    """The largest eigenpairs by subspace iteration (Halko, Martinsson and Tropp, 2011), to preconditioning accuracy."""
    import scipy.linalg

    basis = np.random.default_rng(0).standard_normal((len(gram), rank))
    for _ in range(4):
        basis, _ = scipy.linalg.qr(gram @ basis, mode="economic")
    values, turn = scipy.linalg.eigh(basis.T @ gram @ basis)
    return values, basis @ turn


class Descent:
    """L-BFGS for one problem, driven from outside: `trial` is evaluated in a pass and handed to `observe`."""

    def __init__(
        self, problem: Problem, pull: Vector, positive: float, n: int, metric: Metric, fit_intercept: bool, tol: float
    ) -> None:
        self.problem, self.tol = problem, tol
        self.n_iter, self.backtracks = 0, 0
        self.converged = self.finished = False
        self.pairs: list[tuple[Vector, Vector, float]] = []
        self.hessian: Hessian | None = None
        self.renew_at = PATIENCE
        self.shortest, self.stalled = np.inf, 0
        rate = positive / n if fit_intercept else 0.5
        self.point = np.append(np.zeros(len(pull)), np.log(rate / (1 - rate)) if fit_intercept else 0.0)
        self.value = -n * (rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
        self.gradient = np.append(-pull, 0.0)
        self.curvature = n * rate * (1 - rate)
        direction = metric.solve(-self.gradient[:, None], [self.curvature], [1 / problem.C])[:, 0]
        # the least-squares step, lengthened to the discriminant's: within-class instead of total covariance
        explained = float(direction[:-1] @ pull) / n
        self.direction = direction / max(1 - explained, 0.1)
        self.step = 1.0

    @property
    def trial(self) -> Vector:
        """The point to evaluate next."""
        return self.point + self.step * self.direction

    @property
    def stale(self) -> bool:
        """Whether the metric should become the Hessian at `point`."""
        return self.n_iter >= self.renew_at and self.step == 1.0

    def renew(self, hessian: Hessian) -> None:
        """Go on from `point` with `hessian` as the metric."""
        self.hessian, self.pairs = hessian, []
        self.renew_at = self.n_iter + max(1, PATIENCE // 3)
        self.two_loop_second(hessian.solve(self.two_loop_first(), 1 / self.problem.C))

    def observe(self, loss: float, gradient: Vector, curvature: float) -> bool:
        """Take the trial point or shorten the step; True when a new direction is wanted."""
        self.n_iter += 1
        trial = self.trial
        penalty = 1 / self.problem.C
        value = loss + 0.5 * penalty * float(trial[:-1] @ trial[:-1])
        gradient = gradient + penalty * np.append(trial[:-1], 0.0)
        slope = float(self.gradient @ self.direction)
        new_slope = float(gradient @ self.direction)
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
        if (bend := float(moved @ turned)) > 0:
            self.pairs = [*self.pairs, (moved, turned, 1 / bend)][-_MEMORY:]
        self.point, self.value, self.gradient, self.curvature = trial, value, gradient, curvature
        self.backtracks = 0
        return True

    def two_loop_first(self) -> Vector:
        """The column to which the inverse metric is to be applied."""
        q = self.gradient.copy()
        self._alphas = []
        for moved, turned, rho in reversed(self.pairs):
            alpha = rho * float(moved @ q)
            self._alphas.append(alpha)
            q -= alpha * turned
        return q

    def two_loop_second(self, r: Vector) -> None:
        """Take a new direction, or the last step, from what the inverse metric gave."""
        r = r.copy()
        for (moved, turned, rho), alpha in zip(self.pairs, reversed(self._alphas), strict=True):
            r += moved * (alpha - rho * float(turned @ r))
        self.direction, self.step = -r, 1.0
        size, weights = float(np.linalg.norm(r[:-1])), float(np.linalg.norm(self.point[:-1]))
        length = max(size / max(weights, 1e-300), abs(float(r[-1])) / max(1.0, abs(float(self.point[-1]))))
        self.stalled = 0 if length < self.shortest / 2 else self.stalled + 1
        self.shortest = min(self.shortest, length)
        if length <= self.tol or (length <= 1e-4 and self.stalled >= 6):
            self.point = self.trial
            self.converged = self.finished = True
