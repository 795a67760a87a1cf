"""What a run records of the model that made it, so that its rows can be made again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from millpond.capture.versions import check_vllm_version
from millpond.store.errors import InvalidInput

COMPUTATION = ("config_sha256", "weights_sha256", "adapter", "interventions")
"""What two runs must share for their rows to be of one computation."""


def model_provenance(folder: Path) -> dict[str, Any]:
    """Names, hashes and versions of the model in `folder`; reads all its weights."""
    tokenizer = folder / "tokenizer.json"
    weights = sorted(folder.glob("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    return {
        "model": "/".join(folder.resolve().parts[-2:]),
        "folder": str(folder.resolve()),
        "architecture": (config.get("architectures") or [None])[0],
        "config_sha256": sha256(folder / "config.json"),
        "weight_bytes": sum(path.stat().st_size for path in weights),
        "weights_sha256": {path.name: sha256(path) for path in weights},
        "tokenizer_sha256": sha256(tokenizer) if tokenizer.is_file() else None,
        "vllm": check_vllm_version(),
        "millpond": version("millpond"),
    }


def adapter_provenance(name: str, folder: Path) -> dict[str, Any]:
    """Name and hashes of the LoRA adapter in `folder`, in PEFT's format.

    Raises:
        InvalidInput: the folder holds none.
    """
    files = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    for path in files:
        if not path.is_file():
            raise InvalidInput(
                f"adapter {name!r}: {str(folder)!r} has no {path.name}; give the folder of a LoRA adapter in PEFT's "
                "format, saved as safetensors"
            )
    return {"name": name, "folder": str(folder.resolve()), "sha256": {path.name: sha256(path) for path in files}}


def different_computation(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The first field in which two runs' provenance shows different computations; None if there is none.

    An adapter's name does not count, only its contents.
    """
    for field in COMPUTATION:
        ours, theirs = stored.get(field), wanted.get(field)
        if field == "adapter":
            ours, theirs = (value and value["sha256"] for value in (ours, theirs))
        if (ours or None) != (theirs or None):
            return field
    return None


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
