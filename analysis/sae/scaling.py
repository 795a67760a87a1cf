"""Centring and scaling of inputs, and the way back: what is kept works on raw activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from millpond.analysis.sae.blocks import SaeWeights
from millpond.store.errors import InvalidInput

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Scale:
    """`(x - mean) * factor` has mean squared norm d."""

    mean: Doubles
    factor: float

    def apply(self, rows: Tensor) -> Tensor:
        """Scaled rows, float32."""
        mean = torch.from_numpy(self.mean.astype(np.float32)).to(rows.device)
        return (rows - mean).mul_(self.factor)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"mean": torch.from_numpy(self.mean), "factor": self.factor}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Scale:
        """What `state` gave."""
        return cls(state["mean"].numpy(), state["factor"])


def scale_of_rows(sample: NDArray[Any]) -> Scale:
    """The scale of some rows (rows, d)."""
    mean = sample.mean(axis=0, dtype=np.float64)
    return scale_of_moments(mean, float(np.square(sample - mean).sum(dtype=np.float64) / len(sample)))


def scale_of_moments(mean: NDArray[Any], variance: float) -> Scale:
    """The scale of rows with this mean (d,) and this variance, summed over the dimensions."""
    if not variance > 0:
        raise InvalidInput("all rows of X are equal; there is nothing to learn from them")
    return Scale(np.asarray(mean, np.float64), float(np.sqrt(len(mean) / variance)))


def geometric_median(rows: Tensor, steps: int = 100) -> Tensor:
    """The point with the least sum of distances to `rows` (Weiszfeld, 1937), to about 1e-6 of the rows' distance."""
    point = rows.mean(0)
    for _ in range(steps):
        weight = 1 / (rows - point).norm(dim=1).clamp_min(1e-12)
        moved = weight @ rows / weight.sum()
        done = float((moved - point).norm() * weight.sum()) < 1e-6 * len(rows)  # of the rows' harmonic mean distance
        point = moved
        if done:
            break
    return point


def unscaled(
    parameters: dict[str, Tensor],
    inputs: Sequence[Scale],
    outputs: Sequence[Scale],
    *,
    tied: bool,
    architecture: str,
    k: int | None,
    threshold: float | None,
) -> SaeWeights:
    """The trained weights for raw activations, with decoder rows of norm 1 (TopK: of the mean norm 1).

    A latent's activation is in units of the output, so that it says how far the latent moves it.
    """
    own = {name: tensor.detach().cpu().double().numpy() for name, tensor in parameters.items()}
    mean_in, factor_in = _joined(inputs)
    mean_out, factor_out = _joined(outputs)
    w_dec = own["w_dec"] / factor_out
    norm = np.linalg.norm(w_dec, axis=1)
    if architecture == "topk":  # one factor for all latents, so that their order stays
        norm[:] = norm.mean()
    norm = np.maximum(norm, 1e-30)
    w_enc = own["w_enc"].T * factor_in[:, None]
    b_dec = mean_out + own["b_dec"] / factor_out
    # tied encoders see raw inputs less b_dec; the others less nothing, so their bias takes the mean in
    moved = np.zeros(len(norm)) if tied else (mean_in * factor_in) @ own["w_enc"].T
    skip = None
    if "w_skip" in own:
        skip = own["w_skip"] * factor_in[:, None] / factor_out
        b_dec -= mean_in @ skip
    gate_bias = own["b_gate"] - moved if "b_gate" in own else None
    b_enc = own["b_enc"] - (moved * np.exp(own["r_mag"]) if gate_bias is not None else moved)
    cut: Any = None
    if "log_threshold" in own:
        cut = np.exp(own["log_threshold"]) * norm
    elif threshold is not None:
        cut = threshold * norm
    kinds = {"batchtopk": "jumprelu", "matryoshka": "jumprelu"}
    floats = {
        "w_enc": w_enc * norm,
        "b_enc": b_enc * norm,
        "w_dec": w_dec / norm[:, None],
        "b_dec": b_dec,
        "threshold": cut,
        "b_gate": None if gate_bias is None else gate_bias * norm,
        "r_mag": own.get("r_mag"),
        "w_skip": skip,
    }
    return SaeWeights(
        kinds.get(architecture, architecture),
        **{name: None if value is None else np.ascontiguousarray(value, np.float32) for name, value in floats.items()},  # type: ignore[arg-type]
        k=k if architecture == "topk" else None,
        tied=tied,
    )


def _joined(scales: Sequence[Scale]) -> tuple[Doubles, Doubles]:
    """Mean and factor of each dimension of the hooks side by side."""
    return (
        np.concatenate([scale.mean for scale in scales]),
        np.concatenate([np.full(len(scale.mean), scale.factor) for scale in scales]),
    )
