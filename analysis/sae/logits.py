"""What a latent's decoder row does to the next token when it goes straight to the unembedding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millpond.store.errors import InvalidInput

if TYPE_CHECKING:
    from millpond.analysis.sae.estimator import Sae


def unembedding(model: str | Path) -> NDArray[np.float32]:
    """The map (vocabulary, d_model) from the residual stream to logits, the final norm's weight folded in.

    Reads only these tensors of the model's folder.

    Raises:
        InvalidInput: they are not there.
    """
    folder = Path(model)
    index = folder / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    )
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
    found: dict[str, Any] = {}
    wanted = ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight")
    for name in files:
        if (folder / name).exists():
            found |= _tensors(folder / name, wanted)
    matrix = found.get("lm_head.weight", found.get("model.embed_tokens.weight"))
    norm = found.get("model.norm.weight")
    if matrix is None or norm is None:
        raise InvalidInput(f"{folder} has no {' or '.join(wanted[:2])} with {wanted[2]}; logit effects need them")
    if str(config.get("model_type", "")).startswith("gemma"):  # its norms multiply by 1 + weight
        norm = norm + 1
    return np.asarray(matrix * norm)


def logit_effects(
    sae: Sae, matrix: NDArray[np.float32], latents: NDArray[np.int64], n: int = 8
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
    """The `n` tokens whose logits each latent raises and lowers most, by how much for one unit of activation.

    Effects are less their mean over the vocabulary, which moves no probability; the final norm's scale is
    taken as 1.

    Returns:
        tokens and effects raised, tokens and effects lowered, (latents, n) each.
    """
    rows = sae.W_dec_[latents]
    if rows.shape[1] != matrix.shape[1]:
        raise InvalidInput(f"decoder rows have width {rows.shape[1]}, the unembedding {matrix.shape[1]}")
    effects = rows @ matrix.T
    effects -= effects.mean(axis=1, keepdims=True)
    order = np.argsort(effects, axis=1, kind="stable")
    raised, lowered = order[:, ::-1][:, :n], order[:, :n]
    return (
        raised, np.take_along_axis(effects, raised, 1), lowered, np.take_along_axis(effects, lowered, 1)
    )  # fmt: skip


def _tensors(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        held = set(file.keys())
        return {name: file.get_tensor(name).float().numpy() for name in names if name in held}
