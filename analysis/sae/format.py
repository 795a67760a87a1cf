"""The folder in which an autoencoder is kept: SAELens' layout, which SAELens and SAEBench open."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from millpond.analysis.sae.blocks import SaeWeights
from millpond.analysis.sae.config import SaeConfig
from millpond.store.errors import InvalidInput

SAE_LENS_VERSION = "6.54.12"
"""The version whose layout this is; SAELens rewrites configurations that name none as older than 6."""


def write_sae(
    folder: Path, weights: SaeWeights, config: SaeConfig, metadata: dict[str, Any], trained_on: dict[str, Any]
) -> Path:
    """Write `cfg.json` and `sae_weights.safetensors`; BatchTopK is a JumpReLU with one threshold for all latents."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    d_in, d_sae = weights.w_enc.shape
    tensors = {
        "W_enc": weights.w_enc, "b_enc": weights.b_enc, "W_dec": weights.w_dec, "b_dec": weights.b_dec,
        "threshold": np.full(d_sae, weights.threshold, np.float32),
    }  # fmt: skip
    save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "sae_weights.safetensors"
    )
    cfg = {
        "architecture": "jumprelu", "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAE_LENS_VERSION, "model_name": "", "hook_name": "", "hook_head_index": None,
            "prepend_bos": None, "context_size": None, "dataset_path": "",
            **metadata,
            "millpond": {"config": asdict(config), "trained_on": trained_on},
        },
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(cfg, indent=1) + "\n")
    return folder


def read_sae(folder: Path) -> tuple[SaeWeights, SaeConfig, dict[str, Any]]:
    """Weights, training configuration and origin of the autoencoder in `folder`.

    Raises:
        InvalidInput: there is none, or `write_sae` did not write it.
    """
    from safetensors.numpy import load_file

    if not (folder / "cfg.json").is_file():
        raise InvalidInput(f"{folder} holds no cfg.json; give a folder that BatchTopKSae.save wrote")
    cfg = json.loads((folder / "cfg.json").read_text())
    ours = cfg.get("metadata", {}).get("millpond")
    if cfg.get("architecture") != "jumprelu" or ours is None:
        raise InvalidInput(
            f"{folder} holds an autoencoder of architecture {cfg.get('architecture')!r} that BatchTopKSae.save did not "
            "write; open it with sae_lens.SAE.load_from_disk"
        )
    tensors = load_file(folder / "sae_weights.safetensors")
    weights = SaeWeights(
        tensors["W_enc"], tensors["b_enc"], tensors["W_dec"], tensors["b_dec"], float(tensors["threshold"][0])
    )
    return weights, SaeConfig(**ours["config"]), ours["trained_on"]
