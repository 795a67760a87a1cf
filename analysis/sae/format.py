"""The folder in which an autoencoder is kept: SAELens' layout, which SAELens and SAEBench open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millpond.analysis.sae.blocks import SaeWeights
from millpond.store.errors import InvalidInput
from millpond.store.files import write_whole

SAE_LENS_VERSION = "6.54.12"
"""The version whose layout this is; SAELens rewrites configurations that name none as older than 6."""

_NAMES = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
_TRANSCODERS = {"relu": "transcoder", "jumprelu": "jumprelu_transcoder"}
_SKIP_TRANSCODERS = {"relu": "skip_transcoder", "jumprelu": "jumprelu_skip_transcoder"}


def write_sae(
    folder: Path,
    weights: SaeWeights,
    metadata: dict[str, Any],
    ours: dict[str, Any],
    frequency: NDArray[np.float64] | None,
) -> Path:
    """Write `cfg.json` and `sae_weights.safetensors`, and where firing frequencies are known `sparsity.safetensors`.

    `ours` is kept in the metadata under `millpond`. SAELens opens autoencoders of the four architectures,
    and transcoders whose activation is ReLU or JumpReLU; others (crosscoders, TopK transcoders) are written
    in the same way under an architecture of their own name, which it refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    d_in, d_sae = weights.w_enc.shape
    named = {"W_enc": weights.w_enc, "b_enc": weights.b_enc, "W_dec": weights.w_dec, "b_dec": weights.b_dec}
    optional = {"threshold": weights.threshold, "b_gate": weights.b_gate, "r_mag": weights.r_mag}
    named |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    if weights.w_skip is not None:
        # SAELens multiplies the input by the transpose
        named["W_skip"] = weights.w_skip.T
    if weights.architecture == "gated":
        named["b_mag"] = named.pop("b_enc")
    cfg: dict[str, Any] = {
        "architecture": _architecture(weights, ours), "d_in": d_in, "d_sae": d_sae, "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": weights.tied, "normalize_activations": "none",
        "reshape_activations": "none",
    }  # fmt: skip
    if weights.architecture == "topk":
        cfg |= {"k": weights.k, "rescale_acts_by_decoder_norm": False}
    if not weights.tied:
        cfg["d_out"] = weights.w_dec.shape[1]
    cfg["metadata"] = {
        "sae_lens_version": SAE_LENS_VERSION, "model_name": "", "hook_name": "", "hook_head_index": None,
        "prepend_bos": None, "context_size": None, "dataset_path": "",
        **metadata,
        "millpond": ours,
    }  # fmt: skip
    _write_tensors(folder / "sae_weights.safetensors", named)
    if frequency is not None:
        logs = np.log10(np.maximum(frequency, 1e-10)).astype(np.float32)
        _write_tensors(folder / "sparsity.safetensors", {"sparsity": logs})
    write_whole(folder / "cfg.json", (json.dumps(cfg, indent=1) + "\n").encode())
    return folder


def _architecture(weights: SaeWeights, ours: dict[str, Any]) -> str:
    if ours.get("kind") == "crosscoder":
        return f"{weights.architecture}_crosscoder"
    if weights.tied:
        return _NAMES[weights.architecture]
    names = _TRANSCODERS if weights.w_skip is None else _SKIP_TRANSCODERS
    return names.get(weights.architecture, f"{weights.architecture}_transcoder")


def _write_tensors(path: Path, tensors: dict[str, Any]) -> None:
    from safetensors.numpy import save

    write_whole(path, save({name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}))


def read_sae(folder: Path) -> tuple[SaeWeights, dict[str, Any], NDArray[np.float64] | None]:
    """Weights, `cfg.json` and firing frequencies of the autoencoder in `folder`, whoever wrote it.

    Raises:
        InvalidInput: there is none, or it is of a kind that is not supported.
    """
    if not (folder / "cfg.json").is_file():
        raise InvalidInput(f"{folder} holds no cfg.json; give a folder that Sae.save or SAELens wrote")
    cfg = json.loads((folder / "cfg.json").read_text())
    name = str(cfg.get("architecture"))
    if name in ("standard", "transcoder", "skip_transcoder"):
        name = "relu"
    for suffix in ("_skip_transcoder", "_transcoder", "_crosscoder"):
        name = name.removesuffix(suffix)
    if name not in _NAMES:
        raise InvalidInput(
            f"{folder} holds an autoencoder of architecture {cfg.get('architecture')!r}; "
            f"those of {', '.join(_NAMES.values())} and their transcoders can be read"
        )
    for field, neutral in (("normalize_activations", "none"), ("reshape_activations", "none")):
        if cfg.get(field, neutral) not in (neutral, None):
            raise InvalidInput(
                f"{folder} has {field} {cfg[field]!r}; fold it into the weights first (SAE.fold_activation_norm_scaling_factor)"
            )
    tensors = _read_tensors(folder / "sae_weights.safetensors")
    d_in, d_sae, d_out = int(cfg["d_in"]), int(cfg["d_sae"]), int(cfg.get("d_out") or cfg["d_in"])
    shapes = {
        "W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_out), "b_dec": (d_out,), "threshold": (d_sae,),
        "b_gate": (d_sae,), "b_mag": (d_sae,), "r_mag": (d_sae,), "W_skip": (d_out, d_in),
    }  # fmt: skip
    needed = {"W_enc", "W_dec", "b_dec"} | ({"b_gate", "b_mag", "r_mag"} if name == "gated" else {"b_enc"})
    needed |= {"threshold"} if name == "jumprelu" else set()
    for tensor in sorted(needed | (tensors.keys() & shapes.keys())):
        if tensor not in tensors or tensors[tensor].shape != shapes[tensor]:
            found = tensors[tensor].shape if tensor in tensors else "missing"
            raise InvalidInput(f"{folder}: {tensor} is {found}, cfg.json says {shapes[tensor]}; restore the folder")
    if name == "topk" and cfg.get("rescale_acts_by_decoder_norm"):  # k are chosen by activation times decoder norm
        norms = np.linalg.norm(tensors["W_dec"], axis=1)
        tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norms, tensors["b_enc"] * norms
        tensors["W_dec"] = tensors["W_dec"] / np.maximum(norms, 1e-30)[:, None]
    weights = SaeWeights(
        name,
        tensors["W_enc"],
        tensors["b_mag" if name == "gated" else "b_enc"],
        tensors["W_dec"],
        tensors["b_dec"],
        threshold=tensors.get("threshold"),
        k=int(cfg["k"]) if name == "topk" else None,
        b_gate=tensors.get("b_gate"),
        r_mag=tensors.get("r_mag"),
        tied=bool(cfg.get("apply_b_dec_to_input", "transcoder" not in str(cfg["architecture"]))),
        w_skip=None if "W_skip" not in tensors else np.ascontiguousarray(tensors["W_skip"].T),
    )
    frequency = None
    if (folder / "sparsity.safetensors").is_file():
        frequency = 10.0 ** _read_tensors(folder / "sparsity.safetensors")["sparsity"].astype(np.float64)
    return weights, cfg, frequency


def _read_tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    """Tensors as float32, bfloat16 ones too, which safetensors does not give to NumPy."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).float().numpy() for name in file.keys()}  # noqa: SIM118 - no mapping
