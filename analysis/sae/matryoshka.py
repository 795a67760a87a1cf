"""Matryoshka BatchTopK: the first latents must reconstruct without the later ones (Bussmann et al., 2025, arXiv 2503.17547).

The loss is the mean, not the sum, of the errors over the prefixes, so that it is comparable with FVU; Adam
does not see the difference.
"""

from __future__ import annotations

from millpond.analysis.sae.batchtopk import BatchTopK


class MatryoshkaBatchTopK(BatchTopK):
    """BatchTopK's selection, with `config.matryoshka_prefixes` in the loss (`SparseArchitecture.gradients`)."""
