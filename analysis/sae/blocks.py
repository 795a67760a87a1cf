"""What passes compute with a trained autoencoder, block by block, in NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Strongest = tuple[Floats, NDArray[np.int64]]

_SLICE_BYTES = 64 << 20


@dataclass(frozen=True)
class SaeWeights:
    """A JumpReLU autoencoder: active where `(x - b_dec) @ w_enc + b_enc` exceeds the threshold."""

    w_enc: Floats
    """(d_in, d_sae)"""
    b_enc: Floats
    w_dec: Floats
    """(d_sae, d_in), rows of norm 1"""
    b_dec: Floats
    threshold: float

    def only(self, latents: NDArray[np.int64]) -> SaeWeights:
        """The autoencoder with some of its latents."""
        return SaeWeights(
            self.w_enc[:, latents], self.b_enc[latents], self.w_dec[latents], self.b_dec, self.threshold
        )  # fmt: skip


def encode(weights: SaeWeights, x: NDArray[Any]) -> Floats:
    """Activations (rows, d_sae) of the latents."""
    latents = (np.asarray(x) - weights.b_dec).astype(np.float32, copy=False) @ weights.w_enc
    latents += weights.b_enc
    latents[latents <= weights.threshold] = 0
    return np.asarray(latents)


def evaluate(weights: SaeWeights, x: NDArray[Any]) -> dict[str, Any]:
    """Sums over rows: residual, moments about `b_dec`, cosine similarity, and firings of each latent."""
    import scipy.sparse

    d_in, d_sae = weights.w_enc.shape
    sums: dict[str, Any] = {
        "rows": len(x), "bad": 0, "residual": 0.0, "square": 0.0, "cosine": 0.0,
        "total": np.zeros(d_in), "fired": np.zeros(d_sae, np.int64),
    }  # fmt: skip
    for part in _slices(weights, x):
        if bad := int((~np.isfinite(part).all(axis=1)).sum()):
            sums["bad"] += bad
            continue
        latents = scipy.sparse.csr_matrix(encode(weights, part))
        centred = (part - weights.b_dec).astype(np.float32, copy=False)
        rebuilt = np.asarray(latents @ weights.w_dec)
        sums["residual"] += float(np.square(centred - rebuilt).sum(dtype=np.float64))
        sums["square"] += float(np.square(centred).sum(dtype=np.float64))
        sums["total"] += centred.sum(axis=0, dtype=np.float64)
        sums["fired"] += np.bincount(latents.indices, minlength=d_sae)
        rebuilt += weights.b_dec
        norms = np.linalg.norm(part, axis=1) * np.linalg.norm(rebuilt, axis=1)
        sums["cosine"] += float(((part * rebuilt).sum(axis=1) / np.maximum(norms, 1e-30)).sum(dtype=np.float64))
    return sums


def count(weights: SaeWeights, x: NDArray[Any]) -> tuple[NDArray[np.int64], int]:
    """How many rows activate each latent, and how many rows there are."""
    fired = np.zeros(weights.w_enc.shape[1], np.int64)
    for part in _slices(weights, x):
        fired += np.count_nonzero(encode(weights, part), axis=0)
    return fired, len(x)


def strongest(state: tuple[SaeWeights, int], x: NDArray[Any], numbers: NDArray[np.int64]) -> Strongest:
    """Values and row numbers (latents, n) of the rows that activate each latent most, strongest first."""
    weights, n = state
    merge, first = Merge(n), 0
    latents = weights.w_enc.shape[1]
    best: Strongest = (np.zeros((latents, 0), np.float32), np.zeros((latents, 0), np.int64))
    for part in _slices(weights, x):
        values = encode(weights, part).T
        rows = np.broadcast_to(numbers[first : first + len(part)], values.shape)
        best = merge(best, (values, rows))
        first += len(part)
    return best


class Merge:
    """Combines two results of `strongest`, the left one from earlier rows."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, left: Strongest, right: Strongest) -> Strongest:
        """Keep the strongest of both; ties go to the earlier row."""
        values = np.concatenate([left[0], right[0]], axis=1)
        rows = np.concatenate([left[1], right[1]], axis=1)
        order = np.argsort(-values, axis=1, kind="stable")[:, : self.n]
        return np.take_along_axis(values, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _slices(weights: SaeWeights, x: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Slices of the block whose activations fit in `_SLICE_BYTES`."""
    rows = max(1, _SLICE_BYTES // (4 * weights.w_enc.shape[1]))
    for start in range(0, len(x), rows):
        yield x[start : start + rows]
