"""Exact logistic regression out of core: many problems (hook, label, C) share each read of the rows.

Minimises scikit-learn's objective, sum of log-losses + |w|^2 / (2 C) with an unpenalised intercept, by
L-BFGS (Nocedal and Wright, 2006, algorithm 7.4) whose starting metric is the Gram matrix of the rows
scaled by the mean of p (1 - p), from the point that linear discriminant analysis gives. Every step of
every problem costs one shared pass; 5 to 20 passes are usual, however many problems there are. A problem
that needs more (classes almost separable) gets the Hessian at its current point as its metric.

Precision: rows are shifted by the mean of the first ones, so that dimensions with a large mean do not
cancel; products are in float64 up to `EXACT_SIZE` values and in the rows' data type beyond (where rounding
averages out over the rows), sums over blocks always in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.passes import AlignedRows, Pass, one_blas_thread, run_passes
from millpond.analysis.probes.descent import Descent, Hessian, Metric, Problem
from millpond.store.errors import InvalidInput

Vector = NDArray[np.float64]

GRAM_ROWS = 50_000
"""The metric is taken from about this many rows (or 8 a dimension), evenly spread; gradients are exact."""
EXACT_SIZE = 1 << 25
"""Rows times width up to which float32 rows are computed in float64: it costs little and matters most."""
_SLICE_ROWS = 8192
_HESSIANS = 4


@dataclass(frozen=True)
class Solution:
    """A fitted weight vector, in the rows' own units."""

    coef: Vector
    intercept: float
    shift: Vector
    """What rows were shifted by; score with `(x - shift) @ coef + intercept_shifted`."""
    intercept_shifted: float
    n_iter: int
    """Gradient passes in which this problem took part."""
    converged: bool


@dataclass(frozen=True)
class Design:
    """One hook's rows, blocks of (activations, labels (rows, L) uint8), and the problems on them."""

    name: str
    rows: AlignedRows
    problems: Sequence[Problem]


@one_blas_thread()
def solve(
    designs: Sequence[Design], *, fit_intercept: bool, tol: float, max_iter: int, progress: bool = True
) -> list[list[Solution]]:
    """Fit every problem of every design in shared passes.

    A problem has converged when its next quasi-Newton step is shorter than `tol` times its weights, or
    is within 1e-4 of them and rounding keeps it from getting shorter.
    Held per design of width d with P problems: the metric (d * d float64) and 2 * 12 vectors a problem,
    and another metric for each problem that needs its Hessian.

    Raises:
        InvalidInput: a row holds NaN or an infinity.
    """
    heads = run_passes([Pass(design.rows.head(4096), _mean) for design in designs], progress=False)
    shifts = [head if fit_intercept else np.zeros_like(head) for head in heads]
    states = []
    for design, shift in zip(designs, shifts, strict=True):
        stride = max(1, design.rows.n_rows // max(8 * len(shift), GRAM_ROWS))
        exact = design.rows.n_rows * len(shift) <= EXACT_SIZE
        states.append({"shift": shift, "stride": stride, "exact": exact})
    todo = [Pass(d.rows, _moments, state) for d, state in zip(designs, states, strict=True)]
    moments = run_passes(todo, description="probe statistics", progress=progress)
    fits = [_Fit(d, s, m, fit_intercept, tol) for d, s, m in zip(designs, states, moments, strict=True)]
    for number in range(max_iter):
        for fit in fits:
            stale = [descent for descent in fit.active if descent.stale]
            for first in range(0, len(stale), _HESSIANS):
                some = stale[first : first + _HESSIANS]
                todo = [Pass(fit.design.rows, _hessians, fit.state([descent.point for descent in some]))]
                fit.renew(some, run_passes(todo, description="probe curvature", progress=progress)[0])
        active = [fit for fit in fits if fit.active]
        if not active:
            break
        todo = [Pass(fit.design.rows, _gradients, fit.trial_state()) for fit in active]
        found = run_passes(todo, description=f"probe pass {number + 1}", progress=progress)
        for fit, sums in zip(active, found, strict=True):
            fit.advance(sums)
    return [fit.solutions() for fit in fits]


def _mean(state: None, x: NDArray[Any], y: NDArray[np.uint8]) -> Vector:
    mean = np.asarray(x.mean(axis=0, dtype=np.float64))
    return np.where(np.isfinite(mean), mean, 0.0)


def _moments(state: dict[str, Any], x: NDArray[Any], y: NDArray[np.uint8]) -> dict[str, Any]:
    shift, stride = state["shift"], state["stride"]
    d = x.shape[1]
    sums = {
        "n": len(x), "bad": 0, "sum": np.zeros(d), "label_sum": np.zeros((d, y.shape[1])),
        "positive": y.sum(axis=0, dtype=np.int64), "gram": np.zeros((d, d)), "gram_n": 0, "gram_sum": np.zeros(d),
    }  # fmt: skip
    for start in range(0, len(x), _SLICE_ROWS * stride):
        part = _shifted(x[start : start + _SLICE_ROWS * stride], shift, state["exact"])
        total = part.sum(axis=0, dtype=np.float64)
        if not np.isfinite(total).all():
            sums["bad"] += int((~np.isfinite(part).all(axis=1)).sum())
            continue
        sums["sum"] += total
        sums["label_sum"] += part.T @ y[start : start + _SLICE_ROWS * stride].astype(part.dtype)
        sample = part[::stride]
        sums["gram"] += sample.T @ sample
        sums["gram_n"] += len(sample)
        sums["gram_sum"] += sample.sum(axis=0, dtype=np.float64)
    return sums


def _gradients(state: dict[str, Any], x: NDArray[Any], y: NDArray[np.uint8]) -> dict[str, Any]:
    """Loss, gradient by weights and intercept, and sum of p (1 - p), for each column of `weights`."""
    shift, labels = state["shift"], state["labels"]
    weights, intercepts = state["weights"], state["intercepts"]
    sums = {"loss": 0.0, "gradient": 0.0, "residual": 0.0, "curvature": 0.0}
    for start in range(0, len(x), _SLICE_ROWS):
        part = _shifted(x[start : start + _SLICE_ROWS], shift, state["exact"])
        z = part @ weights.astype(part.dtype)
        z += intercepts.astype(part.dtype)
        target = y[start : start + _SLICE_ROWS, labels]
        small = np.exp(-np.abs(z))
        p = np.where(z >= 0, 1, small) / (1 + small)
        loss = np.maximum(z, 0) + np.log1p(small) - z * target
        sums["loss"] += loss.sum(axis=0, dtype=np.float64)
        sums["curvature"] += (p * (1 - p)).sum(axis=0, dtype=np.float64)
        p -= target
        sums["residual"] += p.sum(axis=0, dtype=np.float64)
        sums["gradient"] += (part.T @ p).astype(np.float64)
    return sums


def _hessians(state: dict[str, Any], x: NDArray[Any], y: NDArray[np.uint8]) -> tuple[Vector, Vector, Vector]:
    """For each column of `weights`: sums of q x x', q x and q over a sample of the rows, where q = p (1 - p)."""
    shift, stride, mean = state["shift"], state["stride"], state["mean"]
    weights, intercepts = state["weights"], state["intercepts"]
    d, count = weights.shape
    outer, first, total = np.zeros((count, d, d)), np.zeros((count, d)), np.zeros(count)
    for start in range(0, len(x), _SLICE_ROWS * stride):
        part = _shifted(x[start : start + _SLICE_ROWS * stride : stride], shift + mean, state["exact"])
        z = part @ weights.astype(part.dtype)
        z += (intercepts + mean @ weights).astype(part.dtype)
        small = np.exp(-np.abs(z))
        q = small / (1 + small) ** 2
        for i in range(count):
            outer[i] += part.T @ (part * q[:, i, None])
        first += (q.T @ part).astype(np.float64)
        total += q.sum(axis=0, dtype=np.float64)
    return outer, first, total


def _shifted(x: NDArray[Any], shift: Vector, exact: bool) -> NDArray[Any]:
    """`x - shift`, in float64 if that is asked for or `x` is so wide."""
    dtype = np.float32 if x.dtype in (np.float32, np.float16) and not exact else np.float64
    return np.asarray(np.subtract(x, shift.astype(dtype), dtype=dtype))


class _Fit:
    """All problems of one design: shared moments and metric, one descent each."""

    def __init__(
        self, design: Design, state: dict[str, Any], moments: dict[str, Any], fit_intercept: bool, tol: float
    ) -> None:
        if moments["bad"]:
            raise InvalidInput(
                f"{design.name}: {moments['bad']:,} of {moments['n']:,} rows hold NaN or infinity; leave those rows out"
            )
        self.design, self.n = design, int(moments["n"])
        self.base, self.shift = state, state["shift"]
        self.fit_intercept = fit_intercept
        self.mean = moments["sum"] / self.n if fit_intercept else np.zeros_like(self.shift)
        center = moments["gram_sum"] / moments["gram_n"] if fit_intercept else self.mean
        covariance = moments["gram"] / moments["gram_n"] - np.outer(center, center)
        self.metric = Metric(covariance * self.n, self.n)
        self.descents = []
        for problem in design.problems:
            positive = float(moments["positive"][problem.label])
            pull = moments["label_sum"][:, problem.label] - self.mean * positive
            if not fit_intercept:
                pull = pull - moments["sum"] / 2
            self.descents.append(Descent(problem, pull, positive, self.n, self.metric, fit_intercept, tol))

    @property
    def active(self) -> list[Descent]:
        return [descent for descent in self.descents if not descent.finished]

    def state(self, points: list[Vector]) -> dict[str, Any]:
        """What `_gradients` and `_hessians` need to know of `points` (weights, then intercept of centred rows)."""
        columns = np.stack(points, axis=1)
        weights = columns[:-1]
        intercepts = columns[-1] - self.mean @ weights
        return self.base | {"mean": self.mean, "weights": weights, "intercepts": intercepts}

    def trial_state(self) -> dict[str, Any]:
        labels = [descent.problem.label for descent in self.active]
        return self.state([descent.trial for descent in self.active]) | {"labels": labels}

    def renew(self, descents: list[Descent], sums: tuple[Vector, Vector, Vector]) -> None:
        """Give each descent the Hessian at its point as metric, and a direction by it."""
        for descent, outer, first, total in zip(descents, *sums, strict=True):
            scale = descent.curvature / total
            descent.renew(Hessian(outer * scale, first * scale * self.fit_intercept, descent.curvature))

    def advance(self, sums: dict[str, Any]) -> None:
        gradients = sums["gradient"] - np.outer(self.mean, sums["residual"])
        moved = []
        for i, descent in enumerate(self.active):
            gradient = np.append(gradients[:, i], sums["residual"][i] if self.fit_intercept else 0.0)
            if descent.observe(float(sums["loss"][i]), gradient, float(sums["curvature"][i])):
                moved.append(descent)
        for descent in moved:
            if descent.hessian is not None:
                descent.two_loop_second(descent.hessian.solve(descent.two_loop_first(), 1 / descent.problem.C))
        shared = [descent for descent in moved if descent.hessian is None]
        if shared:
            turned = np.stack([descent.two_loop_first() for descent in shared], axis=1)
            scaled = self.metric.solve(turned, [d.curvature for d in shared], [1 / d.problem.C for d in shared])
            for i, descent in enumerate(shared):
                descent.two_loop_second(scaled[:, i])

    def solutions(self) -> list[Solution]:
        out = []
        for descent in self.descents:
            coef, intercept = descent.point[:-1], float(descent.point[-1])
            shifted = intercept - float(self.mean @ coef)
            raw = shifted - float(self.shift @ coef)
            out.append(Solution(coef, raw, self.shift, shifted, descent.n_iter, descent.converged))
        return out
