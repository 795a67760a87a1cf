"""How well a trained autoencoder reconstructs held-out rows: one streaming pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.passes import AlignedRows, Pass, run_pass
from millpond.analysis.sae import blocks
from millpond.analysis.sae.blocks import SaeWeights
from millpond.store.errors import InvalidInput
from millpond.store.result import Value

FREQUENCY_EDGES = np.array([0.0, *(10.0 ** (np.arange(-12, 1) / 2)), np.inf])
"""Edges of the firing histogram: below 1e-6 (with latents that never fired), then half decades up to 1."""


def run(weights: SaeWeights, inputs: Sequence[Any], outputs: Sequence[Any] | None, progress: bool) -> dict[str, Any]:
    """Sums over the rows; `outputs` are what to reconstruct, if not the inputs."""
    same = outputs is None or all(a is b for a, b in zip(inputs, outputs, strict=False))
    given = [*inputs] if same else [*inputs, *(outputs or ())]
    widths = [int(np.shape(array)[1]) for array in (inputs if same else outputs or inputs)]
    if sum(widths) != weights.w_dec.shape[1]:
        raise InvalidInput(f"targets have width {sum(widths)}; give {weights.w_dec.shape[1]}, as in fit")
    state = (weights, len(inputs), same)
    sums: dict[str, Any] = run_pass(Pass(AlignedRows(*given), evaluate, state), description="SAE", progress=progress)
    if sums["bad"]:
        raise InvalidInput(f"{sums['bad']:,} of {sums['rows']:,} rows hold NaN or infinity; leave those rows out")
    return sums | {"widths": widths}


def summary(weights: SaeWeights, sums: dict[str, Any]) -> dict[str, Value]:
    """The values of an evaluation.

    l0: active latents a row. fvu: squared error over the variance about the mean, both summed over all
    rows and dimensions; explained_variance is 1 - fvu, so predicting the mean scores 0. mse: a row and
    dimension. cosine: mean similarity of rows with their reconstructions. dead_latents: share that no
    row activated. frequency_histogram: latents in each interval of `FREQUENCY_EDGES`. decoder_similarity:
    mean, over the latents or 4,096 of them, of the greatest cosine similarity of its decoder row with another.
    """
    n, d_out = sums["rows"], weights.w_dec.shape[1]
    variance = sums["square"] - np.square(sums["total"]) / n
    residual, spread = sums["residual"], variance.sum()
    values: dict[str, Value] = {
        "l0": float(sums["fired"].sum() / n),
        "fvu": float(residual.sum() / spread),
        "explained_variance": float(1 - residual.sum() / spread),
        "mse": float(residual.sum() / (n * d_out)),
        "cosine": float(sums["cosine"] / n),
        "dead_latents": float((sums["fired"] == 0).mean()),
        "decoder_similarity": float(nearest(weights, 1, 4096)[1].mean()) if weights.d_sae > 1 else 0.0,
        "frequency_histogram": np.histogram(sums["fired"] / n, FREQUENCY_EDGES)[0],
    }
    if len(sums["widths"]) > 1:
        ends = np.cumsum(sums["widths"])[:-1]
        for number, (part, whole) in enumerate(zip(np.split(residual, ends), np.split(variance, ends), strict=True)):
            values[f"fvu_{number}"] = float(part.sum() / whole.sum())
    return values


def nearest(weights: SaeWeights, n: int, sample: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For each latent, or `sample` evenly spaced ones, the `n` others with the most similar decoder rows.

    Returns their numbers and cosine similarities, (latents, n).
    """
    rows = weights.w_dec / np.maximum(np.linalg.norm(weights.w_dec, axis=1, keepdims=True), 1e-30)
    n = min(n, len(rows) - 1)
    asked = np.linspace(0, len(rows) - 1, min(len(rows), sample or len(rows))).astype(np.int64)
    which, how = np.empty((len(asked), n), np.int64), np.empty((len(asked), n), np.float32)
    for part in blocks.slices(weights, len(asked)):
        similar = rows[asked[part]] @ rows.T
        similar[np.arange(len(similar)), asked[part]] = -2
        top = np.argpartition(-similar, n - 1, axis=1)[:, :n]
        order = np.argsort(-np.take_along_axis(similar, top, 1), axis=1, kind="stable")
        which[part] = np.take_along_axis(top, order, 1)
        how[part] = np.take_along_axis(similar, which[part], 1)
    return which, how


def evaluate(state: tuple[SaeWeights, int, bool], *given: NDArray[Any]) -> dict[str, Any]:
    """Sums over rows: residual and moments of each dimension, cosine similarity, and firings of each latent."""
    import scipy.sparse

    weights, n_inputs, same = state
    x = blocks.side_by_side(given[:n_inputs])
    y = x if same else blocks.side_by_side(given[n_inputs:])
    d_out = y.shape[1]
    sums: dict[str, Any] = {
        "rows": len(x), "bad": 0, "cosine": 0.0, "residual": np.zeros(d_out),
        "square": np.zeros(d_out), "total": np.zeros(d_out), "fired": np.zeros(weights.d_sae, np.int64),
    }  # fmt: skip
    for part in blocks.slices(weights, len(x)):
        if bad := int((~(np.isfinite(x[part]).all(axis=1) & np.isfinite(y[part]).all(axis=1))).sum()):
            sums["bad"] += bad
            continue
        latents = scipy.sparse.csr_matrix(blocks.encode(weights, x[part]))
        rebuilt = blocks.reconstruct(weights, latents, x[part])
        target = y[part].astype(np.float32, copy=False)
        # moments about the decoder's bias: about 0 they would cancel where the mean is far from it
        centred = target - weights.b_dec
        sums["residual"] += np.square(target - rebuilt).sum(axis=0, dtype=np.float64)
        sums["square"] += np.square(centred).sum(axis=0, dtype=np.float64)
        sums["total"] += centred.sum(axis=0, dtype=np.float64)
        sums["fired"] += np.bincount(latents.indices, minlength=weights.d_sae)
        norms = np.linalg.norm(target, axis=1) * np.linalg.norm(rebuilt, axis=1)
        sums["cosine"] += float(((target * rebuilt).sum(axis=1) / np.maximum(norms, 1e-30)).sum(dtype=np.float64))
    return sums


def count(weights: SaeWeights, x: NDArray[Any]) -> tuple[NDArray[np.int64], int]:
    """How many rows activate each latent, and how many rows there are."""
    fired = np.zeros(weights.d_sae, np.int64)
    for part in blocks.slices(weights, len(x)):
        fired += np.count_nonzero(blocks.encode(weights, x[part]), axis=0)
    return fired, len(x)
