"""Principal components, fitted in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from millpond.analysis.gram import Covariance, covariance_of, first_mean, gram_bytes
from millpond.analysis.passes import AlignedRows, Pass, join, run_pass
from millpond.analysis.probes.inputs import check_one_hook
from millpond.analysis.tiles import Rows, tiles
from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    from millpond.analysis.passes import RowArray

Vector = NDArray[np.float64]
_SLICE_ROWS = 2048


class PcaReducer(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """The `n_components` directions of largest variance, from the mean and Gram matrix of one pass.

    `fvu` gives the fraction of variance that they leave unexplained: what a sparse autoencoder with
    as many active latents has to beat. Memory: blocks, and half of d * d float64 for each thread.
    """

    mean_: Vector
    components_: Vector
    explained_variance_: Vector
    explained_variance_ratio_: Vector

    def __init__(self, n_components: int, *, progress: bool = True) -> None:
        self.n_components = n_components
        self.progress = progress

    def fit(self, X: RowArray, y: Any = None) -> PcaReducer:
        """Fit to `X` (rows, d_model); `y` is ignored.

        Raises:
            InvalidInput: `n_components` is not between 1 and the width, or a value is not finite.
        """
        import scipy.linalg

        check_one_hook(X)
        X = _two_dimensional(X)
        rows = AlignedRows(X, stored=True)
        width = int(X.shape[1])
        if not 1 <= self.n_components <= width:
            raise InvalidInput(f"n_components is {self.n_components}; give 1 to {width}, the width of X")
        shift = run_pass(Pass(rows.head(4096), first_mean), progress=False)
        one = Pass(rows, Covariance, shift, accumulate=True, result_bytes=gram_bytes(width, 8))
        found = run_pass(one, description="PCA", progress=self.progress)
        n = found[0]
        if not np.isfinite(found[1]).all():
            raise InvalidInput(f"some of the {n:,} rows hold NaN or infinity; leave those rows out")
        if n < 2:
            raise InvalidInput(f"X has {n} row; give at least 2")
        _, mean, covariance = covariance_of(found)
        if not np.isfinite(covariance).all():
            raise InvalidInput("some rows are so large that float32 does not hold their squares; scale X down")
        first = width - self.n_components
        values, vectors = scipy.linalg.eigh(covariance, subset_by_index=[first, width - 1])
        components = vectors[:, ::-1].T
        # scikit-learn's sign: the largest entry of each component is positive
        largest = np.abs(components).argmax(axis=1)
        components = components * np.sign(components[np.arange(len(components)), largest])[:, None]
        self.mean_ = shift + mean
        self.components_ = components
        self.explained_variance_ = np.maximum(values[::-1], 0.0)
        self.explained_variance_ratio_ = self.explained_variance_ / np.trace(covariance)
        self.n_features_in_ = width
        self.n_rows_ = int(n)
        return self

    def transform(self, X: RowArray) -> NDArray[Any]:
        """Coordinates (rows, n_components) of the rows along the components."""
        check_is_fitted(self)
        rows = AlignedRows(_two_dimensional(X), stored=True)
        parts = run_pass(Pass(rows, _project, (self.mean_, self.components_), join), progress=self.progress)
        return np.concatenate(parts)

    def inverse_transform(self, coordinates: NDArray[Any]) -> NDArray[Any]:
        """Rows (rows, d_model) from their coordinates."""
        check_is_fitted(self)
        dtype = coordinates.dtype
        return np.asarray(coordinates @ self.components_.astype(dtype) + self.mean_.astype(dtype))

    def fvu(self, X: RowArray) -> float:
        """Fraction of the variance of `X` (about its own mean) that the components do not explain."""
        check_is_fitted(self)
        rows = AlignedRows(_two_dimensional(X), stored=True)
        one = Pass(rows, _residuals, (self.mean_, self.components_))
        n, residual, total, square = run_pass(one, description="PCA", progress=self.progress)
        return float(residual / (square - float(total @ total) / n))


def _two_dimensional(X: Any) -> Any:
    X = X if hasattr(X, "shape") else np.asarray(X)
    if X.ndim != 2:
        raise InvalidInput(f"X has shape {X.shape}; give (rows, d_model)")
    return X


def _project(state: tuple[Vector, Vector], x: Rows) -> list[NDArray[Any]]:
    mean, components = state
    parts = [tile @ components.T.astype(tile.dtype) for _, tile in tiles(x, mean, rows=_SLICE_ROWS)]
    return [np.concatenate(parts)]


def _residuals(state: tuple[Vector, Vector], x: Rows) -> tuple[int, float, Vector, float]:
    """Rows, squared residual, and sum and squared sum of the rows about the fitted mean."""
    mean, components = state
    residual, square, total = 0.0, 0.0, np.zeros(len(mean))
    for _, tile in tiles(x, mean, rows=_SLICE_ROWS):
        directions = components.astype(tile.dtype)
        total += tile.sum(axis=0, dtype=np.float64)
        square += float(np.square(tile).sum(dtype=np.float64))
        tile -= (tile @ directions.T) @ directions
        residual += float(np.square(tile).sum(dtype=np.float64))
    return len(x), residual, total, square
