"""Principal components, fitted in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from millpond.analysis.passes import AlignedRows, Pass, join, run_pass
from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    from millpond.analysis.passes import RowArray

Vector = NDArray[np.float64]
_SLICE_ROWS = 8192


class PcaReducer(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """The `n_components` directions of largest variance, from the mean and Gram matrix of one pass.

    `fvu` gives the fraction of variance that they leave unexplained: what a sparse autoencoder with
    as many active latents has to beat. Memory: blocks, and d * d float64 a block in flight.
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

        X = _two_dimensional(X)
        rows = AlignedRows(X)
        width = int(X.shape[1])
        if not 1 <= self.n_components <= width:
            raise InvalidInput(f"n_components is {self.n_components}; give 1 to {width}, the width of X")
        shift = run_pass(Pass(rows.head(4096), _first_mean), progress=False)
        n, total, gram = run_pass(Pass(rows, _gram, shift), description="PCA", progress=self.progress)
        if not np.isfinite(total).all():
            raise InvalidInput(f"some of the {n:,} rows hold NaN or infinity; leave those rows out")
        if n < 2:
            raise InvalidInput(f"X has {n} row; give at least 2")
        mean = total / n
        covariance = (gram - n * np.outer(mean, mean)) / (n - 1)
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
        rows = AlignedRows(_two_dimensional(X))
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
        rows = AlignedRows(_two_dimensional(X))
        one = Pass(rows, _residuals, (self.mean_, self.components_))
        n, residual, total, square = run_pass(one, description="PCA", progress=self.progress)
        return float(residual / (square - float(total @ total) / n))


def _two_dimensional(X: Any) -> Any:
    X = X if hasattr(X, "shape") else np.asarray(X)
    if X.ndim != 2:
        raise InvalidInput(f"X has shape {X.shape}; give (rows, d_model)")
    return X


def _first_mean(state: None, x: NDArray[Any]) -> Vector:
    mean = np.asarray(x.mean(axis=0, dtype=np.float64))
    return np.where(np.isfinite(mean), mean, 0.0)


def _parts(x: NDArray[Any], shift: Vector) -> list[NDArray[Any]]:
    dtype = np.float32 if x.dtype in (np.float32, np.float16) else np.float64
    low = shift.astype(dtype)
    return [np.subtract(x[i : i + _SLICE_ROWS], low, dtype=dtype) for i in range(0, len(x), _SLICE_ROWS)]


def _gram(shift: Vector, x: NDArray[Any]) -> tuple[int, Vector, Vector]:
    total, gram = np.zeros(len(shift)), np.zeros((len(shift), len(shift)))
    for part in _parts(x, shift):
        total += part.sum(axis=0, dtype=np.float64)
        gram += part.T @ part
    return len(x), total, gram


def _project(state: tuple[Vector, Vector], x: NDArray[Any]) -> list[NDArray[Any]]:
    mean, components = state
    return [part @ components.T.astype(part.dtype) for part in _parts(x, mean)]


def _residuals(state: tuple[Vector, Vector], x: NDArray[Any]) -> tuple[int, float, Vector, float]:
    """Rows, squared residual, and sum and squared sum of the rows about the fitted mean."""
    mean, components = state
    residual, square, total = 0.0, 0.0, np.zeros(len(mean))
    for part in _parts(x, mean):
        directions = components.astype(part.dtype)
        total += part.sum(axis=0, dtype=np.float64)
        square += float(np.square(part).sum(dtype=np.float64))
        part -= (part @ directions.T) @ directions
        residual += float(np.square(part).sum(dtype=np.float64))
    return len(x), residual, total, square
