"""Logistic regression probe: scikit-learn's model and objective, fitted out of core."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from millpond.analysis.passes import AlignedRows, Pass, join, run_pass
from millpond.analysis.probes.descent import Problem
from millpond.analysis.probes.solver import Design, Solution, solve
from millpond.store.errors import InvalidInput
from millpond.store.result import Result

if TYPE_CHECKING:
    from millpond.analysis.passes import RowArray
    from millpond.analysis.sweep import Sweep
    from millpond.store.run import Run

    LabelSource = Callable[[Run], Any]


class LogisticProbe(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Binary L2-regularised logistic regression on activations of any size.

    Same objective as `sklearn.linear_model.LogisticRegression(C=C)`: sum of log-losses plus
    |w|^2 / (2 C), intercept not penalised, activations not rescaled. `fit` takes NumPy, Dask or
    xarray input; the last two are read block by block and never held whole, the labels are (one byte
    a row).

    Args:
        C: inverse regularisation strength.
        fit_intercept: add an intercept.
        tol: converged when the next step is shorter than this fraction of the weights.
        max_iter: most passes over the rows; one that ends there warns and sets `converged_` False.
        progress: show a bar for passes longer than a second.
    """

    coef_: NDArray[np.float64]
    intercept_: NDArray[np.float64]
    classes_: NDArray[Any]
    n_iter_: NDArray[np.int32]
    converged_: bool
    n_features_in_: int

    def __init__(
        self,
        C: float = 1.0,
        *,
        fit_intercept: bool = True,
        tol: float = 1e-5,
        max_iter: int = 100,
        progress: bool = True,
    ) -> None:
        self.C = C
        self.fit_intercept = fit_intercept
        self.tol = tol
        self.max_iter = max_iter
        self.progress = progress

    def fit(self, X: RowArray, y: RowArray) -> LogisticProbe:
        """Fit to activations `X` (rows, d_model) and one label a row.

        Raises:
            InvalidInput: shapes or chunks do not match, a value is NaN or infinite, or `y` does not
                hold exactly two classes.
        """
        check_parameters(self)
        X = self._check_rows(X, reset=True)
        labels = to_memory(y)
        labels = column_or_1d(labels, warn=True) if labels.ndim != 1 else labels
        check_finite(labels, name_of(y, "y"))
        check_classification_targets(labels)
        classes, codes = two_classes(labels, name_of(y, "y"))
        rows = AlignedRows(X, codes[:, None])
        [[solution]] = solve(
            [Design(name_of(X, "X"), rows, [Problem(0, float(self.C))])],
            fit_intercept=self.fit_intercept, tol=self.tol, max_iter=self.max_iter, progress=self.progress,
        )  # fmt: skip
        return self.take_solution(solution, classes, source_of(X))

    def take_solution(self, solution: Solution, classes: NDArray[Any], trained_on: dict[str, Any]) -> LogisticProbe:
        """Become the fitted probe of `solution`; warns if it has not converged."""
        self.classes_ = classes
        self.coef_ = solution.coef[None]
        self.intercept_ = np.array([solution.intercept])
        self.n_features_in_ = len(solution.coef)
        self.n_iter_ = np.array([solution.n_iter], np.int32)
        self.converged_ = solution.converged
        self.trained_on_ = trained_on
        self._shift, self._intercept_shifted = solution.shift, solution.intercept_shifted
        if not solution.converged:
            where = f" on {trained_on['hook']}" if "hook" in trained_on else ""
            warnings.warn(
                f"LogisticProbe(C={self.C}){where} did not reach tol={self.tol} in {solution.n_iter} passes "
                f"(max_iter={self.max_iter}); raise max_iter or lower C",
                ConvergenceWarning,
                stacklevel=3,
            )
        return self

    def decision_function(self, X: RowArray) -> NDArray[Any]:
        """Log-odds of the second class, one a row."""
        check_is_fitted(self)
        rows = AlignedRows(self._check_rows(X, reset=False))
        state = (self._shift, self.coef_.T, np.array([self._intercept_shifted]))
        parts = run_pass(Pass(rows, score_block, state, join), description="probe scores", progress=self.progress)
        scores: NDArray[Any] = np.concatenate(parts)[:, 0]
        return scores

    def predict_proba(self, X: RowArray) -> NDArray[Any]:
        """Probabilities of the two classes, (rows, 2)."""
        from scipy.special import expit

        scores = self.decision_function(X)
        return np.stack([expit(-scores), expit(scores)], axis=1)

    def predict(self, X: RowArray) -> NDArray[Any]:
        """The more probable class of each row."""
        scores = self.decision_function(X)
        return np.asarray(self.classes_[(scores > 0).astype(int)])

    def score(self, X: RowArray, y: RowArray, sample_weight: NDArray[Any] | None = None) -> float:
        """Accuracy, as scikit-learn's classifiers give."""
        from sklearn.metrics import accuracy_score

        return float(accuracy_score(to_memory(y), self.predict(X), sample_weight=sample_weight))

    def evaluate(
        self, X: RowArray, y: RowArray, groups: RowArray | None = None, *, n_bootstrap: int = 1000, seed: int = 0
    ) -> Result:
        """AUROC, accuracy, balanced accuracy, F1 and log-loss, with 95 % intervals that resample prompts.

        Args:
            X: activations (rows, d_model).
            y: one label a row, of the classes that the probe was fitted to.
            groups: prompt of each row; by default the `prompt` coordinate of `X` if it has one.
            n_bootstrap: resamples behind the intervals.
            seed: of the resamples.

        Raises:
            InvalidInput: shapes do not match, or `y` holds one class only or an unknown one.
        """
        from millpond.analysis.metrics import evaluate_scores

        scores = self.decision_function(X)
        if groups is None:
            groups = getattr(X, "coords", {}).get("prompt")
        truth = binary(to_memory(y), self.classes_, name_of(y, "y"))
        prompts = None if groups is None else to_memory(groups)
        found = evaluate_scores(scores, truth, prompts, n_bootstrap=n_bootstrap, seed=seed)
        provenance = {
            "estimator": "LogisticProbe", "parameters": self.get_params(), "trained_on": self.trained_on_,
            "evaluated_on": source_of(X),
            "label": name_of(y, "y"), "n_bootstrap": n_bootstrap, "seed": seed,
        }  # fmt: skip
        return Result("probe-evaluation", found.values, found.intervals, found.evidence, provenance)

    def sweep(
        self,
        train: Run,
        test: Run,
        hooks: str | Sequence[str],
        labels: str | Sequence[str] | Mapping[str, str | LabelSource],
        C: float | Sequence[float] | None = None,
        *,
        control: bool = True,
        seed: int = 0,
    ) -> Sweep:
        """Fit a probe for every hook, label and C in shared passes; see `millpond.analysis.sweep.run_sweep`."""
        from millpond.analysis.sweep import run_sweep

        return run_sweep(self, train, test, hooks, labels, C, control=control, seed=seed)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def _check_rows(self, X: Any, *, reset: bool) -> Any:
        """`X` if it is lazy and of the right width, else checked as scikit-learn checks its input."""
        if not is_lazy(X):
            return validate_data(self, X, reset=reset, dtype=[np.float32, np.float64])
        if X.ndim != 2:
            raise InvalidInput(f"X has {X.ndim} dimensions, shape {X.shape}; give (rows, d_model)")
        if reset:
            self.n_features_in_ = int(X.shape[1])
        elif X.shape[1] != self.n_features_in_:
            raise InvalidInput(
                f"X has {X.shape[1]} features, but LogisticProbe is expecting {self.n_features_in_} features as input"
            )
        return X


def check_parameters(probe: LogisticProbe) -> None:
    """Raises InvalidInput unless the probe's parameters can be used."""
    for name, low in (("C", 0), ("tol", 0), ("max_iter", 0)):
        value = getattr(probe, name)
        if not value > low:
            raise InvalidInput(f"{name} is {value}; give a number above {low}")


def is_lazy(array: Any) -> bool:
    """Whether `array` is a Dask array or a DataArray over one."""
    return hasattr(array, "__dask_graph__") and array.__dask_graph__() is not None


def to_memory(array: Any) -> NDArray[Any]:
    """The values of one label or coordinate a row, computed if they are lazy."""
    return np.asarray(array.compute() if is_lazy(array) else array)


def name_of(array: Any, default: str) -> str:
    """The name of a DataArray or Series, else `default`."""
    name = getattr(array, "name", None)
    return name if isinstance(name, str) and not name.startswith("array-") else default


def source_of(array: Any) -> dict[str, Any]:
    """Run, hook and model that a DataArray of activations says it comes from."""
    return {key: value for key, value in getattr(array, "attrs", {}).items() if key in ("run", "hook", "model")}


def check_finite(labels: NDArray[Any], name: str) -> None:
    """Raises InvalidInput if a label is NaN or infinite."""
    if labels.dtype.kind == "f" and (bad := int((~np.isfinite(labels)).sum())):
        raise InvalidInput(
            f"Input {name} contains NaN or infinity in {bad:,} of {len(labels):,} rows; leave those rows out"
        )


def two_classes(labels: NDArray[Any], name: str) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """The two classes among `labels`, in order, and for each row whether it is the second.

    Raises:
        InvalidInput: there are not exactly two.
    """
    check_finite(labels, name)
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) != 2:
        shown = ", ".join(str(value) for value in classes[:5]) + (", ..." if len(classes) > 5 else "")
        what = f"{len(classes)} classes" if len(classes) != 1 else "one class"
        remedy = (
            "Only binary classification is supported: compare with one value, such as labels == value"
            if len(classes) > 2
            else "a probe needs rows of both classes"
        )
        raise InvalidInput(f"{name} holds {what} ({shown}) in {len(labels):,} rows. {remedy}")
    return classes, codes.astype(np.uint8)


def binary(labels: NDArray[Any], classes: NDArray[Any], name: str) -> NDArray[np.bool_]:
    """Whether each label is the second of `classes`.

    Raises:
        InvalidInput: a label is neither.
    """
    second = labels == classes[1]
    other = ~(second | (labels == classes[0]))
    if other.any():
        raise InvalidInput(f"{name} holds {labels[other][0]}; the probe was fitted to {classes[0]} and {classes[1]}")
    return np.asarray(second)


def score_block(state: tuple[NDArray[Any], ...], x: NDArray[Any], *_: Any) -> list[NDArray[Any]]:
    """Log-odds (rows, problems) of one block, in the data type of its rows."""
    shift, weights, intercepts = state
    dtype = np.float32 if x.dtype in (np.float32, np.float16) else np.float64
    z = np.subtract(x, shift.astype(dtype), dtype=dtype) @ weights.astype(dtype)
    z += intercepts.astype(dtype)
    return [z]
