"""One training step of a BatchTopK autoencoder on a CPU, with no dense decoder and no dense gradient.

Bussmann, Leask and Nanda (2024, arXiv 2412.06410) keep the batch_size * k largest pre-activations of a
batch. Only those are decoded and only their rows of the weights get a gradient, so everything but the
encoder's one matrix product costs k instead of d_sae. Latents that stopped firing are pulled back by the
auxiliary loss of Gao et al. (2024, arXiv 2406.04093, section 2.4), on an eighth of each batch; those that
it does not reach, because no row activates them at all, are set to the residuals of badly reconstructed
rows (Bricken et al., 2023, "Towards Monosemanticity", appendix on neuron resampling).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nn
from numpy.typing import NDArray
from torch import Tensor

from millpond.analysis.sae.config import SaeConfig, default_lr

AUX_SHARE = 8


@dataclass(frozen=True)
class StepStats:
    """What one step saw."""

    loss: float
    """Squared error over the batch's variance, plus the weighted auxiliary loss."""
    fvu: float
    l0: float
    dead: float
    """Fraction of the latents that are dead."""
    lr: float


@dataclass(frozen=True)
class Active:
    """The selected entries of a batch, row by row."""

    crow: Tensor
    """Start of each row among the entries, (rows + 1,)."""
    col: Tensor
    """Latent of each entry."""
    values: Tensor
    """Pre-activation of each entry, float32."""


class Trainer:
    """Parameters (latents first) and optimiser; inputs are to be centred and scaled to mean norm sqrt(d_in)."""

    def __init__(self, config: SaeConfig, d_in: int, total_steps: int) -> None:
        self.config, self.total_steps = config, total_steps
        d_sae = config.d_sae
        generator = torch.Generator().manual_seed(config.seed)
        decoder = torch.randn(d_sae, d_in, generator=generator)
        decoder /= decoder.norm(dim=1, keepdim=True)
        self.w_dec = torch.nn.Parameter(decoder)
        self.w_enc = torch.nn.Parameter(decoder.clone())
        self.b_enc = torch.nn.Parameter(torch.zeros(d_sae))
        self.b_dec = torch.nn.Parameter(torch.zeros(d_in))
        self.parameters = [self.w_enc, self.w_dec, self.b_enc, self.b_dec]
        self.lr = config.lr or default_lr(d_sae, total_steps)
        self.adam = torch.optim.Adam(self.parameters, lr=self.lr, fused=True)
        self.steps = 0
        self.tokens = 0
        total = total_steps * config.batch_size
        self.dead_tokens = config.dead_tokens or min(10_000_000, max(total // 20, 8 * config.batch_size))
        self.aux_k = config.aux_k or max(1, d_in // 2)
        self.idle = torch.zeros(d_sae, dtype=torch.long)
        self.revive_every = max(1, self.dead_tokens // config.batch_size)
        self.revive_until = int(total_steps * (1 - config.decay))
        self.generator = generator
        self.bf16 = config.encoder_dtype == "bfloat16" or (config.encoder_dtype == "auto" and has_bfloat16())
        self._floor: float | None = None
        _use_up_beta_warning()

    @torch.no_grad()
    def step(self, x: Tensor) -> StepStats:
        """Train on one batch (rows, d_in) of centred, scaled inputs."""
        n, d_sae = len(x), self.config.d_sae
        centred = x - self.b_dec
        active = self._select(centred)
        on = active.values > 0
        values = active.values.relu()
        error = decode(active, values, self.w_dec).add_(self.b_dec).sub_(x)
        variance = float((x - x.mean(0)).square().sum())
        squared = float(error.square().sum())
        aux_loss, aux = self._auxiliary(centred, error)
        residual = -error
        error *= 2 / variance
        slopes = sampled(active, error, self.w_dec)
        slopes *= on
        by_latent = torch.sort(active.col.to(torch.int32), stable=True)[1]
        rows = torch.repeat_interleave(torch.arange(n), active.crow.diff())[by_latent]
        counts = torch.bincount(active.col, minlength=d_sae)
        starts = counts.cumsum(0) - counts

        def gather(table: Tensor, weights: Tensor) -> Tensor:
            return nn.embedding_bag(rows, table, starts, per_sample_weights=weights[by_latent], mode="sum")

        grad_dec, grad_enc = gather(error, values), gather(centred, slopes)
        grad_bias = torch.zeros(d_sae).index_add_(0, active.col, slopes)
        grad_in = error.sum(0) - grad_bias @ self.w_enc
        if aux is not None:
            dead, aux_enc, aux_dec, aux_bias = aux
            grad_enc[dead] += aux_enc
            grad_dec[dead] += aux_dec
            grad_bias[dead] += aux_bias
        # only directions across a decoder row matter: rows are kept at norm 1
        grad_dec -= (grad_dec * self.w_dec).sum(1, keepdim=True) * self.w_dec
        fired = torch.bincount(active.col[on], minlength=d_sae) > 0
        self.idle += n
        self.idle[fired] = 0
        lr = self._update([grad_enc, grad_dec, grad_bias, grad_in])
        self.tokens += n
        if self.steps % self.revive_every == 0 and self.steps < self.revive_until:
            self._revive(residual)
        dead_share = float((self.idle >= self.dead_tokens).float().mean())
        return StepStats(squared / variance + aux_loss, squared / variance, float(on.sum()) / n, dead_share, lr)

    def _update(self, gradients: list[Tensor]) -> float:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        done, config = self.steps / self.total_steps, self.config
        warm = (self.steps + 1) / max(1.0, config.warmup * self.total_steps)
        fall = (1 - done) / config.decay if config.decay else 1.0
        lr = self.lr * min(1.0, warm, fall)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.w_dec.div_(self.w_dec.norm(dim=1, keepdim=True))
        self.steps += 1
        return lr

    def _pre_activations(self, centred: Tensor) -> Tensor:
        if self.bf16:
            return torch.addmm(self.b_enc.bfloat16(), centred.bfloat16(), self.w_enc.bfloat16().T)
        return torch.addmm(self.b_enc, centred, self.w_enc.T)

    def _select(self, centred: Tensor) -> Active:
        """The rows * k largest pre-activations, through a filter that follows the cut from batch to batch."""
        n, d_sae = len(centred), self.config.d_sae
        wanted = self.config.k * n
        flat = self._pre_activations(centred).view(-1)
        if self._floor is None:
            sample = flat[:: max(1, len(flat) // 65536)].float()
            self._floor = float(sample.quantile(max(0.0, 1 - 1.5 * self.config.k / d_sae)))
        candidates = _above(flat, self._floor)
        if len(candidates) < wanted:
            low = float(flat.float().kthvalue(max(1, len(flat) - int(1.2 * wanted))).values)
            candidates = (flat >= low).nonzero().view(-1)
        active = self._exact(candidates, centred)
        cut = float(active.values.kthvalue(max(1, len(candidates) - wanted + 1)).values)
        self._floor = cut * 0.93 if cut > 0 else cut * 1.07 - 1e-3
        keep = active.values >= cut
        kept_before = torch.cat([torch.zeros(1, dtype=torch.long), keep.cumsum(0)])
        return Active(kept_before[active.crow], active.col[keep], active.values[keep])

    def _exact(self, flat_indices: Tensor, centred: Tensor) -> Active:
        """Entries of the pre-activations, computed in float32."""
        n, d_sae = len(centred), self.config.d_sae
        row = torch.div(flat_indices, d_sae, rounding_mode="floor")
        col = flat_indices - row * d_sae
        crow = torch.zeros(n + 1, dtype=torch.long)
        crow[1:] = torch.bincount(row, minlength=n).cumsum(0)
        active = Active(crow, col, torch.zeros(len(col)))
        values = sampled(active, centred, self.w_enc)
        values += self.b_enc[col]
        return Active(crow, col, values)

    def _auxiliary(self, centred: Tensor, error: Tensor) -> tuple[float, tuple[Tensor, Tensor, Tensor, Tensor] | None]:
        """Weighted loss of reconstructing the residual from dead latents, and its gradients by those latents."""
        dead = (self.idle >= self.dead_tokens).nonzero().view(-1)
        if not len(dead) or not self.config.aux_weight:
            return 0.0, None
        share = max(1, len(centred) // AUX_SHARE)
        x, target = centred[:share], -error[:share]
        w_enc, w_dec = self.w_enc[dead], self.w_dec[dead]
        pre = torch.addmm(self.b_enc[dead], x, w_enc.T)
        if self.aux_k < len(dead):
            pre = torch.where(pre >= pre.topk(self.aux_k, dim=1).values[:, -1:], pre, 0.0)
        acts = pre.relu_()
        diff = torch.addmm(target, acts, w_dec, beta=-1.0)
        scale = self.config.aux_weight / max(float(target.square().sum()), 1e-12)
        loss = scale * float(diff.square().sum())
        diff *= 2 * scale
        slopes = (diff @ w_dec.T) * (acts > 0)
        return loss, (dead, slopes.T @ x, acts.T @ diff, slopes.sum(0))

    def _revive(self, residual: Tensor) -> None:
        """Point latents that have been dead for as long again at rows drawn by their squared error."""
        lost = (self.idle >= 2 * self.dead_tokens).nonzero().view(-1)[: len(residual)]
        if not len(lost):
            return
        rows = residual.square().sum(1).multinomial(len(lost), generator=self.generator)
        directions = residual[rows] / residual[rows].norm(dim=1, keepdim=True).clamp_min(1e-12)
        alive = self.idle < self.dead_tokens
        self.w_dec[lost] = directions
        self.w_enc[lost] = directions * self.w_enc[alive].norm(dim=1).mean()
        self.b_enc[lost] = 0.0
        for parameter in (self.w_enc, self.w_dec, self.b_enc):
            for moment in ("exp_avg", "exp_avg_sq"):
                self.adam.state[parameter][moment][lost] = 0.0
        self.idle[lost] = 0

    @torch.no_grad()
    def calibrated_threshold(self, batches: list[Tensor]) -> float:
        """The threshold at which rows of `batches` have k active latents on average (never below 0)."""
        wanted = self.config.k * sum(len(batch) for batch in batches)
        floor = max(0.0, (self._floor or 0.0) * 0.5)
        found: list[Tensor] = []
        for batch in batches:
            pre = torch.addmm(self.b_enc, batch - self.b_dec, self.w_enc.T).view(-1)
            found.append(pre[pre > floor])
        values = torch.cat(found)
        if len(values) <= wanted:
            return floor
        low, high = values.kthvalue(len(values) - wanted).values, values.kthvalue(len(values) - wanted + 1).values
        return float((low + high) / 2)


def _use_up_beta_warning() -> None:
    """PyTorch says once a process that sparse CSR tensors are in beta; let it be now, unheard."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        empty = torch.zeros(0, dtype=torch.long)
        torch.sparse_csr_tensor(torch.zeros(2, dtype=torch.long), empty, empty.float(), (1, 1), check_invariants=False)


def _above(flat: Tensor, floor: float) -> Tensor:
    """Indices of the entries above `floor`; NumPy finds them four times faster than `Tensor.nonzero`."""
    if flat.dtype == torch.bfloat16:
        if floor <= 0:
            return (flat > floor).nonzero().view(-1)
        # positive floats sort like their bits, and negative ones have the sign bit set
        bits = int(torch.tensor(floor).bfloat16().view(torch.int16))
        return torch.from_numpy(np.flatnonzero(flat.view(torch.int16).numpy() > bits))
    return torch.from_numpy(np.flatnonzero(flat.numpy() > np.float32(floor)))


def sampled(active: Active, left: Tensor, right: Tensor) -> Tensor:
    """The entries of `left @ right.T` at the active places."""
    size = (len(left), len(right))
    pattern = torch.sparse_csr_tensor(
        active.crow, active.col, torch.zeros(len(active.col)), size, check_invariants=False
    )
    values: Tensor = torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()
    return values


def decode(active: Active, values: Tensor, w_dec: Tensor) -> Tensor:
    """Rows of `w_dec` summed with `values` as weights."""
    return nn.embedding_bag(active.col, w_dec, active.crow[:-1], per_sample_weights=values, mode="sum")


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware, as PyTorch's oneDNN sees it."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def input_scale(sample: NDArray[Any]) -> tuple[NDArray[np.float64], float]:
    """Mean of the rows of `sample`, and the factor that gives centred rows a mean norm of sqrt(d_in)."""
    mean = sample.mean(axis=0, dtype=np.float64)
    norm = float(np.linalg.norm(sample - mean, axis=1).mean())
    return mean, float(np.sqrt(sample.shape[1]) / max(norm, 1e-30))
