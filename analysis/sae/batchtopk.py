"""BatchTopK: the batch_size * k largest latents of a batch (Bussmann, Leask and Nanda, 2024, arXiv 2412.06410)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from millpond.analysis.sae import sparse
from millpond.analysis.sae.architecture import SparseArchitecture


class BatchTopK(SparseArchitecture):
    """Keeps the rows * k largest positive pre-activations, through a filter that follows the cut from batch to batch."""

    _floor: float | None = None

    def select(self, centred: sparse.Columns) -> sparse.Active:
        """See `SparseArchitecture.select`."""
        k, products, bias = self.config.k, self.products(centred.whole), self.parameters["b_enc"]
        assert k is not None
        wanted = k * len(products)
        floor = self._first_floor(products, k) if self._floor is None else self._floor
        while True:
            limits = floor - bias  # instead of a pass that adds the bias to all products
            if limits.min() < 0 or limits.max() > 4 * floor:  # their bits would not sort, or be too coarse
                products += bias
                bias = torch.zeros_like(bias)
                limits = floor - bias
            flat = sparse.above(products, limits)
            if len(flat) >= wanted or floor == 0:
                break
            floor = 0.9 * floor if floor > 1e-3 else 0.0
        active = self.exact(flat, centred)
        active, cut = sparse.trim_batch(active, wanted)
        self._floor = 0.97 * max(cut, 0.0)
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
