"""A probe and two SAEs for the tests of reads, and what their formulas give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from millpond.store.artifacts import save_probe, save_sae
from millpond.store.lake import Lake

D_SAE, K = 96, 8
INTERCEPT = np.array([0.5, -1.0])


def coefficients(d_model: int) -> np.ndarray:
    """Of the probe, (2, d_model)."""
    return np.random.default_rng(11).normal(0, 1, (2, d_model))


def make_artifacts(lake: Lake, folder: Path, d_model: int) -> dict[str, dict[str, torch.Tensor]]:
    """A probe of two outputs, a top-k SAE and a JumpReLU SAE; returns the SAEs' weights."""
    save_probe(lake, "lie", coefficients(d_model), INTERCEPT, classes=["lie", "doubt"])
    generator, made = torch.Generator().manual_seed(0), {}
    for name, config in {"topk": {"architecture": "topk", "k": K}, "jump": {"architecture": "jumprelu"}}.items():
        shapes = {"W_enc": (d_model, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, d_model), "b_dec": (d_model,)}
        weights = {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        if name == "jump":
            weights["threshold"] = torch.full((D_SAE,), 1.5)
        (folder / name).mkdir()
        save_file(weights, folder / name / "sae_weights.safetensors")
        (folder / name / "cfg.json").write_text(json.dumps({"d_in": d_model, "d_sae": D_SAE, **config}))
        save_sae(lake, name, folder / name)
        made[name] = weights
    return made


def save_small_sae(lake: Lake, folder: Path, d_in: int, d_sae: int, architecture: str = "jumprelu") -> None:
    """A random SAE under the name of `folder`; top-k ones rescale by the norms of their decoder."""
    generator = torch.Generator().manual_seed(d_sae)
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    weights = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    config: dict[str, Any] = {"architecture": architecture, "d_in": d_in, "d_sae": d_sae}
    if architecture == "topk":
        config |= {"k": 3, "rescale_acts_by_decoder_norm": True}
    else:
        weights["threshold"] = torch.full((d_sae,), 0.3)
    folder.mkdir()
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    save_sae(lake, folder.name, folder)


def dense_codes(weights: dict[str, torch.Tensor], x: np.ndarray) -> np.ndarray:
    """What an SAE's formula gives of rows (n, d_model): all latents (n, D_SAE), in float64."""
    w = {key: tensor.double().numpy() for key, tensor in weights.items()}
    pre = (x.astype(np.float64) - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    if "threshold" in w:
        return np.where(pre > w["threshold"], pre, 0.0)
    kth = np.sort(pre, axis=1)[:, -K][:, None]
    return np.where(pre >= kth, np.maximum(pre, 0), 0.0)


def check_codes(read: Any, dense: np.ndarray, rounding: float) -> None:
    """Stored codes against dense latents (n, d_sae): the largest ones, in order, and none forgotten."""
    indices, values, active = (read[name].values for name in ("indices", "values", "active"))
    slack = 1e-5 * dense.max()
    k = indices.shape[1]
    best = -np.sort(-dense, axis=1)[:, :k]
    np.testing.assert_allclose(values, best, rtol=rounding, atol=slack)
    np.testing.assert_allclose(
        np.take_along_axis(dense, indices.astype(np.int64), axis=1), values, rtol=rounding, atol=slack
    )
    assert all(len(set(row)) == k for row in indices.tolist())
    assert (np.diff(values, axis=1) <= 0).all()
    np.testing.assert_array_equal(active, (dense > 0).sum(1))
