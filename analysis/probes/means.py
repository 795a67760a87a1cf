"""Probes from the means of classes: difference of means (mass-mean) and linear discriminant analysis, in one pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.passes import one_blas_thread
from millpond.analysis.probes import inputs
from millpond.analysis.probes import moments as statistics
from millpond.analysis.probes.base import ClassProbe
from millpond.analysis.probes.linear import Linear
from millpond.analysis.probes.targets import Design, Layout, Problem, training_sums
from millpond.store.errors import InvalidInput

Vector = NDArray[np.float64]


class _MeansProbe(ClassProbe, ABC):
    """Scores by class means m_k and a precision matrix P: x' P m_k - m_k' P m_k / 2 + bias_k."""

    @abstractmethod
    def _priors(self, rates: Vector) -> Vector:
        """Prior of each class, given how frequent they are."""

    @abstractmethod
    def _whitens(self) -> bool:
        """Whether P is the inverse of the pooled covariance, not the identity."""

    @one_blas_thread()
    def solve(self, designs: Sequence[Design], problems: Sequence[Problem]) -> list[list[Linear]]:
        """Fit every problem on every design in one shared pass."""
        mode: statistics.Gram = "exact" if self._whitens() else "none"
        return [found for some in statistics.batches(designs, mode) for found in self._solve(some, problems, mode)]

    def _solve(
        self, designs: Sequence[Design], problems: Sequence[Problem], mode: statistics.Gram
    ) -> list[list[Linear]]:
        states = statistics.first_looks(designs, True)
        found = statistics.take_moments(designs, states, mode, progress=self.progress)
        out = []
        for design, state, sums in zip(designs, states, found, strict=True):
            layout = design.targets.layout
            out.append([self._fit(problem, layout, state["shift"], sums) for problem in problems])
        return out

    def _fit(self, problem: Problem, layout: Layout, shift: Vector, sums: dict[str, Any]) -> Linear:
        weight = layout.weight_of(problem.label)
        totals = layout.by_class(training_sums(sums["totals"], problem.fold), problem.label) * weight
        x = layout.by_class(training_sums(sums["sums"], problem.fold), problem.label) * weight
        means = x / totals
        center = means.mean(axis=1, keepdims=True)
        directions = means - center
        if self._whitens():
            variant = statistics.variants(layout).index(problem.label if layout.class_weights[problem.label] else -1)
            within = training_sums(sums["gram"][variant], problem.fold) - (means * totals) @ means.T
            directions = _whiten(within / totals.sum(), directions, problem.strength)
        # of (means - center), so that large common means do not cancel
        half = np.einsum("dk,dk->k", directions, means - center) / 2
        priors = np.log(self._priors(totals / totals.sum()))
        intercept = priors - half - directions.T @ center[:, 0]
        if len(totals) == 2:
            coef = (directions[:, 1] - directions[:, 0])[None]
            return Linear.of_shifted(coef, intercept[1:] - intercept[:1], shift)
        return Linear.of_shifted(directions.T, intercept, shift)


class MassMeanProbe(_MeansProbe):
    """Difference of class means (Marks and Tegmark, 2023): the score of a row is its place between the means.

    For two classes it is (x - midpoint) . (m_1 - m_0), for more x . m_k - |m_k|^2 / 2. With `whiten` the
    products are taken with the inverse of the covariance within classes, which is linear discriminant analysis
    with equal priors. Without it one pass and d values a class are all it costs. Classes count the same however
    many rows they have. Scores are not calibrated.

    Args:
        whiten: use the covariance within classes; memory d * d float64 for each block in flight.
        progress: show a bar for passes longer than a second.
    """

    def __init__(self, *, whiten: bool = False, progress: bool = True) -> None:
        self.whiten = whiten
        self.progress = progress

    def check_parameters(self) -> None:
        """Nothing can be wrong."""

    def _priors(self, rates: Vector) -> Vector:
        return np.full(len(rates), 1 / len(rates))

    def _whitens(self) -> bool:
        return self.whiten


class LdaProbe(_MeansProbe):
    """Linear discriminant analysis: Gaussian classes with one covariance; class frequencies as priors.

    Same probabilities as `sklearn.discriminant_analysis.LinearDiscriminantAnalysis(solver="lsqr", shrinkage=...)`.
    Memory: d * d float64 for each block in flight (times the folds, if there are several shrinkages).

    Args:
        shrinkage: from 0 to 1, how far the covariance is drawn to a multiple of the identity, or several to
            choose from by cross-validation (log-loss on left-out prompts).
        priors: of the classes in order; by default their weighted frequencies.
        class_weight: `balanced`, or a mapping from classes to weights.
        cv: folds, whole prompts together, if there are several shrinkages.
        progress: show a bar for passes longer than a second.
    """

    strength: ClassVar[str | None] = "shrinkage"
    shrinkage_: float

    def __init__(
        self,
        shrinkage: float | Sequence[float] = 0.0,
        *,
        priors: Sequence[float] | None = None,
        class_weight: Mapping[Any, float] | str | None = None,
        cv: int = 5,
        progress: bool = True,
    ) -> None:
        self.shrinkage = shrinkage
        self.priors = priors
        self.class_weight = class_weight
        self.cv = cv
        self.progress = progress

    def check_parameters(self) -> None:
        """Raises InvalidInput unless the parameters can be used."""
        if self.priors is not None:
            given = np.asarray(self.priors, np.float64)
            if given.ndim != 1 or not (given > 0).all() or abs(given.sum() - 1) > 1e-6:
                raise InvalidInput(f"priors are {self.priors}; give a number above 0 for each class, with sum 1")

    def strengths(self, given: Any = None) -> list[float]:
        """The values of the shrinkage."""
        value = self.shrinkage if given is None else given
        return inputs.strengths_of(value, "shrinkage", open_below=False, most=1.0)

    def _priors(self, rates: Vector) -> Vector:
        if self.priors is None:
            return rates
        if len(self.priors) != len(rates):
            raise InvalidInput(f"priors are {self.priors}; give one for each of the {len(rates)} classes")
        return np.asarray(self.priors, np.float64)

    def _whitens(self) -> bool:
        return True


def _whiten(covariance: Vector, directions: Vector, shrinkage: float) -> Vector:
    """The inverse of the shrunken covariance applied to the directions; directions without variance are left out."""
    import scipy.linalg

    values, vectors = scipy.linalg.eigh(covariance, driver="evd", check_finite=False)
    values = np.maximum(values, 0.0)
    values = (1 - shrinkage) * values + shrinkage * values.mean()
    floor = len(values) * np.finfo(np.float64).eps * float(values.max(initial=0.0))
    kept = values > floor
    inverse = np.where(kept, 1 / np.where(kept, values, 1.0), 0.0)
    return np.asarray(vectors @ (inverse[:, None] * (vectors.T @ directions)))
