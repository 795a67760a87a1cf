import dask.array as da
import numpy as np
import pytest
from sklearn.decomposition import PCA

from millpond.analysis import PcaReducer
from millpond.store.errors import InvalidInput


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1500, 20)) @ rng.standard_normal((20, 20)) * np.arange(1, 21) ** -0.7 + 3
    x[:, 4] = x[:, 4] * 50 + 2000
    return x.astype(np.float32)


@pytest.mark.parametrize("chunk", [37, 1500])
def test_equals_scikit_learn(rows, chunk):
    reference = PCA(5).fit(rows.astype(np.float64))
    lazy = da.from_array(rows, chunks=(chunk, -1))
    found = PcaReducer(5).fit(lazy)
    np.testing.assert_allclose(found.mean_, reference.mean_, rtol=1e-6)
    np.testing.assert_allclose(found.components_, reference.components_, atol=1e-4)
    np.testing.assert_allclose(found.explained_variance_ratio_, reference.explained_variance_ratio_, atol=1e-6)
    np.testing.assert_allclose(found.transform(lazy), reference.transform(rows), atol=0.02)
    rebuilt = found.inverse_transform(found.transform(lazy))
    np.testing.assert_allclose(rebuilt, reference.inverse_transform(reference.transform(rows)), atol=0.02)


def test_fvu_is_the_share_of_variance_left(rows):
    train, test = rows[:1000], rows[1000:]
    found = PcaReducer(6).fit(train)
    reference = PCA(6).fit(train.astype(np.float64))
    left = test - reference.inverse_transform(reference.transform(test.astype(np.float64)))
    expected = (left**2).sum() / ((test - test.mean(axis=0, dtype=np.float64)) ** 2).sum()
    assert found.fvu(test) == pytest.approx(expected, rel=1e-4)
    assert PcaReducer(20).fit(train).fvu(train) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("components", "x", "words"),
    [
        (0, np.ones((4, 3)), "n_components is 0"),
        (4, np.ones((4, 3)), "give 1 to 3"),
        (1, np.ones(3), "shape"),
        (1, np.full((4, 3), np.nan), "NaN"),
        (1, np.ones((1, 3)), "at least 2"),
    ],
)
def test_what_cannot_be_fitted_is_refused(components, x, words):
    with pytest.raises(InvalidInput, match=words):
        PcaReducer(components).fit(x)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_rows_whose_squares_float32_does_not_hold_are_refused():
    rows = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32) * np.float32(1e30)
    with pytest.raises(InvalidInput, match="scale X down"):
        PcaReducer(1).fit(rows)
