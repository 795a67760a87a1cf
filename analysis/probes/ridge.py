"""Ridge regression probe: numbers, or classes one against the rest, from one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.metaestimators import available_if

from millpond.analysis.passes import one_blas_thread
from millpond.analysis.probes import inputs
from millpond.analysis.probes import moments as statistics
from millpond.analysis.probes.base import LinearProbe, best_class
from millpond.analysis.probes.linear import Linear
from millpond.analysis.probes.targets import Design, Layout, Problem, training_sums
from millpond.analysis.remote import backend_of, check_unused
from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping

    from millpond.analysis.metrics import Kind
    from millpond.analysis.passes import RowArray

Vector = NDArray[np.float64]


def _classifies(probe: RidgeProbe) -> bool:
    return probe.task == "classification"


class RidgeProbe(LinearProbe):
    """L2-regularised least squares, from the exact Gram matrix of one pass.

    Same objectives as `sklearn.linear_model.Ridge(alpha=alpha)` and, with `task="classification"`, as
    `RidgeClassifier`: targets -1 and 1, one column a class against the rest if there are more than two.
    Memory: d * d float64 for each block in flight (times the folds, if there are several alpha).

    Args:
        alpha: regularisation strength, or several to choose from by cross-validation (squared error on left-out prompts).
        task: `regression` of numbers or `classification`.
        fit_intercept: add an intercept, not penalised.
        class_weight: `balanced`, or a mapping from classes to weights; for classification.
        cv: folds, whole prompts together, if there are several alpha.
        progress: show a bar for passes longer than a second.
    """

    strength: ClassVar[str | None] = "alpha"
    probabilistic: ClassVar[bool] = False
    alpha_: float

    def __init__(
        self,
        alpha: float | Sequence[float] = 1.0,
        *,
        task: Literal["regression", "classification"] = "regression",
        fit_intercept: bool = True,
        class_weight: Mapping[Any, float] | str | None = None,
        cv: int = 5,
        progress: bool = True,
    ) -> None:
        self.alpha = alpha
        self.task = task
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.cv = cv
        self.progress = progress

    @property
    def kind(self) -> Kind:
        """What it predicts."""
        return super().kind if _classifies(self) else "regression"

    @property
    def predicts_classes(self) -> bool:
        """Whether labels are classes (or else numbers)."""
        return _classifies(self)

    def check_parameters(self) -> None:
        """Raises InvalidInput unless the parameters can be used."""
        if self.task not in ("regression", "classification"):
            raise InvalidInput(f"task is {self.task!r}; give 'regression' or 'classification'")
        if self.class_weight is not None and not _classifies(self):
            raise InvalidInput("class_weight is for task='classification'; use sample_weight")

    def strengths(self, given: Any = None) -> list[float]:
        """The values of alpha; 0 is allowed."""
        return inputs.strengths_of(self.alpha if given is None else given, "alpha", open_below=False)

    def encode(
        self, labels: NDArray[Any], name: str, weights: NDArray[Any] | None
    ) -> tuple[NDArray[Any] | None, NDArray[Any], tuple[float, ...] | None]:
        """As for other probes; numbers as float64."""
        if _classifies(self):
            return super().encode(labels, name, weights)
        if labels.dtype.kind not in "biuf":
            try:
                labels = labels.astype(np.float64)
            except (TypeError, ValueError):
                raise InvalidInput(f"{name} holds {labels.dtype} values; regression needs numbers") from None
        return None, labels.astype(np.float64), None

    def held_out_loss(self, z: NDArray[Any], target: NDArray[Any]) -> NDArray[Any]:
        """Squared error of each row, summed over the columns."""
        if _classifies(self):
            k = z.shape[1]
            wanted = (target[:, None] == np.arange(k)) if k > 1 else target[:, None] == 1
            target = 2.0 * wanted - 1
        return np.asarray(np.square(z - np.asarray(target, np.float64).reshape(len(z), -1)).sum(axis=1))

    @one_blas_thread()
    def solve(self, designs: Sequence[Design], problems: Sequence[Problem]) -> list[list[Linear]]:
        """Fit every problem on every design in one shared pass."""
        return [found for some in statistics.batches(designs, "exact") for found in self._solve(some, problems)]

    def _solve(self, designs: Sequence[Design], problems: Sequence[Problem]) -> list[list[Linear]]:
        states = statistics.first_looks(designs, self.fit_intercept)
        found = statistics.take_moments(designs, states, "exact", progress=self.progress)
        out = []
        for design, state, sums in zip(designs, states, found, strict=True):
            layout, cache = design.targets.layout, _Factors(sums["gram"])
            out.append([self._fit(problem, layout, state["shift"], sums, cache) for problem in problems])
        return out

    def _fit(self, problem: Problem, layout: Layout, shift: Vector, sums: dict[str, Any], factors: _Factors) -> Linear:
        weight = layout.weight_of(problem.label)
        totals = layout.by_class(training_sums(sums["totals"], problem.fold), problem.label)
        x = layout.by_class(training_sums(sums["sums"], problem.fold), problem.label)
        if _classifies(self):
            totals, x = totals * weight, x * weight
            n, total, k = float(totals.sum()), x.sum(axis=1), len(totals)
            xy, y = (
                (2 * x - total[:, None], 2 * totals - n)
                if k > 2
                else (2 * x[:, 1:] - total[:, None], 2 * totals[1:] - n)
            )
        else:
            n = float(training_sums(sums["totals"], problem.fold)[0])
            total, xy, y = training_sums(sums["sums"], problem.fold)[:, 0], x, totals
        mean = total / n if self.fit_intercept else np.zeros_like(total)
        variant = statistics.variants(layout).index(problem.label if layout.class_weights[problem.label] else -1)
        values, vectors = factors.of(variant, problem.fold, mean, n)
        pull = xy - np.outer(mean, y)
        inverse = _inverse(values + problem.strength, values)
        coef = (vectors @ (inverse[:, None] * (vectors.T @ pull))).T
        intercept = y / n - coef @ mean if self.fit_intercept else np.zeros(len(coef))
        return Linear.of_shifted(coef, intercept, shift)

    def predict(self, X: RowArray) -> NDArray[Any]:
        """A number a row, or the class with the highest score."""
        z = self.raw_scores(X)
        return np.asarray(self.classes_[best_class(z)]) if _classifies(self) else z[:, 0].astype(np.float64)

    @available_if(_classifies)  # type: ignore[untyped-decorator]
    def decision_function(self, X: RowArray) -> NDArray[Any]:
        """The regressed -1 or 1, (rows,) for two classes, (rows, K) for more."""
        z = self.raw_scores(X)
        return z[:, 0] if z.shape[1] == 1 else z

    def score(self, X: RowArray, y: RowArray, sample_weight: NDArray[Any] | None = None) -> float:
        """R2 of numbers, accuracy of classes, as scikit-learn gives."""
        if backend_of(X) is not None:
            check_unused("score", {"sample_weight": (sample_weight, None)})
            return float(self.evaluate(X, y)["accuracy" if _classifies(self) else "r2"])
        from sklearn.metrics import accuracy_score, r2_score

        metric = accuracy_score if _classifies(self) else r2_score
        return float(metric(inputs.to_memory(y), self.predict(X), sample_weight=sample_weight))

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, RegressorTags

        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        if _classifies(self):
            tags.estimator_type, tags.classifier_tags = "classifier", ClassifierTags()
        else:
            tags.estimator_type, tags.regressor_tags = "regressor", RegressorTags()
        return tags


class _Factors:
    """Eigenvalues and eigenvectors of centred Gram matrices, each made once."""

    def __init__(self, gram: Vector) -> None:
        self.gram, self.held = gram, {}  # type: ignore[var-annotated]

    def of(self, variant: int, fold: int, mean: Vector, n: float) -> tuple[Vector, Vector]:
        import scipy.linalg

        if (variant, fold) not in self.held:
            centered = training_sums(self.gram[variant], fold) - n * np.outer(mean, mean)
            values, vectors = scipy.linalg.eigh(centered, driver="evd", check_finite=False, overwrite_a=True)
            self.held[variant, fold] = np.maximum(values, 0.0), vectors
        found: tuple[Vector, Vector] = self.held[variant, fold]
        return found


def _inverse(penalised: Vector, values: Vector) -> Vector:
    """1 / penalised; 0 in directions without variance or penalty, which gives the smallest weights."""
    floor = len(values) * np.finfo(np.float64).eps * float(values.max(initial=0.0))
    return np.where(penalised > floor, 1 / np.where(penalised > floor, penalised, 1.0), 0.0)
