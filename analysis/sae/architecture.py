"""What all architectures share: parameters, the wide product of the encoder, and the gradients of one batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from millpond.analysis.sae import sparse
from millpond.analysis.sae.config import DEFAULT_SPARSITY, SaeConfig

if TYPE_CHECKING:
    from millpond.analysis.sae.parallel import Group


@dataclass
class BatchGradients:
    """What one batch says about the parameters."""

    loss: Tensor
    """Scalar: squared error over the batch's variance, and what the architecture adds."""
    squared: Tensor
    """Scalar: squared error, summed over rows and dimensions."""
    variance: Tensor
    """Scalar: squared distance of the targets from their mean, summed likewise."""
    counts: Tensor
    """Rows in which each latent was active, (d_sae,)."""
    error: Callable[[int], Tensor]
    """Reconstruction less target of the first so many rows, (rows, d_out)."""
    gradients: dict[str, Tensor]
    coming: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    """What waits for those of the gradients that are being added up over the workers."""

    def gradient(self, name: str) -> Tensor:
        """One of the gradients, once its sum over the workers is there."""
        wait = self.coming.pop(name, None)
        if wait is not None:
            self.gradients[name] = wait()
        return self.gradients[name]


class Architecture(ABC):
    """Encoder, decoder and loss of an autoencoder or transcoder.

    Inputs are to be centred and scaled to mean squared norm d_in, targets likewise. `tied`
    autoencoders subtract the decoder's bias from their input, as in SAELens' `apply_b_dec_to_input`.
    """

    unit_norm: ClassVar[bool] = True
    """Whether the decoder's rows are kept at norm 1."""

    def __init__(
        self, config: SaeConfig, d_in: int, d_out: int, *, tied: bool, skip: bool, device: torch.device
    ) -> None:
        self.config, self.tied = config, tied
        generator = torch.Generator().manual_seed(config.seed)
        decoder = torch.randn(config.d_sae, d_out, generator=generator)
        decoder /= decoder.norm(dim=1, keepdim=True)
        encoder = decoder.clone()
        if not tied:
            encoder = torch.randn(config.d_sae, d_in, generator=generator)
            encoder /= encoder.norm(dim=1, keepdim=True)
        self.parameters = {
            "w_enc": encoder,
            "w_dec": decoder,
            "b_enc": torch.zeros(config.d_sae),
            "b_dec": torch.zeros(d_out),
        }
        if skip:
            self.parameters["w_skip"] = torch.zeros(d_in, d_out)
        self.extend(self.parameters, d_in)
        self.parameters = {name: tensor.to(device) for name, tensor in self.parameters.items()}
        self.device = device
        wide = config.encoder_dtype == "auto" and config.k is not None and sparse.has_bfloat16(device)
        self.bf16 = config.encoder_dtype == "bfloat16" or wide
        self.scratch = sparse.Scratch()
        self.group: Group | None = None
        """The workers that train together."""
        self.sparsity_scale = 1.0
        """Share of `config.sparsity` in force, which rises over the first steps."""

    def extend(self, parameters: dict[str, Tensor], d_in: int) -> None:  # noqa: B027 - most have none
        """Add the parameters that this architecture has beside those of all."""

    @abstractmethod
    def gradients(self, x: Tensor, y: Tensor) -> BatchGradients:
        """Loss and gradients of a batch of inputs (rows, d_in) and targets (rows, d_out)."""

    def state(self) -> dict[str, Any]:
        """What training needs beside the parameters to go on exactly."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027 - most have none
        """Take what `state` gave."""

    def centred(self, x: Tensor) -> Tensor:
        """What the encoder multiplies."""
        return x - self.parameters["b_dec"] if self.tied else x


class SparseArchitecture(Architecture):
    """Architectures that select a bounded number of entries, of which alone the rest of a step is made.

    There is no dense decoder and no dense gradient: everything but the encoder's one product costs the
    active entries instead of d_sae. Values are those of a float32 step over all latents. With several
    `prefixes` the loss is the mean of the errors of the reconstructions from the first latents.
    """

    @abstractmethod
    def select(self, centred: Tensor) -> sparse.Active:
        """The entries that stay, with positive pre-activations."""

    def products(self, centred: Tensor, *, biased: bool) -> Tensor:
        """All pre-activations (rows, d_sae) with or without `b_enc`, for selection; the next call overwrites them."""
        w_enc, b_enc = self.parameters["w_enc"], self.parameters["b_enc"]
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        out = self.scratch.like("products", (len(centred), len(w_enc)), dtype, centred.device)
        left, right = (
            matrix
            if matrix.dtype == dtype
            else self.scratch.like(name, matrix.shape, dtype, matrix.device).copy_(matrix)
            for name, matrix in (("rows", centred), ("encoder", w_enc))
        )
        right = right.T
        return torch.addmm(b_enc.to(dtype), left, right, out=out) if biased else torch.mm(left, right, out=out)

    def exact(self, pattern: sparse.Pattern, centred: Tensor) -> sparse.Active:
        """The entries of a pattern, their pre-activations computed in float32."""
        values = self.parameters["b_enc"].index_select(0, pattern[1])
        sparse.add_sampled(values, *pattern, centred, self.parameters["w_enc"])
        return sparse.Active(*pattern, values)

    @torch.no_grad()
    def gradients(self, x: Tensor, y: Tensor) -> BatchGradients:
        """See `Architecture.gradients`."""
        own, n, d_sae = self.parameters, len(x), self.config.d_sae
        whole = self.centred(x)
        active = self.select(whole)
        crow, col, values = active.crow, active.col, active.values
        levels = self.config.matryoshka_prefixes
        if len(levels) > 1:  # entries of each level in rows of their own, level by level
            level = torch.bucketize(col, torch.tensor(levels, dtype=col.dtype, device=col.device), right=True)
            order = torch.argsort(level, stable=True)
            place, col, values = (level * n + active.row)[order], col[order], values[order]
            crow = torch.zeros(len(levels) * n + 1, dtype=torch.long, device=col.device)
            crow[1:] = torch.bincount(place, minlength=len(levels) * n).cumsum(0)
        starts, place, order = sparse.by_latent(crow, col, d_sae)
        offsets, firsts = crow[:-1].int(), starts[:-1].int()
        row = place if len(levels) == 1 else place % n
        target = whole if self.tied else y - own["b_dec"]
        if "w_skip" in own:
            target -= x @ own["w_skip"]
        variance = spread(y)
        scale = 2 / (variance * len(levels))  # of the loss's slopes by the errors, applied to all that is made of them
        codes = values.index_select(0, order).mul_(scale)
        errors, squared, every, sums = [], [], [], []
        empty_like = torch.empty_like if self.group is None else self.group.empty_like
        slopes, w_dec = torch.zeros_like(values), empty_like(own["w_dec"])
        for here in sparse.column_blocks(w_dec):  # a block is used again while it is in the cache
            table = own["w_dec"][:, here].contiguous()
            part = sparse.decode(offsets, col, values, table)
            by_level = part.view(len(levels), n, -1)
            if len(levels) > 1:
                by_level.cumsum_(0)
            by_level.sub_(target[:, here])
            every.append(sum_of_squares(part))
            squared.append(sum_of_squares(part[-n:]) if len(levels) > 1 else every[-1])
            if len(levels) > 1:  # a latent of a level is in the reconstructions of that level and all later ones
                by_level.copy_(by_level.flip(0).cumsum_(0).flip(0))
            sums.append(part[:n].sum(0))
            sparse.slopes_and_gradient(starts, place, codes, part, table, slopes, w_dec[:, here])
            errors.append(part)
        coming = {} if self.group is None else {"w_dec": self.group.start_sum(w_dec)}  # while the others are made
        slopes *= scale
        bias = torch.segment_reduce(slopes, "sum", offsets=starts)
        w_enc = empty_like(own["w_enc"])
        for here in sparse.column_blocks(w_enc):
            w_enc[:, here] = sparse.decode(firsts, row, slopes, whole[:, here].contiguous())
        if self.group is not None:
            coming["w_enc"] = self.group.start_sum(w_enc)
        total = scale * torch.cat(sums)
        gradients = {
            "w_enc": w_enc,
            "w_dec": w_dec,
            "b_enc": bias,
            "b_dec": total - bias @ own["w_enc"] if self.tied else total,
        }
        if "w_skip" in own:
            gradients["w_skip"] = scale * (x.T @ torch.cat([part[:n] for part in errors], dim=1))

        def error(rows: int) -> Tensor:  # the last level has only its own error
            return torch.cat([part[len(part) - n : len(part) - n + rows] for part in errors], dim=1)

        loss = torch.stack(every).sum() / variance / len(levels)
        return BatchGradients(loss, torch.stack(squared).sum(), variance, starts.diff(), error, gradients, coming)


class DenseArchitecture(Architecture):
    """Architectures whose loss autograd differentiates over all latents."""

    @abstractmethod
    def losses(self, own: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Activations (rows, d_sae), reconstructions (rows, d_out), and the sparsity term as a mean over rows.

        The term is in units of inputs with mean squared norm 1 and not yet multiplied by `sparsity`.
        """

    def further_error(self, own: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor | None:
        """A further squared error, summed over rows and dimensions."""
        return None

    @property
    def unit(self) -> float:
        """Norm of a typical input: lengths divided by it are those of the papers."""
        return math.sqrt(self.parameters["w_enc"].shape[1])

    def rebuild(self, own: dict[str, Tensor], latents: Tensor, x: Tensor) -> Tensor:
        """Reconstructions from activations of the latents."""
        rebuilt = latents @ own["w_dec"] + own["b_dec"]
        return rebuilt + x @ own["w_skip"] if "w_skip" in own else rebuilt

    def gradients(self, x: Tensor, y: Tensor) -> BatchGradients:
        """See `Architecture.gradients`."""
        weight = self.config.sparsity or DEFAULT_SPARSITY[self.config.architecture]
        own = {name: tensor.detach().requires_grad_() for name, tensor in self.parameters.items()}
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            latents, rebuilt, penalty = self.losses(own, x, y)
            further = self.further_error(own, x, y)
        error = rebuilt.float() - y
        squared = error.square().sum()
        variance = spread(y)
        fit = squared if further is None else squared + further
        loss = fit / variance + weight * self.sparsity_scale * penalty
        found = torch.autograd.grad(loss, list(own.values()))
        return BatchGradients(
            loss.detach(), squared.detach(), variance, (latents.detach() > 0).sum(0), lambda rows: error.detach()[:rows],
            dict(zip(own, (gradient.float() for gradient in found), strict=True)),
        )  # fmt: skip


def sum_of_squares(x: Tensor) -> Tensor:
    """Of all entries, without a copy of them."""
    flat = x.reshape(-1)
    return torch.dot(flat, flat)


def spread(y: Tensor) -> Tensor:
    """Squared distance of the rows from their mean, summed; the rows are centred nearly, so nothing cancels."""
    mean = y.mean(0)
    return sum_of_squares(y) - len(y) * torch.dot(mean, mean)


def make(config: SaeConfig, d_in: int, d_out: int, *, tied: bool, skip: bool, device: torch.device) -> Architecture:
    """The architecture that `config` names."""
    from millpond.analysis.sae.batchtopk import BatchTopK
    from millpond.analysis.sae.gated import Gated
    from millpond.analysis.sae.jumprelu import JumpRelu
    from millpond.analysis.sae.matryoshka import MatryoshkaBatchTopK
    from millpond.analysis.sae.relu import Relu
    from millpond.analysis.sae.topk import TopK

    kinds: dict[str, type[Architecture]] = {
        "batchtopk": BatchTopK,
        "topk": TopK,
        "matryoshka": MatryoshkaBatchTopK,
        "relu": Relu,
        "gated": Gated,
        "jumprelu": JumpRelu,
    }
    return kinds[config.architecture](config, d_in, d_out, tied=tied, skip=skip, device=device)
