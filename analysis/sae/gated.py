"""Gated: one linear map decides which latents are active, a tied one how strongly (Rajamanoharan et al., 2024, arXiv 2404.16014).

The L1 penalty falls on the gate, which learns from an auxiliary reconstruction through a frozen decoder
(section 3.2); magnitudes are not shrunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from millpond.analysis.sae.architecture import DenseArchitecture


class Gated(DenseArchitecture):
    """`b_enc` is the bias of the magnitudes; `b_gate` and `r_mag` are as in the paper."""

    def extend(self, parameters: dict[str, Tensor], d_in: int) -> None:
        """See `Architecture.extend`."""
        parameters["b_gate"] = torch.zeros(self.config.d_sae)
        parameters["r_mag"] = torch.zeros(self.config.d_sae)

    def losses(self, own: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `DenseArchitecture.losses`."""
        hidden = self._hidden(own, x)
        gate = hidden + own["b_gate"]
        latents = (gate > 0) * torch.relu(hidden * own["r_mag"].exp() + own["b_enc"])
        penalty = torch.relu(gate).float().sum(1).mean() / self.unit
        return latents, self.rebuild(own, latents, x), penalty

    def further_error(self, own: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Error of the reconstruction from the rectified gate, with the decoder frozen."""
        gate = torch.relu(self._hidden(own, x) + own["b_gate"])
        frozen = own | {name: own[name].detach() for name in ("w_dec", "b_dec")}
        return (self.rebuild(frozen, gate, x).float() - y).square().sum()

    def _hidden(self, own: dict[str, Tensor], x: Tensor) -> Tensor:
        centred = x - own["b_dec"] if self.tied else x
        return centred @ own["w_enc"].T
