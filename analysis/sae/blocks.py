"""What passes compute with a trained autoencoder, block by block, in NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_SLICE_BYTES = 64 << 20


@dataclass(frozen=True)
class SaeWeights:
    """A trained autoencoder, transcoder or crosscoder as it is used: on raw rows of its hooks side by side.

    The pre-activations are `(x - b_dec) @ w_enc + b_enc`, without `b_dec` where `tied` is off.
    """

    architecture: str
    """relu; jumprelu: active above `threshold`; topk: the k largest of a row; gated: active where the gate is."""
    w_enc: Floats
    """(d_in, d_sae)"""
    b_enc: Floats
    w_dec: Floats
    """(d_sae, d_out)"""
    b_dec: Floats
    threshold: Floats | None = None
    """(d_sae,)"""
    k: int | None = None
    b_gate: Floats | None = None
    r_mag: Floats | None = None
    tied: bool = True
    w_skip: Floats | None = None
    """(d_in, d_out) of a transcoder whose input is also mapped linearly to the output."""

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.w_dec)


def encode(weights: SaeWeights, x: NDArray[Any]) -> Floats:
    """Activations (rows, d_sae) of the latents."""
    x = np.asarray(x)
    centred = (x - weights.b_dec if weights.tied else x).astype(np.float32, copy=False)
    latents: Floats = centred @ weights.w_enc
    if weights.architecture == "gated":
        assert weights.b_gate is not None
        assert weights.r_mag is not None
        open_gate = latents + weights.b_gate > 0
        latents *= np.exp(weights.r_mag)
        latents += weights.b_enc
        np.maximum(latents, 0, out=latents)
        latents *= open_gate
        return latents
    latents += weights.b_enc
    if weights.architecture == "jumprelu":
        latents[latents <= np.maximum(weights.threshold, 0)] = 0  # type: ignore[arg-type]
        return latents
    np.maximum(latents, 0, out=latents)
    return latents if weights.architecture == "relu" else _keep_largest(latents, weights.k or weights.d_sae)


def _keep_largest(latents: Floats, k: int) -> Floats:
    """The k largest of each row; of equal ones at the cut the first."""
    width = latents.shape[1]
    if k >= width:
        return latents
    cut = np.partition(latents, width - k, axis=1)[:, width - k, None]
    room = k - (latents > cut).sum(axis=1, keepdims=True)
    ties = latents == cut
    tied_rows = np.flatnonzero(ties.sum(axis=1) > room[:, 0])
    latents[latents < cut] = 0
    if len(tied_rows):
        late = ties[tied_rows] & (np.cumsum(ties[tied_rows], axis=1) > room[tied_rows])
        latents[tied_rows] = np.where(late, 0, latents[tied_rows])
    return latents


def reconstruct(weights: SaeWeights, latents: Any, x: NDArray[Any]) -> Floats:
    """Reconstructions (rows, d_out) from activations, dense or sparse, and for a skip transcoder the inputs."""
    rebuilt = np.asarray(latents @ weights.w_dec) + weights.b_dec
    return rebuilt if weights.w_skip is None else rebuilt + x.astype(np.float32, copy=False) @ weights.w_skip


def slices(weights: SaeWeights, n_rows: int) -> Iterator[slice]:
    """Slices of a block whose activations fit in 64 MiB."""
    rows = max(1, _SLICE_BYTES // (4 * weights.d_sae))
    for start in range(0, n_rows, rows):
        yield slice(start, min(start + rows, n_rows))


def side_by_side(blocks: tuple[NDArray[Any], ...] | list[NDArray[Any]]) -> NDArray[Any]:
    """The hooks of a crosscoder as one row each."""
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
