"""Probes that one pass solves: ridge, discriminant analysis and differences of means, against scikit-learn and NumPy."""

import warnings

import dask.array as da
import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.neighbors import NearestCentroid
from sklearn.utils.estimator_checks import estimator_checks_generator
from tests.analysis.test_logistic import lazy, problem, relative

from millpond.analysis import LdaProbe, MassMeanProbe, RidgeProbe
from millpond.analysis.probes import moments
from millpond.analysis.probes.inputs import assign_folds
from millpond.store.errors import InvalidInput, MissingLabels


@pytest.fixture(scope="module")
def data():
    """Rows with two massive dimensions, a number to regress, and a label of three classes."""
    x, y = problem(n=900, massive=True)
    rng = np.random.default_rng(0)
    number = 1e4 + x @ rng.standard_normal(24).astype(np.float32) / x.std(axis=0).mean() + rng.standard_normal(900)
    three = np.array(["a", "b", "c"])[np.digitize(x[:, 3] + rng.standard_normal(900), [-0.5, 1])]
    return x, y, number, three


@pytest.mark.parametrize("alpha", [0.0, 10.0, 1e5])
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_ridge_regression_equals_scikit_learn(data, alpha, fit_intercept):
    x, _, number, _ = data
    weights = np.random.default_rng(1).integers(0, 3, 900)
    expected = Ridge(alpha=alpha, fit_intercept=fit_intercept, solver="svd").fit(x.astype(float), number, weights)
    found = RidgeProbe(alpha, fit_intercept=fit_intercept).fit(x, number, weights)
    assert relative(found.coef_, expected.coef_) < 1e-6
    np.testing.assert_allclose(found.predict(x), expected.predict(x), rtol=1e-5)
    assert found.score(x, number) == pytest.approx(expected.score(x, number), rel=1e-5)
    rows, numbers = lazy(x, number, 130)
    assert (
        relative(RidgeProbe(alpha, fit_intercept=fit_intercept).fit(rows, numbers, weights).coef_, found.coef_) < 1e-6
    )
    if fit_intercept and alpha:
        result = found.evaluate(rows, numbers, allow_overlap=True, n_bootstrap=100)
        assert result["r2"] == pytest.approx(expected.score(x, number), abs=1e-6)
        assert result.evidence["residual_dof"] == (weights > 0).sum() - 25
        assert result.intervals["r2"][0] < result["r2"] < result.intervals["r2"][1]


@pytest.mark.parametrize("class_weight", [None, "balanced"])
@pytest.mark.parametrize("label", [1, 3])
def test_ridge_classification_equals_scikit_learn(data, label, class_weight):
    x, y = data[0], data[label]
    expected = RidgeClassifier(alpha=5.0, solver="svd", class_weight=class_weight).fit(x.astype(float), y)
    found = RidgeProbe(5.0, task="classification", class_weight=class_weight).fit(x, y)
    np.testing.assert_allclose(found.coef_, np.atleast_2d(expected.coef_), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(found.decision_function(x), expected.decision_function(x), atol=1e-5)
    assert (found.predict(x) == expected.predict(x)).all()
    assert "log_loss" not in found.evaluate(x, y, n_bootstrap=0).values


def test_a_path_of_alpha_equals_a_loop_over_folds(data):
    x, _, number, _ = data
    rows, numbers = lazy(x, number, 100)
    alphas = [1.0, 1e3, 1e6]
    found = RidgeProbe(alphas, cv=3).fit(rows, numbers)
    folds = assign_folds(np.arange(900) // 20, 900, 3)
    errors = [
        [
            np.square(
                Ridge(alpha=alpha, solver="svd")
                .fit(x[folds != k].astype(float), number[folds != k])
                .predict(x[folds == k])
                - number[folds == k]
            ).mean()
            for k in range(3)
        ]
        for alpha in alphas
    ]
    np.testing.assert_allclose(found.cv_results_["loss"], np.mean(errors, axis=1), rtol=1e-4)
    assert found.alpha_ == alphas[int(np.mean(errors, axis=1).argmin())]


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
@pytest.mark.parametrize("label", [1, 3])
@pytest.mark.parametrize("priors", [None, "equal"])
def test_lda_equals_scikit_learn(data, label, shrinkage, priors):
    x, y = data[0], data[label]
    k = len(np.unique(y))
    priors = None if priors is None else [1 / k] * k
    expected = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage or None)
    expected.fit(x.astype(float), y)
    if priors is not None:  # scikit-learn also weighs the covariance by the priors; ours is that of the rows
        expected.intercept_ += np.log(1 / k) - np.log(expected.priors_) if k > 2 else -np.diff(np.log(expected.priors_))
    found = LdaProbe(shrinkage, priors=priors).fit(x, y)
    np.testing.assert_allclose(found.predict_proba(x), expected.predict_proba(x), atol=1e-5)
    rows, labels = lazy(x, y, 70)
    np.testing.assert_allclose(LdaProbe(shrinkage, priors=priors).fit(rows, labels).coef_, found.coef_, rtol=1e-4)


def test_mass_mean_is_the_difference_of_means(data):
    x, y, _, three = data
    a, b = x[~y].mean(axis=0, dtype=float), x[y].mean(axis=0, dtype=float)
    rows, labels = lazy(x, y, 64)
    found = MassMeanProbe().fit(rows, labels)
    np.testing.assert_allclose(found.coef_[0], b - a, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.decision_function(x), (x - (a + b) / 2) @ (b - a), rtol=1e-3, atol=1.0)
    whitened = MassMeanProbe(whiten=True).fit(rows, labels)
    within = (np.cov(x[y].T, bias=True) * y.sum() + np.cov(x[~y].T, bias=True) * (~y).sum()) / len(y)
    assert relative(whitened.coef_, np.linalg.solve(within, b - a)) < 1e-4
    nearest = NearestCentroid().fit(x, three)
    assert (MassMeanProbe().fit(x, three).predict(x) == nearest.predict(x)).mean() > 0.999


@pytest.mark.parametrize("exact_size", [0, 1 << 25])
def test_many_labels_share_one_pass_with_the_same_numbers(data, exact_size, monkeypatch):
    from millpond.analysis.probes.targets import Design, Problem, Targets

    monkeypatch.setattr(moments, "EXACT_SIZE", exact_size)
    x, y, _, three = data
    codes = np.unique(three, return_inverse=True)[1].astype(np.uint8)
    targets = Targets.of([y.astype(np.uint8), codes], [2, 3], [None, None])
    for probe, strength in (
        (RidgeProbe(2.0, task="classification"), 2.0),
        (LdaProbe(0.5), 0.5),
        (MassMeanProbe(), 0.0),
    ):
        [found] = probe.solve([Design("x", x, targets)], [Problem(0, strength), Problem(1, strength)])
        tolerance = 1e-3 if exact_size == 0 else 1e-9
        for one, label in zip(found, (y, three), strict=True):
            assert relative(one.coef, probe.fit(x, label).coef_) < tolerance


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        (RidgeProbe(-1.0), "alpha is -1.0; give a number of at least 0"),
        (RidgeProbe(task="guess"), "task is 'guess'"),
        (RidgeProbe(class_weight="balanced"), "class_weight is for task='classification'"),
        (RidgeProbe(task="classification", class_weight="heavy"), "class_weight is 'heavy'"),
        (RidgeProbe(task="classification", class_weight={7: 1.0}), "names the class 7"),
        (LdaProbe(1.5), "shrinkage is 1.5; give a number of at least 0 and at most 1"),
        (LdaProbe(priors=[0.5, 0.4]), "with sum 1"),
        (LdaProbe(priors=[0.2, 0.3, 0.5]), "one for each of the 2 classes"),
    ],
)
def test_parameters_that_cannot_be_used_are_refused(data, probe, words):
    with pytest.raises(InvalidInput, match=words):
        probe.fit(data[0], data[1].astype(int))


def test_numbers_that_are_missing_are_refused(data):
    x, _, number, _ = data
    with pytest.raises(MissingLabels, match="in 1 of 900 rows"):
        RidgeProbe().fit(da.from_array(x, chunks=(100, -1)), np.where(np.arange(900) == 5, np.nan, number))
    with pytest.raises(InvalidInput, match="regression needs numbers"):
        RidgeProbe().fit(da.from_array(x, chunks=(100, -1)), np.full(900, "a"))


PROBES = [
    RidgeProbe(progress=False),
    RidgeProbe(task="classification", progress=False),
    MassMeanProbe(progress=False),
    MassMeanProbe(whiten=True, progress=False),
    LdaProbe(progress=False),
]
CHECKS = [
    pytest.param(estimator, check, id=f"{estimator!r}-{check.func.__name__}")
    for probe in PROBES
    for estimator, check in estimator_checks_generator(probe)
    if not check.func.__name__.startswith("check_array_api")  # array API input is not supported
]


@pytest.mark.parametrize(("estimator", "check"), CHECKS)
def test_is_a_scikit_learn_estimator(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the checks feed it what it warns about
        check(estimator)
