import re
import warnings

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import estimator_checks_generator

from millpond.analysis import BatchTopKSae, LdaProbe, LogisticProbe, MassMeanProbe, PcaReducer, RidgeProbe
from millpond.analysis.metrics import METRICS
from millpond.analysis.probes import moments, solver
from millpond.analysis.probes.targets import Design, Problem, Targets
from millpond.store.errors import InvalidInput, MissingLabels, OneClass, RunOpen


def problem(n=2000, d=24, strength=2.0, massive=False, seed=0):
    """Correlated features with a power-law spectrum, and labels of a logistic model."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((d, d)) * np.arange(1, d + 1) ** -0.5
    x = rng.standard_normal((n, d)) @ mix.T
    if massive:
        x[:, 1] = 1000 * x[:, 1] + 3000
        x[:, 5] = 800 * x[:, 5] - 500
    weights = strength * rng.standard_normal(d) / np.sqrt(d) / x.std(axis=0)
    y = rng.random(n) < 1 / (1 + np.exp(-(x - x.mean(axis=0)) @ weights))
    return x.astype(np.float32), y


def lazy(x, y, chunk):
    """The same rows as a run gives them."""
    coordinate = da.from_array(np.arange(len(x), dtype=np.int32) // 20, chunks=chunk)
    rows = xr.DataArray(
        da.from_array(x, chunks=(chunk, -1)),
        dims=("row", "d_model"),
        coords={"prompt": ("row", coordinate)},
        attrs={"run": "r", "hook": "blocks.1.hook_resid_post", "model": "m"},
    )
    return rows, xr.DataArray(da.from_array(y, chunks=chunk), dims=("row",), name="positive")


def optimum(x, y, C, fit_intercept=True):
    """Newton's method in float64 on scikit-learn's objective, written out."""
    x = x.astype(np.float64)
    mean = x.mean(axis=0) if fit_intercept else np.zeros(x.shape[1])
    design = np.column_stack([x - mean, np.full(len(x), float(fit_intercept))])
    penalty = np.append(np.full(x.shape[1], 1 / C), 0 if fit_intercept else 1)
    w = np.zeros(design.shape[1])

    def value(w):
        z = design @ w
        return np.logaddexp(0, z).sum() - z @ y + 0.5 * penalty @ w**2

    for _ in range(100):
        p = 1 / (1 + np.exp(-design @ w))
        gradient = design.T @ (p - y) + penalty * w
        step = np.linalg.solve((design.T * (p * (1 - p))) @ design + np.diag(penalty), gradient)
        size = 1.0
        while size > 1e-6 and value(w - size * step) > value(w) + 1e-9:
            size /= 2
        w = w - size * step
        if np.abs(step).max() < 1e-11:
            break
    return w[:-1], w[-1] - w[:-1] @ mean


def relative(found, expected):
    return np.linalg.norm(np.ravel(found) - np.ravel(expected)) / np.linalg.norm(expected)


@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_scikit_learn(C, seed):
    x, y = problem(seed=seed)
    expected = LogisticRegression(C=C, tol=1e-10, solver="newton-cholesky").fit(x.astype(np.float64), y)
    found = LogisticProbe(C=C).fit(x, y)
    assert found.converged_
    assert relative(found.coef_, expected.coef_) < 1e-4
    assert found.intercept_ == pytest.approx(expected.intercept_, abs=1e-3)
    np.testing.assert_allclose(found.predict_proba(x), expected.predict_proba(x), atol=1e-3)
    assert (found.predict(x) == expected.predict(x)).mean() > 0.999
    assert found.score(x, y) == pytest.approx(expected.score(x, y), abs=1e-3)


@pytest.mark.parametrize(
    ("case", "C"),
    [
        ({"massive": True}, 1.0),
        ({"massive": True, "strength": 60.0}, 1.0),
        ({"n": 400, "d": 60, "strength": 60.0}, 100.0),
    ],
    ids=["massive dimensions", "almost separable", "separable"],
)
def test_hard_problems_reach_the_optimum(case, C):
    x, y = problem(**case)
    coef, intercept = optimum(x, y, C)
    found = LogisticProbe(C=C).fit(x, y)
    assert found.converged_
    assert relative(found.coef_, coef) < 1e-4
    assert found.intercept_[0] == pytest.approx(intercept, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("massive", [False, True])
def test_float32_products_are_enough_for_many_rows(massive, monkeypatch):
    monkeypatch.setattr(moments, "EXACT_SIZE", 0)
    x, y = problem(n=20_000, massive=massive)
    coef, _ = optimum(x, y, 1.0)
    found = LogisticProbe().fit(x, y)
    assert found.converged_
    assert relative(found.coef_, coef) < 1e-4


def test_a_tolerance_below_rounding_ends(monkeypatch):
    monkeypatch.setattr(moments, "EXACT_SIZE", 0)
    x, y = problem()
    found = LogisticProbe(C=100.0, tol=1e-9).fit(x, y)
    assert found.converged_
    assert found.n_iter_[0] < 60


def test_without_intercept():
    x, y = problem()
    coef, _ = optimum(x, y, 1.0, fit_intercept=False)
    found = LogisticProbe(fit_intercept=False).fit(x + 0.5 - 0.5, y)
    assert relative(found.coef_, coef) < 1e-4
    assert found.intercept_[0] == 0


def test_wide_rows_use_a_low_rank_metric(monkeypatch):
    monkeypatch.setattr(moments, "FULL_RANK", 16)
    x, y = problem(d=48)
    coef, _ = optimum(x, y, 1.0)
    found = LogisticProbe().fit(x, y)
    assert found.converged_
    assert relative(found.coef_, coef) < 1e-3
    assert relative(LogisticProbe(tol=1e-7).fit(x, y).coef_, coef) < 1e-5


def test_metric_from_a_sample_of_the_rows(monkeypatch):
    monkeypatch.setattr(moments, "GRAM_ROWS", 300)
    x, y = problem()
    coef, _ = optimum(x, y, 1.0)
    assert relative(LogisticProbe(tol=1e-5).fit(x, y).coef_, coef) < 1e-4


@pytest.mark.parametrize("chunk", [1, 7, 501, 700])
def test_lazy_input_gives_the_same_probe_whatever_its_chunks(chunk):
    x, y = problem(n=700)
    expected = LogisticProbe().fit(x, y)
    rows, labels = lazy(x, y, chunk)
    found = LogisticProbe().fit(rows, labels)
    assert relative(found.coef_, expected.coef_) < 1e-5
    np.testing.assert_allclose(found.decision_function(rows), expected.decision_function(x), atol=1e-4)
    assert found.trained_on_ == {"run": "r", "hook": "blocks.1.hook_resid_post", "model": "m", "label": "positive"}
    assert found.score(rows, labels) == pytest.approx(expected.score(x, y), abs=2e-3)


def test_many_problems_in_shared_passes_equal_single_fits():
    """Two hooks, a binary and a three-class label, three C, and folds left out: all in one solve."""
    x, y = problem()
    third = np.digitize(x[:, 3], np.quantile(x[:, 3], [0.3, 0.6]))
    folds = (np.arange(len(x)) // 20 % 3).astype(np.uint8)
    targets = Targets.of([y.astype(np.uint8), third.astype(np.uint8)], [2, 3], [None, None], None, folds)
    problems = [Problem(label, C, fold) for label in (0, 1) for C in (0.1, 10.0) for fold in (-1, 2)]
    hooks = (x, x[:, ::-1] * 2)
    solutions = solver.solve(
        [Design(str(i), rows, targets) for i, rows in enumerate(hooks)], problems, solver.Options()
    )
    for rows, fitted in zip(hooks, solutions, strict=True):
        for one, solution in zip(problems, fitted, strict=True):
            kept = folds != one.fold
            labels = (y, third)[one.label]
            expected = LogisticRegression(C=one.strength, tol=1e-10, solver="newton-cholesky", max_iter=1000)
            expected.fit(rows[kept].astype(np.float64), labels[kept])
            assert solution.converged
            assert relative(solution.coef, expected.coef_) < 1e-3
            np.testing.assert_allclose(solution.intercept, expected.intercept_, atol=3e-3)


@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
def test_several_classes_equal_scikit_learn(C):
    x, _ = problem(massive=True)
    y = np.digitize(x[:, 3] + x[:, 7], np.quantile(x[:, 3] + x[:, 7], [0.2, 0.5, 0.9]))
    y = np.array(["red", "green", "blue", "white"])[y]
    x[:, 3] += np.random.default_rng(1).standard_normal(len(x))
    mean, scale = x.mean(axis=0), x.std(axis=0)
    x = ((x - mean) / scale).astype(np.float32)
    expected = LogisticRegression(C=C, tol=1e-10, solver="newton-cholesky").fit(x.astype(np.float64), y)
    found = LogisticProbe(C=C).fit(x, y)
    assert found.converged_
    assert list(found.classes_) == ["blue", "green", "red", "white"]
    assert relative(found.coef_, expected.coef_) < 1e-3
    np.testing.assert_allclose(found.predict_proba(x), expected.predict_proba(x), atol=1e-3)
    result = found.evaluate(x, y, n_bootstrap=0)
    assert result["accuracy"] == pytest.approx(expected.score(x, y), abs=2e-3)
    assert result.evidence["class_red"] == (y == "red").sum()
    assert found.evidence_["residual_dof"] == len(x) - 25 * 3


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("class_weight", ["balanced", {0: 3.0, 1: 0.5}])
def test_class_and_sample_weights_equal_scikit_learn(n_classes, class_weight):
    x, y = problem(n=800)
    y = y.astype(int) if n_classes == 2 else np.digitize(x[:, 3], [-1, 1])
    weights = np.random.default_rng(3).integers(0, 4, len(x)).astype(float)
    expected = LogisticRegression(tol=1e-10, solver="newton-cholesky", class_weight=class_weight, max_iter=1000)
    expected.fit(x.astype(np.float64), y, weights)
    found = LogisticProbe(class_weight=class_weight, tol=1e-7).fit(x, y, sample_weight=weights)
    assert relative(found.coef_, expected.coef_) < 1e-4
    rows, labels = lazy(x, y, 90)
    assert (
        relative(LogisticProbe(class_weight=class_weight, tol=1e-7).fit(rows, labels, weights).coef_, found.coef_)
        < 1e-5
    )


def test_standardized_penalty_is_that_of_standardized_rows():
    x, y = problem(massive=True)
    x = x.astype(np.float64)
    mean, scale = x.mean(axis=0), x.std(axis=0)
    expected = LogisticRegression(C=0.01, tol=1e-10, solver="newton-cholesky").fit((x - mean) / scale, y)
    found = LogisticProbe(C=0.01, standardize=True).fit(x, y)
    assert relative(found.coef_ * scale, expected.coef_) < 1e-4
    np.testing.assert_allclose(found.decision_function(x), expected.decision_function((x - mean) / scale), atol=1e-3)


def test_a_path_of_c_is_chosen_by_grouped_cross_validation():
    """Against scikit-learn's own folds and log-loss on the same folds."""
    from sklearn.metrics import log_loss

    from millpond.analysis.probes.inputs import assign_folds

    x, y = problem(n=400, d=60)
    prompts = np.arange(400) // 20
    rows, labels = lazy(x, y, 70)
    found = LogisticProbe(C=[1e-4, 1e-2, 100.0], cv=4).fit(rows, labels)
    folds = assign_folds(prompts, 400, 4)
    assert all(len(set(folds[prompts == prompt])) == 1 for prompt in range(20))
    assert np.bincount(folds).tolist() == [100] * 4
    expected = []
    for C in (1e-4, 1e-2, 100.0):
        losses = []
        for fold in range(4):
            model = LogisticRegression(C=C, tol=1e-10, solver="newton-cholesky", max_iter=1000)
            model.fit(x[folds != fold].astype(np.float64), y[folds != fold])
            losses.append(log_loss(y[folds == fold], model.predict_proba(x[folds == fold])))
        expected.append(np.mean(losses))
    np.testing.assert_allclose(found.cv_results_["loss"], expected, rtol=1e-3)
    assert [1e-4, 1e-2, 100.0][int(np.argmin(expected))] == found.C_
    assert relative(found.coef_, LogisticProbe(C=found.C_).fit(x, y).coef_) < 1e-4
    assert found.cv_results_.evidence["folds"] == 4
    assert found.cv_results_.plot().axes


@pytest.mark.slow
@pytest.mark.filterwarnings("default::ResourceWarning", "default::DeprecationWarning")
def test_a_cluster_gives_what_threads_give():
    """Every estimator, a path of C, and an evaluation: the same bits on two workers as on threads here."""
    from distributed import Client, LocalCluster

    x, y = problem(massive=True)
    rows, labels = lazy(x, y, 130)
    _, three = lazy(x, np.digitize(x[:, 3], [-1, 1]), 130)
    probes = [
        (LogisticProbe(), labels),
        (LogisticProbe([0.01, 1.0], cv=3), three),
        (RidgeProbe(10.0), three),
        (LdaProbe(0.1), three),
        (MassMeanProbe(), labels),
        (MassMeanProbe(whiten=True), labels),
    ]
    expected = [clone(probe).fit(rows, target) for probe, target in probes]
    metrics = expected[0].evaluate(rows, labels, n_bootstrap=50, allow_overlap=True)
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster):
        found = [clone(probe).fit(rows, target) for probe, target in probes]
        in_memory = LogisticProbe().fit(x, y)
        again = found[0].evaluate(rows, labels, n_bootstrap=50, allow_overlap=True)
    for here, there in zip(expected, found, strict=True):
        np.testing.assert_array_equal(here.coef_, there.coef_)
        np.testing.assert_array_equal(here.intercept_, there.intercept_)
    assert relative(in_memory.coef_, expected[0].coef_) < 1e-5
    assert {name: metrics[name] for name in METRICS["binary"]} == {name: again[name] for name in METRICS["binary"]}
    assert metrics.intervals == again.intervals


def test_evaluate_resamples_prompts_and_says_where_numbers_come_from():
    x, y = problem(n=1200)
    rows, labels = lazy(x, y, 100)
    probe = LogisticProbe().fit(rows[:800], labels[:800])
    result = probe.evaluate(rows[800:], labels[800:], n_bootstrap=200)
    assert result.kind == "probe-evaluation"
    assert result.evidence == {
        "rows": 400, "prompts": 20, "positives": y[800:].sum(), "negatives": (~y[800:]).sum(),
        "train_rows": 800, "train_prompts": 40, "residual_dof": 800 - 25,
    }  # fmt: skip
    assert result.provenance["versions"]["numpy"] == np.__version__
    assert "reliability" in result.values
    assert len(result.plot().axes) == 2
    assert result["accuracy"] == pytest.approx(probe.score(x[800:], y[800:]))
    low, high = result.intervals["auroc"]
    assert low < result["auroc"] < high
    assert result.provenance["evaluated_on"]["hook"] == "blocks.1.hook_resid_post"
    assert "prompts" not in probe.evaluate(x[800:], y[800:], n_bootstrap=0).evidence


def test_labels_may_be_any_two_values():
    x, y = problem(n=300)
    names = np.where(y, "yes", "no")
    probe = LogisticProbe().fit(x, names)
    assert list(probe.classes_) == ["no", "yes"]
    assert set(probe.predict(x)) == {"no", "yes"}
    assert probe.evaluate(x, names, n_bootstrap=0)["accuracy"] == probe.score(x, names)
    with pytest.raises(InvalidInput, match="maybe; the probe was fitted to no and yes"):
        probe.evaluate(x, np.full(300, "maybe"))


def with_nan(x):
    x = x.copy()
    x[3, 2] = np.nan
    return x


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x, y: (x, y[:-1]), "rows"),
        (lambda x, y: (x, np.arange(len(x)) * 1.5), "Unknown label type: continuous"),
        (lambda x, y: (da.from_array(with_nan(x), chunks=(50, -1)), y), "1 of 200 rows hold NaN"),
        (lambda x, y: (lazy(x, y, 50)[0], lazy(x, y, 40)[1].data.astype(int)[:-1]), "rows"),
        (lambda x, y: (lazy(x, y, 50)[0][:, 0], y), "1 dimensions"),
        (lambda x, y: (da.zeros((0, 4), dtype="float32"), y[:0]), "y has 0 rows; give at least one of each class"),
        (lambda x, y: (x, "in_string"), "y is 'in_string'; give one label a row"),
    ],
)
def test_what_cannot_be_fitted_is_refused(make, words):
    x, y = problem(n=200)
    with pytest.raises(InvalidInput, match=words):
        LogisticProbe().fit(*make(x, y))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda y: np.zeros(len(y), bool), OneClass, "y holds one class"),
        (lambda y: np.where(y, 1.0, np.nan), MissingLabels, "y contains NaN or infinity in"),
        (lambda y: np.where(y, "a", None), MissingLabels, "in 113 of 200 rows"),
    ],
)
def test_labels_that_are_missing_have_errors_of_their_own(make, error, words):
    x, y = problem(n=200, seed=5)
    labels = make(y)
    if words.startswith("in"):
        words = f"in {int((~y).sum())} of 200 rows"
    with pytest.raises(error, match=words):
        LogisticProbe().fit(da.from_array(x, chunks=(50, -1)), labels)


def test_a_run_is_not_the_rows_of_a_hook(run):
    words = re.escape("X is a run; give the rows of one of its hooks, run[hook]")
    with pytest.raises(InvalidInput, match=words):
        LogisticProbe().fit(run, "inside")
    for estimator in (PcaReducer(2), BatchTopKSae(d_sae=8, k=2)):
        with pytest.raises(InvalidInput, match=words):
            estimator.fit(run)


def test_rows_of_an_open_run_are_refused():
    x, y = problem(n=200)
    rows, labels = lazy(x, y, 50)
    with pytest.raises(RunOpen, match="run 'r' is open"):
        LogisticProbe().fit(rows.assign_attrs(state="open"), labels)


@pytest.mark.parametrize(
    ("weights", "words"),
    [(np.full(200, -1.0), "negative"), (np.zeros(200), "zero"), (np.ones(3), "shape"), (np.full(200, np.nan), "NaN")],
)
def test_weights_that_cannot_be_used_are_refused(weights, words):
    x, y = problem(n=200)
    with pytest.raises(InvalidInput, match=words):
        LogisticProbe().fit(x, y, sample_weight=weights)


def test_classes_in_too_few_prompts_for_the_folds_are_refused():
    x, _ = problem(n=200)
    prompts = np.arange(200) // 20
    with pytest.raises(OneClass, match="lower cv"):
        LogisticProbe(C=[0.1, 1.0]).fit(x, prompts == 3, groups=prompts)
    with pytest.raises(InvalidInput, match="the rows have 10 groups"):
        LogisticProbe(C=[0.1, 1.0], cv=11).fit(x, prompts > 3, groups=prompts)


@pytest.mark.parametrize(
    "parameters", [{"C": 0}, {"tol": -1}, {"max_iter": 0}, {"C": float("nan")}, {"C": []}, {"cv": 1, "C": [1, 2]}]
)
def test_parameters_out_of_range_are_refused(parameters):
    x, y = problem(n=100)
    with pytest.raises(InvalidInput, match=f"{next(iter(parameters))} is"):
        LogisticProbe(**parameters).fit(x, y)


def test_lazy_rows_of_another_width_are_refused():
    x, y = problem(n=100)
    with pytest.raises(InvalidInput, match="expecting 24 features"):
        LogisticProbe().fit(x, y).predict(da.zeros((5, 3)))


def test_stopping_early_warns_and_is_recorded():
    x, y = problem()
    with pytest.warns(ConvergenceWarning, match=r"max_iter=2\)"):
        probe = LogisticProbe(max_iter=2).fit(x, y)
    assert not probe.converged_
    assert probe.n_iter_ == [2]


CHECKS = [
    pytest.param(estimator, check, id=check.func.__name__)
    for estimator, check in estimator_checks_generator(LogisticProbe(progress=False))
    if not check.func.__name__.startswith("check_array_api")  # array API input is not supported
]


@pytest.mark.parametrize(("estimator", "check"), CHECKS)
def test_is_a_scikit_learn_estimator(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the checks feed it what it warns about
        check(estimator)
