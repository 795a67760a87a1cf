"""TopK: the k largest latents of each row (Gao et al., 2024, "Scaling and evaluating sparse autoencoders", arXiv 2406.04093)."""

from __future__ import annotations

from torch import Tensor

from millpond.analysis.sae import sparse
from millpond.analysis.sae.architecture import SparseArchitecture


class TopK(SparseArchitecture):
    """Keeps the k largest positive pre-activations of each row."""

    def select(self, centred: Tensor) -> sparse.Active:
        """See `SparseArchitecture.select`; a few more than k are compared in float32 where bfloat16 chose them."""
        k = self.config.k
        assert k is not None
        pre = self.products(centred, biased=True)
        spare = k // 8 + 2 if self.bf16 else 0
        pattern = sparse.largest_of_rows(pre, min(k + spare, pre.shape[1]))
        active = self.exact(pattern, centred)
        active = sparse.trim_rows(active, k)
        return active.keep(active.values > 0)
