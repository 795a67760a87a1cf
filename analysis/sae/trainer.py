"""One training step: gradients of a batch, clipped, into Adam; dead latents brought back.

Latents that stopped firing are pulled back by the auxiliary loss of Gao et al. (2024, arXiv 2406.04093,
section 2.4), on an eighth of each batch; those that it does not reach, because no row activates them at
all, are set to the residuals of badly reconstructed rows (Bricken et al., 2023, "Towards
Monosemanticity", appendix on neuron resampling).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from millpond.analysis.sae import architecture, kernels, sparse
from millpond.analysis.sae.architecture import BatchGradients
from millpond.analysis.sae.config import WITH_K, SaeConfig, default_lr

if TYPE_CHECKING:
    from millpond.analysis.sae.parallel import Group

AUX_SHARE = 8
FREQUENCY_SHARE = 0.2
"""Share of the steps, at the end, over which firings are counted."""


@dataclass(frozen=True)
class StepStats:
    """What one step saw."""

    loss: float
    """Squared error over the batch's variance, plus what the architecture and the dead latents add."""
    fvu: float
    l0: float
    dead: float
    """Fraction of the latents that are dead."""
    lr: float


class Trainer:
    """An architecture with its optimiser; inputs and targets are to be centred and scaled to mean squared norm d.

    On several workers each sees other rows; gradients and firings are added up, so parameters
    stay equal on all of them.
    """

    def __init__(
        self,
        config: SaeConfig,
        d_in: int,
        total_steps: int,
        *,
        d_out: int | None = None,
        skip: bool = False,
        group: Group | None = None,
    ) -> None:
        self.config, self.total_steps, self.group = config, total_steps, group
        self.device = device(config)
        tied = d_out is None
        self.arch = architecture.make(
            config, d_in, d_in if d_out is None else d_out, tied=tied, skip=skip, device=self.device
        )
        self.parameters = self.arch.parameters
        self._leaves = [torch.nn.Parameter(tensor) for tensor in self.parameters.values()]
        for name, leaf in zip(self.parameters, self._leaves, strict=True):
            self.parameters[name] = leaf.data  # the same memory: Adam writes what the architecture reads
        self.lr = config.lr or default_lr(config.d_sae, total_steps)
        self.adam = torch.optim.Adam(self._leaves, lr=self.lr, betas=config.betas, fused=True)
        self.steps = 0
        self.tokens = 0
        self.workers = group.world if group else 1
        if group is not None:
            self.arch.group = group
            group.share(self.parameters.values())
        total = total_steps * config.batch_size * self.workers
        self.dead_tokens = config.dead_tokens or min(10_000_000, max(total // 20, 8 * config.batch_size))
        self.aux_k = config.aux_k or max(1, d_in // 2)
        default_aux = 1 / 32 if config.architecture in WITH_K else 0.0
        self.aux_weight = default_aux if config.aux_weight is None else config.aux_weight
        self.idle = torch.zeros(config.d_sae, dtype=torch.long, device=self.device)
        self.fires = torch.zeros_like(self.idle)
        self.fire_rows = 0
        self.revive_every = max(1, self.dead_tokens // (config.batch_size * self.workers))
        self.revive_until = int(total_steps * (1 - config.decay))
        self.generator = torch.Generator().manual_seed(config.seed + 1)

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor | None = None) -> StepStats:
        """Train on one batch of inputs (rows, d_in) and, for a transcoder, targets (rows, d_out)."""
        done = self.steps / self.total_steps
        self.arch.sparsity_scale = min(1.0, done / self.config.sparsity_warmup) if self.config.sparsity_warmup else 1.0
        with torch.enable_grad():
            batch = self.arch.gradients(x, x if y is None else y)
        aux_loss = self._auxiliary(x, batch)
        sums, counts = torch.stack([batch.squared, batch.variance, batch.loss + aux_loss]), batch.counts
        if self.group is None:
            lr = self._update(batch)
        else:
            left = {name: gradient for name, gradient in batch.gradients.items() if name not in batch.coming}
            batch.coming |= {name: self.group.start_sum(left[name]) for name in left if left[name].ndim > 1}
            vectors = [gradient for gradient in left.values() if gradient.ndim == 1]
            tally = [sums, counts, *vectors]
            joined = torch.cat([part.double() for part in tally])  # one exchange for all that is small
            joined = self.group.start_sum(joined)()
            sums, counts, *summed = torch.split(joined, [len(part) for part in tally])
            for vector, total in zip(vectors, summed, strict=True):
                vector.copy_(total)
            counts = counts.long()
            lr = self._update(batch)
        squared, variance, loss = sums.tolist()
        seen = len(x) * self.workers
        self.idle += seen
        self.idle[counts > 0] = 0
        self.tokens += seen
        if done >= 1 - FREQUENCY_SHARE:
            self.fires += counts
            self.fire_rows += seen
        if self.steps % self.revive_every == 0 and self.steps < self.revive_until:
            self._revive(batch, len(x))
        dead = float((self.idle >= self.dead_tokens).float().mean())
        return StepStats(loss / self.workers, squared / variance, float(counts.sum()) / seen, dead, lr)

    def _update(self, batch: BatchGradients) -> float:
        w_dec, norms = self.parameters["w_dec"], []
        leaves = dict(zip(self.parameters, self._leaves, strict=True))
        for name in sorted(leaves, key=lambda name: name != "w_dec"):  # whose sum over the workers comes first
            gradient = leaves[name].grad = batch.gradient(name)
            if name == "w_dec" and self.arch.unit_norm:  # only directions across a row matter: rows are kept at norm 1
                norms.append(_take_across(gradient, w_dec))
            else:
                norms.append(torch.linalg.vector_norm(gradient))
        norm = torch.linalg.vector_norm(torch.stack(norms))
        most = self.config.clip / w_dec.shape[1]
        # fused Adam divides gradients by this while it reads them, which saves a pass that clips and averages
        clip = ((norm / self.workers + 1e-6) / most).clamp_min(1.0)
        self.adam.grad_scale = clip * self.workers  # type: ignore[attr-defined]
        done, config = self.steps / self.total_steps, self.config
        warm = (self.steps + 1) / max(1.0, config.warmup * self.total_steps)
        fall = (1 - done) / config.decay if config.decay else 1.0
        lr = self.lr * min(1.0, warm, fall)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        if self.arch.unit_norm:
            _normalise(w_dec)
        self.steps += 1
        return lr

    def _auxiliary(self, inputs: Tensor, batch: BatchGradients) -> float:
        """Weighted loss of reconstructing the residual from dead latents; adds its gradients by those latents."""
        dead = (self.idle >= self.dead_tokens).nonzero().view(-1)
        if not self.aux_weight or not len(dead):
            return 0.0
        share = max(1, len(inputs) // AUX_SHARE)
        x, target = self.arch.centred(inputs[:share]), -batch.error(share)
        w_enc, w_dec, b_enc = (self.parameters[name][dead] for name in ("w_enc", "w_dec", "b_enc"))
        pre = torch.addmm(b_enc, x, w_enc.T)
        if self.aux_k < len(dead):
            pre = torch.where(pre >= pre.topk(self.aux_k, dim=1).values[:, -1:], pre, 0.0)
        acts = pre.relu_()
        diff = torch.addmm(target, acts, w_dec, beta=-1.0)
        scale = self.aux_weight / max(float(target.square().sum()), 1e-12)
        loss = scale * float(diff.square().sum())
        diff *= 2 * scale
        slopes = (diff @ w_dec.T) * (acts > 0)
        changes = {"w_enc": slopes.T @ x, "w_dec": acts.T @ diff, "b_enc": slopes.sum(0)}
        if self.group is not None:
            coming = {name: self.group.start_sum(changes[name]) for name in changes if name in batch.coming}
            changes |= {name: wait() for name, wait in coming.items()}
        for name, change in changes.items():
            batch.gradient(name)[dead] += change
        return loss

    def _revive(self, batch: BatchGradients, n: int) -> None:
        """Point latents that have been dead for as long again at rows drawn by their squared error."""
        lost = (self.idle >= 2 * self.dead_tokens).nonzero().view(-1)[:n]
        if not len(lost) or not self.aux_weight or not self.arch.tied:
            return
        residual = -batch.error(n)
        if self.group is not None:
            residual = self.group.from_first(residual)
        rows = residual.square().sum(1).cpu().multinomial(len(lost), generator=self.generator).to(self.device)
        directions = residual[rows] / residual[rows].norm(dim=1, keepdim=True).clamp_min(1e-12)
        own = self.parameters
        alive = self.idle < self.dead_tokens
        own["w_dec"][lost] = directions
        own["w_enc"][lost] = directions * own["w_enc"][alive].norm(dim=1).mean()
        own["b_enc"][lost] = 0.0
        for leaf, name in zip(self._leaves, own, strict=True):
            if name in ("w_enc", "w_dec", "b_enc"):
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.adam.state[leaf][moment][lost] = 0.0
        self.idle[lost] = 0

    def state(self) -> dict[str, Any]:
        """Everything that the next steps depend on: tensors and plain values."""
        return {
            "parameters": dict(self.parameters),
            "adam": self.adam.state_dict(),
            "idle": self.idle,
            "fires": self.fires,
            "fire_rows": self.fire_rows,
            "steps": self.steps,
            "tokens": self.tokens,
            "generator": self.generator.get_state(),
            "architecture": self.arch.state(),
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        for name, tensor in state["parameters"].items():
            self.parameters[name].copy_(tensor)
        self.adam.load_state_dict(state["adam"])
        self.idle.copy_(state["idle"])
        self.fires.copy_(state["fires"])
        self.fire_rows = state["fire_rows"]
        self.steps, self.tokens = state["steps"], state["tokens"]
        self.generator.set_state(state["generator"].cpu())
        self.arch.load_state(state["architecture"])


def _take_across(gradient: Tensor, rows: Tensor) -> Tensor:
    """Take from each row of `gradient` what is along the row of norm 1 of `rows`; the norm of what is left."""
    if not gradient.is_cuda:
        return torch.tensor(kernels.take_across(gradient.numpy(), rows.numpy()))
    gradient.addcmul_(torch.linalg.vecdot(gradient, rows)[:, None], rows, value=-1)
    norm: Tensor = torch.linalg.vector_norm(gradient)
    return norm


def _normalise(rows: Tensor) -> None:
    if rows.is_cuda:
        rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
    else:
        kernels.normalise(rows.numpy())


def device(config: SaeConfig) -> torch.device:
    """Where `config` says to train."""
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def calibrated_threshold(trainer: Trainer, batches: list[Tensor]) -> float:
    """The threshold at which rows of `batches` have k active latents on average (never below 0)."""
    k, own = trainer.config.k, trainer.parameters
    assert k is not None
    wanted = k * sum(len(batch) for batch in batches)
    kept: Tensor = torch.zeros(0, device=trainer.device)
    for batch in batches:  # of each batch the largest 4 k a row, which is enough unless batches differ wildly
        pre = torch.addmm(own["b_enc"], trainer.arch.centred(batch), own["w_enc"].T).view(-1)
        count = min(len(pre), 4 * k * len(batch))
        cut = sparse.smallest(pre, len(pre) - count + 1).clamp_min(0) if count < len(pre) else pre.new_zeros(())
        kept = torch.cat([kept, pre[pre > cut]])
    if len(kept) <= wanted:
        return 0.0
    low, high = (sparse.smallest(kept, len(kept) - wanted + more) for more in (0, 1))
    return float((low + high) / 2)
