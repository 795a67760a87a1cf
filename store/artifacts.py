"""Artifacts: directions, probes and SAEs kept in a lake under a name, for interventions and further jobs.

An artifact is one safetensors file, `artifacts/<name>.safetensors`; what describes it is in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import google_crc32c
import numpy as np
from numpy.typing import ArrayLike, NDArray

from millpond.store.errors import ArtifactNotFound, InvalidInput, LakeCorrupt
from millpond.store.manifest import check_run_name

if TYPE_CHECKING:
    from millpond.store.lake import Lake

Kind = Literal["vector", "probe", "sae"]
"""vector: tensor `vector` (d_model,). probe: `coef` (n_outputs, d_model) and `intercept` (n_outputs,).
sae: SAELens' tensors, with its cfg.json as the configuration."""


@dataclass(frozen=True)
class Artifact:
    """One artifact as it is stored; never changed after it was saved."""

    name: str
    kind: Kind
    config: dict[str, Any]
    provenance: dict[str, Any]
    data: bytes
    """A safetensors file."""
    checksum: str
    """crc32c of the tensors, 8 hexadecimal digits."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The tensors as NumPy arrays; NumPy has no bfloat16, so SAEs are better loaded with torch."""
        from safetensors.numpy import load

        return dict(load(self.data))


def save_artifact(
    lake: Lake,
    name: str,
    kind: Kind,
    tensors: Mapping[str, ArrayLike] | bytes,
    *,
    config: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Keep `tensors` (arrays, or the bytes of a safetensors file) in `lake` under `name`.

    Raises:
        InvalidInput: the name is taken or not allowed, or a value is not finite.
    """
    from safetensors.numpy import save

    check_run_name(name)
    if isinstance(tensors, bytes):
        data = tensors
    else:
        arrays = {key: np.ascontiguousarray(values) for key, values in tensors.items()}
        for key, values in arrays.items():
            if not np.isfinite(values).all():
                raise InvalidInput(f"artifact {name!r}: {key} holds a value that is not finite")
        data = save(arrays)
    header, body = _split(data)
    header["__metadata__"] = {
        "format": "millpond-artifact",
        "version": "1",
        "kind": kind,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": json.dumps(dict(config or {})),
        "provenance": json.dumps(dict(provenance or {})),
        "crc32c": _digits(body),
    }
    if not lake.storage.create(_path(name), _join(header, body)):
        raise InvalidInput(f"artifact {name!r} exists; artifacts never change: choose another name")


def load_artifact(lake: Lake, name: str, kind: Kind | None = None) -> Artifact:
    """The artifact called `name`.

    Raises:
        ArtifactNotFound: the lake has none of that name.
        InvalidInput: it is not of `kind`.
        LakeCorrupt: its bytes are not those that were saved.
    """
    check_run_name(name)
    try:
        data = lake.storage.get(_path(name))
    except FileNotFoundError:
        held = ", ".join(artifact_names(lake)) or "none"
        raise ArtifactNotFound(f"artifact {name!r} is not in the lake, which holds {held}; save it first") from None
    try:
        header, body = _split(data)
        metadata = header["__metadata__"]
        config, provenance = json.loads(metadata["config"]), json.loads(metadata["provenance"])
        if metadata["crc32c"] != _digits(body):
            raise ValueError("its checksum is another")
    except (ValueError, KeyError, TypeError) as error:
        raise LakeCorrupt(f"artifact {name!r} is not what was saved ({error}); save it again") from error
    if kind is not None and metadata["kind"] != kind:
        raise InvalidInput(f"artifact {name!r} is a {metadata['kind']}; give the name of a {kind}")
    return Artifact(name, metadata["kind"], config, provenance, data, metadata["crc32c"])


def artifact_names(lake: Lake) -> list[str]:
    """The names of all artifacts in `lake`."""
    entries = lake.storage.list("artifacts")
    return sorted(entry.path.removeprefix("artifacts/").removesuffix(".safetensors") for entry in entries)


def save_direction(
    lake: Lake, name: str, values: ArrayLike, *, hook: str | None = None, provenance: Mapping[str, Any] | None = None
) -> None:
    """Keep a direction (d_model,) as float32; `hook` is where it was found.

    Raises:
        InvalidInput: it is no vector, zero or not finite, or the name is taken.
    """
    vector = np.asarray(values, np.float32)
    if vector.ndim != 1 or not np.any(vector):
        raise InvalidInput(f"direction {name!r} has shape {vector.shape}; give d_model numbers that are not all zero")
    save_artifact(lake, name, "vector", {"vector": vector}, config={"hook": hook}, provenance=provenance)


def save_probe(
    lake: Lake,
    name: str,
    coef: ArrayLike,
    intercept: ArrayLike,
    *,
    classes: Sequence[Any] | None = None,
    hook: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Keep a linear probe: scores of a row x are x @ coef.T + intercept, in float32.

    Args:
        lake: which keeps it.
        name: of the artifact.
        coef: (d_model,) or (n_outputs, d_model), such as a fitted probe's `coef_`.
        intercept: a number, or (n_outputs,).
        classes: what the outputs stand for.
        hook: where it was trained.
        provenance: anything more about where it comes from.

    Raises:
        InvalidInput: the shapes do not belong together, a value is not finite, or the name is taken.
    """
    weights, offsets = np.atleast_2d(np.asarray(coef, np.float32)), np.atleast_1d(np.asarray(intercept, np.float32))
    if weights.ndim != 2 or offsets.shape != weights.shape[:1]:
        raise InvalidInput(
            f"probe {name!r} has coef of shape {np.shape(coef)} and intercept of shape {np.shape(intercept)}; give "
            "(n_outputs, d_model) and (n_outputs,)"
        )
    about = {"hook": hook, "classes": None if classes is None else np.asarray(classes).tolist()}
    tensors = {"coef": weights, "intercept": offsets}
    save_artifact(lake, name, "probe", tensors, config=about, provenance=provenance)


def save_sae(lake: Lake, name: str, folder: Path, *, provenance: Mapping[str, Any] | None = None) -> None:
    """Keep the SAE in `folder` (SAELens' layout: cfg.json and sae_weights.safetensors).

    Raises:
        InvalidInput: the folder holds no such SAE, or the name is taken.
    """
    try:
        config = json.loads((folder / "cfg.json").read_text())
        data = (folder / "sae_weights.safetensors").read_bytes()
        _split(data)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{str(folder)!r} is no SAE folder: {error}; save it with sae.save(folder)") from error
    save_artifact(lake, name, "sae", data, config=config, provenance=provenance)


def _path(name: str) -> str:
    return f"artifacts/{name}.safetensors"


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and what follows it."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("no safetensors file")
    return header, data[8 + length :]


def _join(header: Mapping[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + body


def _digits(data: bytes) -> str:
    return f"{int(google_crc32c.value(data)):08x}"
