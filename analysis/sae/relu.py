"""ReLU with an L1 penalty times decoder norms (Conerly et al., 2024, "Update on how we train SAEs", Transformer Circuits, April).

Decoder rows are free, since the penalty does not change when a latent's scale moves between encoder and decoder.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from millpond.analysis.sae.architecture import DenseArchitecture


class Relu(DenseArchitecture):
    """Squared error and the mean over rows of the sum of activations times their decoder norms."""

    unit_norm: ClassVar[bool] = False

    def losses(self, own: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `DenseArchitecture.losses`."""
        centred = x - own["b_dec"] if self.tied else x
        latents = torch.relu(centred @ own["w_enc"].T + own["b_enc"])
        penalty = (latents.float() @ own["w_dec"].norm(dim=1)).mean() / self.unit
        return latents, self.rebuild(own, latents, x), penalty
