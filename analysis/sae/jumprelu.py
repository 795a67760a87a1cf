"""JumpReLU: a learned threshold for each latent (Rajamanoharan et al., 2024, "Jumping Ahead", arXiv 2407.14435).

The penalty is L0 itself. Thresholds learn through straight-through estimators with a rectangular kernel of
width epsilon (equations 11 and 12); epsilon and the first threshold are 0.001 where inputs have mean squared
norm 1, so here that times sqrt(d_in).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from millpond.analysis.sae.architecture import DenseArchitecture


class _Jump(torch.autograd.Function):
    """z where z > theta, else 0."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.epsilon = epsilon
        return z * (z > theta)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        z, theta = ctx.saved_tensors
        window = (z - theta).abs() < ctx.epsilon / 2
        return gradient * (z > theta), (gradient * window).sum(0) * (-theta / ctx.epsilon), None


class _Step(torch.autograd.Function):
    """1 where z > theta, else 0."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.epsilon = epsilon
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        z, theta = ctx.saved_tensors
        window = (z - theta).abs() < ctx.epsilon / 2
        return None, (gradient * window).sum(0) * (-1 / ctx.epsilon), None


class JumpRelu(DenseArchitecture):
    """`log_threshold` is the logarithm of each latent's threshold."""

    def extend(self, parameters: dict[str, Tensor], d_in: int) -> None:
        """See `Architecture.extend`."""
        first = math.log(self.config.bandwidth * math.sqrt(d_in))
        parameters["log_threshold"] = torch.full((self.config.d_sae,), first)

    def losses(self, own: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `DenseArchitecture.losses`."""
        centred = x - own["b_dec"] if self.tied else x
        z = torch.relu((centred @ own["w_enc"].T).float() + own["b_enc"])
        theta, epsilon = own["log_threshold"].exp(), self.config.bandwidth * self.unit
        latents: Tensor = _Jump.apply(z, theta, epsilon)  # type: ignore[no-untyped-call]
        l0: Tensor = _Step.apply(z, theta, epsilon)  # type: ignore[no-untyped-call]
        return latents, self.rebuild(own, latents, x), l0.sum(1).mean()
