"""LoRA adapters in PEFT's format: checked before an engine loads them, and merged for comparison."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millpond.store.errors import InvalidInput

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for `max_lora_rank`."""


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter."""

    name: str
    folder: Path
    rank: int


def read_adapter(folder: str | Path, field: str) -> Adapter:
    """The adapter in `folder`.

    Raises:
        InvalidInput: there is none, or it is of another kind; `field` names where it was asked for.
    """
    path = Path(folder)
    config = _config(path, field)
    if not (path / "adapter_model.safetensors").is_file():
        raise InvalidInput(f"{field}: {str(folder)!r} has no adapter_model.safetensors; save it as safetensors")
    rank = config.get("r")
    if config.get("peft_type") != "LORA" or isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InvalidInput(
            f"{field}: {str(folder)!r} is of type {config.get('peft_type')!r} and rank {rank!r}; give a LoRA adapter"
        )
    return Adapter(path.resolve().name, path, rank)


def _config(path: Path, field: str) -> dict[str, Any]:
    try:
        config = json.loads((path / "adapter_config.json").read_text())
    except OSError:
        raise InvalidInput(
            f"{field}: {str(path)!r} has no adapter_config.json; give the folder of a LoRA adapter in PEFT's format"
        ) from None
    except ValueError as error:
        raise InvalidInput(f"{field}: {path / 'adapter_config.json'} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InvalidInput(f"{field}: {path / 'adapter_config.json'} is no JSON object")
    return config


def engine_rank(rank: int) -> int:
    """The least `max_lora_rank` that vLLM takes for adapters of this rank.

    Raises:
        InvalidInput: there is none.
    """
    for allowed in _RANKS:
        if rank <= allowed:
            return allowed
    raise InvalidInput(f"a LoRA rank of {rank} is above vLLM's limit of {_RANKS[-1]}; use an adapter of a lower rank")


def merge_adapter(model: Any, folder: Path) -> None:
    """Add an adapter's low-rank products to the weights of a Hugging Face model.

    W + (alpha / r) B A (Hu et al. 2021, section 4.1); alpha / sqrt(r) with `use_rslora`.

    Raises:
        InvalidInput: the adapter changes what this cannot merge.
    """
    import torch
    from safetensors.torch import load_file

    config = _config(folder, "adapter")
    for name in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.get(name):
            raise InvalidInput(f"adapter {str(folder)!r} sets {name}, which cannot be merged here")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    if {f"{name}.lora_{side}.weight" for name in names for side in "AB"} != set(tensors):
        raise InvalidInput(
            f"adapter {str(folder)!r} holds more than lora_A and lora_B weights; it cannot be merged here"
        )
    with torch.no_grad():
        for name in sorted(names):
            weight = model.get_submodule(name.removeprefix("base_model.model.")).weight
            product = tensors[f"{name}.lora_B.weight"].float() @ tensors[f"{name}.lora_A.weight"].float()
            weight += (scale * product).to(weight.dtype)
