"""SAEs spliced in where a graph is replayed without Python: named when the engine starts, switched on by data.

A recorded graph computes the same for every token, so each SAE is encoded and decoded for all tokens of a graph at its
hook point, wanted or not. That is why an engine is told which ones it may be asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from millpond.capture.saes import StoredSae
from millpond.store.interventions import SpliceSae

_BLOCK_VALUES = 1 << 26  # latents computed at once: 256 MiB


@dataclass(frozen=True)
class LatentEdits:
    """What one splice does with latents: each becomes factor * latent + value."""

    latents: tuple[int, ...]
    factors: tuple[float, ...]
    values: tuple[float, ...]
    keep_error: bool

    @classmethod
    def of(cls, splice: SpliceSae) -> LatentEdits:
        """A latent that is both scaled and set is set."""
        edits = {latent: (factor, 0.0) for latent, factor in splice.scale_latents.items()}
        edits |= {latent: (0.0, value) for latent, value in splice.set_latents.items()}
        factors, values = zip(*edits.values(), strict=True) if edits else ((), ())
        return cls(tuple(edits), factors, values, splice.keep_error)


class DeviceSplice:
    """One SAE at one hook point.

    Args:
        sae: whatever device it is on; a copy goes to `device`.
        max_tokens: most tokens of one step, padding included.
        latents: most latents that one request edits.
        device: where the model runs.
    """

    def __init__(self, sae: StoredSae, max_tokens: int, latents: int, device: torch.device) -> None:
        self._sae = sae.to(device)
        self._directions = self._sae.directions()
        self._on = torch.zeros(max_tokens, dtype=torch.bool, device=device)
        self._keep_error = torch.zeros(max_tokens, dtype=torch.bool, device=device)
        # what is not used multiplies latent 0 with 1
        self._latents = torch.zeros(max_tokens, latents, dtype=torch.int64, device=device)
        self._factors = torch.ones(max_tokens, latents, device=device)
        self._values = torch.zeros(max_tokens, latents, device=device)
        self._block = max(_BLOCK_VALUES // sae.d_sae, 1)
        self._used = 0

    @property
    def nbytes(self) -> int:
        """Device memory of weights and buffers."""
        buffers = (self._on, self._keep_error, self._latents, self._factors, self._values, self._directions)
        return self._sae.nbytes + sum(t.nbytes for t in buffers)

    def load(self, wanted: Sequence[tuple[NDArray[np.int64], LatentEdits]], n_tokens: int) -> None:
        """Say which tokens of the coming step, by their index, are spliced, and how."""
        width = self._latents.shape[1]
        on, keep_error = np.zeros(n_tokens, bool), np.zeros(n_tokens, bool)
        latents = np.zeros((n_tokens, width), np.int64)
        factors, values = np.ones((n_tokens, width), np.float32), np.zeros((n_tokens, width), np.float32)
        for at, edits in wanted:
            on[at], keep_error[at] = True, edits.keep_error
            n = len(edits.latents)
            latents[at, :n], factors[at, :n], values[at, :n] = edits.latents, edits.factors, edits.values
        buffers = (self._on, self._keep_error, self._latents, self._factors, self._values)
        for buffer, array in zip(buffers, (on, keep_error, latents, factors, values), strict=True):
            sent = torch.from_numpy(array)
            sent = sent.pin_memory() if buffer.is_cuda else sent
            buffer[:n_tokens].copy_(sent, non_blocking=True)
        self._used = n_tokens

    def clear(self) -> None:
        """Splice nothing."""
        if self._used:
            self._on[: self._used].fill_(False)
        self._used = 0

    @property
    def is_used(self) -> bool:
        """Whether the coming step splices any token."""
        return self._used > 0

    def apply(self, hidden: Tensor, residual: Tensor | None) -> None:
        """Splice in float32 on the true sum (n_tokens, d_model), rounded once; other rows keep their bits."""
        for start in range(0, len(hidden), self._block):
            part = slice(start, start + self._block)
            self._apply(part, hidden[part], None if residual is None else residual[part])

    def _apply(self, part: slice, hidden: Tensor, residual: Tensor | None) -> None:
        x = hidden.float() if residual is None else hidden.float() + residual.float()
        n = len(hidden)
        on, latent = self._on[part][:n, None], self._latents[part][:n]
        latents = self._sae.encode(x)
        before = latents.gather(1, latent)
        moved = before * self._factors[part][:n] + self._values[part][:n] - before
        kept = torch.where(self._keep_error[part][:n, None], x, self._sae.decode(latents))
        spliced = kept + torch.einsum("ne,ned->nd", moved, self._directions[latent])
        hidden.copy_(torch.where(on, spliced.to(hidden.dtype), hidden))
        if residual is not None:
            residual.masked_fill_(on, 0.0)
