"""What all probes share: scikit-learn's interface, lazy input, paths of strengths with cross-validation, evaluation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from millpond.analysis.passes import AlignedRows, Pass, join, run_pass
from millpond.analysis.probes import inputs
from millpond.analysis.probes.linear import Linear, scores, stack
from millpond.analysis.probes.targets import Design, Problem, Targets
from millpond.analysis.remote import HandedProbe, backend_of, check_unused, stays
from millpond.analysis.tiles import Rows
from millpond.store.errors import InvalidInput, OneClass
from millpond.store.result import Result

if TYPE_CHECKING:
    from millpond.analysis.metrics import Kind
    from millpond.analysis.passes import RowArray
    from millpond.analysis.sweep import Sweep
    from millpond.store.run import Run

    LabelSource = Callable[[Run], Any]


class LinearProbe(HandedProbe, BaseEstimator):  # type: ignore[misc]
    """A probe whose scores are linear in the activations. Subclasses say how problems are solved.

    `fit` takes NumPy, Dask or xarray input; the last two are read block by block and never held whole,
    the labels are (one byte a row for up to 256 classes).
    """

    strength: ClassVar[str | None] = None
    """The parameter that regularises; a sequence of values is chosen from by cross-validation."""
    probabilistic: ClassVar[bool] = True
    """Whether scores are log-odds or logits."""
    progress: bool

    coef_: NDArray[np.float64]
    intercept_: NDArray[np.float64]
    classes_: NDArray[Any]
    n_features_in_: int
    n_iter_: NDArray[np.int32]
    converged_: bool
    evidence_: dict[str, int]
    trained_on_: dict[str, Any]
    cv_results_: Result

    @property
    def kind(self) -> Kind:
        """What it predicts."""
        return "binary" if len(self.classes_) == 2 else "multiclass"

    @property
    def predicts_classes(self) -> bool:
        """Whether labels are classes (or else numbers)."""
        return True

    @abstractmethod
    def solve(self, designs: Sequence[Design], problems: Sequence[Problem]) -> list[list[Linear]]:
        """Fit every problem on every design in shared passes."""

    @abstractmethod
    def check_parameters(self) -> None:
        """Raises InvalidInput unless the parameters can be used."""

    def held_out_loss(self, z: NDArray[Any], target: NDArray[Any]) -> NDArray[Any]:
        """Loss of each row by which strengths are chosen: log-loss of scores (rows, k) for class codes."""
        if z.shape[1] == 1:
            return np.asarray(np.logaddexp(0, np.where(target == 1, -z[:, 0], z[:, 0])))
        top = z.max(axis=1)
        norm = top + np.log(np.exp(z - top[:, None]).sum(axis=1))
        return np.asarray(norm - z[np.arange(len(z)), target])

    def strengths(self, given: Any = None) -> list[float]:
        """The strengths to fit; `given` in place of the parameter."""
        if self.strength is None:
            return [0.0]
        return inputs.strengths_of(getattr(self, self.strength) if given is None else given, self.strength)

    def fit(self, X: RowArray, y: RowArray, sample_weight: Any = None, groups: RowArray | None = None) -> Self:
        """Fit to activations `X` (rows, d_model) and one label a row.

        Args:
            X: activations.
            y: one label a row.
            sample_weight: one weight of at least 0 a row.
            groups: group of each row, kept together by cross-validation; by default the `prompt`
                coordinate of `X` if it has one.

        Raises:
            InvalidInput: shapes or chunks do not match, or a value is NaN or infinite.
            MissingLabels: a label is NaN.
            OneClass: `y` holds one class only.
            RunOpen: the run may still grow.
        """
        if backend_of(X) is not None:
            check_unused("fit", {"sample_weight": (sample_weight, None), "groups": (groups, None)})
            self.submit_fit(X, y).result()
            return self
        self.check_parameters()
        strengths = self.strengths()
        inputs.check_one_hook(X)
        inputs.check_sealed(X)
        X, labels = self._check(X, y, reset=True)
        n_rows, name = int(X.shape[0]), inputs.name_of(y, "y")
        if labels.shape != (n_rows,):
            raise InvalidInput(f"X has {n_rows:,} rows and {name} {len(labels):,}; give one label a row")
        weights = inputs.sample_weights(sample_weight, n_rows)
        prompts = inputs.groups_of(X, None)
        groups = prompts if groups is None else inputs.groups_of(X, groups)
        classes, column, by_class = self.encode(labels, name, weights)
        several = len(strengths) > 1
        folds = inputs.assign_folds(groups, n_rows, self._cv()) if several else None
        n_classes = 1 if classes is None else len(classes)
        if folds is not None and classes is not None:
            check_folds(column, folds, n_classes, name)
        targets = Targets.of([column], [n_classes], [by_class], weights, folds)
        design = Design(inputs.name_of(X, "X"), X, targets)
        problems = [Problem(0, value) for value in strengths]
        if several:
            problems += [Problem(0, value, fold) for value in strengths for fold in range(targets.n_folds)]
        [found] = self.solve([design], problems)
        chosen = 0
        evidence = evidence_of(column, classes, prompts, weights)
        if several:
            losses = cross_validate(self, design, problems[len(strengths) :], found[len(strengths) :])
            losses = losses.reshape(len(strengths), targets.n_folds)
            chosen = int(losses.mean(axis=1).argmin())
            self.cv_results_ = self._path_result(strengths, losses, evidence, inputs.source_of(X) | {"label": name})
        self.trained_on_ = inputs.source_of(X) | {"label": name}
        self.train_prompts_ = None if prompts is None else np.unique(prompts)
        return self.take(found[chosen], classes, evidence, strengths[chosen])

    def take(
        self, found: Linear, classes: NDArray[Any] | None, evidence: Mapping[str, int], strength: float | None = None
    ) -> Self:
        """Become the fitted probe of `found`; warns if it has not converged."""
        self._forget()
        if classes is not None:
            self.classes_ = classes
        self.coef_, self.intercept_ = found.coef, found.intercept
        if not self.predicts_classes:
            self.coef_, self.intercept_ = found.coef[0], found.intercept[0]
        self.n_features_in_ = found.coef.shape[1]
        self.n_iter_ = np.array([found.n_iter], np.int32)
        self.converged_ = found.converged
        if self.strength is not None:
            setattr(self, f"{self.strength}_", strength)
        parameters = (found.coef.shape[1] + 1) * max(1, len(found.coef) - (len(found.coef) > 1))
        self.evidence_ = dict(evidence) | {"residual_dof": evidence["rows"] - parameters}
        self._linear = found
        if not found.converged:
            self._warn(found)
        return self

    def _warn(self, found: Linear) -> None:
        """Called with what has not converged."""

    def evaluate(
        self,
        X: RowArray,
        y: RowArray,
        groups: RowArray | None = None,
        *,
        n_bootstrap: int = 1000,
        seed: int = 0,
        fpr: float = 0.01,
        allow_overlap: bool = False,
    ) -> Result:
        """Metrics with 95 % intervals that resample prompts; see `millpond.analysis.metrics.evaluate_scores`.

        Args:
            X: activations (rows, d_model).
            y: one label a row, of the classes that the probe was fitted to.
            groups: group of each row; by default the `prompt` coordinate of `X` if it has one.
            n_bootstrap: resamples behind the intervals.
            seed: of the resamples.
            fpr: false-positive rate at which the recall is taken.
            allow_overlap: evaluate on prompts that the probe was fitted to, too.

        Raises:
            InvalidInput: shapes do not match, or `y` holds an unknown class.
            OneClass: `y` holds one class only.
            MissingLabels: a label is NaN.
            OverlappingGroups: the probe was fitted to some of these prompts.
        """
        if backend_of(X) is not None:
            check_unused(
                "evaluate",
                {
                    "groups": (groups, None), "n_bootstrap": (n_bootstrap, 1000), "seed": (seed, 0), "fpr": (fpr, 0.01),
                    "allow_overlap": (allow_overlap, False),
                },
            )  # fmt: skip
            return self._ask("evaluate", {"data": X, "labels": y})
        from millpond.analysis.evaluation import evaluate_probe

        return evaluate_probe(
            self, X, y, groups, n_bootstrap=n_bootstrap, seed=seed, fpr=fpr, allow_overlap=allow_overlap
        )

    def sweep(
        self,
        train: Run,
        test: Run,
        hooks: str | Sequence[str],
        labels: Any,
        strengths: float | Sequence[float] | None = None,
        *,
        cv: int | None = None,
        controls: Sequence[str] = ("shuffled", "random direction"),
        groups: str | None = None,
        seed: int = 0,
        n_bootstrap: int = 1000,
        fpr: float = 0.01,
        **given: Any,
    ) -> Sweep:
        """Fit a probe for every hook, label and strength in shared passes; see `millpond.analysis.sweep.run_sweep`.

        The strengths may also be given by their own name, as in `C=[0.1, 1.0]`.
        """
        from millpond.analysis.remote_sweep import hand_over_sweep
        from millpond.analysis.sweep import run_sweep

        if self.strength in given and strengths is None:
            strengths = given.pop(self.strength)
        backend = backend_of(train)
        if backend is not None:
            check_unused(
                "sweep",
                {
                    "cv": (cv, None), "groups": (groups, None), "seed": (seed, 0),
                    "n_bootstrap": (n_bootstrap, 1000), "fpr": (fpr, 0.01), "other arguments": (given, {}),
                },
            )  # fmt: skip
            chosen = {} if strengths is None or self.strength is None else {self.strength: strengths}
            one = type(self)(**(self.get_params() | chosen))
            return hand_over_sweep(backend, one, train, test, hooks, labels, control="shuffled" in controls)
        if given:
            raise InvalidInput(f"{next(iter(given))} is no argument of {type(self).__name__}.sweep")
        return run_sweep(
            self, train, test, hooks, labels, strengths,
            cv=cv, controls=controls, groups=groups, seed=seed, n_bootstrap=n_bootstrap, fpr=fpr,
        )  # fmt: skip

    def encode(
        self, labels: NDArray[Any], name: str, weights: NDArray[Any] | None
    ) -> tuple[NDArray[Any] | None, NDArray[Any], tuple[float, ...] | None]:
        """Classes, class codes of the rows and class weights; for numbers None, the numbers and None."""
        classes, codes = inputs.class_codes(labels, name)
        if weights is not None and (np.bincount(codes, weights=weights) == 0).any():
            raise OneClass(f"{name} has a class whose rows all have sample_weight 0; leave its rows out")
        return classes, codes, inputs.class_weights(getattr(self, "class_weight", None), classes, codes, weights)

    def raw_scores(self, X: RowArray) -> NDArray[Any]:
        """Scores (rows, k)."""
        if backend_of(X) is not None:
            raise stays("the scores of these rows stay", "probe.evaluate(...) measures them there")
        check_is_fitted(self)
        X = self._check_rows(X, reset=False)
        one = Pass(AlignedRows(X, stored=True), _score, stack([self._linear], exact=not self.predicts_classes), join)
        return np.concatenate(run_pass(one, description="probe scores", progress=self.progress))

    def _cv(self) -> int:
        return int(getattr(self, "cv", 5))

    def _path_result(
        self, strengths: list[float], losses: NDArray[Any], evidence: dict[str, int], source: dict[str, Any]
    ) -> Result:
        values = {
            str(self.strength): np.asarray(strengths),
            "loss": losses.mean(axis=1),
            "loss_se": losses.std(axis=1, ddof=1) / np.sqrt(losses.shape[1]),
            "chosen": float(strengths[int(losses.mean(axis=1).argmin())]),
        }
        counts = dict(evidence) | {"folds": losses.shape[1]}
        return Result("probe-path", values, {}, counts, self.provenance() | {"trained_on": source})

    def provenance(self) -> dict[str, Any]:
        """Estimator, parameters and versions."""
        return {"estimator": type(self).__name__, "parameters": self.get_params(), "versions": _versions()}

    def _check(self, X: Any, y: Any, *, reset: bool) -> tuple[Any, NDArray[Any]]:
        if y is None:
            raise InvalidInput(f"{type(self).__name__} requires y to be passed, but the target y is None")
        if isinstance(y, str):
            raise InvalidInput(f"y is {y!r}; give one label a row, run.labels[{y!r}]")
        labels = inputs.to_memory(y)
        name = inputs.name_of(y, "y")
        labels = column_or_1d(labels, warn=True) if labels.ndim != 1 else labels
        X = self._check_rows(X, reset=reset)
        inputs.check_labels(labels, name)
        if self.predicts_classes:
            try:
                check_classification_targets(labels)
            except ValueError as error:
                raise InvalidInput(f"{name}: {error} RidgeProbe() regresses numbers") from None
        return X, labels

    def _check_rows(self, X: Any, *, reset: bool) -> Any:
        """`X` if it is lazy and of the right width, else checked as scikit-learn checks its input."""
        if not inputs.is_lazy(X):
            return validate_data(self, X, reset=reset, dtype=[np.float32, np.float64])
        if X.ndim != 2:
            raise InvalidInput(f"X has {X.ndim} dimensions, shape {X.shape}; give (rows, d_model)")
        if reset:
            self.n_features_in_ = int(X.shape[1])
        elif X.shape[1] != self.n_features_in_:
            raise InvalidInput(
                f"X has {X.shape[1]} features, but {type(self).__name__} is expecting {self.n_features_in_} features as input"
            )
        return X


class ClassProbe(ClassifierMixin, LinearProbe):  # type: ignore[misc]
    """A probe for classes whose scores are log-odds (two classes) or logits (more)."""

    def decision_function(self, X: RowArray) -> NDArray[Any]:
        """Log-odds of the second of two classes (rows,), or a logit for each class (rows, K)."""
        z = self.raw_scores(X)
        return z[:, 0] if z.shape[1] == 1 else z

    def predict_proba(self, X: RowArray) -> NDArray[Any]:
        """Probability of each class, (rows, K)."""
        from scipy.special import expit, softmax

        z = self.raw_scores(X)
        if z.shape[1] == 1:
            return np.stack([expit(-z[:, 0]), expit(z[:, 0])], axis=1)
        return np.asarray(softmax(z, axis=1))

    def predict(self, X: RowArray) -> NDArray[Any]:
        """The most probable class of each row."""
        z = self.raw_scores(X)
        return np.asarray(self.classes_[best_class(z)])

    def score(self, X: RowArray, y: RowArray, sample_weight: NDArray[Any] | None = None) -> float:
        """Accuracy, as scikit-learn's classifiers give."""
        if backend_of(X) is not None:
            check_unused("score", {"sample_weight": (sample_weight, None)})
            return float(self._ask("evaluate", {"data": X, "labels": y})["accuracy"])
        from sklearn.metrics import accuracy_score

        return float(accuracy_score(inputs.to_memory(y), self.predict(X), sample_weight=sample_weight))


def best_class(z: NDArray[Any]) -> NDArray[Any]:
    """The class with the highest score, from scores (rows, k)."""
    return np.asarray(z[:, 0] > 0, np.int64) if z.shape[1] == 1 else z.argmax(axis=1)


def check_folds(codes: NDArray[Any], folds: NDArray[np.uint8], n_classes: int, name: str) -> None:
    """Raises OneClass if leaving out a fold leaves a class without rows."""
    rows = np.zeros((int(folds.max()) + 1, n_classes), np.int64)
    np.add.at(rows, (folds, codes), 1)
    if (rows.sum(axis=0) == rows).any():
        raise OneClass(f"all rows of a class of {name} are in one fold (few prompts have it); lower cv or capture more")


def evidence_of(
    column: NDArray[Any], classes: NDArray[Any] | None, prompts: NDArray[Any] | None, weights: NDArray[Any] | None
) -> dict[str, int]:
    """Rows with a weight, distinct prompts, and rows of each class."""
    used = slice(None) if weights is None else weights > 0
    column = column[used]
    found = {"rows": len(column)}
    if prompts is not None:
        found["prompts"] = len(np.unique(prompts[used]))
    if classes is None:
        return found
    rows = np.bincount(column, minlength=len(classes))
    if len(classes) == 2:
        return found | {"positives": int(rows[1]), "negatives": int(rows[0])}
    return found | {f"class_{value}": int(count) for value, count in zip(classes, rows, strict=True)}


def cross_validate(
    probe: LinearProbe, design: Design, problems: Sequence[Problem], found: Sequence[Linear]
) -> NDArray[np.float64]:
    """Mean loss of each problem on the rows of the fold it has not seen, in one pass."""
    linear = stack(found, exact=not probe.predicts_classes)
    state = (linear, [len(one.coef) for one in found], list(problems), design.targets.layout, probe.held_out_loss)
    one = Pass(design.rows, _held_out, state)
    loss, weight = run_pass(one, description="cross-validation", progress=probe.progress)
    return np.asarray(loss / weight)


def _held_out(state: Any, x: Rows, *blocks: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    linear, widths, problems, layout, loss_of = state
    columns, weights, folds = layout.unpack(blocks)
    z = scores(linear, x).astype(np.float64)
    loss, weight, start = np.zeros(len(problems)), np.zeros(len(problems)), 0
    for number, (problem, width) in enumerate(zip(problems, widths, strict=True)):
        some = folds == problem.fold
        row = np.ones(int(some.sum())) if weights is None else weights[some]
        loss[number] = row @ loss_of(z[some, start : start + width], columns[some, problem.label])
        weight[number] = row.sum()
        start += width
    return loss, weight


def _score(state: Any, x: Rows) -> list[NDArray[Any]]:
    return [scores(state, x)]


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    import scipy

    return {"millpond": version("millpond"), "numpy": np.__version__, "scipy": scipy.__version__}
