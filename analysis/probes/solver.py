"""Exact logistic regression out of core: many problems (hook, label, C, fold) share each read of the rows.

Minimises scikit-learn's objective, weighted sum of log-losses + |w|^2 / (2 C) with an unpenalised intercept,
by L-BFGS (Nocedal and Wright, 2006, algorithm 7.4) whose starting metric is the Gram matrix of the rows
scaled by the mean of p (1 - p), or for K classes its Kronecker product with the mean of diag(p) - p p', from the
point that linear discriminant analysis gives. Every step of every problem costs one shared pass; 5 to 20 passes
are usual, however many problems there are. A binary problem that needs more (classes almost separable) gets the
Hessian at its current point as its metric, unless rows are wider than `moments.FULL_RANK`.

Precision: rows are shifted by the mean of the first ones where that is large, so that they do not
cancel; products are in float64 up to `moments.EXACT_SIZE` values and in the rows' data type beyond (where
rounding averages out over the rows), sums over blocks always in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.passes import Pass, one_blas_thread, run_passes
from millpond.analysis.probes import moments as statistics
from millpond.analysis.probes.descent import CoarseMetric, Descent, Hessian, Metric, SingleMetric, Start
from millpond.analysis.probes.linear import Linear
from millpond.analysis.probes.losses import Columns, gradients, hessians
from millpond.analysis.probes.targets import Design, Problem, training_sums

Vector = NDArray[np.float64]

_HESSIANS = 4
_STALL = 6


@dataclass(frozen=True)
class Options:
    """What all problems of a solve have in common."""

    fit_intercept: bool = True
    standardize: bool = False
    tol: float = 1e-4
    max_iter: int = 100
    progress: bool = True


def solve(designs: Sequence[Design], problems: Sequence[Problem], options: Options) -> list[list[Linear]]:
    """Fit every problem on every design in shared passes; one list a design, in the order of `problems`.

    A problem has converged when its next quasi-Newton step is shorter than `tol` times its weights, or
    is within 1e-4 of them and rounding keeps it from getting shorter.
    Held per design of width d with P score columns: the metric (d * d float64, or float32 if wide), 2 * 12
    vectors a column, and another metric for each problem that needs its Hessian.

    Raises:
        InvalidInput: a row holds NaN or an infinity.
    """
    if any(int(design.X.shape[1]) > statistics.FULL_RANK for design in designs):
        import torch  # noqa: F401  # before the threads are limited, so that its own are too
    with one_blas_thread():
        return [found for some in statistics.batches(designs, "sample") for found in _solve(some, problems, options)]


def _solve(designs: Sequence[Design], problems: Sequence[Problem], options: Options) -> list[list[Linear]]:
    progress = options.progress
    states = statistics.first_looks(designs, options.fit_intercept)
    found = statistics.take_moments(designs, states, "sample", progress=progress)
    fits = [_Fit(*one, problems, options) for one in zip(designs, states, found, strict=True)]
    for number in range(options.max_iter):
        for fit in fits:
            stale = [descent for descent in fit.active if descent.stale] if fit.may_renew else []
            for first in range(0, len(stale), _HESSIANS):
                some = stale[first : first + _HESSIANS]
                one = fit.pass_over(hessians, [(descent, descent.point) for descent in some])
                fit.renew(some, run_passes([one], description="probe curvature", progress=progress)[0])
        active = [fit for fit in fits if fit.active]
        if not active:
            break
        todo = [fit.pass_over(gradients, [(d, d.trial) for d in fit.active]) for fit in active]
        sums = run_passes(todo, description=f"probe pass {number + 1}", progress=progress)
        for fit, of_fit in zip(active, sums, strict=True):
            fit.advance(of_fit)
    return [fit.solutions() for fit in fits]


class _Fit:
    """All problems of one design: shared moments and metric, one descent each."""

    def __init__(
        self,
        design: Design,
        state: dict[str, Any],
        sums: dict[str, Any],
        problems: Sequence[Problem],
        options: Options,
    ) -> None:
        self.rows, self.layout = design.rows, design.targets.layout
        self.base, self.shift = state | {"stride": 1}, state["shift"]
        self.fit_intercept = options.fit_intercept
        weight = float(sums["totals"][:, 0].sum())
        mean = sums["sums"][:, :, 0].sum(axis=0) / weight
        self.mean = mean if options.fit_intercept else np.zeros_like(mean)
        self.scale = np.ones_like(mean)
        variance = np.maximum(sums["variance"] / weight - mean**2, 0.0)
        if options.standardize:
            self.scale = np.where(variance > 0, np.sqrt(variance), 1.0)
        self.may_renew = len(mean) <= statistics.FULL_RANK
        n = int(sums["rows"].sum())
        self.base["stride"] = max(1, n // max(8 * len(mean), statistics.GRAM_ROWS))
        single = len(problems) == 1 and self.layout.n_classes[problems[0].label] == 2
        self.metric = self._metric(sums, single)
        stall = options.max_iter if state["exact"] else _STALL
        starts = [self._start(problem, sums) for problem in problems]
        # several classes have no Hessian to end with, and near the optimum short steps mean less
        self.descents = [
            Descent(problem, start, options.tol * (1.0 if start.point.shape[1] == 1 else 0.1), stall)
            for problem, start in zip(problems, starts, strict=True)
        ]
        # a binary problem has one score column and comes first: that is how `losses` lays them out
        self._turn(self.descents, [descent.gradient for descent in self.descents], begin=True)

    def _metric(self, sums: dict[str, Any], single: bool) -> Metric | SingleMetric | CoarseMetric:
        center = sums["gram_sum"] / sums["gram_n"] if self.fit_intercept else np.zeros_like(self.mean)
        if self.may_renew:
            covariance = sums["gram"] / sums["gram_n"] - np.outer(center, center)
            covariance /= np.outer(self.scale, self.scale)
            return SingleMetric(covariance) if single else Metric.of(covariance)
        return CoarseMetric(sums.pop("gram"), float(sums["gram_n"]), center, self.scale)

    def _start(self, problem: Problem, sums: dict[str, Any]) -> Start:
        weight = self.layout.weight_of(problem.label)
        totals = self.layout.by_class(training_sums(sums["totals"], problem.fold), problem.label) * weight
        x = self.layout.by_class(training_sums(sums["sums"], problem.fold), problem.label) * weight
        x = (x - np.outer(self.mean, totals)) / self.scale[:, None]
        k, n = len(totals), float(totals.sum())
        rate = totals / n if self.fit_intercept else np.full(k, 1 / k)
        gradient = np.outer(x.sum(axis=1), rate) - x
        curvature = n * (np.diag(rate) - np.outer(rate, rate))
        intercept = np.log(rate) - np.log(rate).mean()
        if k == 2:
            gradient, curvature, intercept = gradient[:, 1:], curvature[1:, 1:], intercept[1:] - intercept[:1]
        columns = gradient.shape[1]
        point = np.vstack([np.zeros((len(x), columns)), intercept if self.fit_intercept else np.zeros(columns)])
        value = -float(totals @ np.log(rate))
        return Start(point, value, np.vstack([gradient, np.zeros(columns)]), curvature, n)

    @property
    def active(self) -> list[Descent]:
        """Unfinished descents, binary ones first."""
        some = [descent for descent in self.descents if not descent.finished]
        return sorted(some, key=lambda descent: descent.k)

    def state(self, points: list[tuple[Descent, Vector]]) -> dict[str, Any]:
        """What `gradients` and `hessians` need to know of points of `descents` (weights, then intercept)."""
        columns = np.concatenate([point for _, point in points], axis=1)
        weights = columns[:-1] / self.scale[:, None]
        problems = [(descent.k, descent.problem) for descent, _ in points]
        where = Columns(
            self.layout,
            tuple(problem for k, problem in problems if k == 1),
            tuple(problem for k, problem in problems if k > 1),
        )
        intercepts = columns[-1] - self.mean @ weights
        return self.base | {"mean": self.mean, "weights": weights, "intercepts": intercepts, "columns": where}

    def pass_over(self, function: Any, points: list[tuple[Descent, Vector]]) -> Pass:
        """A pass that computes `gradients` or `hessians` at points of descents."""
        d, columns = len(self.mean), sum(descent.k for descent, _ in points)
        size = 8 * d * columns * (d if function is hessians else 1)
        return Pass(self.rows, function, self.state(points), result_bytes=size, scratch_bytes=4 * d * columns)

    def renew(self, descents: list[Descent], sums: tuple[Vector, Vector, Vector]) -> None:
        """Give each descent the Hessian at its point as metric, and a direction by it."""
        for descent, outer, first, total in zip(descents, *sums, strict=True):
            grown = float(descent.curvature[0, 0]) / total
            border = first * grown * self.fit_intercept / self.scale
            whole = outer * grown / np.outer(self.scale, self.scale)
            descent.renew(Hessian(whole, border, float(descent.curvature[0, 0])))

    def advance(self, sums: dict[str, Any]) -> None:
        """Hand each active descent its sums, and those that moved a new direction."""
        weights = (sums["gradient"] - np.outer(self.mean, sums["residual"])) / self.scale[:, None]
        gradient = np.vstack([weights, sums["residual"] * self.fit_intercept])
        moved, start, n_binary = [], 0, len(sums["loss"])
        for number, descent in enumerate(self.active):
            mine = gradient[:, start : start + descent.k]
            start += descent.k
            if descent.k == 1:
                loss, curvature = sums["loss"][number], sums["curvature"][number].reshape(1, 1)
            else:
                own = sums["multinomial"][number - n_binary]
                loss, curvature = own["loss"][0], own["curvature"]
            if descent.observe(float(loss), mine, curvature):
                moved.append(descent)
        for descent in moved:
            if descent.hessian is not None:
                descent.two_loop_second(descent.hessian.solve(descent.two_loop_first(), descent.penalty))
        shared = [descent for descent in moved if descent.hessian is None]
        if shared:
            self._turn(shared, [descent.two_loop_first() for descent in shared], begin=False)

    def _turn(self, descents: list[Descent], gradients: list[Vector], *, begin: bool) -> None:
        """Apply the inverse metric to all gradients at once: in the basis where curvatures are diagonal."""
        bases, curvatures = [], []
        for descent in descents:
            values, basis = np.linalg.eigh((descent.curvature + descent.curvature.T) / 2)
            bases.append(basis)
            curvatures.append(np.maximum(values, 0.0))
        columns = np.concatenate([g @ basis for g, basis in zip(gradients, bases, strict=True)], axis=1)
        penalties = np.concatenate([np.full(descent.k, descent.penalty) for descent in descents])
        solved = self.metric.solve(columns, np.concatenate(curvatures), penalties)
        start = 0
        for descent, basis in zip(descents, bases, strict=True):
            mine = solved[:, start : start + descent.k] @ basis.T
            start += descent.k
            if begin:
                descent.begin(-mine)
            else:
                descent.two_loop_second(mine)

    def solutions(self) -> list[Linear]:
        """The fitted weights, in the rows' own units."""
        out = []
        for descent in self.descents:
            coef = (descent.point[:-1] / self.scale[:, None]).T
            intercept = descent.point[-1] - coef @ self.mean
            if descent.k > 1:
                intercept = intercept - intercept.mean()
            out.append(Linear.of_shifted(coef, intercept, self.shift, descent.n_iter, descent.converged))
        return out
