"""Stored SAEs as the tap runs them: SAELens' tensors, read from an artifact."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from millpond.store.artifacts import Artifact
from millpond.store.errors import InvalidInput

_ARCHITECTURES = ("standard", "gated", "topk", "jumprelu")


class StoredSae:
    """Encodes and decodes float32 activations, as `sae_lens.SAE` does with the same weights."""

    def __init__(self, artifact: Artifact) -> None:
        from safetensors.torch import load

        config = artifact.config
        self.architecture = config.get("architecture")
        if self.architecture not in _ARCHITECTURES:
            raise InvalidInput(
                f"SAE {artifact.name!r} has architecture {self.architecture!r}; export it as one of {', '.join(_ARCHITECTURES)}"
            )
        for field in ("normalize_activations", "reshape_activations"):
            if config.get(field, "none") != "none":
                raise InvalidInput(
                    f"SAE {artifact.name!r} has {field} {config[field]!r}; fold it into the weights first"
                )
        tensors = {name: tensor.float() for name, tensor in load(artifact.data).items()}
        self.W_enc, self.W_dec, self.b_dec = tensors["W_enc"], tensors["W_dec"], tensors["b_dec"]
        self.d_in, self.d_sae = self.W_enc.shape
        if self.W_dec.shape != (self.d_sae, self.d_in):
            raise InvalidInput(
                f"SAE {artifact.name!r} maps {self.d_in} dimensions to {self.W_dec.shape[1]}; a transcoder cannot be spliced"
            )
        self._tensors = tensors
        self._subtract = bool(config.get("apply_b_dec_to_input", True))
        self.k = int(config["k"]) if self.architecture == "topk" else None
        """Active latents a row, where the architecture fixes them."""
        self._rescale = bool(config.get("rescale_acts_by_decoder_norm", False))

    def to(self, device: torch.device) -> StoredSae:
        """The same on another device."""
        moved = copy(self)
        moved._tensors = {name: tensor.to(device) for name, tensor in self._tensors.items()}
        moved.W_enc, moved.W_dec, moved.b_dec = (moved._tensors[name] for name in ("W_enc", "W_dec", "b_dec"))
        return moved

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def directions(self) -> Tensor:
        """What one unit of each latent adds to a reconstruction, (d_sae, d_in)."""
        directions: Tensor = self.W_dec
        if self.architecture == "topk" and self._rescale:
            directions = directions / directions.norm(dim=1, keepdim=True)
        return directions

    def encode(self, x: Tensor) -> Tensor:
        """Latent activations (n, d_sae) of activations (n, d_in)."""
        t = self._tensors
        if self._subtract:
            x = x - self.b_dec
        hidden = x @ self.W_enc
        if self.architecture == "gated":
            latents: Tensor = torch.relu(hidden * t["r_mag"].exp() + t["b_mag"]) * (hidden + t["b_gate"] > 0)
            return latents
        hidden = hidden + t["b_enc"]
        if self.architecture == "standard":
            return torch.relu(hidden)
        if self.architecture == "jumprelu":
            latents = torch.relu(hidden)
            latents *= hidden > t["threshold"]
            return latents
        indices, values = self._largest(hidden)
        return torch.zeros_like(hidden).scatter_(1, indices, values)

    def dense(self, x: Tensor) -> Tensor:
        """The same before a top-k SAE keeps its k largest."""
        if self.architecture != "topk":
            return self.encode(x)
        hidden = (x - self.b_dec if self._subtract else x) @ self.W_enc + self._tensors["b_enc"]
        return torch.relu(hidden * self.W_dec.norm(dim=1) if self._rescale else hidden)

    def codes(self, x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The `k` largest latents of activations (n, d_in): indices and values (n, k), largest first, and of how many (n,)."""
        if self.architecture == "topk":
            if self._subtract:
                x = x - self.b_dec
            indices, values = self._largest(x @ self.W_enc + self._tensors["b_enc"])
            return indices[:, :k], values[:, :k], (values > 0).sum(1)
        latents = self.encode(x)
        best = latents.topk(k, dim=1)
        return best.indices, best.values, (latents > 0).sum(1)

    def _largest(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of a top-k SAE's latents before the choice (n, d_sae)."""
        assert self.k is not None
        if self._rescale:
            hidden = hidden * self.W_dec.norm(dim=1)
        best = hidden.topk(self.k, dim=1)
        return best.indices, torch.relu(best.values)

    def decode(self, latents: Tensor) -> Tensor:
        """Reconstructions (n, d_in) of latent activations (n, d_sae)."""
        if self.architecture == "topk" and self._rescale:
            latents = latents / self.W_dec.norm(dim=1)
        decoded: Tensor = latents @ self.W_dec + self.b_dec
        return decoded
