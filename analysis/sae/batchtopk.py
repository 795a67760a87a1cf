"""BatchTopK: the batch_size * k largest latents of a batch (Bussmann, Leask and Nanda, 2024, arXiv 2412.06410)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from millpond.analysis.sae import sparse
from millpond.analysis.sae.architecture import SparseArchitecture

_BELOW = 0.98
"""The filter's place below the last cut: those of batches are rarely further apart."""
_ROUNDING = 2**-8
"""Relative error of two numbers that were rounded to bfloat16 and are compared or added. The product of a row and an
encoder row has a fifth of twice that, times the encoder row's norm, as standard deviation: rows have mean squares of 1."""


class BatchTopK(SparseArchitecture):
    """Keeps the rows * k largest positive pre-activations, through a filter that follows the cut from batch to batch."""

    _floor: float | None = None

    def select(self, centred: Tensor) -> sparse.Active:
        """See `SparseArchitecture.select`."""
        k, bias, held, products = self.config.k, self.parameters["b_enc"], None, None
        assert k is not None
        wanted, floor = k * len(centred), self._floor
        if floor is None:
            floor = self._first_floor(self.products(centred, biased=True), k)
        margin = 2 * _ROUNDING * self.parameters["w_enc"].norm(dim=1) if self.bf16 else torch.zeros_like(bias)
        while True:
            limits = (1 - _ROUNDING) * (floor - bias) - margin  # costs less than to add the bias to all products
            biased = bool(limits.min() < 0)  # which `above` cannot compare with
            if biased:
                limits = (floor - _ROUNDING * bias.abs() - margin).clamp_min(0)
            if products is None or biased is not held:
                products, held = self.products(centred, biased=biased), biased
            pattern = sparse.above(products, limits)
            if len(pattern[1]) < wanted and floor > 0:
                floor = 0.9 * floor if floor > 1e-3 else 0.0
                continue
            active, cut = sparse.trim_batch(self.exact(pattern, centred), wanted)
            if cut >= floor or floor == 0:  # otherwise some between the two may be missing
                break
            floor = _BELOW * max(cut, 0.0)
        self._floor = _BELOW * max(cut, 0.0)
        return active.keep(active.values > 0) if cut <= 0 else active

    def _first_floor(self, pre: Tensor, k: int) -> float:
        flat = pre.view(-1)
        sample = flat[:: max(1, len(flat) // 65536)].float()
        return max(0.0, float(sample.quantile(max(0.0, 1 - 1.5 * k / pre.shape[1]))))

    def state(self) -> dict[str, Any]:
        """See `Architecture.state`."""
        return {"floor": self._floor}

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Architecture.load_state`."""
        self._floor = state["floor"]
